//! A VM's description, as `vm.create` takes it and `config.json` keeps it.
//!
//! Fields that are not known are dropped without a word, and values of enumerations that
//! are not known are refused: serde does both, here and in the real program. What this
//! program has no use for is kept as it came.

use std::path::{Path, PathBuf};

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
    pub(crate) mac: Option<String>,
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
        if let Some(vsock) = &self.vsock {
            paths.extend(vsock.socket.parent().map(|parent| (parent, "w")));
        }
        paths
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
