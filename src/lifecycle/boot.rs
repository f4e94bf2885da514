//! Booting: a guest begins anew, on the disks that it had.

use super::{
    CrashPoint, Error, Lifecycle, Signal, crash_point,
    disks::{make_disks, take_back_disks},
    error::{host_failed, snapshot_failed, vmm_failed},
    evidence::check_nothing_sleeps,
    exits::release,
    files::open_to_boot,
    memory_of,
    operation::Op,
    plan::{enter, named, plan},
    room::check_room,
    start::{give_user, run_acts},
};
use crate::{
    sandbox::{ProcessIdentity, Step},
    sync::lock,
};

/// Boots a sandbox that is stopped.
///
/// # Errors
/// It is stopped as before, or was lost after its guest may have run.
pub(super) fn boot<'a>(lifecycle: &'a Lifecycle, op: &mut Op<'a>) -> Result<(), Error> {
    let entry = op.entry;
    if entry.record().spec.kernel.is_none() {
        return Err(Error::NoKernel { id: entry.id().clone() });
    }
    let process = run_acts(lifecycle, op, |op| boot_acts(lifecycle, op))?;
    lifecycle.activity.saw(entry, Signal::Boot);
    let recorded = lifecycle
        .records
        .step(op.held, entry, Step::Booted(process), |record| record.retry_at = None);
    if let Err(error) = recorded {
        lifecycle.unsettled.record_later(entry, "a boot", &error);
    }
    Ok(())
}

/// Does everything up to and with `resume`.
fn boot_acts<'a>(lifecycle: &'a Lifecycle, op: &mut Op<'a>) -> Result<ProcessIdentity, Error> {
    let entry = op.entry;
    check_nothing_sleeps(lifecycle, entry)?;
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let vmm = lifecycle.vmms.to_boot(&record)?;
    let identity = vmm.identity().map_err(vmm_failed(entry, "asking what would boot"))?;
    let memory = memory_of(vmm.as_ref(), &record);
    give_user(lifecycle, op.held, entry, vmm.as_ref())?;
    lifecycle.vmms.check_fit(vmm.as_ref(), &entry.record())?;
    take_back_disks(&home, &record).map_err(host_failed(entry, "taking back a disk of"))?;
    let files = open_to_boot(lifecycle, &record, &home, &op.cancel)?;
    files.check(&record, &home)?;

    lifecycle.records.intend(op, Step::Boot, |record| record.vmm = Some(named(&identity)))?;
    lifecycle.records.sync_intent(op)?;
    crash_point(lifecycle, CrashPoint::BootIntended);

    home.create().map_err(snapshot_failed(entry, "making the directory of"))?;
    check_room(lifecycle, entry, memory, 0)?;
    let run = home
        .begin_run(record.generation, memory, record.spec.memory_bytes)
        .map_err(snapshot_failed(entry, "making the memory of"))?;
    op.undo.push("removing its memory", move || {
        Ok(lifecycle.store.home(&entry.record()).end_run()?)
    });
    let copies = make_disks(lifecycle, op, &files)?;
    let _slot = lifecycle.admission.wake(&record.id)?;

    let nic = lifecycle.networks.connect(op)?;
    crash_point(lifecycle, CrashPoint::BootConnected);

    // Also where the VMM does not start there are its sockets.
    op.undo.push("ending the VMM", move || Ok(release(lifecycle, entry)?));
    let plan = plan(lifecycle, &entry.record(), &run, &files, nic, &op.cancel)?;
    let machine = vmm.boot(&plan).map_err(vmm_failed(entry, "booting"))?;
    let live = enter(lifecycle, entry, machine)?;
    crash_point(lifecycle, CrashPoint::BootSpawned);

    let process = live.process.identity().clone();
    lifecycle.records.amend(op.held, entry, |record| record.phase.set_process(process.clone()))?;
    crash_point(lifecycle, CrashPoint::BootRecorded);

    let _connected = live.connect().map_err(vmm_failed(entry, "reaching"))?;
    // From here on the guest may have written to them.
    if let Some(copies) = copies {
        op.undo.forget(copies);
    }
    lock(&live.machine).resume().map_err(vmm_failed(entry, "starting"))?;
    crash_point(lifecycle, CrashPoint::BootResumed);
    Ok(process)
}
