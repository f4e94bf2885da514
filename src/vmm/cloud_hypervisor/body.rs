//! What Cloud Hypervisor is told and says, as types: the part of its API that is used.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{memory_file, restore_mode, told, version::Version, vsock};
use crate::{
    sandbox::RestoreMode,
    vmm::{Plan, PlannedNic},
};

/// The name of the network device, which its state is saved by.
const NIC: &str = "net0";

/// The answer to `vmm.ping`.
#[derive(Debug, Deserialize)]
pub(super) struct Ping {
    /// Such as `53.0.0`.
    pub(super) version: String,
}

/// The answer to `vm.info`, as far as it matters.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    /// How it is with the machine.
    pub(super) state: State,
    /// The memory, in bytes, without what the balloon has by its driver's word.
    pub(super) memory_actual_size: u64,
}

/// How it is with a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum State {
    /// It has a configuration, and nothing more.
    Created,
    /// Its vCPUs run.
    Running,
    /// The guest has switched it off.
    Shutdown,
    /// Its vCPUs are stopped.
    Paused,
    /// A debugger has stopped it.
    BreakPoint,
}

/// The body of `vm.create`.
#[derive(Debug, Serialize)]
pub(super) struct VmConfig<'a> {
    cpus: Cpus,
    memory: Memory,
    payload: Payload<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<Disk>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Nic<'a>>,
    rng: Rng,
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<Balloon>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock: Option<Vsock>,
    serial: ConsoleMode,
    console: ConsoleMode,
    landlock_enable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    landlock_rules: Vec<LandlockRule>,
}

#[derive(Debug, Serialize)]
struct Cpus {
    boot_vcpus: u8,
    max_vcpus: u8,
}

#[derive(Debug, Serialize)]
struct Memory {
    size: u64,
    shared: bool,
    thp: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    zones: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Payload<'a> {
    kernel: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    initramfs: Option<PathBuf>,
    cmdline: &'a str,
}

#[derive(Debug, Serialize)]
struct Disk {
    path: PathBuf,
    readonly: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_type: Option<&'static str>,
}

/// The address and the state of the tap are not its to set, and it may not.
#[derive(Debug, Serialize)]
struct Nic<'a> {
    id: &'static str,
    tap: &'a str,
    mac: String,
    num_queues: u8,
    queue_size: u16,
}

#[derive(Debug, Serialize)]
struct Rng {
    src: &'static str,
}

#[derive(Debug, Serialize)]
struct Balloon {
    size: u64,
    deflate_on_oom: bool,
    free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
struct Vsock {
    cid: u32,
    socket: PathBuf,
}

#[derive(Debug, Serialize)]
struct ConsoleMode {
    mode: &'static str,
}

/// A path that Cloud Hypervisor may use once it has shut itself in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct LandlockRule {
    pub(super) path: PathBuf,
    /// `r` or `rw`.
    pub(super) access: &'static str,
}

/// The body of `vm.resize`.
#[derive(Debug, Serialize)]
pub(super) struct Resize {
    pub(super) desired_balloon: u64,
}

/// The body of `vm.snapshot`.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotTarget {
    pub(super) destination_url: String,
}

/// The body of `vm.restore`.
#[derive(Debug, Serialize)]
pub(super) struct RestoreSource {
    source_url: String,
    prefault: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_restore_mode: Option<&'static str>,
}

impl<'a> VmConfig<'a> {
    /// Returns the machine of `plan`, which has a kernel, with its memory in `memory_file`, if
    /// in any. It is shut in to the paths of `rules`, and those that the plan names, if there
    /// are any.
    pub(super) fn new(
        plan: &'a Plan,
        memory_file: Option<&Path>,
        version: Version,
        rules: Option<Vec<LandlockRule>>,
    ) -> Self {
        let image_type = version.is_told_image_types().then_some("Raw");
        let disks = plan.disks.iter().enumerate().filter_map(|(number, disk)| {
            let path = told::path(told::disk(number)?);
            Some(Disk { path, readonly: disk.kind.is_readonly(), image_type })
        });
        Self {
            cpus: Cpus { boot_vcpus: plan.vcpus, max_vcpus: plan.vcpus },
            memory: Memory::new(plan.memory_bytes, memory_file),
            payload: Payload {
                kernel: told::path(told::KERNEL),
                initramfs: plan.initramfs.as_ref().map(|_| told::path(told::INITRAMFS)),
                cmdline: &plan.cmdline,
            },
            disks: disks.collect(),
            net: plan.nic.iter().map(Nic::new).collect(),
            rng: Rng { src: "/dev/urandom" },
            // What the guest frees leaves the host's memory, and so the snapshot.
            balloon: plan.balloon.then_some(Balloon {
                size: 0,
                deflate_on_oom: true,
                free_page_reporting: true,
            }),
            vsock: plan
                .vsock
                .as_ref()
                .map(|_| Vsock { cid: vsock::CID, socket: vsock::told_path() }),
            serial: ConsoleMode { mode: "Tty" },
            // The other one would be a second writer to the same terminal.
            console: ConsoleMode { mode: "Off" },
            landlock_enable: rules.is_some(),
            landlock_rules: rules.unwrap_or_default(),
        }
    }
}

impl<'a> Nic<'a> {
    /// A queue for each direction, as long as its own default.
    fn new(nic: &'a PlannedNic) -> Self {
        let (num_queues, queue_size) = (2, 256);
        Self { id: NIC, tap: &nic.tap, mac: nic.mac.to_string(), num_queues, queue_size }
    }
}

impl Memory {
    /// A huge page would be saved, or take room on the disk, whole for any byte of it.
    fn new(bytes: u64, file: Option<&Path>) -> Self {
        match file {
            // Shared memory is a file in memory, of which only what the guest has touched
            // is saved.
            None => Self { size: bytes, shared: true, thp: false, zones: None },
            Some(file) => {
                let zones = Some(memory_file::zones(bytes, file));
                Self { size: 0, shared: false, thp: false, zones }
            }
        }
    }
}

impl RestoreSource {
    /// Has the memory loaded as `mode` says, and the machine left paused.
    ///
    /// # Errors
    /// Says what the version cannot do.
    pub(super) fn new(
        source_url: String,
        mode: RestoreMode,
        version: Version,
    ) -> Result<Self, String> {
        let memory_restore_mode = restore_mode::word(mode, version)?;
        Ok(Self { source_url, prefault: false, memory_restore_mode })
    }
}

/// Has the configuration in a snapshot name what is to be used now: kernel, disks, vsock and
/// memory where it finds them, and the paths that the VMM may use.
///
/// # Errors
/// Says what does not fit.
pub(super) fn adapt(
    config: &mut Value,
    plan: &Plan,
    memory_file: Option<&Path>,
    rules: Option<&[LandlockRule]>,
) -> Result<(), String> {
    let none = Vec::new();
    let count = config["disks"].as_array().unwrap_or(&none).len();
    if count != plan.disks.len() {
        return Err(format!(
            "the snapshot has {count} disks, and the sandbox has {}",
            plan.disks.len()
        ));
    }
    for number in 0..plan.disks.len() {
        config["disks"][number]["path"] = json!(told::disk(number).map(told::path));
    }
    adapt_nic(config, plan)?;
    for (key, place) in [("kernel", told::KERNEL), ("initramfs", told::INITRAMFS)] {
        if config["payload"][key].is_string() {
            config["payload"][key] = json!(told::path(place));
        }
    }
    match (&plan.vsock, config["vsock"].is_object()) {
        (Some(_), true) => config["vsock"]["socket"] = json!(vsock::told_path()),
        (None, false) => {}
        (Some(_), false) | (None, true) => {
            return Err("only one of snapshot and sandbox has a vsock".to_owned());
        }
    }
    let Some(config) = config.as_object_mut() else {
        return Err("its config.json is not an object".to_owned());
    };
    memory_file::adapt(config.entry("memory").or_insert_with(|| json!({})), memory_file)?;
    config.insert("landlock_enable".to_owned(), json!(rules.is_some()));
    config.insert("landlock_rules".to_owned(), json!(rules));
    Ok(())
}

/// Has the network device be that of the plan's tap, which is as this host made it.
fn adapt_nic(config: &mut Value, plan: &Plan) -> Result<(), String> {
    let none = Vec::new();
    match (&plan.nic, config["net"].as_array().unwrap_or(&none).as_slice()) {
        (Some(nic), [_]) => {
            config["net"][0]["tap"] = json!(nic.tap);
            // It noted the tap's own address, and would set it, which it may not.
            config["net"][0]["host_mac"] = Value::Null;
            Ok(())
        }
        (None, []) => Ok(()),
        (Some(_), _) | (None, _) => {
            Err("snapshot and sandbox do not have the same network devices".to_owned())
        }
    }
}
