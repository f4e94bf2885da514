//! Acts on what is due.
//!
//! One that has been at it for long, as its VMM does not answer, costs only itself: another
//! worker is started in its place. A sandbox whose lock is taken is passed over until the next
//! look; one that fails is left alone for longer each time.

use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    thread::JoinHandle,
    time::Duration,
};

use super::queue::{Due, Queue};
use crate::{
    lifecycle::{Entry, Error, Held, Lifecycle, Outcome, Wait, Why, chain},
    sandbox::{Cause, RowId, Timestamp},
    sync::{Arc, Mutex, lock},
};

/// The first wait after a failure; it doubles with each.
pub(super) const RETRY_FIRST: Duration = Duration::from_secs(30);
/// The longest wait after failures.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(3600);
/// How many workers may be started in the place of those that are stuck.
const SPARE_WORKERS_MAX: usize = 64;

/// What the workers share.
#[derive(Debug)]
pub(super) struct Workers {
    lifecycle: Arc<Lifecycle>,
    queue: Arc<Queue>,
    /// How often each failed in a row. Bounded by what is due. A leaf lock.
    failures: Mutex<HashMap<RowId, u32>>,
}

impl Workers {
    pub(super) fn new(lifecycle: Arc<Lifecycle>, queue: Arc<Queue>) -> Self {
        Self { lifecycle, queue, failures: Mutex::default() }
    }

    /// Starts so many workers, which end when the queue is closed.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub(super) fn start(self: &Arc<Self>, count: usize) -> io::Result<Vec<JoinHandle<()>>> {
        let start = |number| {
            let shared = Arc::clone(self);
            let named = std::thread::Builder::new().name(format!("dozed-reap-{number}"));
            named.spawn(move || {
                while let Some(due) = shared.queue.next() {
                    shared.act(due);
                }
            })
        };
        (0..count).map(start).collect()
    }

    /// Starts workers in the place of those that are stuck, if any waits for one. They end when
    /// nothing waits any more.
    pub(super) fn start_spare(self: &Arc<Self>) {
        while self.queue.begin_spare(SPARE_WORKERS_MAX) {
            let shared = Arc::clone(self);
            let spare = std::thread::Builder::new().name("dozed-reap-x".to_owned());
            let started = spare.spawn(move || {
                while let Some(due) = shared.queue.next_for_spare() {
                    shared.act(due);
                }
            });
            if let Err(error) = started {
                self.queue.end_spare();
                tracing::warn!(%error, "starting another worker of the reaper");
                return;
            }
        }
    }

    fn act(&self, due: Due) {
        let done = catch_unwind(AssertUnwindSafe(|| self.act_on(due)));
        if done.is_err() {
            tracing::error!(row = %due.row(), "an action of the reaper panicked");
        }
        self.queue.done(due);
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
            Due::Sleep(_) => ("putting an idle sandbox to sleep", {
                self.lifecycle.sleep(&held, &entry, Why::Idle)
            }),
            Due::Delete(_) => {
                ("deleting a stale sandbox", self.lifecycle.destroy_stale(&held, &entry))
            }
            Due::Settle(_) => {
                ("settling a leftover", self.lifecycle.settle_leftover(&held, &entry))
            }
            Due::Unlink(_) => {
                ("removing a network", self.lifecycle.networks().remove_lingered(&held, &entry))
            }
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
                self.lifecycle.records().metrics().reaper_failed();
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
        if let Err(error) = self.lifecycle.records().put_off(held, entry, until) {
            tracing::error!(id = %entry.id(), error = chain(&error), "postponing a retry");
        }
    }
}

/// The wait after the `count`th failure in a row.
pub(super) fn backoff(count: u32) -> Duration {
    let doublings = count.saturating_sub(1).min(16);
    RETRY_FIRST.saturating_mul(1 << doublings).min(RETRY_MAX)
}
