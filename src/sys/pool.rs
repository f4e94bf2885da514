//! Threads for work that blocks: kept warm for a while, bounded in number.

use std::{
    fmt, io,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use crate::sync::Arc;

/// How many jobs there may be at once. Each blocked writer has one, so it bounds the
/// writers that wait; a thread that waits takes some ten KiB.
const JOBS_MAX: usize = 1024;
/// How long an idle thread is kept for the next job.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A pool of threads for operations that block.
pub struct Pool {
    runtime: Option<tokio::runtime::Runtime>,
    jobs: Arc<AtomicUsize>,
}

/// There are as many jobs as there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{JOBS_MAX} operations are under way or waiting, which is the limit")]
pub struct PoolFull;

/// Counts one job less when the job ends, also by a panic.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Pool {
    /// Makes an empty pool.
    ///
    /// # Errors
    /// Where the system gives no resources for one.
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(JOBS_MAX)
            .thread_keep_alive(KEEP_ALIVE)
            .thread_name("dozed-op")
            .build()?;
        Ok(Self { runtime: Some(runtime), jobs: Arc::new(AtomicUsize::new(0)) })
    }

    /// Runs `job` on a thread of its own. A panic in it ends the job, not the thread.
    ///
    /// # Errors
    /// `PoolFull` when too many are under way; `job` was dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<(), PoolFull> {
        if self.jobs.fetch_add(1, Ordering::SeqCst) >= JOBS_MAX {
            self.jobs.fetch_sub(1, Ordering::SeqCst);
            return Err(PoolFull);
        }
        let counted = Counted(Arc::clone(&self.jobs));
        let runtime =
            self.runtime.as_ref().expect("the runtime is there until the pool is dropped");
        drop(runtime.spawn_blocking(move || {
            let _counted = counted;
            job();
        }));
        Ok(())
    }

    /// Returns how many jobs are under way or waiting.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.jobs.load(Ordering::SeqCst)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Jobs that still wait for a stuck VMM must not keep the daemon from ending.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("jobs", &self.jobs()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_job_that_panics_is_counted_out_and_the_next_one_runs() {
        let pool = Pool::new().unwrap();
        let (done, wait) = mpsc::channel();
        let told = done.clone();
        pool.run(move || {
            let _told = told;
            panic!("on purpose");
        })
        .unwrap();
        pool.run(move || done.send(()).unwrap()).unwrap();
        assert_eq!(wait.recv_timeout(Duration::from_secs(10)), Ok(()));
        // Both senders are gone only when both jobs have ended.
        assert!(wait.recv_timeout(Duration::from_secs(10)).is_err());
    }

    #[test]
    fn one_job_too_many_is_refused_at_once() {
        let pool = Pool::new().unwrap();
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(crate::sync::Mutex::new(wait));
        for _ in 0..JOBS_MAX {
            let wait = Arc::clone(&wait);
            pool.run(move || {
                crate::sync::lock(&wait).recv().unwrap_err();
            })
            .unwrap();
        }
        assert_eq!(pool.run(|| ()), Err(PoolFull));
        drop(release);
    }
}
