//! What is told of a sandbox, and to the log with which facts.

use super::{Entry, Held, Lifecycle, News};
use crate::{
    notify::{Event, What},
    sandbox::{Cause, Record, State},
    sync::Arc,
};

impl Lifecycle {
    /// Returns where all that happens is told.
    #[must_use]
    pub fn news(&self) -> &Arc<News> {
        &self.news
    }

    fn event(&self, record: &Record, what: What, cause: &Cause) -> Event {
        Event {
            time: self.clock.wall(self.now()),
            row: record.row,
            id: record.id.clone(),
            owner: record.owner,
            generation: record.generation,
            what,
            cause: cause.clone(),
        }
    }

    /// Tells that a sandbox was made.
    pub(super) fn tell_created(&self, held: &Held, entry: &Entry) {
        self.news.tell_created(&self.event(&entry.record(), What::Created, held.cause()));
    }

    /// Tells of a step that was taken and can be seen.
    pub(super) fn tell_step(&self, cause: &Cause, before: &Record, after: &Record) {
        let operation = |then, now| if now == then { None } else { now };
        let slept = operation(before.last_sleep, after.last_sleep);
        let woken = operation(before.last_wake, after.last_wake);
        let what = What::Stepped {
            from: before.state,
            to: after.state,
            lasted: after.since.since(before.since),
            took: slept.or(woken),
            snapshot_bytes: after.snapshot.map(|snapshot| snapshot.bytes),
            error: after.error.clone().filter(|_| after.error != before.error),
        };
        let (from, to) = (before.state.word(), after.state.word());
        let took_ms = slept.or(woken).map(|took| took.as_millis());
        match after.state {
            State::Stopped | State::Running | State::Snapshotted => {
                tracing::info!(id = %after.id, from, %cause, took_ms, "{to}");
            }
            State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                tracing::debug!(id = %after.id, from, %cause, "{to}");
            }
        }
        self.news.tell(&self.event(after, what, cause));
    }

    /// Tells that an operation failed.
    pub(super) fn tell_failed(&self, held: &Held, entry: &Entry, error: Box<str>) {
        let event = self.event(&entry.record(), What::Failed { error }, held.cause());
        self.news.tell_log(&event);
    }

    /// Tells that a sandbox is gone. By an `rmdir` the kernel knows it.
    pub(super) fn tell_deleted(&self, held: &Held, entry: &Entry) {
        let event = self.event(&entry.record(), What::Deleted, held.cause());
        self.news.tell_gone(&event, matches!(held.cause(), Cause::Rmdir(_)));
    }
}
