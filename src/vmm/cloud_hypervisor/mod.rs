//! Cloud Hypervisor: the VMM for hosts with hardware virtualisation.
//!
//! The guest's memory is shared memory of the VMM's process. A sleep writes what the guest
//! has touched of it beside the state of the devices; a wake copies it back, and the
//! snapshot is then of no more use to the guest that runs. Or it is a file of the store,
//! where `config` says so, which is mapped and never copied.
//!
//! It is started with an API socket that it inherits, and obeys by HTTP on that. It has
//! no way to make a machine and not let it run, so until its first `resume` a machine
//! that boots is only a configuration. `docs/cloud-hypervisor.md` has what was found out
//! about its releases.
//!
//! Nothing here runs a shell, and nothing here decides when.

mod allowance;
mod api;
mod body;
mod confinement;
mod console;
mod identity;
mod machine;
mod memory_file;
mod restore_mode;
mod saved;
mod told;
mod version;
mod view;
mod vsock;

use std::path::{Path, PathBuf};

use self::{
    machine::CloudMachine,
    version::{OLDEST, Version},
};
use super::{
    Error, Machine, Plan, Vmm, VmmIdentity,
    program::{Program, host_cpu},
};
use crate::{
    sandbox::{MemoryMode, RestoreMode, VmmChoice},
    sync::Arc,
    sys::{command, host, process::Process, userfaultfd},
};

const PROGRAM: &str = "cloud-hypervisor";
/// The number of the machine's layout: which devices there are, and in which order. A
/// snapshot loads only into the layout that it was saved from, so a change of it gets the
/// next number, and sleepers of the old one are refused with a sentence.
const LAYOUT: u32 = 1;

/// A Cloud Hypervisor that this host has.
#[derive(Debug)]
pub struct CloudHypervisor {
    program: Program,
    /// Whether this host lets it shut itself in.
    confined: bool,
}

impl CloudHypervisor {
    /// Finds Cloud Hypervisor where the system keeps its programs.
    ///
    /// # Errors
    /// `Missing` if there is none, or none that works.
    pub fn find() -> Result<Self, Error> {
        let program = command::find(PROGRAM).ok_or_else(|| Error::Missing {
            program: PROGRAM.to_owned(),
            why: "it was not found; install it, or set [vmm] cloud_hypervisor to its path"
                .to_owned(),
        })?;
        Self::at(program)
    }

    /// Takes the Cloud Hypervisor that is at `program`, an absolute path. That has to be the
    /// program itself: a script that starts it has another name and another digest.
    ///
    /// # Errors
    /// `Missing` if there is none, or none that works, or it is too old.
    pub fn at(program: PathBuf) -> Result<Self, Error> {
        let found = Self {
            program: Program::new(program, parse_version),
            confined: confinement::is_possible(),
        };
        let identity = found.identity()?;
        if Version::parse(&identity.version).is_none_or(|version| version < OLDEST) {
            let why =
                format!("it is version {}, and {OLDEST} is the oldest known", identity.version);
            return Err(found.program.missing(&why));
        }
        Ok(found)
    }

    /// Says why it cannot run as another user on this host, if that is so.
    #[must_use]
    pub fn why_no_users(&self) -> Option<&'static str> {
        (host::is_root() && !identity::kvm_is_possible()).then_some(
            "each runs as root without privileges instead of as its own user, because only root \
             may use /dev/kvm; give it to a group (`chgrp kvm /dev/kvm`, `chmod 660 /dev/kvm`), \
             or let dozed make devices and mount (CAP_MKNOD, CAP_SYS_ADMIN)",
        )
    }
}

impl CloudHypervisor {
    /// Says what this VMM is, given what its program says and is.
    fn describe(&self, version: String, digest: String) -> Result<VmmIdentity, Error> {
        Ok(VmmIdentity {
            name: self.name(),
            version,
            digest,
            accelerator: "kvm",
            machine: format!("pci, layout {LAYOUT}"),
            cpu: host_cpu()?,
        })
    }
}

impl Vmm for CloudHypervisor {
    fn choice(&self) -> VmmChoice {
        VmmChoice::CloudHypervisor
    }

    fn name(&self) -> &'static str {
        PROGRAM
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
        true
    }

    fn lacks(&self, version: &str) -> Vec<&'static str> {
        let mut lacks = Version::parse(version).map(Version::lacks).unwrap_or_default();
        if !self.confined {
            lacks.push(
                "it is not confined to its own files: the kernel has no Landlock version 3 (Linux \
                 6.2), or it is disabled (see the kernel's option `lsm=`)",
            );
        }
        lacks
    }

    fn keeps_memory_in_file(&self, mode: MemoryMode) -> bool {
        memory_file::is_wanted(mode)
    }

    fn unfit(&self, memory: MemoryMode, restore: RestoreMode, user: Option<u32>) -> Option<String> {
        let version = self.identity().ok().and_then(|is| Version::parse(&is.version))?;
        let (uid, gid) = user.map_or_else(host::own_ids, |user| (user, user));
        restore_mode::objection(memory, restore, version, || userfaultfd::is_open_to(uid, gid))
    }

    fn reads_kernel_again(&self) -> bool {
        true
    }

    fn takes_user(&self) -> bool {
        true
    }

    fn boot(&self, plan: &Plan) -> Result<Box<dyn Machine>, Error> {
        if plan.kernel.is_none() {
            let said = "no kernel is configured".to_owned();
            return Err(Error::Refused { command: "boot".to_owned(), said });
        }
        Ok(Box::new(CloudMachine::boot(self.program.path(), plan)?))
    }

    fn restore(&self, plan: &Plan, dir: &Path) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(CloudMachine::restore(self.program.path(), plan, dir)?))
    }

    fn adopt(&self, plan: &Plan, process: Arc<Process>) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(CloudMachine::adopt(plan, process)?))
    }
}

/// Reads `cloud-hypervisor v53.0`.
fn parse_version(text: &str) -> Option<&str> {
    let version = text.lines().next()?.split_once(" v")?.1.trim();
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests;
