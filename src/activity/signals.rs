//! When each sandbox last showed which kind of activity.

use std::collections::HashMap;

use crate::{
    sandbox::{RowId, Signal, SignalSet, Timestamp},
    sync::{Mutex, lock},
};

/// When a sandbox last showed each kind of activity, since this daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signals {
    /// There is one for each sandbox that was awake, so it is kept small.
    last: [Timestamp; Signal::ALL.len()],
}

/// Before every moment.
const NEVER: Timestamp = Timestamp::from_millis(i64::MIN);

impl Default for Signals {
    fn default() -> Self {
        Self { last: [NEVER; Signal::ALL.len()] }
    }
}

impl Signals {
    /// Returns when `signal` was last seen.
    #[must_use]
    pub fn last(&self, signal: Signal) -> Option<Timestamp> {
        Some(self.last[signal as usize]).filter(|at| *at != NEVER)
    }

    /// Returns the latest signal of those that count.
    #[must_use]
    pub fn latest(&self, counted: SignalSet) -> Option<(Signal, Timestamp)> {
        Signal::ALL
            .into_iter()
            .filter(|signal| counted.contains(*signal))
            .filter_map(|signal| self.last(signal).map(|at| (signal, at)))
            .max_by_key(|(_, at)| *at)
    }
}

/// The signals of all sandboxes that showed any. Bounded by the count of sandboxes.
#[derive(Debug, Default)]
pub(super) struct SignalTable {
    /// A leaf lock.
    by_row: Mutex<HashMap<RowId, Signals>>,
}

impl SignalTable {
    pub(super) fn saw(&self, row: RowId, signal: Signal, at: Timestamp) {
        lock(&self.by_row).entry(row).or_default().last[signal as usize] = at;
    }

    pub(super) fn get(&self, row: RowId) -> Signals {
        lock(&self.by_row).get(&row).copied().unwrap_or_default()
    }

    pub(super) fn forget(&self, row: RowId) {
        lock(&self.by_row).remove(&row);
    }
}
