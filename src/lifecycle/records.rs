//! Changing the records of sandboxes: each change is written to the index, counted and published.

use super::{ChangeFeed, Entry, Error, Held, Metrics, operation::Op};
use crate::{
    activity::Activities,
    events::{Event, Wakeup, What},
    index::{Commit, Index},
    sandbox::{Cause, Record, State, Step, Timestamp, day_of},
    sync::Arc,
    sys::{clock::Clock, files::Reserve},
};

/// Changes the records of sandboxes.
#[derive(Debug)]
pub struct Records {
    pub(super) index: Arc<Index>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) activity: Arc<Activities>,
    /// Notified when something may be due earlier than the reaper thinks.
    pub(super) reaper_wakeup: Arc<Wakeup>,
    pub(super) feed: Arc<ChangeFeed>,
    pub(super) metrics: Metrics,
    /// Room for what has to be written to a full disk.
    pub(super) reserve: Reserve,
}

impl Records {
    /// Returns what has happened since the start, in numbers.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Takes one step of the table, durably, and publishes it.
    pub(super) fn step(
        &self,
        held: &Held,
        entry: &Entry,
        step: Step,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        self.step_because(held.cause(), held, entry, step, change)
    }

    /// Takes a step for another cause than the lock was taken for.
    pub(super) fn step_because(
        &self,
        cause: &Cause,
        held: &Held,
        entry: &Entry,
        step: Step,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        let (before, now) = (entry.record(), self.clock.now());
        self.make_room_for(&step);
        let record = self
            .index
            .advance(held, entry, &step, now, |record| {
                self.note_waking(cause, &step, &before, record);
                change(record);
            })
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        self.publish(&step, cause, &before, &record);
        Ok(record)
    }

    /// As `step`, but a power cut may take it back until the commit is waited for, or
    /// something on the disk proves it.
    pub(super) fn step_unsynced(
        &self,
        held: &Held,
        entry: &Entry,
        step: Step,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        let (before, now) = (entry.record(), self.clock.now());
        self.make_room_for(&step);
        let (record, commit) = self
            .index
            .advance_unsynced(held, entry, &step, now, |record| {
                self.note_waking(held.cause(), &step, &before, record);
                change(record);
            })
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        self.publish(&step, held.cause(), &before, &record);
        Ok((record, commit))
    }

    /// Records what an operation is about to do, and tells. A crash after this is found at
    /// start-up.
    pub(super) fn intend(
        &self,
        op: &mut Op<'_>,
        step: Step,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), Error> {
        let (_, commit) = self.step_unsynced(op.held, op.entry, step, change)?;
        self.index.begin_sync(commit);
        op.intent = Some(commit);
        Ok(())
    }

    /// Waits until the intent of an operation is on the disk.
    pub(super) fn sync_intent(&self, op: &Op<'_>) -> Result<(), Error> {
        op.intent.map_or(Ok(()), |commit| self.sync(op.entry, commit))
    }

    /// Changes the record without a step of the table.
    pub(super) fn amend(
        &self,
        held: &Held,
        entry: &Entry,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        self.index
            .amend(held, entry, change)
            .map_err(|source| Error::Index { id: entry.id().clone(), source })
    }

    /// As `amend`, but a power cut may take it back.
    pub(super) fn amend_unsynced(
        &self,
        held: &Held,
        entry: &Entry,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        self.index
            .amend_unsynced(held, entry, change)
            .map_err(|source| Error::Index { id: entry.id().clone(), source })
    }

    /// Puts off the reaper's next try with a sandbox.
    ///
    /// # Errors
    /// The index's.
    pub fn put_off(&self, held: &Held, entry: &Entry, until: Timestamp) -> Result<(), Error> {
        self.amend(held, entry, |record| record.retry_at = Some(until)).map(drop)
    }

    /// Waits until what was recorded is on the disk.
    pub(super) fn sync(&self, entry: &Entry, recorded: Commit) -> Result<(), Error> {
        self.index.sync(recorded).map_err(|source| Error::Index { id: entry.id().clone(), source })
    }

    /// Returns the day of the wall clock, in UTC.
    #[must_use]
    pub fn today(&self) -> i32 {
        day_of(self.clock.wall(self.clock.now()).as_second())
    }

    /// Publishes that a sandbox was created.
    pub(super) fn publish_created(&self, held: &Held, entry: &Entry) {
        self.feed.publish_created(&self.event(&entry.record(), What::Created, held.cause()));
    }

    /// Publishes that an operation failed.
    pub(super) fn publish_failure(&self, held: &Held, entry: &Entry, error: Box<str>) {
        let event = self.event(&entry.record(), What::Failed { error }, held.cause());
        self.feed.publish_to_log(&event);
    }

    /// Publishes that a sandbox was deleted. The kernel knows of one deleted by `rmdir`.
    pub(super) fn publish_deletion(&self, held: &Held, entry: &Entry) {
        let event = self.event(&entry.record(), What::Deleted, held.cause());
        self.feed.publish_gone(&event, matches!(held.cause(), Cause::Rmdir(_)));
    }

    /// Returns what wakes the reaper before its next tick.
    #[must_use]
    pub fn reaper_wakeup(&self) -> &Wakeup {
        &self.reaper_wakeup
    }

    /// Returns the change feed.
    #[must_use]
    pub fn feed(&self) -> &Arc<ChangeFeed> {
        &self.feed
    }

    /// Sees to it that the end of an operation or of a sandbox can be recorded on a full disk.
    /// What begins something is refused there.
    pub(super) fn make_room_for(&self, step: &Step) {
        match step {
            Step::Delete
            | Step::Lost
            | Step::Undo
            | Step::Slept(_)
            | Step::Woken(_)
            | Step::Booted(_) => {
                self.reserve.give_up_if_full();
            }
            Step::Boot | Step::Wake | Step::Sleep => {}
        }
    }

    /// Makes the reserve anew that was given up, when there is room again. Called at each tick.
    pub fn keep_reserve(&self) {
        self.reserve.keep();
    }

    /// Remembers of a step how the sandbox came to be awake, or no longer is.
    fn note_waking(&self, cause: &Cause, step: &Step, before: &Record, record: &mut Record) {
        let now = record.since;
        match step {
            Step::Sleep => record.waking.sleeps(cause, before.since, now),
            Step::Woken(_) => {
                let asleep_since = before.snapshot().map_or(before.since, |snapshot| snapshot.at);
                record.waking.woke(cause, asleep_since, now, self.today());
                record.waking.stays_awake(now, self.activity.limits(before).awake_min);
            }
            Step::Booted(_) => {
                record.waking.booted(cause);
                record.waking.stays_awake(now, self.activity.limits(before).awake_min);
            }
            Step::Boot | Step::Slept(_) | Step::Wake | Step::Undo | Step::Lost | Step::Delete => {}
        }
    }

    /// Counts and publishes a step that was written to the index.
    fn publish(&self, step: &Step, cause: &Cause, before: &Record, record: &Record) {
        self.metrics.stepped(step, cause, before, record);
        self.publish_step(cause, before, record);
        if matches!(record.state(), State::Running | State::Snapshotted) {
            self.reaper_wakeup.notify(); // It has a deadline now, which may be the next of all.
        }
    }

    /// Publishes a step. The change is already visible.
    fn publish_step(&self, cause: &Cause, before: &Record, after: &Record) {
        let operation = |then, now| if now == then { None } else { now };
        let slept = operation(before.last_sleep, after.last_sleep);
        let woken = operation(before.last_wake, after.last_wake);
        let what = What::Stepped {
            from: before.state(),
            to: after.state(),
            lasted: after.since.since(before.since),
            took: slept.or(woken),
            snapshot_bytes: after.snapshot().map(|snapshot| snapshot.bytes),
            error: after.error.clone().filter(|_| after.error != before.error),
        };
        let (from, to) = (before.state().word(), after.state().word());
        let took_ms = slept.or(woken).map(|took| took.as_millis());
        match after.state() {
            State::Stopped | State::Running | State::Snapshotted => {
                tracing::info!(id = %after.id, from, %cause, took_ms, "{to}");
            }
            State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                tracing::debug!(id = %after.id, from, %cause, "{to}");
            }
        }
        self.feed.publish(&self.event(after, what, cause));
    }

    fn event(&self, record: &Record, what: What, cause: &Cause) -> Event {
        Event {
            time: self.clock.wall(self.clock.now()),
            row: record.row,
            id: record.id.clone(),
            owner: record.owner,
            generation: record.generation,
            what,
            cause: cause.clone(),
        }
    }
}
