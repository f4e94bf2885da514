//! What is due, and when to look next.

use std::time::Duration;

use super::queue::{Due, Queue};
use crate::{
    lifecycle::{Due as DueRow, Guests, IndexError, Lifecycle, chain},
    sandbox::{RowId, Timestamp},
    sync::Arc,
};

/// How many due sandboxes are read from the index at a time.
const PAGE: usize = 64;
/// How many leftovers are looked at in one go; there is one for each VMM that is stuck.
const LEFTOVERS_MAX: usize = 1024;
/// The shortest time between two looks, however close the next deadline is.
const LOOK_MIN: Duration = Duration::from_millis(50);

/// Puts what is due into the workers' queue.
#[derive(Debug)]
pub(super) struct Deadlines {
    lifecycle: Arc<Lifecycle>,
    queue: Arc<Queue>,
    /// The longest time between two looks.
    wait_max: Duration,
}

impl Deadlines {
    pub(super) fn new(lifecycle: Arc<Lifecycle>, queue: Arc<Queue>, wait_max: Duration) -> Self {
        Self { lifecycle, queue, wait_max }
    }

    /// Hands out all that is due. Returns how long it is to the next deadline.
    pub(super) fn look(&self) -> Duration {
        let active_until = self.look_for_due();
        let now = self.lifecycle.clock().now();
        let next = [
            self.lifecycle.index().next_due(now).ok().flatten(),
            self.lifecycle.networks().next_lingered().filter(|at| *at > now),
            self.lifecycle.next_retry(),
            active_until,
        ];
        let next = next.into_iter().flatten().min();
        next.map_or(self.wait_max, |next| next.since(now).clamp(LOOK_MIN, self.wait_max))
    }

    /// Hands out all that is due. Returns when the first of those is due that the index takes
    /// for due, since it has not been told of their activity.
    fn look_for_due(&self) -> Option<Timestamp> {
        let now = self.lifecycle.clock().now();
        let index = self.lifecycle.index();
        let mut active_until: Option<Timestamp> = None;
        self.hand_out(
            |after| index.due_to_sleep(now, after, PAGE),
            |due| {
                let rows: Vec<_> = due.iter().map(|due| due.row).collect();
                self.lifecycle.sample_activity(Guests::Of(&rows));
                let is_due = |due: &DueRow| {
                    let entry = self.lifecycle.by_row(due.row);
                    let at = entry.and_then(|entry| entry.record().sleep_at(entry.last_activity()));
                    let later = at.filter(|at| *at > now);
                    active_until = [active_until, later].into_iter().flatten().min();
                    later.is_none()
                };
                due.into_iter().filter(is_due).map(|due| (due.at, Due::Sleep(due.row))).collect()
            },
        );
        self.hand_out(
            |after| index.due_to_delete(now, after, PAGE),
            |due| {
                let is_certain = |due: &DueRow| !self.waits_for_clock(due.row);
                let due = due.into_iter().filter(is_certain);
                due.map(|due| (due.at, Due::Delete(due.row))).collect()
            },
        );
        self.lifecycle.retry_due();
        self.hand_out_leftovers(now);
        for row in self.lifecycle.networks().lingered() {
            self.queue.put(now, Due::Unlink(row));
        }
        active_until
    }

    /// Says whether a sandbox that the index has as stale waits for the wall clock of this boot
    /// to be synchronised.
    fn waits_for_clock(&self, row: RowId) -> bool {
        let entry = self.lifecycle.by_row(row);
        entry.and_then(|entry| self.lifecycle.stale_at(&entry.record())).is_some_and(|due| {
            // What is due without it need not wait.
            due.waits_for_clock && due.at > self.lifecycle.clock().now()
        })
    }

    /// Hands out what is in the middle of an operation. If that is still under way, its lock
    /// is taken, and it is passed over.
    fn hand_out_leftovers(&self, now: Timestamp) {
        let rows = self.lifecycle.index().in_transition(LEFTOVERS_MAX).unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "looking for leftovers");
            Vec::new()
        });
        let is_due = |row: &RowId| {
            let retry_at = self.lifecycle.by_row(*row).and_then(|entry| entry.record().retry_at);
            retry_at.is_none_or(|at| at <= now)
        };
        for row in rows.into_iter().filter(is_due) {
            self.queue.put(now, Due::Settle(row));
        }
    }

    /// Hands all that is due and passes `choose` to the workers, page by page.
    fn hand_out(
        &self,
        page: impl Fn(Option<DueRow>) -> Result<Vec<DueRow>, IndexError>,
        mut choose: impl FnMut(Vec<DueRow>) -> Vec<(Timestamp, Due)>,
    ) {
        let mut after = None;
        loop {
            let due = match page(after) {
                Ok(due) => due,
                Err(error) => {
                    tracing::error!(error = chain(&error), "looking for what is due");
                    return;
                }
            };
            let Some(last) = due.last() else { return };
            after = Some(*last);
            for (at, due) in choose(due) {
                self.queue.put(at, due);
            }
        }
    }
}
