//! Waking: a restore from a snapshot, or a boot.

use std::thread;

use super::{
    CrashPoint, Entry, Error, Held, Lifecycle, Outcome, Signal,
    boot::boot,
    crash_point,
    error::{host_failed, snapshot_failed, vmm_failed},
    exits::release,
    files::open_to_wake,
    memory_of,
    operate::operate,
    operation::Op,
    plan::{enter, machine_of, named, plan},
    recover::settle,
    resume::let_run,
    room::{check_room, drop_copy_later, give_back_room},
    start::{give_user, run_acts},
};
use crate::{
    machines::{balloon::deflate, end},
    sandbox::{ProcessIdentity, Record, State, Step},
    snapshot::{self, Memory, Snapshot},
    sync::{Arc, lock},
    sys::{cancel::Cancel, clock::Stopwatch},
    vmm::{Machine, Plan, Vmm, VmmIdentity},
};

impl Lifecycle {
    /// Makes a sandbox `running`: by a restore if it sleeps, by a boot if it is stopped.
    ///
    /// # Errors
    /// After an error it is in the state that it was found in, or `stopped` where the
    /// guest ran and was lost.
    pub fn wake(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        operate(self, held, entry, |op| {
            settle(self, op)?;
            match entry.record().state() {
                State::Running => {
                    self.activity.saw(entry, Signal::Control);
                    Ok(Outcome::Already)
                }
                State::Snapshotted => restore(self, op)
                    .inspect_err(|_| self.networks.refuse_packets(entry))
                    .map(|()| Outcome::Done),
                State::Stopped => boot(self, op).map(|()| Outcome::Done),
                State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                    Err(entry
                        .record()
                        .phase
                        .after(&Step::Wake)
                        .map_or_else(Error::Refused, |_| Error::Gone { id: entry.id().clone() }))
                }
            }
        })
    }
}

fn restore<'a>(lifecycle: &'a Lifecycle, op: &mut Op<'a>) -> Result<(), Error> {
    let took = Stopwatch::start();
    let (entry, record) = (op.entry, op.entry.record());
    let _slot = lifecycle.admission.wake(&record.id)?;
    let (memory, process) = run_acts(lifecycle, op, |op| restore_acts(lifecycle, op))?;
    lifecycle.activity.saw(entry, Signal::Wake);
    // After a power cut the record says at least `restoring`, and the guest is lost
    // either way.
    let recorded =
        lifecycle.records.step_unsynced(op.held, entry, Step::Woken(process), |record| {
            record.generation += 1;
            record.wakes += 1;
            record.retry_at = None;
            record.last_wake = Some(took.elapsed());
        });
    if let Err(error) = recorded {
        lifecycle.unsettled.record_later(entry, "a wake", &error);
    }
    drop_copy_later(lifecycle, &record, memory);
    Ok(())
}

/// Does everything up to and with `resume`.
fn restore_acts<'a>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
) -> Result<(Memory, ProcessIdentity), Error> {
    let (entry, record) = (op.entry, op.entry.record());
    let home = lifecycle.store.home(&record);
    let failed = snapshot_failed(entry, "opening the snapshot of");
    let facts = record
        .snapshot()
        .ok_or_else(|| failed(snapshot::Error::Absent { dir: home.dir().to_owned() }))?;
    let snapshot = home.open(&record.id, facts.generation).map_err(failed)?;
    let made = &snapshot.manifest().vmm;
    let vmm = lifecycle.vmms.that_made(&record, &made.name, &made.version)?;
    let identity = vmm.identity().map_err(vmm_failed(entry, "asking what would wake"))?;
    check_origin(&record, &snapshot, &identity)?;
    let memory = memory_of(vmm.as_ref(), &record);
    check_room(lifecycle, entry, memory, facts.bytes)?;
    give_user(lifecycle, op.held, entry, vmm.as_ref())?;
    lifecycle.vmms.check_fit(vmm.as_ref(), &entry.record())?;
    let asleep = &snapshot.manifest().hardware.disks;
    let files = open_to_wake(lifecycle, &record, asleep, vmm.as_ref(), &op.cancel)?;

    lifecycle.records.intend(op, Step::Wake, |record| record.vmm = Some(named(&identity)))?;
    crash_point(lifecycle, CrashPoint::WakeIntended);

    if memory == Memory::Mapped {
        op.undo.push("giving back its room", move || {
            let dir = lifecycle.store.home(&record).snapshot_dir(facts.generation);
            if dir.exists() {
                give_back_room(lifecycle, &record, facts.generation);
            }
            Ok(())
        });
        snapshot.take_room().map_err(snapshot_failed(entry, "taking space for the memory of"))?;
    }

    let nic = lifecycle.networks.connect(op)?;
    crash_point(lifecycle, CrashPoint::WakeConnected);

    // Also where the VMM does not start there are its sockets.
    op.undo.push("ending the VMM", move || Ok(release(lifecycle, entry)?));
    let plan = plan(lifecycle, &entry.record(), &snapshot.dir(), &files, nic, &op.cancel)?;
    let machine = load(lifecycle, entry, vmm.as_ref(), &plan, &snapshot)?;
    let live = enter(lifecycle, entry, machine)?;
    crash_point(lifecycle, CrashPoint::WakeRestored);

    let process = live.process.identity().clone();
    // No process outlasts a power cut.
    let (_, _moot) = lifecycle
        .records
        .amend_unsynced(op.held, entry, |record| record.phase.set_process(process.clone()))?;
    crash_point(lifecycle, CrashPoint::WakeRecorded);

    let _connected = live.connect().map_err(vmm_failed(entry, "reaching"))?;
    // Else a power cut could leave a record that says `snapshotted`, and no snapshot.
    lifecycle.records.sync_intent(op)?;
    // The commit point. From here on the snapshot is no longer the truth; it can
    // be again only while the guest has provably not run.
    snapshot.consume().map_err(snapshot_failed(entry, "consuming the snapshot of"))?;
    let (woken, cancel) = (Arc::clone(&live), Arc::clone(&op.cancel));
    op.undo.push("taking the snapshot back", move || {
        // What has not run by now must not begin to.
        end(entry.id(), &woken.process)?;
        let ran = memory == Memory::Copied && !lock(&woken.machine).never_ran();
        if ran {
            return Err(Error::MayHaveRun { id: entry.id().clone() }.into());
        }
        Ok(unconsume(lifecycle, entry, facts.generation, &cancel)?)
    });
    crash_point(lifecycle, CrashPoint::WakeConsumed);

    lifecycle.networks.deliver(entry)?;
    let_run(lifecycle, entry, &live, memory, facts.generation)?;
    deflate(&entry.record(), &live);
    crash_point(lifecycle, CrashPoint::WakeResumed);
    Ok((memory, process))
}

/// Loads the machine, while its memory is checked beside it.
fn load(
    lifecycle: &Lifecycle,
    entry: &Entry,
    vmm: &dyn Vmm,
    plan: &Plan,
    snapshot: &Snapshot,
) -> Result<Box<dyn Machine>, Error> {
    let cancel = &plan.cancel;
    let damaged = snapshot_failed(entry, "checking the memory of");
    thread::scope(|scope| {
        let check = lifecycle
            .settings
            .verify_memory
            .then(|| {
                thread::Builder::new()
                    .name("dozed-check".to_owned())
                    .spawn_scoped(scope, || snapshot.check_memory(cancel))
            })
            .transpose()
            .map_err(host_failed(entry, "starting to check the memory of"))?;
        let machine = vmm.restore(plan, &snapshot.dir());
        let checked = check.map_or(Ok(()), |check| {
            check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let machine = machine.map_err(vmm_failed(entry, "restoring"))?;
        if let Err(error) = checked {
            end(entry.id(), machine.process())?;
            return Err(damaged(error));
        }
        Ok(machine)
    })
}

/// Refuses a snapshot that another VMM made, or the same one at another version.
fn check_origin(record: &Record, snapshot: &Snapshot, here: &VmmIdentity) -> Result<(), Error> {
    let made = &snapshot.manifest().vmm;
    let machine = machine_of(&record.spec, here);
    let differs = [
        ("VMM", made.name.as_str(), here.name),
        ("version", &made.version, &here.version),
        ("accelerator", &made.accelerator, here.accelerator),
        ("machine", &made.machine, &machine),
        ("CPU", &made.cpu, &here.cpu),
        ("program digest", &made.digest, &here.digest),
    ]
    .into_iter()
    .find(|(_, then, now)| then != now);
    match differs {
        None => Ok(()),
        Some((what, then, now)) => Err(Error::Foreign {
            id: record.id.clone(),
            why: format!(
                "it was made with {what} `{then}` and this host has `{now}`; reinstall {} {}, \
                 or delete the sandbox",
                made.name, made.version
            ),
        }),
    }
}

/// Makes a consumed snapshot the truth again, if its guest has provably not run: one that
/// executes anything changes memory that is mapped. Of copied memory the VMM says it.
fn unconsume(
    lifecycle: &Lifecycle,
    entry: &Entry,
    generation: u64,
    cancel: &Cancel,
) -> Result<(), Error> {
    let home = lifecycle.store.home(&entry.record());
    let failed = snapshot_failed(entry, "taking back the snapshot of");
    home.unconsume(entry.id(), generation, cancel).map_err(failed)
}
