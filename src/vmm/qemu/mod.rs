//! QEMU's microvm: the VMM for every host, with or without hardware virtualisation.
//!
//! The guest's memory is a file that QEMU maps shared, and QEMU is told to leave it out
//! of what it saves. So a sleep writes the state of the devices, some hundred KiB, and
//! a wake reads it, whatever the size of the memory. The price is that a snapshot is
//! used up by the first instruction after it was restored.
//!
//! QEMU is started with its vCPUs stopped and obeys by QMP on a socket in the sandbox's
//! runtime directory. `docs/qemu.md` has the command line, the order of commands and
//! what was found out about them.
//!
//! Nothing here runs a shell, and nothing here decides when.

mod command_line;
mod console;
mod firmware;
mod machine;
mod qmp;
mod wall_clock;

use std::path::{Path, PathBuf};

use self::{
    command_line::{Beginning, LAYOUT, MACHINE, kernel_cmdline},
    machine::QemuMachine,
};
use super::{
    Error, Machine, Plan, Vmm, VmmIdentity,
    program::{Program, host_cpu},
};
use crate::{
    sandbox::{MemoryMode, RestoreMode, VmmChoice},
    sync::Arc,
    sys::{command, kvm, process::Process, tsc},
};

const PROGRAM: &str = "qemu-system-x86_64";

/// A QEMU that this host has.
#[derive(Debug)]
pub struct Qemu {
    program: Program,
    accelerator: Accelerator,
}

/// What guests are run by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Translation: slower, and everywhere.
    Tcg,
}

impl Qemu {
    /// Finds QEMU where the system keeps its programs.
    ///
    /// # Errors
    /// `Missing` if there is none, or none that works.
    pub fn find() -> Result<Self, Error> {
        let program = command::find(PROGRAM).ok_or_else(|| Error::Missing {
            program: PROGRAM.to_owned(),
            why: "it was not found; install the package qemu-system-x86, or set [vmm] qemu to its \
                  path"
                .to_owned(),
        })?;
        Self::at(program)
    }

    /// Takes the QEMU that is at `program`, an absolute path.
    ///
    /// # Errors
    /// `Missing` if there is none, or none that works.
    pub fn at(program: PathBuf) -> Result<Self, Error> {
        let accelerator = match kvm::usable() {
            Ok(()) => Accelerator::Kvm,
            Err(_) => Accelerator::Tcg,
        };
        let qemu = Self { program: Program::new(program, parse_version), accelerator };
        qemu.identity()?;
        Ok(qemu)
    }
}

impl Qemu {
    /// Says what this VMM is, given what its program says and is.
    fn describe(&self, version: String, digest: String) -> Result<VmmIdentity, Error> {
        Ok(VmmIdentity {
            name: self.name(),
            version,
            digest,
            accelerator: self.accelerator.word(),
            machine: format!("{MACHINE}, layout {LAYOUT}"),
            cpu: match self.accelerator {
                Accelerator::Tcg => self.accelerator.cpu().to_owned(),
                Accelerator::Kvm => host_cpu()?,
            },
        })
    }
}

impl Vmm for Qemu {
    fn choice(&self) -> VmmChoice {
        VmmChoice::Qemu
    }

    fn name(&self) -> &'static str {
        "qemu"
    }

    fn identity(&self) -> Result<Arc<VmmIdentity>, Error> {
        self.program.identity(|version, digest| self.describe(version, digest))
    }

    fn identity_of(&self, process: &Process) -> Result<Arc<VmmIdentity>, Error> {
        let running = self.program.running_as(process);
        running.identity(|version, digest| self.describe(version, digest))
    }

    fn program(&self) -> &Path {
        self.program.path()
    }

    fn has_vsock(&self) -> bool {
        // It has none of its own: vhost-vsock is the host kernel's, with one address for
        // each guest on it.
        false
    }

    fn lacks(&self, _: &str) -> Vec<&'static str> {
        match self.accelerator {
            Accelerator::Kvm => Vec::new(),
            Accelerator::Tcg => vec![
                "its guest runs many times slower: this host has no hardware virtualisation \
                 (`dozed doctor` says why)",
            ],
        }
    }

    fn keeps_memory_in_file(&self, _: MemoryMode) -> bool {
        true
    }

    fn reads_kernel_again(&self) -> bool {
        false
    }

    fn takes_user(&self) -> bool {
        false
    }

    fn unfit(&self, memory: MemoryMode, restore: RestoreMode, _: Option<u32>) -> Option<String> {
        let wrong = match (memory, restore) {
            (MemoryMode::Shared, _) => "memory_mode = \"shared\"",
            (_, RestoreMode::OnDemand) => "restore_mode = \"on-demand\"",
            (_, RestoreMode::CopyOnWrite) => "restore_mode = \"copy-on-write\"",
            (MemoryMode::Auto | MemoryMode::File, RestoreMode::Auto | RestoreMode::Copy) => {
                return None;
            }
        };
        Some(format!(
            "qemu keeps guest memory in a file, so {wrong} is not possible; write \"auto\", or \
             use vmm = \"cloud-hypervisor\""
        ))
    }

    fn boot(&self, plan: &Plan) -> Result<Box<dyn Machine>, Error> {
        let kernel = plan.kernel.as_deref().ok_or_else(|| Error::Refused {
            command: "boot".to_owned(),
            said: "no kernel is configured".to_owned(),
        })?;
        let tsc_khz = match self.accelerator {
            Accelerator::Kvm => None,
            Accelerator::Tcg => tsc::khz(),
        };
        let cmdline = kernel_cmdline(&plan.cmdline, tsc_khz);
        self.start(plan, Beginning::Boot { kernel }, |machine| machine.configure(&cmdline))
    }

    fn restore(&self, plan: &Plan, dir: &Path) -> Result<Box<dyn Machine>, Error> {
        self.start(plan, Beginning::Restore, |machine| machine.load(dir))
    }

    fn adopt(&self, plan: &Plan, process: Arc<Process>) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(QemuMachine::adopt(plan, process)?))
    }
}

impl Qemu {
    fn start(
        &self,
        plan: &Plan,
        beginning: Beginning<'_>,
        then: impl FnOnce(&QemuMachine) -> Result<(), Error>,
    ) -> Result<Box<dyn Machine>, Error> {
        let program = self.program.path();
        let machine = QemuMachine::start(program, self.accelerator, plan, beginning, then)?;
        Ok(Box::new(machine))
    }
}

impl Accelerator {
    /// Returns the word by which QEMU and a snapshot's manifest know it.
    fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// Returns the CPU that QEMU is to show: all that it can do.
    fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max",
        }
    }
}

/// Reads `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(text: &str) -> Option<&str> {
    let (_, after) = text.split_once("version ")?;
    let version = after.split_whitespace().next()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests;
