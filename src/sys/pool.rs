//! A bounded pool of threads for blocking work.
//!
//! If the system cannot start a thread (memory, the unit's `TasksMax`), only the caller's job is
//! refused. The pool of tokio panics then.

use std::{
    collections::VecDeque,
    io, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::Duration,
};

use tracing::Span;

use crate::sync::{Arc, Condvar, Mutex, lock, wait_while_within};

/// The limit of jobs, and so of blocked writers. A waiting thread takes some ten KiB.
const JOBS_MAX: usize = 1024;
/// How long an idle thread is kept for the next job.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads. Dropping it does not wait for running jobs, such as one that waits for a
/// stuck VMM.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    jobs_max: usize,
}

/// Why a job was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// There are as many jobs as there may be.
    #[error("{limit} operations are under way or waiting, which is the limit")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// The system gave no thread for it.
    #[error("the system cannot start a thread for another operation")]
    NoThread {
        /// What it said.
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct Shared {
    /// A leaf.
    state: Mutex<State>,
    /// A job waits for an idle thread, or it is over.
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    /// Jobs that an idle thread is about to take; never more than there are idle threads.
    waiting: VecDeque<Job>,
    /// Threads that have no job.
    idle: usize,
    /// Jobs that wait or are under way.
    jobs: usize,
    is_over: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("jobs", &self.jobs).finish_non_exhaustive()
    }
}

impl Pool {
    /// Makes an empty pool.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limit(JOBS_MAX)
    }

    /// Makes an empty pool for so many jobs at once.
    #[must_use]
    pub fn with_limit(jobs_max: usize) -> Self {
        Self { shared: Arc::default(), jobs_max }
    }

    /// Runs `job` on a thread of its own, in the span of the caller. A panic in it ends the job,
    /// not the thread.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<(), PoolError> {
        let span = Span::current();
        let job: Job = Box::new(move || span.in_scope(job));
        {
            let mut state = lock(&self.shared.state);
            if state.jobs >= self.jobs_max {
                return Err(PoolError::Full { limit: self.jobs_max });
            }
            state.jobs += 1;
            if state.waiting.len() < state.idle {
                state.waiting.push_back(job);
                self.shared.wanted.notify_one();
                return Ok(());
            }
        }
        let shared = Arc::clone(&self.shared);
        let started = thread::Builder::new()
            .name("dozed-op".to_owned())
            .spawn(move || shared.work(job))
            .map(drop);
        started.map_err(|source| {
            lock(&self.shared.state).jobs -= 1;
            PoolError::NoThread { source }
        })
    }

    /// Returns how many jobs are under way or waiting.
    #[must_use]
    pub fn jobs(&self) -> usize {
        lock(&self.shared.state).jobs
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.is_over = true;
        // What no thread has begun with is not begun.
        let waiting = mem::take(&mut state.waiting);
        state.jobs -= waiting.len();
        drop(state);
        self.shared.wanted.notify_all();
    }
}

impl Shared {
    /// Does jobs until none comes for a while.
    fn work(&self, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            // The hook of the process has told of a panic.
            drop(catch_unwind(AssertUnwindSafe(job)));
            let mut state = lock(&self.state);
            state.jobs -= 1;
            state.idle += 1;
            let has_none = |state: &mut State| state.waiting.is_empty() && !state.is_over;
            let mut state = wait_while_within(&self.wanted, state, KEEP_ALIVE, has_none);
            state.idle -= 1;
            next = state.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_job_that_panics_is_counted_out_and_the_next_one_runs() {
        let pool = Pool::new();
        let (done, wait) = mpsc::channel();
        let told = done.clone();
        pool.run(move || {
            let _told = told;
            panic!("on purpose");
        })
        .unwrap();
        pool.run(move || done.send(()).unwrap()).unwrap();
        assert_eq!(wait.recv_timeout(Duration::from_secs(180)), Ok(()));
        // Both senders are gone only when both jobs have ended.
        assert!(wait.recv_timeout(Duration::from_secs(180)).is_err());
    }

    #[test]
    fn one_job_too_many_is_refused_at_once() {
        let pool = Pool::new();
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(crate::sync::Mutex::new(wait));
        for _ in 0..JOBS_MAX {
            let wait = Arc::clone(&wait);
            pool.run(move || {
                crate::sync::lock(&wait).recv().unwrap_err();
            })
            .unwrap();
        }
        assert!(matches!(pool.run(|| ()), Err(PoolError::Full { .. })));
        drop(release);
    }

    #[test]
    fn a_thread_is_used_again() {
        let pool = Pool::new();
        let (done, wait) = mpsc::channel();
        let mut threads = std::collections::HashSet::new();
        for _ in 0..50 {
            let done = done.clone();
            pool.run(move || done.send(thread::current().id()).unwrap()).unwrap();
            threads.insert(wait.recv_timeout(Duration::from_secs(60)).unwrap());
            let idle = || lock(&pool.shared.state).idle > 0;
            let deadline = crate::sys::clock::Deadline::after(Duration::from_secs(60));
            while !idle() {
                assert!(!deadline.passed());
                thread::yield_now();
            }
        }
        assert_eq!(threads.len(), 1);
    }

    /// From now on this thread can start no others.
    fn forbid_threads() {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
        let refused = [libc::SYS_clone, libc::SYS_clone3].map(|call| (call, Vec::new()));
        let filter = SeccompFilter::new(
            refused.into_iter().collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EAGAIN.unsigned_abs()),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
    }

    #[test]
    fn where_the_system_gives_no_thread_only_the_job_is_refused() {
        let pool = Arc::new(Pool::new());
        let refused = Arc::clone(&pool);
        let asking = thread::Builder::new().spawn(move || {
            forbid_threads();
            refused.run(|| ())
        });
        let refused = asking.unwrap().join().unwrap();
        assert!(matches!(refused, Err(PoolError::NoThread { .. })), "{refused:?}");
        assert_eq!(pool.jobs(), 0);
        let (done, wait) = mpsc::channel();
        pool.run(move || done.send(()).unwrap()).unwrap();
        assert_eq!(wait.recv_timeout(Duration::from_secs(60)), Ok(()));
    }
}
