//! Who is idle or stale, and why; asks `lifecycle`; nothing else.
//!
//! A sandbox is put to sleep exactly if it is `running`, nobody holds it, its last activity
//! is longer ago than its `idle_after`, and the minimum that it stays awake after a wake is
//! over; it is deleted exactly if it is `snapshotted`, not pinned, and is certain to have
//! slept for longer than its `delete_after`: after a boot the time of before is believed
//! when the wall clock is synchronised, or an hour later. Both are looked at again under the
//! sandbox's lock, so that a touch that came meanwhile wins.
//!
//! Besides, what an operation left in the middle, as its VMM did not answer, is brought to an
//! end once that is possible; and the networks of sleepers go when they have lingered.
//!
//! One thread looks, at every tick, at the next deadline and when the bell rings: a few
//! range scans of the index. A few workers act, so that a slow sandbox does not hold
//! up the others. A sandbox whose lock is taken is passed over until the next look; one
//! that fails is left alone for longer each time.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    lifecycle::{
        Due as DueRow, Entry, Error, Held, IndexError, Lifecycle, Outcome, Wait, Why, chain,
    },
    sandbox::{Cause, RowId, Timestamp},
    sync::{Arc, Mutex, lock},
    sys::{clock::Deadline, thread::join_by},
};

/// How many due sandboxes are read from the index at a time.
const PAGE: usize = 64;
/// How many leftovers are looked at in one go; there is one for each VMM that is stuck.
const LEFTOVERS_MAX: usize = 1024;
/// The first wait after a failure; it doubles with each.
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// The longest wait after failures.
const RETRY_MAX: Duration = Duration::from_secs(3600);
/// The shortest time between two looks, however close the next deadline is.
const LOOK_MIN: Duration = Duration::from_millis(50);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Due {
    Sleep(RowId),
    Delete(RowId),
    Settle(RowId),
    Unlink(RowId),
}

impl Due {
    fn row(self) -> RowId {
        match self {
            Self::Sleep(row) | Self::Delete(row) | Self::Settle(row) | Self::Unlink(row) => row,
        }
    }
}

/// The reaper at work.
#[derive(Debug)]
pub struct Reaper {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    lifecycle: Arc<Lifecycle>,
    /// What is queued or being acted on, so that nothing is twice. A leaf lock.
    in_hand: Mutex<HashSet<RowId>>,
    /// How often each failed in a row. Bounded by what is due. A leaf lock.
    failures: Mutex<HashMap<RowId, u32>>,
}

impl Reaper {
    /// Starts looking every `tick`, with so many workers.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub fn start(lifecycle: Arc<Lifecycle>, tick: Duration, workers: usize) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { lifecycle, in_hand: Mutex::default(), failures: Mutex::default() });
        // Bounded by `in_hand`: a sandbox is in it at most once.
        let (give, take) = mpsc::channel();
        let take = Arc::new(Mutex::new(take));
        let mut threads = Vec::new();
        for number in 0..workers.max(1) {
            let (shared, take) = (Arc::clone(&shared), Arc::clone(&take));
            let name = format!("dozed-reap-{number}");
            threads.push(std::thread::Builder::new().name(name).spawn(move || {
                loop {
                    let due = lock(&take).recv();
                    let Ok(due) = due else { return };
                    shared.act(due);
                }
            })?);
        }
        let looking = Arc::clone(&shared);
        threads.push(
            std::thread::Builder::new()
                .name("dozed-reaper".to_owned())
                .spawn(move || looking.look_on(tick, &give))?,
        );
        Ok(Self { shared, threads })
    }

    /// Ends the looking, and waits for what is being acted on, for at most `limit`. What takes
    /// longer is left behind; the next start finishes it.
    pub fn stop(self, limit: Duration) {
        self.shared.lifecycle.bell().close();
        let deadline = Deadline::after(limit);
        for thread in self.threads {
            join_by(thread, &deadline, "a thread of the reaper");
        }
    }
}

impl Shared {
    fn look_on(&self, tick: Duration, give: &mpsc::Sender<Due>) {
        loop {
            self.look(give);
            let now = self.lifecycle.clock().now();
            let next = self.lifecycle.index().next_due(now).ok().flatten();
            let lingered = self.lifecycle.next_lingered().filter(|at| *at > now);
            let retries = [self.lifecycle.next_deletion(), self.lifecycle.next_settling()];
            let next = next.into_iter().chain(lingered).chain(retries.into_iter().flatten()).min();
            let wait = next.map_or(tick, |next| next.since(now).clamp(LOOK_MIN, tick));
            if !self.lifecycle.bell().wait(wait) {
                return;
            }
        }
    }

    /// One look: what counts as activity first, so that it is seen before the verdict.
    fn look(&self, give: &mpsc::Sender<Due>) {
        if self.lifecycle.index().check().is_err() {
            return; // It is told, and the daemon ends.
        }
        self.lifecycle.sample_activity();
        self.lifecycle.sample_holds();
        self.lifecycle.trim_consoles();
        self.lifecycle.cool();
        self.lifecycle.keep_room();
        if let Err(error) = self.lifecycle.flush_activity() {
            tracing::error!(error = chain(&error), "writing activity to the index");
        }
        if let Err(error) = self.lifecycle.forget_holds() {
            tracing::error!(error = chain(&error), "forgetting holds that have ended");
        }
        if let Err(error) = self.lifecycle.confirm_clock() {
            tracing::warn!(error = chain(&error), "keeping that the wall clock is synchronised");
        }
        let now = self.lifecycle.clock().now();
        let index = self.lifecycle.index();
        self.hand_out(give, Due::Sleep, |after| index.due_to_sleep(now, after, PAGE));
        self.hand_out(give, Due::Delete, |after| index.due_to_delete(now, after, PAGE));
        self.lifecycle.resume_deletions();
        self.lifecycle.settle_due();
        self.hand_out_leftovers(give, now);
        for row in self.lifecycle.lingered() {
            if !self.hand_over(give, Due::Unlink(row)) {
                return;
            }
        }
        self.lifecycle.ticked(now);
    }

    /// Hands out what is in the middle of an operation. If that is still under way, its lock
    /// is taken, and it is passed over.
    fn hand_out_leftovers(&self, give: &mpsc::Sender<Due>, now: Timestamp) {
        let rows = self.lifecycle.index().between(LEFTOVERS_MAX).unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "looking for leftovers");
            Vec::new()
        });
        let is_due = |row: &RowId| {
            let retry_at = self.lifecycle.by_row(*row).and_then(|entry| entry.record().retry_at);
            retry_at.is_none_or(|at| at <= now)
        };
        for row in rows.into_iter().filter(is_due) {
            if !self.hand_over(give, Due::Settle(row)) {
                return;
            }
        }
    }

    /// Hands all that is due to the workers, but for what they have already.
    fn hand_out(
        &self,
        give: &mpsc::Sender<Due>,
        kind: fn(RowId) -> Due,
        page: impl Fn(Option<DueRow>) -> Result<Vec<DueRow>, IndexError>,
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
            let due = due.into_iter().map(|due| kind(due.row));
            for due in due.filter(|due| !self.waits_for_clock(*due)) {
                if !self.hand_over(give, due) {
                    return;
                }
            }
        }
    }

    /// Says whether one is only to be deleted if the wall clock proves to be right.
    fn waits_for_clock(&self, due: Due) -> bool {
        matches!(due, Due::Delete(row) if self.lifecycle.waits_for_clock(row))
    }

    /// Hands one to the workers, unless they have it already. False: there are none any more.
    fn hand_over(&self, give: &mpsc::Sender<Due>, due: Due) -> bool {
        !lock(&self.in_hand).insert(due.row()) || give.send(due).is_ok()
    }

    fn act(&self, due: Due) {
        let done = catch_unwind(AssertUnwindSafe(|| self.act_on(due)));
        if done.is_err() {
            tracing::error!(row = %due.row(), "a reaper's act panicked");
        }
        lock(&self.in_hand).remove(&due.row());
    }

    fn act_on(&self, due: Due) {
        let Some(entry) = self.lifecycle.by_row(due.row()) else {
            return;
        };
        // Busy is active: whoever has the lock is doing something with it.
        let cause = match due {
            Due::Sleep(_) => Cause::Idle,
            Due::Delete(_) => Cause::Stale,
            Due::Settle(_) | Due::Unlink(_) => Cause::Reconcile,
        };
        let Ok(held) = self.lifecycle.lock(&entry, Wait::Never, cause) else {
            return;
        };
        let (doing, result) = match due {
            Due::Sleep(_) => {
                ("putting an idle one to sleep", { self.lifecycle.sleep(&held, &entry, Why::Idle) })
            }
            Due::Delete(_) => ("deleting a stale one", self.lifecycle.destroy_stale(&held, &entry)),
            Due::Settle(_) => {
                ("settling a leftover", self.lifecycle.settle_leftover(&held, &entry))
            }
            Due::Unlink(_) => ("removing a network", self.lifecycle.remove_lingered(&held, &entry)),
        };
        match result {
            Ok(outcome) => {
                lock(&self.failures).remove(&entry.row());
                if outcome == Outcome::Done {
                    tracing::info!(id = %entry.id(), "{doing}");
                }
            }
            Err(Error::Gone { .. } | Error::ShuttingDown) => {}
            // That a network stays is no reason to leave its sandbox alone.
            Err(error @ Error::Network { .. }) if matches!(due, Due::Unlink(_)) => {
                tracing::error!(id = %entry.id(), error = chain(&error), "{doing}");
            }
            Err(error) => {
                self.lifecycle.metrics().reaper_failed();
                let wait = self.put_off(&entry);
                let until = self.lifecycle.clock().now().after(wait);
                tracing::error!(
                    id = %entry.id(), error = chain(&error), retry_in = ?wait, "{doing}"
                );
                self.postpone(&held, &entry, until);
            }
        }
    }

    /// Counts a failure, and returns for how long the sandbox is left alone.
    fn put_off(&self, entry: &Entry) -> Duration {
        let mut failures = lock(&self.failures);
        let count = failures.entry(entry.row()).or_insert(0);
        *count += 1;
        backoff(*count)
    }

    fn postpone(&self, held: &Held, entry: &Arc<Entry>, until: Timestamp) {
        if let Err(error) = self.lifecycle.postpone(held, entry, until) {
            tracing::error!(id = %entry.id(), error = chain(&error), "putting off a retry");
        }
    }
}

/// The wait after the `count`th failure in a row.
fn backoff(count: u32) -> Duration {
    let doublings = count.saturating_sub(1).min(16);
    RETRY_FIRST.saturating_mul(1 << doublings).min(RETRY_MAX)
}
