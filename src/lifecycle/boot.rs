//! Booting: a guest begins anew, on the disks that it had.

use super::{
    CrashPoint, Error, Lifecycle, Signal,
    disks::take_back_disks,
    error::{host_failed, snapshot_failed, vmm_failed},
    memory_of,
    operation::Op,
    start::named,
};
use crate::{
    sandbox::{ProcessIdentity, Step},
    sync::lock,
};

impl Lifecycle {
    /// Boots a sandbox that is stopped.
    ///
    /// # Errors
    /// It is stopped as before, or was lost after its guest may have run.
    pub(super) fn boot<'a>(&'a self, op: &mut Op<'a>) -> Result<(), Error> {
        let entry = op.entry;
        if entry.record().spec.kernel.is_none() {
            return Err(Error::NoKernel { id: entry.id().clone() });
        }
        let process = self.start(op, |op| self.boot_acts(op))?;
        self.activity.saw(entry, Signal::Boot);
        let recorded =
            self.step(op.held, entry, Step::Booted(process), |record| record.retry_at = None);
        if let Err(error) = recorded {
            self.record_later(entry, "a boot", &error);
        }
        Ok(())
    }

    /// Does everything up to and with `resume`.
    fn boot_acts<'a>(&'a self, op: &mut Op<'a>) -> Result<ProcessIdentity, Error> {
        let entry = op.entry;
        self.check_nothing_sleeps(entry)?;
        let record = entry.record();
        let home = self.home(&record);
        let vmm = self.vmms.to_boot(&record)?;
        let identity = vmm.identity().map_err(vmm_failed(entry, "asking what would boot"))?;
        let memory = memory_of(vmm.as_ref(), &record);
        self.give_user(op.held, entry, vmm.as_ref())?;
        self.vmms.check_fit(vmm.as_ref(), &entry.record())?;
        take_back_disks(&home, &record).map_err(host_failed(entry, "taking back a disk of"))?;
        let files = self.open_to_boot(&record, &home, &op.cancel)?;
        files.check(&record, &home)?;

        self.intend(op, Step::Boot, |record| record.vmm = Some(named(&identity)))?;
        self.sync_intent(op)?;
        self.crash_point(CrashPoint::BootIntended);

        home.create().map_err(snapshot_failed(entry, "making the directory of"))?;
        self.check_room(entry, memory, 0)?;
        let run = home
            .begin_run(record.generation, memory, record.spec.memory_bytes)
            .map_err(snapshot_failed(entry, "making the memory of"))?;
        op.undo.push("removing its memory", move || Ok(self.home(&entry.record()).end_run()?));
        let copies = self.make_disks(op, &files)?;
        let _slot = self.admission.wake(&record.id)?;

        let nic = self.networks.connect(op)?;
        self.crash_point(CrashPoint::BootConnected);

        // Also where the VMM does not start there are its sockets.
        op.undo.push("ending the VMM", move || Ok(self.release(entry)?));
        let plan = self.plan(&entry.record(), &run, &files, nic, &op.cancel)?;
        let machine = vmm.boot(&plan).map_err(vmm_failed(entry, "booting"))?;
        let live = self.enter(entry, machine)?;
        self.crash_point(CrashPoint::BootSpawned);

        let process = live.process.identity().clone();
        self.amend(op.held, entry, |record| record.phase.set_process(process.clone()))?;
        self.crash_point(CrashPoint::BootRecorded);

        let _connected = live.connect().map_err(vmm_failed(entry, "reaching"))?;
        // From here on the guest may have written to them.
        if let Some(copies) = copies {
            op.undo.forget(copies);
        }
        lock(&live.machine).resume().map_err(vmm_failed(entry, "starting"))?;
        self.crash_point(CrashPoint::BootResumed);
        Ok(process)
    }
}
