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

use std::{io, thread, time::Duration};

use super::{
    Entry, Error, Lifecycle, Outcome, Signal, chain,
    error::{host_failed, snapshot_failed, vmm_failed},
    evidence::Tokened,
    exits::LOST,
    files::Files,
    memory_of,
    operation::Op,
};
use crate::{
    lifecycle::Held,
    machines::{Live, balloon::deflate, end},
    sandbox::{Cause, Record, RowId, SnapshotFacts, State, Step},
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
        self.restore_deletions();
        let all = self.index.entries_after(RowId(0));
        let settling = Arc::new(Settling::default());
        let left: Vec<_> = all.filter(|entry| self.is_unsettled(entry)).collect();
        let workers = left.len().min(WORKERS);
        let table = Table { unfinished: left.len(), left, done: Reconciled::default() };
        *lock(&settling.table) = table;
        for number in 0..workers {
            let (this, shared) = (Arc::clone(self), Arc::clone(&settling));
            let beside = thread::Builder::new().name("dozed-settle".to_owned());
            if let Err(error) = beside.spawn(move || this.settle_all(&shared)) {
                tracing::warn!(%error, "settling with fewer threads");
                if number == 0 {
                    self.settle_all(&settling);
                }
                break;
            }
        }
        let is_unfinished = |table: &mut Table| table.unfinished > 0;
        let table =
            wait_while_within(&settling.changed, lock(&settling.table), limit, is_unfinished);
        let mut done = Reconciled { late: table.unfinished, ..table.done };
        drop(table);
        done.orphans = self.kill_orphans();
        self.networks.reconcile(|entry, error| self.note(entry, error));
        self.empty_trash_later();
        done
    }

    fn settle_all(&self, settling: &Settling) {
        loop {
            let Some(entry) = lock(&settling.table).left.pop() else { return };
            // Also where this panics.
            let _finished = Finished(settling);
            self.reconcile_one(&entry, settling);
        }
    }

    fn reconcile_one(&self, entry: &Arc<Entry>, settling: &Settling) {
        let held = Held::new(self.locks.lock(entry.id()), Cause::Reconcile);
        // Whoever had the lock before us may have settled or deleted it.
        if self.index.by_row(entry.row()).is_none() || self.is_settled(entry) {
            return;
        }
        let before = entry.record().state();
        let recovered = match self.operations.begin(&held, entry) {
            Ok(op) => self.recover(&op),
            Err(Error::ShuttingDown) => return,
            Err(_) => self.destroy(&held, entry), // Its deletion is what is to be finished.
        };
        let adopted = before == State::Running && self.machines.get(entry.row()).is_some();
        let mut table = lock(&settling.table);
        match &recovered {
            Ok(()) if adopted => table.done.adopted += 1,
            Ok(()) => table.done.settled += 1,
            Err(_) => table.done.failed += 1,
        }
        drop(table);
        if let Err(error) = recovered {
            tracing::error!(id = %entry.id(), error = chain(&error), "settling at start");
            self.note(entry, &error);
            self.settle_later(entry.row());
        }
    }

    /// Kills what has this store's token but belongs to no machine that we know, if it is
    /// proven to be of no use: a VMM that a crash left inert, or beside its committed snapshot.
    fn kill_orphans(&self) -> usize {
        let mut killed = 0;
        for Tokened { process, row } in self.tokened() {
            let pid = process.identity().pid;
            let is_known =
                self.machines.all().iter().any(|(_, live)| live.process.identity().pid == pid);
            let entry = row.and_then(|row| self.by_row(row));
            // Whoever has the lock is about to know it.
            let held = entry.as_ref().and_then(|entry| self.locks.try_lock(entry.id()));
            let (Some(entry), Some(_held), false) = (entry, held, is_known) else { continue };
            if self.is_leftover(&entry) {
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

    /// Says whether a record is as it says: nothing was cut off, nothing got lost.
    #[must_use]
    pub fn is_settled(&self, entry: &Entry) -> bool {
        !self.is_unsettled(entry)
    }

    fn is_unsettled(&self, entry: &Entry) -> bool {
        if self.operations.is_deleting(entry.row()) {
            return true;
        }
        match entry.record().state() {
            State::Stopped | State::Snapshotted => false,
            State::Running => {
                let live = self.machines.get(entry.row());
                live.is_none_or(|live| live.process.exited().is_some())
            }
            State::Booting | State::Snapshotting | State::Restoring | State::Deleting => true,
        }
    }

    /// Brings what an earlier operation left to an end, before a new one begins.
    pub(super) fn settle(&self, op: &Op<'_>) -> Result<(), Error> {
        if self.is_unsettled(op.entry) { self.recover(op) } else { Ok(()) }
    }

    /// Brings what an operation left that could not be taken back to an end, if that can be
    /// done by now: its VMM answers again, or has died. Why the operation failed stays in
    /// `error`.
    ///
    /// # Errors
    /// Where it still cannot.
    pub fn settle_leftover(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        let op = self.operations.begin(held, entry)?;
        if self.is_settled(entry) {
            return Ok(Outcome::Already);
        }
        self.recover(&op).map(|()| Outcome::Done)
    }

    /// Brings a record to the state that the table above says.
    pub(super) fn recover(&self, op: &Op<'_>) -> Result<(), Error> {
        let (held, entry) = (op.held, op.entry);
        if self.operations.is_deleting(entry.row()) {
            return self.destroy(held, entry);
        }
        let process = self.process_of(entry)?;
        let record = entry.record();
        match (record.state(), process) {
            (State::Running, Some(process)) => self.take_over(op, &process).map(drop),
            (State::Running, None) => self.lose(held, entry, &self.why_lost(entry)),
            (State::Snapshotting, process) => self.recover_sleep(op, process),
            (State::Restoring, process) => self.recover_wake(op, process),
            (State::Booting, process) => self.recover_boot(op, process),
            (State::Deleting, _) => self.destroy(held, entry),
            (State::Stopped | State::Snapshotted, _) => Ok(()),
        }
    }

    /// A sleep is undone before its commit point, and finished after it.
    fn recover_sleep(&self, op: &Op<'_>, process: Option<Arc<Process>>) -> Result<(), Error> {
        let (held, entry) = (op.held, op.entry);
        let record = entry.record();
        let home = self.home(&record);
        let generation = record.generation + 1;
        let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
        if survey.committed == Some(generation) {
            // Whoever was cut off may have had no time to bring the name to the disk.
            sync_dir(home.dir()).map_err(host_failed(entry, "syncing the directory of"))?;
            if let Some(process) = process {
                end(entry.id(), &process)?;
            }
            self.release(entry)?;
            let failed = snapshot_failed(entry, "finishing the snapshot of");
            home.end_run().map_err(failed)?;
            let bytes = home.snapshot_bytes(&record.id, generation).map_err(failed)?;
            let bytes = self.give_back_room(&record, generation).unwrap_or(bytes);
            let snapshot = SnapshotFacts { generation, bytes, at: self.now() };
            self.step(held, entry, Step::Slept(snapshot), |record| {
                record.generation += 1;
                record.sleeps += 1;
                record.retry_at = None;
            })?;
            self.networks.after_sleep(entry);
            return Ok(());
        }
        let Some(process) = process else {
            return self.lose(held, entry, &self.why_lost(entry));
        };
        let failed = snapshot_failed(entry, "undoing the snapshot of");
        let memory = memory_of(self.vmms.of(&record)?.as_ref(), &record);
        home.recover_partials(memory).map_err(failed)?;
        self.take_over(op, &process)?;
        self.step(held, entry, Step::Undo, |_| ())?;
        Ok(())
    }

    /// A wake is undone before its commit point, and finished after it.
    fn recover_wake(&self, op: &Op<'_>, process: Option<Arc<Process>>) -> Result<(), Error> {
        let (held, entry) = (op.held, op.entry);
        let record = entry.record();
        let home = self.home(&record);
        let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
        let generation = record.snapshot().map(|facts| facts.generation);
        let consumed = survey.committed.is_none();
        let memory = || self.vmms.of(&record).map(|vmm| memory_of(vmm.as_ref(), &record));
        if consumed {
            // Before the guest runs the disk has to have it that its snapshot is used up.
            sync_dir(home.dir()).map_err(host_failed(entry, "syncing the directory of"))?;
        }
        match process {
            Some(process) if consumed => {
                self.take_over(op, &process)?;
                // Else it would be idle since before it slept, and sleep again at once.
                self.activity.saw(entry, Signal::Wake);
                let process = process.identity().clone();
                self.step(held, entry, Step::Woken(process), |record| {
                    record.generation += 1;
                    record.wakes += 1;
                    record.retry_at = None;
                })?;
                self.drop_copy_later(&record, memory()?);
                return Ok(());
            }
            Some(process) => drop(end(entry.id(), &process)?),
            None => {}
        }
        self.release(entry)?;
        if consumed {
            // That a copy is as it was proves nothing, and whoever knew is gone. Nor does what
            // is left of a mapping on the disk, if its pages went with the host: the
            // process was recorded before the snapshot was consumed, and in which boot.
            let proves = memory()? == Memory::Mapped && self.is_of_this_boot(entry)?;
            let back = generation
                .filter(|_| proves)
                .map(|generation| home.unconsume(&record.id, generation, &op.cancel));
            match back {
                Some(Ok(())) => {}
                // It has run, or its memory is damaged.
                Some(Err(snapshot::Error::Damaged { .. } | snapshot::Error::Absent { .. }))
                | None => return self.lose(held, entry, LOST),
                // That it could not be read proves nothing, so it is kept and read again.
                Some(Err(error)) => {
                    return Err(snapshot_failed(entry, "taking back the snapshot of")(error));
                }
            }
        }
        if let Some(generation) = generation {
            self.give_back_room(&record, generation);
        }
        self.step(held, entry, Step::Undo, |_| ())?;
        self.networks.after_sleep(entry);
        Ok(())
    }

    /// Says whether the VMM in the record was started since the host was.
    fn is_of_this_boot(&self, entry: &Entry) -> Result<bool, Error> {
        let boot_id = boot_id().map_err(host_failed(entry, "reading the boot id of"))?;
        Ok(entry.record().process().is_some_and(|process| *process.boot_id == *boot_id))
    }

    /// A boot that got as far as running is finished; an inert VMM is ended.
    fn recover_boot(&self, op: &Op<'_>, process: Option<Arc<Process>>) -> Result<(), Error> {
        let (held, entry) = (op.held, op.entry);
        if let Some(process) = process {
            // One that was not recorded has not been told to run, unless the index lost its end.
            // Whether it runs its VMM says; while one that was recorded does not answer, the
            // guest may run.
            let is_recorded = entry.record().process() == Some(process.identity());
            let runs = self.attach(op, &process).and_then(|live| {
                lock(&live.machine).running().map_err(vmm_failed(entry, "looking at"))
            });
            match runs {
                Ok(true) => {
                    self.activity.saw(entry, Signal::Boot);
                    let booted = Step::Booted(process.identity().clone());
                    self.step(held, entry, booted, |record| record.retry_at = None)?;
                    return Ok(());
                }
                Err(error) if is_recorded => return Err(error),
                Ok(false) | Err(_) => {}
            }
            end(entry.id(), &process)?;
        } else if entry.record().process().is_some() {
            return self.lose(held, entry, &self.why_lost(entry)); // It may have run.
        }
        self.release(entry)?;
        self.networks.abandon(entry);
        let home = self.home(&entry.record());
        home.end_run().map_err(snapshot_failed(entry, "cleaning up after"))?;
        self.step(held, entry, Step::Undo, |_| ())?;
        Ok(())
    }

    /// Enters a process as the machine of a sandbox, and sees to it that its vCPUs run.
    fn take_over(&self, op: &Op<'_>, process: &Arc<Process>) -> Result<Arc<Live>, Error> {
        let entry = op.entry;
        let live = self.attach(op, process)?;
        let mut machine = lock(&live.machine);
        if !machine.running().map_err(vmm_failed(entry, "looking at"))? {
            machine.resume().map_err(vmm_failed(entry, "resuming"))?;
        }
        drop(machine);
        // A daemon may have died between having asked for memory and giving it back.
        deflate(&entry.record(), &live);
        Ok(live)
    }

    fn attach(&self, op: &Op<'_>, process: &Arc<Process>) -> Result<Arc<Live>, Error> {
        let entry = op.entry;
        if let Some(live) = self.machines.get(entry.row())
            && Arc::ptr_eq(&live.process, process)
        {
            return Ok(live);
        }
        let record = entry.record();
        let run = self.home(&record).live_dir(record.generation);
        // It has its files.
        let plan = self.plan(&record, &run, &Files::default(), None, &op.cancel)?;
        let vmm = self.vmms.of(&record)?;
        let machine =
            vmm.adopt(&plan, Arc::clone(process)).map_err(vmm_failed(entry, "adopting"))?;
        self.admission.book_adopted(record.row, record.spec.memory_bytes);
        self.enter(entry, machine)
    }

    /// Returns the VMM's process of a sandbox, if it lives: the one that we know, the
    /// recorded one, or - where a crash came before the record - the one that has its
    /// token.
    pub(super) fn process_of(&self, entry: &Entry) -> Result<Option<Arc<Process>>, Error> {
        let record = entry.record();
        let failed =
            |source| Error::Host { doing: "looking for the VMM of", id: record.id.clone(), source };
        if let Some(live) = self.machines.get(record.row) {
            return Ok(live.process.exited().is_none().then(|| Arc::clone(&live.process)));
        }
        let token = self.token(record.row);
        if let Some(identity) = record.process() {
            let adopted = Process::adopt(identity, &token).map_err(failed)?;
            return self.first_of_ours(&record, adopted).map_err(failed);
        }
        match record.state() {
            State::Booting | State::Restoring | State::Deleting => {
                let found = self.named(&token).map_err(failed)?;
                let found = found.into_iter().map(|(process, _)| process);
                self.first_of_ours(&record, found).map_err(failed)
            }
            State::Stopped | State::Running | State::Snapshotting | State::Snapshotted => Ok(None),
        }
    }

    /// Returns the first that uses the files of this sandbox. The record and the token may be
    /// in a copy of the store too, whose VMMs are not ours.
    fn first_of_ours(
        &self,
        record: &Record,
        found: impl IntoIterator<Item = Arc<Process>>,
    ) -> io::Result<Option<Arc<Process>>> {
        for process in found {
            match self.uses_files_of(record.row, &process) {
                Ok(true) => return Ok(Some(process)),
                Ok(false) => {
                    let pid = process.identity().pid;
                    tracing::warn!(
                        id = %record.id, pid,
                        "a VMM of this name uses none of the files of this store and is left alone"
                    );
                }
                Err(_) if process.exited().is_some() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}
