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
//! One thread looks: at every tick at all that run, to see who was active, and at the next
//! deadline and when it is notified at who is due, by a few range scans of the index. Of those
//! who are due it takes a sample before the verdict. It waits for no disk for long.
//!
//! A few workers act, those first whose deadline is the earliest. One that has been at it for
//! long, as its VMM does not answer, costs only itself: another worker is started in its
//! place. A sandbox whose lock is taken is passed over until the next look; one that fails is
//! left alone for longer each time.

mod queue;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    thread::JoinHandle,
    time::Duration,
};

use queue::Queue;

use crate::{
    lifecycle::{
        Due as DueRow, Entry, Error, Held, IndexError, Lifecycle, Outcome, Wait, Why, chain,
    },
    sandbox::{Cause, RowId, Timestamp},
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
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

/// After how long a worker counts as stuck, so that another is started. A healthy act takes
/// less, but for the sleep of a large guest on a slow disk, and then there are two.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// How many workers may be started in the place of those that are stuck.
const SPARE_WORKERS_MAX: usize = 64;
/// How often it is looked whether one is stuck, while others wait.
const STUCK_LOOK: Duration = Duration::from_secs(1);
/// How long a look waits for the chores of its tick, so that deadlines are seen by what they
/// wrote. On a disk that hangs they go on without it.
const CHORES_WAIT: Duration = Duration::from_secs(5);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Sleep(RowId),
    Delete(RowId),
    Unlink(RowId),
    Settle(RowId),
}

impl Due {
    /// Which kinds come first. To settle a leftover is to ask a VMM that did not answer.
    fn rank(self) -> u8 {
        match self {
            Self::Sleep(_) => 0,
            Self::Delete(_) => 1,
            Self::Unlink(_) => 2,
            Self::Settle(_) => 3,
        }
    }

    fn row(self) -> RowId {
        match self {
            Self::Sleep(row) | Self::Delete(row) | Self::Settle(row) | Self::Unlink(row) => row,
        }
    }
}

/// When it looks, and how it acts.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// How often it looks at all that run.
    tick: Duration,
    /// How long it waits at the most before it looks at the deadlines.
    wait_max: Duration,
    /// How many act at once.
    workers: usize,
    stuck_after: Duration,
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
    pace: Pace,
    queue: Queue,
    /// How often each failed in a row. Bounded by what is due. A leaf lock.
    failures: Mutex<HashMap<RowId, u32>>,
    chores: Arc<Chores>,
}

/// What is to be done at each tick that may have to wait for a disk.
#[derive(Debug, Default)]
struct Chores {
    /// Whether they are under way. A leaf lock.
    under_way: Mutex<bool>,
    done: Condvar,
}

impl Reaper {
    /// Starts looking every `tick`, with so many workers.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub fn start(lifecycle: Arc<Lifecycle>, tick: Duration, workers: usize) -> io::Result<Self> {
        let stuck_after = STUCK_AFTER;
        Self::at(Pace { tick, wait_max: tick, workers: workers.max(1), stuck_after }, lifecycle)
    }

    fn at(pace: Pace, lifecycle: Arc<Lifecycle>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            lifecycle,
            pace,
            queue: Queue::new(pace.workers, pace.stuck_after),
            failures: Mutex::default(),
            chores: Arc::default(),
        });
        let mut threads = Vec::new();
        for number in 0..pace.workers {
            let shared = Arc::clone(&shared);
            let named = std::thread::Builder::new().name(format!("dozed-reap-{number}"));
            threads.push(named.spawn(move || {
                while let Some(due) = shared.queue.next() {
                    shared.act(due);
                }
            })?);
        }
        let looking = Arc::clone(&shared);
        threads.push(
            std::thread::Builder::new()
                .name("dozed-reaper".to_owned())
                .spawn(move || looking.look_on())?,
        );
        Ok(Self { shared, threads })
    }

    /// Ends the looking, and waits for what is being acted on, for at most `limit`. What takes
    /// longer is left behind; the next start finishes it.
    pub fn stop(self, limit: Duration) {
        self.shared.lifecycle.reaper_wakeup().close();
        self.shared.queue.close();
        let deadline = Deadline::after(limit);
        for thread in self.threads {
            join_by(thread, &deadline, "a thread of the reaper");
        }
    }
}

#[cfg(test)]
impl Reaper {
    /// Looks once, acts on all that is due, and ends. Its wakeup is closed already.
    pub(crate) fn run_once(mut self) {
        let limit = Duration::from_secs(3600);
        let looking = self.threads.pop().expect("the thread that looks is the last one");
        join_by(looking, &Deadline::after(limit), "the thread that looks");
        self.shared.queue.drain(limit);
        self.stop(limit);
    }
}

impl Shared {
    fn look_on(self: &Arc<Self>) {
        let mut next_tick = self.lifecycle.clock().now();
        loop {
            let wait = self.look(&mut next_tick);
            if !self.lifecycle.reaper_wakeup().wait(wait) {
                return;
            }
        }
    }

    /// One look. Returns how long it is to the next.
    fn look(self: &Arc<Self>, next_tick: &mut Timestamp) -> Duration {
        let Pace { tick, wait_max, .. } = self.pace;
        if self.lifecycle.index().check().is_err() {
            return wait_max; // It is told, and the daemon ends.
        }
        let now = self.lifecycle.clock().now();
        let is_tick = *next_tick <= now;
        if is_tick {
            *next_tick = now.after(tick);
            // What counts as activity first, so that it is seen before the verdict.
            self.lifecycle.sample_activity();
            self.lifecycle.activity().sample_holds();
            self.do_chores();
        }
        let active_until = self.look_for_due();
        self.start_spare_workers();
        let now = self.lifecycle.clock().now();
        let next = [
            self.lifecycle.index().next_due(now).ok().flatten(),
            self.lifecycle.networks().next_lingered().filter(|at| *at > now),
            self.lifecycle.next_deletion(),
            self.lifecycle.next_settling(),
            active_until,
        ];
        let next = next.into_iter().flatten().min();
        let wait = next.map_or(wait_max, |next| next.since(now).clamp(LOOK_MIN, wait_max));
        self.lifecycle.ticked(now);
        if self.queue.waits() { wait.min(STUCK_LOOK) } else { wait }
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
                self.lifecycle.sample_activity_of(&rows);
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
                let is_certain = |due: &DueRow| !self.lifecycle.waits_for_clock(due.row);
                let due = due.into_iter().filter(is_certain);
                due.map(|due| (due.at, Due::Delete(due.row))).collect()
            },
        );
        self.lifecycle.resume_deletions();
        self.lifecycle.settle_due();
        self.hand_out_leftovers(now);
        for row in self.lifecycle.networks().lingered() {
            self.queue.put(now, Due::Unlink(row));
        }
        active_until
    }

    /// Does what a tick has to do that may wait for a disk, on a thread of the pool, and waits
    /// for it for a moment. Those of the last tick may still be under way; then there are no
    /// others.
    fn do_chores(&self) {
        if std::mem::replace(&mut *lock(&self.chores.under_way), true) {
            return;
        }
        let (lifecycle, chores) = (Arc::clone(&self.lifecycle), Arc::clone(&self.chores));
        let started = self.lifecycle.pool().run(move || {
            // Also where one of them panics.
            let _done = ChoresDone(chores);
            lifecycle.do_chores();
        });
        if let Err(error) = started {
            *lock(&self.chores.under_way) = false;
            tracing::warn!(%error, "the chores of a tick are left to the next");
            return;
        }
        let under_way = lock(&self.chores.under_way);
        drop(wait_while_within(&self.chores.done, under_way, CHORES_WAIT, |under_way| *under_way));
    }

    /// Starts workers in the place of those that are stuck, if any waits for one. They end when
    /// nothing waits any more.
    fn start_spare_workers(self: &Arc<Self>) {
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

    fn act(&self, due: Due) {
        let done = catch_unwind(AssertUnwindSafe(|| self.act_on(due)));
        if done.is_err() {
            tracing::error!(row = %due.row(), "a reaper's act panicked");
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
            Due::Sleep(_) => {
                ("putting an idle one to sleep", { self.lifecycle.sleep(&held, &entry, Why::Idle) })
            }
            Due::Delete(_) => ("deleting a stale one", self.lifecycle.destroy_stale(&held, &entry)),
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

/// Notes that the chores are done when it is dropped.
struct ChoresDone(Arc<Chores>);

impl Drop for ChoresDone {
    fn drop(&mut self) {
        *lock(&self.0.under_way) = false;
        self.0.done.notify_all();
    }
}

/// The wait after the `count`th failure in a row.
fn backoff(count: u32) -> Duration {
    let doublings = count.saturating_sub(1).min(16);
    RETRY_FIRST.saturating_mul(1 << doublings).min(RETRY_MAX)
}
