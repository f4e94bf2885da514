//! What booting and waking have in common: a budget, a plan for the VMM, and the end of a failure.

use std::path::Path;

use super::{
    Entry, Error, Held, Lifecycle, chain, error::host_failed, files::Files, operation::Op,
};
use crate::{
    machines::Live,
    sandbox::{NetMode, Record, Spec, Step},
    snapshot,
    sync::Arc,
    sys::{
        cancel::Cancel,
        files::{let_through, make_private_dir},
    },
    vmm::{Machine, Plan, PlannedNic, PlannedVsock, Vmm, VmmIdentity},
};

impl Lifecycle {
    /// Does the acts of a boot or a wake, within the budget, and takes them back if they fail.
    pub(super) fn start<'a, T>(
        &'a self,
        op: &mut Op<'a>,
        acts: impl FnOnce(&mut Op<'a>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (entry, record) = (op.entry, op.entry.record());
        self.admission.book(record.row, &record.id, record.spec.memory_bytes)?;
        op.undo.push("giving back its memory", || {
            self.admission.give_back(entry.row());
            Ok(())
        });
        acts(op).map_err(|cause| {
            if matches!(cause, Error::Unanswered { .. }) {
                self.settle_later(entry.row());
                return cause;
            }
            let error = op.undo.run(cause);
            if op.intent.is_some() {
                self.end_failed_start(op, &error);
            }
            error
        })
    }

    /// Gives a sandbox its user id, if its VMM is to run as one and it has none yet. It keeps
    /// it until it is deleted.
    pub(super) fn give_user(&self, held: &Held, entry: &Entry, vmm: &dyn Vmm) -> Result<(), Error> {
        let Some(users) = self.settings.users.filter(|_| vmm.takes_user()) else {
            return Ok(());
        };
        let given = self
            .index
            .give_user(held, entry, users)
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        given.map(drop).ok_or_else(|| Error::NoUser { id: entry.id().clone(), users })
    }

    /// Says everything that a driver has to know; `run` is the directory of its memory, and
    /// `nic` its network device, where one is to be opened.
    pub(super) fn plan(
        &self,
        record: &Record,
        run: &Path,
        files: &Files,
        nic: Option<PlannedNic>,
        cancel: &Arc<Cancel>,
    ) -> Result<Plan, Error> {
        let home = self.home(record);
        let runtime_dir = self.runtime_dir(record.row);
        let mut made = make_private_dir(&runtime_dir);
        if record.spec.vsock {
            // Its owner has to get there; the rest of the way is the driver's to open.
            made = made.and_then(|()| let_through(&self.settings.runtime));
        }
        made.map_err(|source| Error::Host {
            doing: "making the directory for the sockets of",
            id: record.id.clone(),
            source,
        })?;
        let disks = record.spec.disks.iter().enumerate();
        let disks = disks.map(|(number, disk)| files.planned(disk, home.disk(number)));
        Ok(Plan {
            id: record.id.clone(),
            token: self.token(record.row),
            user: self.vmms.user_of(record),
            vcpus: record.spec.vcpus,
            memory_bytes: record.spec.memory_bytes,
            memory_mode: record.spec.memory_mode,
            restore_mode: record.spec.restore_mode,
            kernel: record.spec.kernel.as_deref().and_then(|path| files.path(path)),
            initramfs: record.spec.initramfs.as_deref().and_then(|path| files.path(path)),
            cmdline: record.spec.cmdline.clone(),
            disks: disks.collect(),
            balloon: record.spec.balloon,
            vsock: record.spec.vsock.then(|| PlannedVsock::new(&runtime_dir, record.owner)),
            nic,
            memory: run.join(snapshot::MEMORY),
            runtime_dir,
            console_log: home.console_log(),
            vmm_log: home.vmm_log(),
            held: files.held(),
            cancel: Arc::clone(cancel),
        })
    }

    pub(super) fn enter(
        &self,
        entry: &Entry,
        machine: Box<dyn Machine>,
    ) -> Result<Arc<Live>, Error> {
        self.activity.guest_starts(entry.row());
        let added = self.machines.add(entry.row(), machine);
        added.map_err(host_failed(entry, "watching the VMM of"))
    }

    /// After a failed and undone wake or boot: takes the intent back too. Where undoing
    /// failed, the rules of `recover` say what is left.
    fn end_failed_start(&self, op: &Op<'_>, error: &Error) {
        let entry = op.entry;
        if self.operations.is_deleting(entry.row()) {
            return; // The next to have the lock removes it from whatever state.
        }
        let ended = if matches!(error, Error::Undo { .. }) {
            self.recover(op)
        } else {
            self.step(op.held, entry, Step::Undo, |_| ()).map(|_| self.networks.after_sleep(entry))
        };
        if let Err(error) = ended {
            tracing::error!(id = %entry.id(), error = chain(&error), "ending an operation");
            self.settle_later(entry.row());
        }
    }
}

/// Says which machine a VMM makes of `spec`, in so far as a snapshot of one does not load
/// into another. What has the devices that there were from the start is called as then.
pub(super) fn machine_of(spec: &Spec, vmm: &VmmIdentity) -> String {
    let balloon = if spec.balloon { "" } else { ", no balloon" };
    let vsock = if spec.vsock { ", vsock" } else { "" };
    let nic = if spec.net == NetMode::None { "" } else { ", network" };
    format!("{}{balloon}{vsock}{nic}", vmm.machine)
}

/// Names a VMM as `status` shows it.
pub(super) fn named(identity: &VmmIdentity) -> Box<str> {
    format!("{} {}", identity.name, identity.version).into()
}
