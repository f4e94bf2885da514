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
//! One thread looks: at every tick at all that run, to see who was active ([`sampler`]), and at
//! the next deadline and when it is notified at who is due ([`deadlines`]), by a few range scans
//! of the index. Of those who are due it takes a sample before the verdict. It waits for no disk
//! for long.
//!
//! A few workers act, those first whose deadline is the earliest.

mod deadlines;
mod queue;
mod sampler;
#[cfg(test)]
mod tests;
mod workers;

use std::{io, thread::JoinHandle, time::Duration};

use deadlines::Deadlines;
use queue::Queue;
use sampler::Sampler;
use workers::Workers;

use crate::{
    lifecycle::Lifecycle,
    sync::Arc,
    sys::{clock::Deadline, thread::join_by},
};

/// After how long a worker counts as stuck, so that another is started. A healthy act takes
/// less, but for the sleep of a large guest on a slow disk, and then there are two.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// How often it is looked whether one is stuck, while others wait.
const STUCK_LOOK: Duration = Duration::from_secs(1);

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
    lifecycle: Arc<Lifecycle>,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
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
        let queue = Arc::new(Queue::new(pace.workers, pace.stuck_after));
        let workers = Arc::new(Workers::new(Arc::clone(&lifecycle), Arc::clone(&queue)));
        let mut threads = workers.start(pace.workers)?;
        let looking = Looking {
            sampler: Sampler::new(Arc::clone(&lifecycle), pace.tick),
            deadlines: Deadlines::new(Arc::clone(&lifecycle), Arc::clone(&queue), pace.wait_max),
            lifecycle: Arc::clone(&lifecycle),
            queue: Arc::clone(&queue),
            workers,
            wait_max: pace.wait_max,
        };
        let named = std::thread::Builder::new().name("dozed-reaper".to_owned());
        threads.push(named.spawn(move || looking.look_on())?);
        Ok(Self { lifecycle, queue, threads })
    }

    /// Ends the looking, and waits for what is being acted on, for at most `limit`. What takes
    /// longer is left behind; the next start finishes it.
    pub fn stop(self, limit: Duration) {
        self.lifecycle.records().reaper_wakeup().close();
        self.queue.close();
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
        self.queue.drain(limit);
        self.stop(limit);
    }
}

/// The thread that looks.
struct Looking {
    sampler: Sampler,
    deadlines: Deadlines,
    lifecycle: Arc<Lifecycle>,
    queue: Arc<Queue>,
    workers: Arc<Workers>,
    wait_max: Duration,
}

impl Looking {
    fn look_on(mut self) {
        loop {
            let wait = self.look();
            if !self.lifecycle.records().reaper_wakeup().wait(wait) {
                return;
            }
        }
    }

    /// One look. Returns how long it is to the next.
    fn look(&mut self) -> Duration {
        if self.lifecycle.index().check().is_err() {
            return self.wait_max; // It is told, and the daemon ends.
        }
        // What counts as activity first, so that it is seen before the verdict.
        self.sampler.sample();
        let wait = self.deadlines.look();
        self.workers.start_spare();
        self.lifecycle.records().metrics().ticked(self.lifecycle.clock().now());
        if self.queue.waits() { wait.min(STUCK_LOOK) } else { wait }
    }
}
