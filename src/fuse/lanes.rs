//! A share of the threads for each user: whoever asks for much waits for themselves.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
};

use tracing::Span;

use crate::{
    sync::{Arc, Mutex, lock},
    sys::pool::{Pool, PoolError},
};

type Job = Box<dyn FnOnce() + Send>;

/// How much of a pool one user may have. Root may have all of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// How many jobs at once.
    pub(super) threads: usize,
    /// How many more may wait for those.
    pub(super) queue: usize,
}

/// A pool that users share.
#[derive(Debug)]
pub(super) struct Lanes {
    pool: Arc<Pool>,
    share: Share,
    /// The users that have jobs. A leaf lock.
    users: Arc<Mutex<HashMap<u32, Lane>>>,
}

/// The jobs of one user. While fewer are under way than may be, none waits.
#[derive(Default)]
struct Lane {
    under_way: usize,
    waiting: VecDeque<Job>,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("under_way", &self.under_way).finish_non_exhaustive()
    }
}

impl Lanes {
    pub(super) fn new(pool: Arc<Pool>, share: Share) -> Self {
        Self { pool, share, users: Arc::default() }
    }

    /// Runs `job` for the user `uid`, in the span of the caller, once a thread of their share
    /// is free.
    ///
    /// # Errors
    /// Where too many wait already, or there is no thread; `job` was dropped.
    pub(super) fn run(
        &self,
        uid: u32,
        job: impl FnOnce() + Send + 'static,
    ) -> Result<(), PoolError> {
        if uid == 0 {
            return self.pool.run(job);
        }
        let span = Span::current();
        let job: Job = Box::new(move || span.in_scope(job));
        {
            let mut users = lock(&self.users);
            let lane = users.entry(uid).or_default();
            if lane.under_way >= self.share.threads {
                if lane.waiting.len() >= self.share.queue {
                    return Err(PoolError::Full { limit: self.share.threads + self.share.queue });
                }
                lane.waiting.push_back(job);
                return Ok(());
            }
            lane.under_way += 1;
        }
        let users = Arc::clone(&self.users);
        let started = self.pool.run(move || {
            let mut next = Some(job);
            while let Some(job) = next {
                // The hook of the process has told of a panic.
                drop(catch_unwind(AssertUnwindSafe(job)));
                next = next_of(&users, uid);
            }
        });
        if started.is_err() {
            // What came to wait meanwhile is refused with it, unless another thread does it.
            let _refused = leave(&mut lock(&self.users), uid);
        }
        started
    }
}

/// Returns the next job of a user; without any their thread is free.
fn next_of(users: &Mutex<HashMap<u32, Lane>>, uid: u32) -> Option<Job> {
    let mut users = lock(users);
    let next = users.get_mut(&uid)?.waiting.pop_front();
    if next.is_none() {
        leave(&mut users, uid);
    }
    next
}

/// Counts a job out. Returns those that nobody is left to do.
fn leave(users: &mut HashMap<u32, Lane>, uid: u32) -> Option<Lane> {
    let lane = users.get_mut(&uid)?;
    lane.under_way -= 1;
    if lane.under_way == 0 { users.remove(&uid) } else { None }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    const SHARE: Share = Share { threads: 2, queue: 3 };

    #[test]
    fn a_user_who_has_their_share_waits_and_others_and_root_do_not() {
        let lanes = Lanes::new(Arc::new(Pool::new()), SHARE);
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        let (done, finished) = mpsc::channel();
        let job = |name: &'static str| {
            let (blocked, done) = (Arc::clone(&blocked), done.clone());
            move || {
                lock(&blocked).recv().unwrap_err();
                done.send(name).unwrap();
            }
        };
        for _ in 0..SHARE.threads + SHARE.queue {
            lanes.run(1, job("flood")).unwrap();
        }
        assert!(matches!(lanes.run(1, || ()), Err(PoolError::Full { .. })));
        for uid in [0, 2] {
            let done = done.clone();
            lanes.run(uid, move || done.send("other").unwrap()).unwrap();
            assert_eq!(finished.recv_timeout(Duration::from_secs(60)), Ok("other"));
        }
        drop(release);
        for _ in 0..SHARE.threads + SHARE.queue {
            assert_eq!(finished.recv_timeout(Duration::from_secs(60)), Ok("flood"));
        }
        let is_left = || lock(&lanes.users).contains_key(&1);
        let deadline = crate::sys::clock::Deadline::after(Duration::from_secs(60));
        while is_left() {
            assert!(!deadline.passed());
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_job_that_panics_or_gets_no_thread_leaves_its_place() {
        let lanes = Lanes::new(Arc::new(Pool::with_limit(1)), SHARE);
        let (release, blocked) = mpsc::channel::<()>();
        lanes.run(1, move || blocked.recv().unwrap_err().to_string().clear()).unwrap();
        assert!(matches!(lanes.run(2, || ()), Err(PoolError::Full { .. })));
        assert!(!lock(&lanes.users).contains_key(&2));
        let (done, finished) = mpsc::channel();
        let next = done.clone();
        assert!(matches!(lanes.run(1, || panic!("on purpose")), Err(PoolError::Full { .. })));
        drop(release);
        let deadline = crate::sys::clock::Deadline::after(Duration::from_secs(60));
        while lanes.pool.jobs() > 0 {
            assert!(!deadline.passed());
            std::thread::yield_now();
        }
        lanes.run(1, || panic!("on purpose")).unwrap();
        while lanes
            .run(1, {
                let done = next.clone();
                move || done.send(()).unwrap()
            })
            .is_err()
        {
            assert!(!deadline.passed());
            std::thread::yield_now();
        }
        assert_eq!(finished.recv_timeout(Duration::from_secs(60)), Ok(()));
    }
}
