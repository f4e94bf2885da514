//! What runs a sandbox's vCPUs: one small trait, one driver for each VMM.
//!
//! A driver knows processes, sockets and its VMM's language. It knows nothing of
//! records, states, locks or policy, and decides nothing: `lifecycle` says when.
//!
//! A machine comes to life inert. `boot` and `restore` return with a process that
//! has not run one guest instruction, and after a boot may have no more than its
//! settings, so that a daemon that dies in between leaves nothing that could harm:
//! such a process is found by its token and ended.

use std::{
    fmt,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    sandbox::{MemoryMode, Owner, RestoreMode, SandboxId, VmmChoice, network::Mac},
    sync::Arc,
    sys::{
        cancel::Cancel,
        process::{Exit, Process},
    },
};

pub mod cloud_hypervisor;
#[cfg(test)]
pub(crate) mod fake;
mod log;
mod nic;
mod peer;
mod program;
pub mod qemu;
mod typing;

/// The file of a snapshot that has the guest's memory, whichever VMM saved it.
pub const SAVED_MEMORY: &str = "memory";

/// A VMM that this host has.
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Returns which of the VMMs this is.
    fn choice(&self) -> VmmChoice;

    /// Returns its name, which manifests and records know it by.
    fn name(&self) -> &'static str;

    /// Returns what the VMM is right now; a package upgrade changes it under us.
    ///
    /// # Errors
    /// Where the program is gone or does not tell its version.
    fn identity(&self) -> Result<Arc<VmmIdentity>, Error>;

    /// Returns what the VMM is that runs as `process`, which an upgrade leaves as it was.
    ///
    /// # Errors
    /// As for [`Vmm::identity`].
    fn identity_of(&self, process: &Process) -> Result<Arc<VmmIdentity>, Error>;

    /// Returns the file of its program.
    fn program(&self) -> &Path;

    /// Says whether its machines can have a vsock.
    fn has_vsock(&self) -> bool;

    /// Returns a sentence for each thing that one of `version` lacks on this host. Nothing
    /// is looked at and nobody is asked.
    fn lacks(&self, version: &str) -> Vec<&'static str>;

    /// Says whether a guest that is to have its memory as `mode` says has it in the file
    /// [`Plan::memory`], which the VMM maps.
    ///
    /// If not, it is memory of the process: `save` writes it to [`SAVED_MEMORY`] in its
    /// directory, and `restore` copies it from there, so that the file is the same before
    /// and after the guest has run. Only [`Machine::never_ran`] can tell then.
    fn keeps_memory_in_file(&self, mode: MemoryMode) -> bool;

    /// Returns why it cannot run a machine with such memory, or not on this host or as `user`,
    /// and what to do about it; nothing if it can.
    fn unfit(&self, memory: MemoryMode, restore: RestoreMode, user: Option<u32>) -> Option<String>;

    /// Says whether a machine that was restored may read its kernel and initial RAM file system
    /// again, as it does where it deals with a reset of its guest itself.
    fn reads_kernel_again(&self) -> bool;

    /// Says whether the driver runs the VMM as [`Plan::user`].
    fn takes_user(&self) -> bool;

    /// Starts a machine up to just before its first instruction. It need not have been
    /// made yet: whatever the first `resume` of it says may be about that.
    ///
    /// # Errors
    /// After an error no process is left.
    fn boot(&self, plan: &Plan) -> Result<Box<dyn Machine>, Error>;

    /// Loads a machine from the snapshot in `dir`, paused. The memory file may be
    /// changed from the moment of `resume` on, and not before. No file in `dir` is needed
    /// after it, but for the memory where that is mapped.
    ///
    /// # Errors
    /// After an error no process is left, and the snapshot is as it was.
    fn restore(&self, plan: &Plan, dir: &Path) -> Result<Box<dyn Machine>, Error>;

    /// Takes over a machine that an earlier daemon left behind.
    ///
    /// # Errors
    /// Where the VMM does not answer; the process is left as it is.
    fn adopt(&self, plan: &Plan, process: Arc<Process>) -> Result<Box<dyn Machine>, Error>;
}

/// One sandbox's machine. Dropping it leaves its process alone.
pub trait Machine: fmt::Debug + Send {
    /// Returns the VMM's process.
    fn process(&self) -> &Arc<Process>;

    /// Says whether vCPUs run.
    ///
    /// # Errors
    /// Where the VMM does not answer in time.
    fn running(&mut self) -> Result<bool, Error>;

    /// Opens what commands are sent by, and keeps it open until `disconnect`, so that none of
    /// them fails because this process has no descriptor left. Without it each command opens
    /// its own. Doing it again is no error.
    ///
    /// # Errors
    /// Where the VMM cannot be reached, or does not answer in time.
    fn connect(&mut self) -> Result<(), Error>;

    /// Closes what `connect` opened, if anything.
    fn disconnect(&mut self);

    /// Stops the vCPUs. When it returns the guest does no more I/O, and nothing changes its
    /// memory before the next `resume`, nor does `save`. Doing it again is no error.
    ///
    /// # Errors
    /// Where the VMM refuses or does not answer in time.
    fn pause(&mut self) -> Result<(), Error>;

    /// Lets the vCPUs run: the first instruction after a boot, or on from a pause.
    ///
    /// # Errors
    /// Where the VMM refuses or does not answer in time.
    fn resume(&mut self) -> Result<(), Error>;

    /// Says whether the guest has provably not run one instruction since `boot` or
    /// `restore`, also after a `resume` that failed. Of a machine that was adopted, or
    /// whose memory is a file that proves it better, nothing is known.
    fn never_ran(&self) -> bool;

    /// Returns about how many bytes of memory `save` is going to write: none where the
    /// memory is a file.
    fn save_bytes(&self) -> u64;

    /// Writes the devices' state, and the memory unless it already is a file, of the
    /// paused machine into `dir`, which is empty. Nothing is synced. The machine
    /// stays paused, and may be resumed as if nothing had been.
    ///
    /// # Errors
    /// Where it cannot be written; `dir` may then hold anything.
    fn save(&mut self, dir: &Path) -> Result<(), Error>;

    /// Returns a sentence for each thing that this machine lacks of what its VMM can give.
    fn lacks(&self) -> Vec<String>;

    /// Returns what the kernel counts of its process that tells what the guest's disks do.
    fn disk_traffic(&self) -> DiskTraffic;

    /// Asks the guest to have the balloon take `bytes` of its memory, or give back what is
    /// above that. It returns before the guest has done so, which it may never do.
    ///
    /// # Errors
    /// Where there is no balloon, or the VMM does not answer in time.
    fn set_balloon(&mut self, bytes: u64) -> Result<(), Error>;

    /// Returns how much of the guest's memory the balloon has, by what the guest says.
    ///
    /// # Errors
    /// Where there is no balloon, or the VMM does not answer in time.
    fn balloon_bytes(&mut self) -> Result<u64, Error>;

    /// Lets `owner`, and nobody else without privileges, connect to the vsock, if there is one.
    ///
    /// # Errors
    /// Where the socket is not there, or not as the VMM made it.
    fn give_vsock(&mut self, owner: Owner) -> Result<(), Error>;

    /// Types `bytes` on the guest's serial console; returns how many were taken.
    ///
    /// # Errors
    /// Where the console cannot be reached.
    fn type_in(&mut self, bytes: &[u8]) -> Result<usize, Error>;
}

/// What tells of a guest's disks, of what the kernel counts of its VMM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskTraffic {
    /// Its system calls: it reads and writes disks by those, and does little else by them.
    Calls,
    /// Its blocks: it has disks read and written by the kernel (`io_uring`).
    Blocks {
        /// What the names of the threads begin with whose blocks are not of disks but of memory,
        /// where that is a file.
        vcpus: Option<&'static str>,
    },
}

/// What a VMM is, in so far as a snapshot depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmIdentity {
    /// Such as `qemu`.
    pub name: &'static str,
    /// Such as `7.2.22`.
    pub version: String,
    /// `blake3:` and the digest of the program's file, in hexadecimal.
    pub digest: String,
    /// What guests are run by: `kvm` or `tcg`.
    pub accelerator: &'static str,
    /// The machine type, such as `microvm`.
    pub machine: String,
    /// The CPU model that guests see. For `kvm` it names the host's.
    pub cpu: String,
}

impl VmmIdentity {
    /// Returns the first thing in which `other` differs so that neither loads the snapshots of
    /// the other: what it is called, what it is here, and what there.
    #[must_use]
    pub fn difference<'a>(&'a self, other: &'a Self) -> Option<(&'static str, &'a str, &'a str)> {
        [
            ("version", self.version.as_str(), other.version.as_str()),
            ("accelerator", self.accelerator, other.accelerator),
            ("machine", &self.machine, &other.machine),
            ("CPU", &self.cpu, &other.cpu),
            ("program digest", &self.digest, &other.digest),
        ]
        .into_iter()
        .find(|(_, this, that)| this != that)
    }
}

/// Everything that a driver has to know to make a machine.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The sandbox, for messages.
    pub id: SandboxId,
    /// The name that the process is given, which no other process has, and by which a later
    /// daemon finds it: as its first argument or after `-name guest=`. It has no comma and no
    /// blank.
    pub token: String,
    /// The user id that the VMM is to run as, by a driver that does so, if it is not ours.
    pub user: Option<u32>,
    /// The count of vCPUs.
    pub vcpus: u8,
    /// The size of memory.
    pub memory_bytes: u64,
    /// Where the memory is.
    pub memory_mode: MemoryMode,
    /// How memory that is in no file comes back.
    pub restore_mode: RestoreMode,
    /// The kernel; needed to boot, and by some to restore: see [`Vmm::reads_kernel_again`].
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The disks, as the machine is to open them.
    pub disks: Vec<PlannedDisk>,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// The vsock, if there is one.
    pub vsock: Option<PlannedVsock>,
    /// The network device, if there is one.
    pub nic: Option<PlannedNic>,
    /// The file that the memory is mapped from, shared, where it is in a file. `boot` finds
    /// a file of zeros here, or an empty one, `restore` the memory of the snapshot.
    pub memory: PathBuf,
    /// A directory for sockets, this sandbox's own, on a tmpfs. It exists.
    pub runtime_dir: PathBuf,
    /// The file to append the serial console's output to. It is in the sandbox's own
    /// directory, in which its disks and the directories of its snapshots are too.
    pub console_log: PathBuf,
    /// The file to append the VMM's own messages to.
    pub vmm_log: PathBuf,
    /// What is open for paths such as `/proc/self/fd/7`, by which kernel, initial RAM file
    /// system and disks may be named. They lead to it in us, and in a process that inherits it.
    pub held: Vec<Arc<OwnedFd>>,
    /// Ends the work, and the process once there is one.
    pub cancel: Arc<Cancel>,
}

/// A disk of a planned machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    /// The raw image, or a block device.
    pub path: PathBuf,
    /// Whose it is.
    pub kind: DiskKind,
}

/// Whose a disk is, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskKind {
    /// A file of the sandbox's own, which its guest may write to.
    Own,
    /// A file that several guests may read.
    Shared,
    /// A block device that several guests may read.
    SharedDevice,
}

impl DiskKind {
    /// Says whether the guest may only read it.
    #[must_use]
    pub fn is_readonly(self) -> bool {
        match self {
            Self::Own => false,
            Self::Shared | Self::SharedDevice => true,
        }
    }
}

/// A socket of the host's by which it reaches a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedVsock {
    dir: PathBuf,
    /// Who may connect.
    pub owner: Owner,
}

impl PlannedVsock {
    /// The name of its directory in that of the sockets.
    pub const DIR: &str = "vsock";
    /// The name of the socket in its directory.
    pub const NAME: &str = "vsock.sock";

    /// Plans the vsock of a sandbox whose sockets are in `runtime_dir`. The directory above
    /// that can be gone through by everybody.
    #[must_use]
    pub fn new(runtime_dir: &Path, owner: Owner) -> Self {
        Self { dir: runtime_dir.join(Self::DIR), owner }
    }

    /// Returns the directory that the VMM makes the socket in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of the socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join(Self::NAME)
    }
}

/// The network device of a planned machine: the guest's end of a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedNic {
    /// The file that the tap's namespace is pinned to. The VMM runs in there.
    pub namespace: PathBuf,
    /// The name of the tap, which is there, is up, and stays when nobody has it open.
    pub tap: String,
    /// The guest's own address on it.
    pub mac: Mac,
}

/// Why a VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `vmm::Error` wherever it is used")]
pub enum Error {
    /// There is no such program, or it is not usable.
    #[error("{program} is not usable: {why}")]
    Missing {
        /// Such as `qemu-system-x86_64`.
        program: String,
        /// What to do about it.
        why: String,
    },
    /// Something of the host failed.
    #[error("{doing}")]
    Host {
        /// Such as `starting qemu-system-x86_64`.
        doing: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The VMM said no.
    #[error("the VMM refused {command}: {said}")]
    Refused {
        /// The command in the VMM's language.
        command: String,
        /// The VMM's words.
        said: String,
    },
    /// The VMM said something that we do not understand.
    #[error("unexpected answer of the VMM to {command}: {said}")]
    Nonsense {
        /// The command in the VMM's language.
        command: String,
        /// What came.
        said: String,
    },
    /// The VMM's process ended.
    #[error("the VMM ended while {doing}: {exit}{}", last_words(.said))]
    Died {
        /// Such as `loading the snapshot`.
        doing: String,
        /// How it ended.
        exit: Exit,
        /// The end of what it wrote to its log.
        said: String,
    },
    /// A bounded wait ran out.
    #[error("the VMM did not finish {command} within {} ms", .limit.as_millis())]
    TimedOut {
        /// The command in the VMM's language.
        command: String,
        /// How long we waited.
        limit: Duration,
    },
    /// The operation was called off.
    #[error("cancelled while {doing}")]
    Cancelled {
        /// Such as `loading the snapshot`.
        doing: String,
    },
}

fn last_words(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}
