//! What waits for a worker, and what the workers are at.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::{
    sandbox::{RowId, Timestamp},
    sync::{Condvar, Mutex, lock, wait},
    sys::clock::Stopwatch,
};

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
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

    pub(super) fn row(self) -> RowId {
        match self {
            Self::Sleep(row) | Self::Delete(row) | Self::Settle(row) | Self::Unlink(row) => row,
        }
    }
}

/// The queue. A sandbox is in it, or being acted on, at most once, which bounds it.
#[derive(Debug)]
pub(super) struct Queue {
    workers: usize,
    stuck_after: Duration,
    /// A leaf lock.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By kind, and of a kind those first whose deadline is the earliest.
    waiting: BTreeMap<(u8, Timestamp, RowId), Due>,
    /// The rows of those that wait, and since when those are acted on that are.
    in_hand: HashMap<RowId, Option<Stopwatch>>,
    /// Workers that were started in the place of others.
    spares: usize,
    is_closed: bool,
}

impl State {
    fn take(&mut self) -> Option<Due> {
        let (_, due) = self.waiting.pop_first()?;
        self.in_hand.insert(due.row(), Some(Stopwatch::start()));
        Some(due)
    }
}

impl Queue {
    pub(super) fn new(workers: usize, stuck_after: Duration) -> Self {
        Self { workers, stuck_after, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Has one acted on that is due since `at`, unless it waits or is acted on already.
    pub(super) fn put(&self, at: Timestamp, due: Due) {
        let mut state = lock(&self.state);
        if state.is_closed || state.in_hand.contains_key(&due.row()) {
            return;
        }
        state.in_hand.insert(due.row(), None);
        state.waiting.insert((due.rank(), at, due.row()), due);
        self.changed.notify_one();
    }

    /// Waits for the next one. `None` when the queue is closed.
    pub(super) fn next(&self) -> Option<Due> {
        let mut state = lock(&self.state);
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(due) = state.take() {
                return Some(due);
            }
            state = wait(&self.changed, state);
        }
    }

    /// Returns the next one for a spare worker, which ends where there is none.
    pub(super) fn next_for_spare(&self) -> Option<Due> {
        let mut state = lock(&self.state);
        let next = if state.is_closed { None } else { state.take() };
        if next.is_none() {
            state.spares -= 1;
        }
        next
    }

    /// Notes that one was acted on.
    pub(super) fn done(&self, due: Due) {
        lock(&self.state).in_hand.remove(&due.row());
        self.changed.notify_all();
    }

    /// Waits until nothing waits and nothing is acted on.
    #[cfg(test)]
    pub(super) fn drain(&self, limit: Duration) {
        use crate::sync::wait_while_within;
        let is_busy = |state: &mut State| !state.in_hand.is_empty();
        drop(wait_while_within(&self.changed, lock(&self.state), limit, is_busy));
    }

    /// Says whether any waits for a worker.
    pub(super) fn waits(&self) -> bool {
        !lock(&self.state).waiting.is_empty()
    }

    /// Says whether to start one more worker: something waits, and fewer than there are to be
    /// are at work and not stuck. It is counted then.
    pub(super) fn begin_spare(&self, spares_max: usize) -> bool {
        let mut state = lock(&self.state);
        let acting = state.in_hand.values().flatten();
        let (mut stuck, mut all) = (0, 0);
        for since in acting {
            all += 1;
            stuck += usize::from(since.elapsed() >= self.stuck_after);
        }
        // Those that are just about to take one are not needed twice.
        let about_to_take = (self.workers + state.spares).saturating_sub(all);
        let is_needed = state.waiting.len() > about_to_take
            && all - stuck + about_to_take < self.workers
            && state.spares < spares_max;
        state.spares += usize::from(is_needed);
        is_needed
    }

    /// Counts a spare worker out that could not be started.
    pub(super) fn end_spare(&self) {
        lock(&self.state).spares -= 1;
    }

    /// Has all workers end. What waits is not begun.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        state.waiting.clear();
        self.changed.notify_all();
    }
}
