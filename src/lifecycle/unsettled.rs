//! What could not be recorded, or not be brought to an end, is tried again until it is.
//!
//! An operation that passed its commit point has taken effect, also where the index cannot be
//! written then; a guest that ended has ended. So nobody is told that it failed: the record
//! is brought up to date here, as soon as that is possible.

use std::{collections::HashMap, time::Duration};

use super::{Entry, Error, Held, Lifecycle, chain};
use crate::{
    sandbox::{Cause, RowId, State, Timestamp},
    sync::{Arc, Mutex, lock},
};

/// When to try for the second time. Most often another process has the index locked, for
/// moments.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// The longest wait between two tries: so late a record is after the disk is well again.
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// The sandboxes whose records are behind. Bounded by the count of sandboxes.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    /// A leaf lock.
    table: Mutex<HashMap<RowId, Retry>>,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    /// When to try again; `None` while a thread is at it.
    at: Option<Timestamp>,
    failures: u32,
}

impl Unsettled {
    fn take_due(&self, now: Timestamp) -> Vec<RowId> {
        let mut due = Vec::new();
        for (row, retry) in lock(&self.table).iter_mut() {
            if retry.at.is_some_and(|at| at <= now) {
                retry.at = None;
                due.push(*row);
            }
        }
        due
    }

    /// Puts a retry that did not succeed off, and returns for how long.
    fn put_off(&self, row: RowId, now: Timestamp, failed: bool) -> Duration {
        let mut table = lock(&self.table);
        let retry = table.entry(row).or_insert(Retry { at: None, failures: 0 });
        retry.failures += u32::from(failed);
        let doublings = retry.failures.min(16);
        let wait = AGAIN_FIRST.saturating_mul(1 << doublings).min(AGAIN_MAX);
        retry.at = Some(now.after(wait));
        wait
    }
}

impl Lifecycle {
    /// Has the record of a sandbox brought up to date later.
    pub(super) fn settle_later(&self, row: RowId) {
        let at = Some(self.now().after(AGAIN_FIRST));
        lock(&self.unsettled.table).entry(row).or_insert(Retry { at, failures: 0 });
        self.reaper_wakeup.notify(); // It may be earlier than what the reaper waits for.
    }

    /// As `settle_later`, of an operation that has taken effect and could not be recorded.
    pub(super) fn record_later(&self, entry: &Entry, doing: &'static str, error: &Error) {
        tracing::warn!(id = %entry.id(), error = chain(error), "{doing} is recorded later");
        self.settle_later(entry.row());
    }

    /// Returns when the next record is to be tried again to be brought up to date.
    #[must_use]
    pub fn next_settling(&self) -> Option<Timestamp> {
        lock(&self.unsettled.table).values().filter_map(|retry| retry.at).min()
    }

    /// Tries again to bring the records up to date that are due for it, each on a thread of
    /// its own, as a VMM may have to be asked.
    pub fn settle_due(self: &Arc<Self>) {
        for row in self.unsettled.take_due(self.now()) {
            let this = Arc::clone(self);
            if self.pool.run(move || this.settle_row(row)).is_err() {
                self.unsettled.put_off(row, self.now(), false);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn unsettled_left(&self) -> usize {
        lock(&self.unsettled.table).len()
    }

    fn settle_row(&self, row: RowId) {
        let Some(entry) = self.by_row(row) else {
            lock(&self.unsettled.table).remove(&row);
            return;
        };
        // Whoever has the lock settles it before anything else.
        let Some(held) = self.locks.try_lock(entry.id()) else {
            self.put_off_settling(row, false);
            return;
        };
        let is_end = entry.record().state() == State::Running;
        let cause = if is_end { Cause::GuestExit } else { Cause::Reconcile };
        match self.settle_leftover(&Held::new(held, cause), &entry) {
            Ok(_) => {
                lock(&self.unsettled.table).remove(&row);
            }
            Err(error) => {
                let wait = self.put_off_settling(row, true);
                let error = chain(&error);
                tracing::error!(id = %entry.id(), error, retry_in = ?wait, "bringing up to date");
            }
        }
    }

    /// Has it tried again later, and returns in what time.
    fn put_off_settling(&self, row: RowId, failed: bool) -> Duration {
        let wait = self.unsettled.put_off(row, self.now(), failed);
        self.reaper_wakeup.notify(); // The reaper may have looked while a thread was at it.
        wait
    }
}
