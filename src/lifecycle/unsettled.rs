//! What could not be recorded, or not be brought to an end, is tried again until it is.
//!
//! An operation that passed its commit point has taken effect, also where the index cannot be
//! written then; a guest that ended has ended. So nobody is told that it failed: the record
//! is brought up to date here, as soon as that is possible.

use std::{collections::HashMap, time::Duration};

use super::{Entry, Error, Held, Lifecycle, chain};
use crate::{
    events::Wakeup,
    sandbox::{Cause, RowId, State, Timestamp},
    sync::{Arc, Mutex, lock},
    sys::clock::Clock,
};

/// When to try for the second time. Most often another process has the index locked, for
/// moments.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// The longest wait between two tries: so late a record is after the disk is well again.
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// The sandboxes whose records are behind. Bounded by the count of sandboxes.
#[derive(Debug)]
pub(super) struct Unsettled {
    clock: Arc<dyn Clock>,
    reaper_wakeup: Arc<Wakeup>,
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
    pub(super) fn new(clock: Arc<dyn Clock>, reaper_wakeup: Arc<Wakeup>) -> Self {
        Self { clock, reaper_wakeup, table: Mutex::default() }
    }

    /// Has the record of a sandbox brought up to date later.
    pub(super) fn later(&self, row: RowId) {
        let at = Some(self.clock.now().after(AGAIN_FIRST));
        lock(&self.table).entry(row).or_insert(Retry { at, failures: 0 });
        self.reaper_wakeup.notify(); // It may be earlier than what the reaper waits for.
    }

    /// As `settle_later`, of an operation that has taken effect and could not be recorded.
    pub(super) fn record_later(&self, entry: &Entry, doing: &'static str, error: &Error) {
        tracing::warn!(id = %entry.id(), error = chain(error), "{doing} is recorded later");
        self.later(entry.row());
    }

    /// Returns when the next record is to be tried again to be brought up to date.
    #[must_use]
    pub(super) fn next_try(&self) -> Option<Timestamp> {
        lock(&self.table).values().filter_map(|retry| retry.at).min()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.table).len()
    }

    /// Puts a retry that did not succeed off, and returns for how long.
    pub(super) fn put_off(&self, row: RowId, failed: bool) -> Duration {
        let mut table = lock(&self.table);
        let retry = table.entry(row).or_insert(Retry { at: None, failures: 0 });
        retry.failures += u32::from(failed);
        let doublings = retry.failures.min(16);
        let wait = AGAIN_FIRST.saturating_mul(1 << doublings).min(AGAIN_MAX);
        retry.at = Some(self.clock.now().after(wait));
        drop(table);
        self.reaper_wakeup.notify(); // The reaper may have looked while a thread was at it.
        wait
    }

    fn settled(&self, row: RowId) {
        lock(&self.table).remove(&row);
    }

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
}

/// Tries again to bring the records up to date that are due for it, each on a thread of
/// its own, as a VMM may have to be asked.
pub(super) fn settle_due(lifecycle: &Arc<Lifecycle>) {
    for row in lifecycle.unsettled.take_due(lifecycle.clock.now()) {
        let this = Arc::clone(lifecycle);
        if lifecycle.pool.run(move || settle_row(&this, row)).is_err() {
            lifecycle.unsettled.put_off(row, false);
        }
    }
}

fn settle_row(lifecycle: &Lifecycle, row: RowId) {
    let Some(entry) = lifecycle.by_row(row) else {
        lifecycle.unsettled.settled(row);
        return;
    };
    // Whoever has the lock settles it before anything else.
    let Some(held) = lifecycle.locks.try_lock(entry.id()) else {
        lifecycle.unsettled.put_off(row, false);
        return;
    };
    let is_end = entry.record().state() == State::Running;
    let cause = if is_end { Cause::GuestExit } else { Cause::Reconcile };
    match lifecycle.settle_leftover(&Held::new(held, cause), &entry) {
        Ok(_) => {
            lifecycle.unsettled.settled(row);
        }
        Err(error) => {
            let wait = lifecycle.unsettled.put_off(row, true);
            let error = chain(&error);
            tracing::error!(id = %entry.id(), error, retry_in = ?wait, "bringing up to date");
        }
    }
}
