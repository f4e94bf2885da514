//! A VM's description, as `vm.create` takes it and `config.json` keeps it.
//!
//! Fields that are not known are dropped without a word, and values of enumerations that
//! are not known are refused: serde does both, here and in the real program. What this
//! program has no use for is kept as it came.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use dozed::sys::tun;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::Failure;

/// A VM's description.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmConfig {
    #[serde(default)]
    pub(crate) cpus: Cpus,
    #[serde(default)]
    pub(crate) memory: MemoryConfig,
    pub(crate) payload: Option<Payload>,
    pub(crate) disks: Option<Vec<Disk>>,
    pub(crate) net: Option<Vec<Net>>,
    #[serde(default)]
    pub(crate) rng: Rng,
    pub(crate) balloon: Option<Balloon>,
    #[serde(default = "Console::null")]
    pub(crate) serial: Console,
    #[serde(default = "Console::tty")]
    pub(crate) console: Console,
    pub(crate) vsock: Option<Vsock>,
    #[serde(default)]
    pub(crate) pvpanic: bool,
    #[serde(default)]
    pub(crate) iommu: bool,
    #[serde(default)]
    pub(crate) watchdog: bool,
    pub(crate) platform: Option<Value>,
    pub(crate) numa: Option<Value>,
    pub(crate) pci_segments: Option<Value>,
    #[serde(default)]
    pub(crate) landlock_enable: bool,
    pub(crate) landlock_rules: Option<Vec<Rule>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Cpus {
    pub(crate) boot_vcpus: u32,
    pub(crate) max_vcpus: u32,
    #[serde(default = "yes")]
    pub(crate) nested: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MemoryConfig {
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) shared: bool,
    #[serde(default)]
    pub(crate) mergeable: bool,
    #[serde(default)]
    pub(crate) hugepages: bool,
    #[serde(default)]
    pub(crate) prefault: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) zones: Option<Vec<Zone>>,
    #[serde(default = "yes")]
    pub(crate) thp: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Zone {
    pub(crate) id: String,
    pub(crate) size: u64,
    pub(crate) file: Option<PathBuf>,
    #[serde(default)]
    pub(crate) shared: bool,
    #[serde(default)]
    pub(crate) hugepages: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Payload {
    pub(crate) firmware: Option<PathBuf>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) cmdline: Option<String>,
    pub(crate) initramfs: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) id: Option<String>,
    pub(crate) path: Option<PathBuf>,
    #[serde(default)]
    pub(crate) readonly: bool,
    #[serde(default)]
    pub(crate) direct: bool,
    #[serde(default)]
    pub(crate) image_type: ImageType,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) enum ImageType {
    FixedVhd,
    Qcow2,
    Raw,
    Vhdx,
    #[default]
    Unknown,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Net {
    pub(crate) id: Option<String>,
    pub(crate) tap: Option<String>,
    pub(crate) ip: Option<IpAddr>,
    pub(crate) mask: Option<IpAddr>,
    pub(crate) mac: Option<Mac>,
    pub(crate) host_mac: Option<Mac>,
    #[serde(default)]
    pub(crate) mtu: Option<u16>,
    #[serde(default = "two")]
    pub(crate) num_queues: usize,
    #[serde(default = "queue_size")]
    pub(crate) queue_size: u16,
}

/// An Ethernet address, in six pairs of digits.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Mac(String);

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_pair = |pair: &str| pair.len() == 2 && u8::from_str_radix(pair, 16).is_ok();
        if text.split(':').count() == 6 && text.split(':').all(is_pair) {
            return Ok(Self(text));
        }
        Err(format!(
            "The provided MAC address is invalid: parsing of {text} into a MAC address failed"
        ))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rng {
    pub(crate) src: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Balloon {
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) deflate_on_oom: bool,
    #[serde(default)]
    pub(crate) free_page_reporting: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Console {
    pub(crate) file: Option<PathBuf>,
    pub(crate) mode: ConsoleMode,
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Vsock {
    pub(crate) cid: u32,
    pub(crate) socket: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rule {
    pub(crate) path: PathBuf,
    pub(crate) access: String,
}

/// What `vm.restore` takes.
#[derive(Debug, Deserialize)]
pub(crate) struct RestoreConfig {
    pub(crate) source_url: String,
    #[serde(default)]
    pub(crate) prefault: bool,
    #[serde(default)]
    pub(crate) memory_restore_mode: Option<Value>,
    #[serde(default)]
    pub(crate) resume: bool,
}

/// How memory comes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum RestoreMode {
    #[default]
    Copy,
    OnDemand,
}

/// The same, of the versions that can do more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum NewRestoreMode {
    Copy,
    OnDemand,
    CopyOnWrite,
}

fn yes() -> bool {
    true
}

fn two() -> usize {
    2
}

fn queue_size() -> u16 {
    256
}

impl Default for Cpus {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: 1, nested: true }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        let (shared, mergeable, hugepages, prefault) = (false, false, false, false);
        Self { size: 512 << 20, shared, mergeable, hugepages, prefault, zones: None, thp: true }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self { src: "/dev/urandom".into() }
    }
}

impl Console {
    fn null() -> Self {
        Self { file: None, mode: ConsoleMode::Null, socket: None }
    }

    fn tty() -> Self {
        Self { file: None, mode: ConsoleMode::Tty, socket: None }
    }
}

impl VmConfig {
    /// Refuses what the real program does not boot.
    pub(crate) fn validate(&self) -> Result<(), Failure> {
        let refused = |said: &str| Err(Failure::config(said));
        let bootable = |said: &str| {
            Err(Failure::new(said)
                .within("Payload configuration is not bootable")
                .within("Failed to validate config"))
            .map_err(|mut failure: Failure| {
                failure.kind = crate::failure::Kind::Config;
                failure
            })
        };
        match self.payload.as_ref().map(|payload| (&payload.firmware, &payload.kernel)) {
            Some((Some(_), Some(_))) => {
                return bootable(
                    "Specifying a kernel is not supported when a firmware is provided",
                );
            }
            None | Some((None, None)) => {
                return bootable("No bootitem provided: neither firmware nor kernel");
            }
            Some(_) => {}
        }
        for console in [&self.serial, &self.console] {
            if console.mode == ConsoleMode::File && console.file.is_none() {
                return refused("Path missing when using file console mode");
            }
            if console.mode == ConsoleMode::Socket && console.socket.is_none() {
                return refused("Path missing when using socket console mode");
            }
        }
        let Cpus { boot_vcpus: boot, max_vcpus: max, .. } = self.cpus;
        if max < boot {
            return refused(&format!("Max CPUs ({max}) lower than boot CPUs ({boot})"));
        }
        let ram = self.ram_bytes();
        if let Some(balloon) = &self.balloon
            && balloon.size >= ram
        {
            let said = format!("Balloon size ({}) greater than RAM ({ram})", balloon.size);
            return refused(&said);
        }
        if let Some(vsock) = &self.vsock
            && [u32::MAX, 0, 1, 2].contains(&vsock.cid)
        {
            return refused(&format!("{} is a special VSOCK CID", vsock.cid));
        }
        for net in self.net.iter().flatten() {
            net.validate(boot)?;
        }
        let mut ids: Vec<_> = self.net.iter().flatten().filter_map(|net| net.id.as_ref()).collect();
        ids.sort();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return refused(&format!("Identifier {} is not unique", pair[0]));
        }
        for rule in self.landlock_rules.iter().flatten() {
            if !rule.path.exists() {
                let path = &rule.path;
                return refused(&format!(
                    "Path {path:?} provided in landlock-rules does not exist"
                ));
            }
            if rule.access.is_empty() || rule.access.chars().any(|c| !"rw".contains(c)) {
                return refused(&format!("Invalid landlock access: {}", rule.access));
            }
        }
        Ok(())
    }

    /// Returns the size of all memory.
    pub(crate) fn ram_bytes(&self) -> u64 {
        let zones = self.memory.zones.iter().flatten().map(|zone| zone.size);
        self.memory.size + zones.sum::<u64>()
    }

    /// Returns the paths that the real program lets itself use under Landlock without a
    /// rule, and what for.
    pub(crate) fn own_paths(&self) -> Vec<(&Path, &'static str)> {
        let mut paths: Vec<(&Path, &str)> = vec![(&self.rng.src, "r")];
        let zones = self.memory.zones.iter().flatten();
        paths.extend(zones.filter_map(|zone| Some((zone.file.as_deref()?, "rw"))));
        let disks = self.disks.iter().flatten();
        paths.extend(disks.filter_map(|disk| Some((disk.path.as_deref()?, "rw"))));
        for console in [&self.serial, &self.console] {
            paths.extend(console.file.as_deref().map(|file| (file, "rw")));
            paths.extend(console.socket.as_deref().map(|socket| (socket, "rw")));
        }
        if let Some(payload) = &self.payload {
            let files = [&payload.firmware, &payload.kernel, &payload.initramfs];
            paths.extend(files.into_iter().filter_map(|file| Some((file.as_deref()?, "r"))));
        }
        if self.net.is_some() {
            paths.push((Path::new(tun::PATH), "rw"));
        }
        if let Some(vsock) = &self.vsock {
            paths.extend(vsock.socket.parent().map(|parent| (parent, "w")));
        }
        paths
    }
}

impl Net {
    /// Refuses a device that no machine with so many CPUs can have.
    fn validate(&self, vcpus: u32) -> Result<(), Failure> {
        const QUEUE_SIZE_MAX: u16 = 32_768;
        let Self { num_queues: queues, queue_size: size, .. } = self;
        let said = if self.id.as_deref().is_some_and(|id| id.starts_with("__")) {
            format!("Identifier {} is not invalid", self.id.as_deref().unwrap_or_default())
        } else if *queues < 2 {
            format!("Number of queues ({queues}) to virtio_net should be higher than 2")
        } else if queues / 2 > vcpus as usize {
            format!("Queue count ({queues}) must not exceed boot vCPUs ({vcpus})")
        } else if !size.is_power_of_two() || *size > QUEUE_SIZE_MAX {
            format!("Queue size must be a power of 2 no greater than {QUEUE_SIZE_MAX}: {size}")
        } else {
            return Ok(());
        };
        Err(Failure::config(&said))
    }
}

impl From<NewRestoreMode> for RestoreMode {
    /// What copies on write reads, as far as this program can tell, as a copy does.
    fn from(mode: NewRestoreMode) -> Self {
        match mode {
            NewRestoreMode::Copy | NewRestoreMode::CopyOnWrite => Self::Copy,
            NewRestoreMode::OnDemand => Self::OnDemand,
        }
    }
}
