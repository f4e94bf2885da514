//! Why a sandbox is awake, and when it will sleep.
//!
//! This room remembers what each sandbox showed of activity, what its guest uses of the host, and
//! who holds it awake. It never takes a sandbox's lock, changes a record or asks a VMM: the
//! counters are passed in. Only what somebody does to a sandbox, or its guest does, is activity.
//! Reads never come here.
//!
//! ```text
//!  verbs, console, touch ──▶ Signals ─┐
//!  counters at each tick ──▶ Usage ───┼──▶ Verdict: idle, active, held, just-woken, …
//!  open files `awake` ─────▶ Holds ───┘
//! ```

mod holds;
mod signals;
mod usage;
mod verdict;

use holds::Holds;
pub use holds::{HoldError, HoldId, Holder};
use signals::SignalTable;
pub use signals::Signals;
use usage::Usages;
pub use usage::{Busyness, Rates};
pub(crate) use usage::{Reading, Sample};
pub use verdict::{Facts, Verdict};

use crate::{
    index::{self, Entry, Index},
    sandbox::{Activity, Record, RowId, Signal, SignalSet, State, Timestamp, text::chain},
    sync::{Arc, lock},
    sys::clock::Clock,
};

/// The activity of all sandboxes.
#[derive(Debug)]
pub struct Activities {
    index: Arc<Index>,
    clock: Arc<dyn Clock>,
    /// What counts as activity of a sandbox whose spec does not say it.
    defaults: Activity,
    signals: SignalTable,
    usages: Usages,
    holds: Holds,
}

impl Activities {
    /// Starts with no activity. A user may have `holds_max` holds at a time.
    pub(crate) fn new(
        index: Arc<Index>,
        clock: Arc<dyn Clock>,
        defaults: Activity,
        holds_max: usize,
    ) -> Self {
        let (signals, usages) = Default::default();
        Self { index, clock, defaults, signals, usages, holds: Holds::new(holds_max) }
    }

    /// Records a signal of a sandbox in memory. If it counts it is activity, which
    /// [`Self::flush`] writes to the index later.
    pub fn saw(&self, entry: &Entry, signal: Signal) {
        let now = self.clock.now();
        self.signals.saw(entry.row(), signal, now);
        if self.limits(&entry.record()).signals.contains(signal) {
            entry.touch(now);
        }
    }

    /// Returns what counts as activity of a sandbox, and from which thresholds on.
    #[must_use]
    pub fn limits(&self, record: &Record) -> Activity {
        record.spec.activity.over(self.defaults)
    }

    /// Returns what a sandbox showed of each kind of activity since the daemon started.
    #[must_use]
    pub fn signals(&self, row: RowId) -> Signals {
        self.signals.get(row)
    }

    /// Writes the activity since the last call to the index.
    ///
    /// # Errors
    /// Where the index cannot be written; the next call writes it all.
    pub fn flush(&self) -> Result<(), index::Error> {
        while self.index.flush_activity()? > 0 {}
        Ok(())
    }

    /// Forgets a sandbox that was deleted.
    pub(crate) fn forget(&self, row: RowId) {
        self.signals.forget(row);
        self.usages.end(row);
    }
}

/// Use of the host by guests.
impl Activities {
    /// Starts to observe a guest that is about to run.
    pub(crate) fn guest_starts(&self, row: RowId) {
        self.usages.begin(row);
    }

    /// Ends to observe a guest.
    pub(crate) fn guest_ended(&self, row: RowId) {
        self.usages.end(row);
    }

    /// Returns how busy a guest is; zero where none runs.
    #[must_use]
    pub fn busyness(&self, row: RowId) -> Busyness {
        self.usages.get(row).map(|usage| lock(&usage).busyness).unwrap_or_default()
    }

    /// Says whether the last sample of a guest is so old that another one makes sense.
    pub(crate) fn is_sample_due(&self, entry: &Entry) -> bool {
        let record = entry.record();
        let sleeps_at = record.sleep_at(entry.last_activity());
        let usage = self.usages.get(entry.row()).filter(|_| record.state() == State::Running);
        usage.is_some_and(|usage| {
            lock(&usage).is_due(self.clock.now(), record.idle_after, sleeps_at)
        })
    }

    /// Takes a sample of a guest. What it shows to be above its threshold becomes activity.
    pub(crate) fn take_sample(&self, entry: &Entry, sample: Sample) {
        let Some(usage) = self.usages.get(entry.row()) else { return };
        let (before, above, after) = {
            let mut usage = lock(&usage);
            let before = usage.busyness.unknown;
            let above = usage.take(sample, &self.limits(&entry.record()));
            (before, above, usage.busyness.unknown)
        };
        if after != before && !after.is_empty() {
            let (id, unknown) = (entry.id(), after);
            tracing::warn!(%id, %unknown, "sampling failed; it stays awake until a sample \
                                           succeeds");
        }
        for signal in above {
            self.saw(entry, signal);
        }
    }

    /// Returns which signals that count for a sandbox the last sample could not read.
    pub(crate) fn unknown(&self, entry: &Entry) -> SignalSet {
        self.busyness(entry.row()).unknown.and(self.limits(&entry.record()).signals)
    }

    /// Takes a count of the bytes that passed a sandbox's firewall. If they are above the
    /// threshold since the last sample, they become activity.
    pub(crate) fn take_network_bytes(&self, entry: &Entry, bytes: u64) {
        let (now, limits) = (self.clock.now(), self.limits(&entry.record()));
        let usage = self.usages.get(entry.row());
        if usage.is_some_and(|usage| lock(&usage).is_network_above(now, bytes, &limits)) {
            self.saw(entry, Signal::Network);
        }
    }

    /// Forgets what a guest used of CPU and disks up to the last sample: what its VMM did for a
    /// sleep that failed is not activity of the guest.
    pub(crate) fn restart_samples(&self, row: RowId) {
        if let Some(usage) = self.usages.get(row) {
            lock(&usage).begin_anew();
        }
    }

    /// Returns when a guest was last sampled.
    #[cfg(test)]
    pub(crate) fn last_sample(&self, row: RowId) -> Option<Timestamp> {
        self.usages.get(row).and_then(|usage| lock(&usage).last)
    }
}

/// Holds.
impl Activities {
    /// Holds a sandbox awake, unless `is_deleted` says that it is gone. This does not wake it.
    ///
    /// # Errors
    /// `Gone`, and `TooMany`.
    pub(crate) fn hold(
        &self,
        entry: &Entry,
        holder: Holder,
        is_deleted: impl FnOnce() -> bool,
    ) -> Result<HoldId, HoldError> {
        let is_gone = || is_deleted() || self.index.by_row(entry.row()).is_none();
        let id = self.holds.add(entry, holder, self.clock.now(), is_gone)?;
        self.saw(entry, Signal::Hold);
        Ok(id)
    }

    /// Releases a hold. The sandbox was active until now. Nothing is written to the disk by
    /// this, as a close must not wait: see [`Self::forget_released_holds`].
    pub fn release(&self, id: HoldId) {
        if self.holds.remove(id)
            && let Some(entry) = self.index.by_row(id.row())
        {
            self.saw(&entry, Signal::Hold);
        }
    }

    /// Releases the holds of a sandbox by the users of whom `has_ended` says so.
    pub fn release_those_of(&self, entry: &Entry, has_ended: impl Fn(u32) -> bool) {
        for hold in self.holds.of_users(entry.row(), has_ended) {
            self.release(hold);
        }
    }

    /// Records in the index that a sandbox has a hold, for the next daemon.
    pub fn record_hold(&self, entry: &Entry) {
        if let Err(error) = self.holds.record(&self.index, entry.row()) {
            // Only what comes after a crash depends on it.
            tracing::warn!(id = %entry.id(), error = chain(&error), "recording a hold");
        }
    }

    /// Returns how many holds there are of all sandboxes.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.holds.len()
    }

    /// Returns who holds a sandbox awake, and since when, the first of them first.
    #[must_use]
    pub fn holders(&self, row: RowId) -> Vec<(Holder, Timestamp)> {
        self.holds.of(row)
    }

    /// Says whether the reaper has to leave a sandbox alone, because of a hold or because an
    /// earlier daemon had one.
    #[must_use]
    pub fn is_held(&self, row: RowId) -> bool {
        self.holds.prevents_sleep(row, self.clock.now())
    }

    /// Returns until when the reaper leaves a sandbox alone because an earlier daemon had a hold.
    #[must_use]
    pub fn grace_until(&self, row: RowId) -> Option<Timestamp> {
        self.holds.grace_until(row)
    }

    /// Does `work` unless the sandbox has a hold. No hold begins meanwhile.
    ///
    /// # Errors
    /// `Held`, and those of `work`.
    pub(crate) fn unless_held<T, E: From<HoldError>>(
        &self,
        entry: &Entry,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        self.holds.unless_held(entry, work)
    }

    /// Counts each hold as activity of this moment. Called at each tick.
    pub fn sample_holds(&self) {
        for entry in self.holds.rows().into_iter().filter_map(|row| self.index.by_row(row)) {
            self.saw(&entry, Signal::Hold);
        }
    }

    /// Removes from the index the holds that were released. Called at each tick.
    ///
    /// # Errors
    /// Where the index cannot be written.
    pub(crate) fn forget_released_holds(&self) -> Result<(), index::Error> {
        self.holds.forget_released(&self.index, self.clock.now())
    }

    /// Has the reaper leave alone for a while what an earlier daemon's holds kept awake. Called
    /// once, at start-up.
    pub(crate) fn restore_holds(&self) {
        let rows = self.holds.restore(&self.index, self.clock.now()).unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "looking for what was held");
            Vec::new()
        });
        for entry in rows.into_iter().filter_map(|row| self.index.by_row(row)) {
            tracing::info!(id = %entry.id(), "it was held awake; it may be opened again");
            self.saw(&entry, Signal::Hold);
        }
    }
}
