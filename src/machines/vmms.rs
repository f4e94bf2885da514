//! The VMMs that this host has, and which of them runs a sandbox.

use super::Error;
use crate::{
    sandbox::{Record, State, Users, VmmChoice},
    sync::Arc,
    vmm::Vmm,
};

/// The VMMs that this host has.
#[derive(Debug)]
pub(crate) struct Vmms {
    all: Vec<Arc<dyn Vmm>>,
    /// The one that `auto` means, which this host may have or not.
    auto: VmmChoice,
    /// The user ids that VMMs run as, one for each sandbox; ours if there are none.
    users: Option<Users>,
}

impl Vmms {
    /// Makes the list of all of them.
    pub(crate) fn new(all: Vec<Arc<dyn Vmm>>, auto: VmmChoice, users: Option<Users>) -> Self {
        Self { all, auto, users }
    }

    /// Returns all of them.
    pub(crate) fn all(&self) -> &[Arc<dyn Vmm>] {
        &self.all
    }

    /// Returns the VMM that is to boot `record`.
    ///
    /// # Errors
    /// `NoVmm` where it is not installed, or lacks a device that `config` asks for.
    pub(crate) fn to_boot(&self, record: &Record) -> Result<&Arc<dyn Vmm>, Error> {
        let vmm = self.chosen(record)?;
        if record.spec.vsock && !vmm.has_vsock() {
            let why = format!(
                "it has `vsock = true`, which needs Cloud Hypervisor, and here it would be {}; \
                 install it, or write `vsock = false`",
                vmm.name()
            );
            return Err(Error::NoVmm { id: record.id.clone(), why });
        }
        Ok(vmm)
    }

    /// Returns the VMM that `config` asks for.
    fn chosen(&self, record: &Record) -> Result<&Arc<dyn Vmm>, Error> {
        let wanted = match record.spec.vmm {
            VmmChoice::Auto => self.auto,
            chosen @ (VmmChoice::Qemu | VmmChoice::CloudHypervisor) => chosen,
        };
        self.all.iter().find(|vmm| vmm.choice() == wanted).ok_or_else(|| Error::NoVmm {
            id: record.id.clone(),
            why: match wanted {
                VmmChoice::Auto | VmmChoice::Qemu => {
                    "qemu-system-x86_64 is not installed; `apt install qemu-system-x86`".into()
                }
                VmmChoice::CloudHypervisor => {
                    "cloud-hypervisor is not installed, or not usable (`dozed doctor` says why); \
                     install it, or use vmm = \"qemu\""
                        .into()
                }
            },
        })
    }

    /// Returns the VMM that runs `record`, or is about to, whatever `auto` means by now.
    ///
    /// # Errors
    /// `NoVmm` where it is not installed any more.
    pub(crate) fn of(&self, record: &Record) -> Result<&Arc<dyn Vmm>, Error> {
        match record.vmm.as_deref().and_then(|named| named.split(' ').next()) {
            None => self.chosen(record),
            Some(name) => self.named(name).ok_or_else(|| {
                let why = format!(
                    "its VMM is {name}, which is not installed any more; reinstall \
                                   it"
                );
                Error::NoVmm { id: record.id.clone(), why }
            }),
        }
    }

    /// Returns the VMM that made a snapshot of `record`. No other can load it.
    ///
    /// # Errors
    /// `NoVmm` where it is not installed.
    pub(crate) fn that_made(
        &self,
        record: &Record,
        name: &str,
        version: &str,
    ) -> Result<&Arc<dyn Vmm>, Error> {
        self.named(name).ok_or_else(|| Error::NoVmm {
            id: record.id.clone(),
            why: format!(
                "its snapshot was made by {name} {version}, which is not installed; reinstall it, \
                 or delete the sandbox"
            ),
        })
    }

    fn named(&self, name: &str) -> Option<&Arc<dyn Vmm>> {
        self.all.iter().find(|vmm| vmm.name() == name)
    }

    /// Returns a sentence for each feature that the VMM of `record` lacks on every machine: the
    /// one that runs it, or whose snapshot it sleeps in.
    pub(crate) fn lacks(&self, record: &Record) -> Vec<&'static str> {
        let named = record.vmm.as_deref().filter(|_| record.state() != State::Stopped);
        let Some((name, version)) = named.and_then(|named| named.split_once(' ')) else {
            return Vec::new();
        };
        self.named(name).map(|vmm| vmm.lacks(version)).unwrap_or_default()
    }

    /// Returns the user id that the VMM of `record` runs as. One that it has from another time
    /// is not used while they are switched off.
    pub(crate) fn user_of(&self, record: &Record) -> Option<u32> {
        record.user.filter(|_| self.users.is_some())
    }

    /// Refuses a sandbox whose VMM cannot have its memory as `config` says.
    ///
    /// # Errors
    /// `NoVmm`.
    pub(crate) fn check_fit(&self, vmm: &dyn Vmm, record: &Record) -> Result<(), Error> {
        let spec = &record.spec;
        match vmm.unfit(spec.memory_mode, spec.restore_mode, self.user_of(record)) {
            Some(why) => Err(Error::NoVmm { id: record.id.clone(), why }),
            None => Ok(()),
        }
    }
}
