//! What counts as activity, and what each sandbox showed of it.
//!
//! Only what somebody does to a sandbox, or its guest does, is activity. Looking is
//! free: nothing that reads comes here.

use std::collections::HashMap;

use super::{Entry, Lifecycle};
use crate::{
    sandbox::{Activity, Record, RowId, Signal, SignalSet, Timestamp},
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

/// What is remembered only while the daemon lives. Bounded by the count of sandboxes.
#[derive(Debug, Default)]
pub(super) struct Activities {
    /// A leaf lock.
    signals: Mutex<HashMap<RowId, Signals>>,
    /// Why the last command was not understood, if it was not. A leaf lock.
    notes: Mutex<HashMap<RowId, Box<str>>>,
}

impl Activities {
    fn see(&self, row: RowId, signal: Signal, at: Timestamp) {
        lock(&self.signals).entry(row).or_default().last[signal as usize] = at;
    }

    pub(super) fn note(&self, row: RowId, text: String) {
        lock(&self.notes).insert(row, text.into_boxed_str());
    }

    pub(super) fn forget_note(&self, row: RowId) {
        lock(&self.notes).remove(&row);
    }

    pub(super) fn forget(&self, row: RowId) {
        lock(&self.signals).remove(&row);
        self.forget_note(row);
    }
}

impl Lifecycle {
    /// Notes a signal of a sandbox, in memory, and counts it as activity if it is one that
    /// counts; the index learns of it later.
    pub fn saw(&self, entry: &Entry, signal: Signal) {
        let now = self.now();
        self.activities.see(entry.row(), signal, now);
        if self.activity_of(&entry.record()).signals.contains(signal) {
            entry.touch(now);
        }
    }

    /// Returns what counts as activity of a sandbox, and from when on.
    #[must_use]
    pub fn activity_of(&self, record: &Record) -> Activity {
        record.spec.activity.over(self.settings.activity)
    }

    /// Returns what a sandbox showed of each kind of activity.
    #[must_use]
    pub fn signals(&self, row: RowId) -> Signals {
        lock(&self.activities.signals).get(&row).copied().unwrap_or_default()
    }

    /// Notes why a command was refused before it became an operation.
    pub fn note(&self, entry: &Entry, error: &(dyn std::error::Error + 'static)) {
        self.activities.note(entry.row(), super::chain(error));
    }

    /// Returns what `error` reads as: why the last command or operation failed.
    #[must_use]
    pub fn last_error(&self, entry: &Entry) -> Option<Box<str>> {
        let note = lock(&self.activities.notes).get(&entry.row()).cloned();
        note.or_else(|| entry.record().error.clone())
    }

    /// Writes what was seen of activity to the index.
    ///
    /// # Errors
    /// Where the index cannot be written; the next try has it all.
    pub fn flush_activity(&self) -> Result<(), crate::index::Error> {
        while self.index.flush_activity()? > 0 {}
        Ok(())
    }
}
