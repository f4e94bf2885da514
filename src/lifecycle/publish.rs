//! Publishes what happens to a sandbox, as log messages and as events.

use super::{ChangeFeed, Entry, Held, Lifecycle};
use crate::{
    events::{Event, What},
    sandbox::{Cause, Record, State},
    sync::Arc,
};

impl Lifecycle {
    /// Returns the change feed.
    #[must_use]
    pub fn feed(&self) -> &Arc<ChangeFeed> {
        &self.feed
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

    /// Publishes that a sandbox was created.
    pub(super) fn publish_created(&self, held: &Held, entry: &Entry) {
        self.feed.publish_created(&self.event(&entry.record(), What::Created, held.cause()));
    }

    /// Publishes a step. The change is already visible.
    pub(super) fn publish_step(&self, cause: &Cause, before: &Record, after: &Record) {
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
}
