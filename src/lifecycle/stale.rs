//! When a sandbox has slept for too long, and is deleted for it.

use super::{
    Entry, Error, Held, Lifecycle, Outcome, delete::delete_locked,
    evidence::check_sleeps_as_recorded,
};
use crate::{
    sandbox::{Record, Timestamp},
    sync::Arc,
};

/// Where the index keeps the basis of the time line.
pub const CLOCK_KEY: &str = "clock";

/// When a sandbox has slept for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stale {
    /// From then on it may be deleted.
    pub at: Timestamp,
    /// Whether it may be earlier, once the wall clock of this boot is synchronised.
    pub waits_for_clock: bool,
}

impl Lifecycle {
    /// Deletes a sandbox that has slept for longer than its `delete_after`, if that is
    /// still so and nobody has pinned it, or holds it or did under an earlier daemon.
    ///
    /// # Errors
    /// The index's, and then nothing has changed.
    pub fn destroy_stale(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        let (record, now) = (entry.record(), self.clock.now());
        let due = self.stale_at(&record);
        let is_due = due.is_some_and(|due| due.at <= now) && !self.activity.is_held(entry.row());
        if !is_due {
            // The index does not know that it is younger than it seems.
            let seems_due = record.delete_at().is_some_and(|at| at <= now);
            if let Some(later) = due.filter(|due| seems_due && !due.waits_for_clock && due.at > now)
            {
                self.records.put_off(held, entry, later.at)?;
            }
            return Ok(Outcome::Skipped);
        }
        check_sleeps_as_recorded(self, entry)?;
        delete_locked(self, held, entry)
    }

    /// Returns when the reaper is to delete a sandbox if nothing more happens; `None` where
    /// it is not. Time of before a boot counts only where it is certain to have passed.
    #[must_use]
    pub fn stale_at(&self, record: &Record) -> Option<Stale> {
        let excess = self.clock.excess(record.asleep_since());
        let at = record.delete_at_without(excess.certain)?;
        let waits = excess.unknown_until.filter(|until| *until > at);
        Some(Stale { at: waits.unwrap_or(at), waits_for_clock: waits.is_some() })
    }
}

/// Believes the wall clock once it is synchronised. Called at each look of the reaper.
///
/// # Errors
/// Where the index cannot be written; what was learnt is kept in memory, and by the end
/// of the daemon.
pub(super) fn confirm_clock(lifecycle: &Lifecycle) -> Result<(), crate::index::Error> {
    match lifecycle.clock.confirm() {
        Some(basis) => lifecycle.index.set_meta(CLOCK_KEY, &basis.to_text()),
        None => Ok(()),
    }
}
