//! At each tick: who was active.

use std::time::Duration;

use crate::{
    lifecycle::{Guests, Lifecycle},
    sandbox::Timestamp,
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
};

/// How long a tick waits for its chores, so that deadlines are seen by what they wrote. On a
/// disk that hangs it goes on without them.
const CHORES_WAIT: Duration = Duration::from_secs(5);

/// Samples all that run, at each tick.
#[derive(Debug)]
pub(super) struct Sampler {
    lifecycle: Arc<Lifecycle>,
    tick: Duration,
    next_tick: Timestamp,
    chores: Arc<Chores>,
}

/// What is to be done at each tick that may have to wait for a disk.
#[derive(Debug, Default)]
struct Chores {
    /// Whether they are under way. A leaf lock.
    under_way: Mutex<bool>,
    done: Condvar,
}

impl Sampler {
    /// Its first tick is now.
    pub(super) fn new(lifecycle: Arc<Lifecycle>, tick: Duration) -> Self {
        let next_tick = lifecycle.clock().now();
        Self { lifecycle, tick, next_tick, chores: Arc::default() }
    }

    /// Samples, if a tick is due.
    pub(super) fn sample(&mut self) {
        let now = self.lifecycle.clock().now();
        if self.next_tick > now {
            return;
        }
        self.next_tick = now.after(self.tick);
        self.lifecycle.sample_activity(Guests::All);
        self.lifecycle.activity().sample_holds();
        self.do_chores();
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
            tracing::warn!(%error, "the work of a tick is left to the next");
            return;
        }
        let under_way = lock(&self.chores.under_way);
        drop(wait_while_within(&self.chores.done, under_way, CHORES_WAIT, |under_way| *under_way));
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
