//! Bringing what was cut off to an end, by what is on disk and what runs.
//!
//! The manifest is the truth about a snapshot and the process about running; the
//! record only says what was intended. Nothing that lives is killed unless the
//! record proves that it must be: its snapshot is committed, or it has not run one
//! instruction yet.
//!
//! | record says | on disk | VMM | so it becomes |
//! |---|---|---|---|
//! | `running` | | alive | `running`, adopted; resumed if it was paused |
//! | `running` | | dead | `stopped`, with the reason |
//! | `snapshotting` | committed | any | killed; `snapshotted` |
//! | `snapshotting` | not committed | alive | partial dropped, resumed; `running` |
//! | `snapshotting` | not committed | dead | `stopped`, with the reason |
//! | `restoring` | not consumed | any | killed, it never ran; `snapshotted` |
//! | `restoring` | consumed | alive | resumed if it was paused; `running` |
//! | `restoring` | consumed | dead | `snapshotted` if its memory proves it, else `stopped` |
//! | `restoring` | consumed, unreadable | dead | left as it is, and read again |
//! | `restoring` | consumed | dead by a power cut | `stopped` |
//! | `booting` | | alive and running | `running` |
//! | `booting` | | inert or dead | killed; `stopped` |
//! | `booting`, process recorded | | does not answer | left as it is, and asked again |
//! | `deleting` | any | any | killed, removed |
//! | `snapshotted` | committed, as recorded | alive, by its token | killed |
//! | `stopped` | no memory | alive, by its token | killed |

//! A record may be behind after a power cut, though never after a kill of the daemon: its
//! last changes may be missing. Each operation brings its intent to the disk before its
//! commit point, and so everything before it; so what can be missing is this:
//!
//! - *the intent of a sleep or a wake.* Then it had not reached its commit point. The
//!   record says `running`, of a guest that is gone with the host, or `snapshotted`, of a
//!   snapshot that nobody consumed: as it is.
//! - *the end of a sleep*, `snapshotted`. The record says `snapshotting`, and the manifest
//!   is there: the sleep is finished, as after a kill at that place.
//! - *the process or the end of a wake*, `running`. The record says `restoring`, and the
//!   snapshot is consumed. The guest may have run, and is gone.
//!
//! And the memory file proves nothing then: what the guest wrote to it may never have left
//! the page cache, so it may be as it was though the guest ran.

use std::{thread, time::Duration};

use super::{
    Entry, Error, Lifecycle, Outcome, Signal, chain,
    delete::{destroy, restore_deletions},
    error::{host_failed, snapshot_failed, vmm_failed},
    evidence::{Tokened, is_leftover, process_of, tokened},
    exits::{LOST, lose, release, why_lost},
    files::Files,
    memory_of,
    operation::Op,
    plan::{enter, plan},
    room::{drop_copy_later, give_back_room},
};
use crate::{
    lifecycle::Held,
    machines::{Live, balloon::deflate, end},
    sandbox::{Cause, RowId, SnapshotFacts, State, Step},
    snapshot::{self, Memory},
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::{clock::boot_id, files::sync_dir, process::Process},
};

/// How many sandboxes are settled at once at start-up. A VMM that does not answer takes
/// its time, and must not take that of all the others.
const WORKERS: usize = 16;

/// What start-up found and did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Guests that run and were taken over.
    pub adopted: usize,
    /// Operations that were finished or undone.
    pub settled: usize,
    /// Records that could not be brought to an end; their `error` says why.
    pub failed: usize,
    /// Leftover processes that were killed.
    pub orphans: usize,
    /// Records that are still being brought to an end.
    pub late: usize,
}

/// What the threads that settle records share.
#[derive(Debug, Default)]
struct Settling {
    /// A leaf lock.
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    /// Those that no thread has begun with.
    left: Vec<Arc<Entry>>,
    unfinished: usize,
    done: Reconciled,
}

/// Counts a record as finished when it is dropped.
struct Finished<'a>(&'a Settling);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        lock(&self.0.table).unfinished -= 1;
        self.0.changed.notify_all();
    }
}

impl Lifecycle {
    /// Brings every record to a legal state. Called once, before the mount.
    ///
    /// It waits for at most `limit`: a VMM that does not answer must not keep the tree of all
    /// others from being served. Who is not settled by then has the state that is recorded, and
    /// is settled by threads that go on, under its lock; an operation on it waits for that.
    pub fn reconcile(self: &Arc<Self>, limit: Duration) -> Reconciled {
        self.activity.restore_holds();
        restore_deletions(self);
        let all = self.index.entries_after(RowId(0));
        let settling = Arc::new(Settling::default());
        let left: Vec<_> = all.filter(|entry| is_unsettled(self, entry)).collect();
        let workers = left.len().min(WORKERS);
        let table = Table { unfinished: left.len(), left, done: Reconciled::default() };
        *lock(&settling.table) = table;
        for number in 0..workers {
            let (this, shared) = (Arc::clone(self), Arc::clone(&settling));
            let beside = thread::Builder::new().name("dozed-settle".to_owned());
            if let Err(error) = beside.spawn(move || settle_all(&this, &shared)) {
                tracing::warn!(%error, "settling with fewer threads");
                if number == 0 {
                    settle_all(self, &settling);
                }
                break;
            }
        }
        let is_unfinished = |table: &mut Table| table.unfinished > 0;
        let table =
            wait_while_within(&settling.changed, lock(&settling.table), limit, is_unfinished);
        let mut done = Reconciled { late: table.unfinished, ..table.done };
        drop(table);
        done.orphans = kill_orphans(self);
        self.networks.reconcile(|entry, error| self.notes.note(entry, error));
        self.trash.empty_later();
        done
    }

    /// Brings what an operation left that could not be taken back to an end, if that can be
    /// done by now: its VMM answers again, or has died. Why the operation failed stays in
    /// `error`.
    ///
    /// # Errors
    /// Where it still cannot.
    pub fn settle_leftover(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        let op = self.operations.begin(held, entry)?;
        if !is_unsettled(self, entry) {
            return Ok(Outcome::Already);
        }
        recover(self, &op).map(|()| Outcome::Done)
    }
}

fn settle_all(lifecycle: &Lifecycle, settling: &Settling) {
    loop {
        let Some(entry) = lock(&settling.table).left.pop() else { return };
        // Also where this panics.
        let _finished = Finished(settling);
        reconcile_one(lifecycle, &entry, settling);
    }
}

fn reconcile_one(lifecycle: &Lifecycle, entry: &Arc<Entry>, settling: &Settling) {
    let held = Held::new(lifecycle.locks.lock(entry.id()), Cause::Reconcile);
    // Whoever had the lock before us may have settled or deleted it.
    if lifecycle.index.by_row(entry.row()).is_none() || !is_unsettled(lifecycle, entry) {
        return;
    }
    let before = entry.record().state();
    let recovered = match lifecycle.operations.begin(&held, entry) {
        Ok(op) => recover(lifecycle, &op),
        Err(Error::ShuttingDown) => return,
        Err(_) => destroy(lifecycle, &held, entry), // Its deletion is what is to be finished.
    };
    let adopted = before == State::Running && lifecycle.machines.get(entry.row()).is_some();
    let mut table = lock(&settling.table);
    match &recovered {
        Ok(()) if adopted => table.done.adopted += 1,
        Ok(()) => table.done.settled += 1,
        Err(_) => table.done.failed += 1,
    }
    drop(table);
    if let Err(error) = recovered {
        tracing::error!(id = %entry.id(), error = chain(&error), "settling at start");
        lifecycle.notes.note(entry, &error);
        lifecycle.unsettled.later(entry.row());
    }
}

/// Kills what has this store's token but belongs to no machine that we know, if it is
/// proven to be of no use: a VMM that a crash left inert, or beside its committed snapshot.
fn kill_orphans(lifecycle: &Lifecycle) -> usize {
    let mut killed = 0;
    for Tokened { process, row } in tokened(lifecycle) {
        let pid = process.identity().pid;
        let is_known =
            lifecycle.machines.all().iter().any(|(_, live)| live.process.identity().pid == pid);
        let entry = row.and_then(|row| lifecycle.by_row(row));
        // Whoever has the lock is about to know it.
        let held = entry.as_ref().and_then(|entry| lifecycle.locks.try_lock(entry.id()));
        let (Some(entry), Some(_held), false) = (entry, held, is_known) else { continue };
        if is_leftover(lifecycle, &entry) {
            tracing::warn!(id = %entry.id(), pid, "killing a leftover VMM");
            process.kill();
            killed += 1;
        } else if entry.record().process().is_none_or(|known| known.pid != pid) {
            // One that could not be adopted is told of by its sandbox.
            tracing::warn!(id = %entry.id(), pid, "leaving a VMM that may still be needed");
        }
    }
    killed
}

pub(super) fn is_unsettled(lifecycle: &Lifecycle, entry: &Entry) -> bool {
    if lifecycle.operations.is_deleting(entry.row()) {
        return true;
    }
    match entry.record().state() {
        State::Stopped | State::Snapshotted => false,
        State::Running => {
            let live = lifecycle.machines.get(entry.row());
            live.is_none_or(|live| live.process.exited().is_some())
        }
        State::Booting | State::Snapshotting | State::Restoring | State::Deleting => true,
    }
}

/// Brings what an earlier operation left to an end, before a new one begins.
pub(super) fn settle(lifecycle: &Lifecycle, op: &Op<'_>) -> Result<(), Error> {
    if is_unsettled(lifecycle, op.entry) { recover(lifecycle, op) } else { Ok(()) }
}

/// Brings a record to the state that the table above says.
pub(super) fn recover(lifecycle: &Lifecycle, op: &Op<'_>) -> Result<(), Error> {
    let (held, entry) = (op.held, op.entry);
    if lifecycle.operations.is_deleting(entry.row()) {
        return destroy(lifecycle, held, entry);
    }
    let process = process_of(lifecycle, entry)?;
    let record = entry.record();
    match (record.state(), process) {
        (State::Running, Some(process)) => take_over(lifecycle, op, &process).map(drop),
        (State::Running, None) => lose(lifecycle, held, entry, &why_lost(lifecycle, entry)),
        (State::Snapshotting, process) => recover_sleep(lifecycle, op, process),
        (State::Restoring, process) => recover_wake(lifecycle, op, process),
        (State::Booting, process) => recover_boot(lifecycle, op, process),
        (State::Deleting, _) => destroy(lifecycle, held, entry),
        (State::Stopped | State::Snapshotted, _) => Ok(()),
    }
}

/// A sleep is undone before its commit point, and finished after it.
fn recover_sleep(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    process: Option<Arc<Process>>,
) -> Result<(), Error> {
    let (held, entry) = (op.held, op.entry);
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let generation = record.generation + 1;
    let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
    if survey.committed == Some(generation) {
        // Whoever was cut off may have had no time to bring the name to the disk.
        sync_dir(home.dir()).map_err(host_failed(entry, "syncing the directory of"))?;
        if let Some(process) = process {
            end(entry.id(), &process)?;
        }
        release(lifecycle, entry)?;
        let failed = snapshot_failed(entry, "finishing the snapshot of");
        home.end_run().map_err(failed)?;
        let bytes = home.snapshot_bytes(&record.id, generation).map_err(failed)?;
        let bytes = give_back_room(lifecycle, &record, generation).unwrap_or(bytes);
        let snapshot = SnapshotFacts { generation, bytes, at: lifecycle.clock.now() };
        lifecycle.records.step(held, entry, Step::Slept(snapshot), |record| {
            record.generation += 1;
            record.sleeps += 1;
            record.retry_at = None;
        })?;
        lifecycle.networks.after_sleep(entry);
        return Ok(());
    }
    let Some(process) = process else {
        return lose(lifecycle, held, entry, &why_lost(lifecycle, entry));
    };
    let failed = snapshot_failed(entry, "undoing the snapshot of");
    let memory = memory_of(lifecycle.vmms.of(&record)?.as_ref(), &record);
    home.recover_partials(memory).map_err(failed)?;
    take_over(lifecycle, op, &process)?;
    lifecycle.records.step(held, entry, Step::Undo, |_| ())?;
    Ok(())
}

/// A wake is undone before its commit point, and finished after it.
fn recover_wake(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    process: Option<Arc<Process>>,
) -> Result<(), Error> {
    let (held, entry) = (op.held, op.entry);
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
    let generation = record.snapshot().map(|facts| facts.generation);
    let consumed = survey.committed.is_none();
    let memory = || lifecycle.vmms.of(&record).map(|vmm| memory_of(vmm.as_ref(), &record));
    if consumed {
        // Before the guest runs the disk has to have it that its snapshot is used up.
        sync_dir(home.dir()).map_err(host_failed(entry, "syncing the directory of"))?;
    }
    match process {
        Some(process) if consumed => {
            take_over(lifecycle, op, &process)?;
            // Else it would be idle since before it slept, and sleep again at once.
            lifecycle.activity.saw(entry, Signal::Wake);
            let process = process.identity().clone();
            lifecycle.records.step(held, entry, Step::Woken(process), |record| {
                record.generation += 1;
                record.wakes += 1;
                record.retry_at = None;
            })?;
            drop_copy_later(lifecycle, &record, memory()?);
            return Ok(());
        }
        Some(process) => drop(end(entry.id(), &process)?),
        None => {}
    }
    release(lifecycle, entry)?;
    if consumed {
        // That a copy is as it was proves nothing, and whoever knew is gone. Nor does what
        // is left of a mapping on the disk, if its pages went with the host: the
        // process was recorded before the snapshot was consumed, and in which boot.
        let proves = memory()? == Memory::Mapped && is_of_this_boot(entry)?;
        let back = generation
            .filter(|_| proves)
            .map(|generation| home.unconsume(&record.id, generation, &op.cancel));
        match back {
            Some(Ok(())) => {}
            // It has run, or its memory is damaged.
            Some(Err(snapshot::Error::Damaged { .. } | snapshot::Error::Absent { .. })) | None => {
                return lose(lifecycle, held, entry, LOST);
            }
            // That it could not be read proves nothing, so it is kept and read again.
            Some(Err(error)) => {
                return Err(snapshot_failed(entry, "taking back the snapshot of")(error));
            }
        }
    }
    if let Some(generation) = generation {
        give_back_room(lifecycle, &record, generation);
    }
    lifecycle.records.step(held, entry, Step::Undo, |_| ())?;
    lifecycle.networks.after_sleep(entry);
    Ok(())
}

/// Says whether the VMM in the record was started since the host was.
fn is_of_this_boot(entry: &Entry) -> Result<bool, Error> {
    let boot_id = boot_id().map_err(host_failed(entry, "reading the boot id of"))?;
    Ok(entry.record().process().is_some_and(|process| *process.boot_id == *boot_id))
}

/// A boot that got as far as running is finished; an inert VMM is ended.
fn recover_boot(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    process: Option<Arc<Process>>,
) -> Result<(), Error> {
    let (held, entry) = (op.held, op.entry);
    if let Some(process) = process {
        // One that was not recorded has not been told to run, unless the index lost its end.
        // Whether it runs its VMM says; while one that was recorded does not answer, the
        // guest may run.
        let is_recorded = entry.record().process() == Some(process.identity());
        let runs = attach(lifecycle, op, &process).and_then(|live| {
            lock(&live.machine).running().map_err(vmm_failed(entry, "looking at"))
        });
        match runs {
            Ok(true) => {
                lifecycle.activity.saw(entry, Signal::Boot);
                let booted = Step::Booted(process.identity().clone());
                lifecycle.records.step(held, entry, booted, |record| record.retry_at = None)?;
                return Ok(());
            }
            Err(error) if is_recorded => return Err(error),
            Ok(false) | Err(_) => {}
        }
        end(entry.id(), &process)?;
    } else if entry.record().process().is_some() {
        return lose(lifecycle, held, entry, &why_lost(lifecycle, entry)); // It may have run.
    }
    release(lifecycle, entry)?;
    lifecycle.networks.abandon(entry);
    let home = lifecycle.store.home(&entry.record());
    home.end_run().map_err(snapshot_failed(entry, "cleaning up after"))?;
    lifecycle.records.step(held, entry, Step::Undo, |_| ())?;
    Ok(())
}

/// Enters a process as the machine of a sandbox, and sees to it that its vCPUs run.
fn take_over(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    process: &Arc<Process>,
) -> Result<Arc<Live>, Error> {
    let entry = op.entry;
    let live = attach(lifecycle, op, process)?;
    let mut machine = lock(&live.machine);
    if !machine.running().map_err(vmm_failed(entry, "looking at"))? {
        machine.resume().map_err(vmm_failed(entry, "resuming"))?;
    }
    drop(machine);
    // A daemon may have died between having asked for memory and giving it back.
    deflate(&entry.record(), &live);
    Ok(live)
}

fn attach(lifecycle: &Lifecycle, op: &Op<'_>, process: &Arc<Process>) -> Result<Arc<Live>, Error> {
    let entry = op.entry;
    if let Some(live) = lifecycle.machines.get(entry.row())
        && Arc::ptr_eq(&live.process, process)
    {
        return Ok(live);
    }
    let record = entry.record();
    let run = lifecycle.store.home(&record).live_dir(record.generation);
    // It has its files.
    let plan = plan(lifecycle, &record, &run, &Files::default(), None, &op.cancel)?;
    let vmm = lifecycle.vmms.of(&record)?;
    let machine = vmm.adopt(&plan, Arc::clone(process)).map_err(vmm_failed(entry, "adopting"))?;
    lifecycle.admission.book_adopted(record.row, record.spec.memory_bytes);
    enter(lifecycle, entry, machine)
}
