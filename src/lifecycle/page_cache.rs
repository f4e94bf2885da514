//! The page cache of sleeping sandboxes: kept for a short sleep, dropped after it.
//!
//! A memory file that was just written is all in the kernel's page cache. It is clean and
//! the kernel can reclaim it at any time, but a host whose sandboxes sleep all night should not
//! have to. So some time after a sandbox fell asleep the kernel is asked to drop it. A
//! wake before that reads nothing from the disk.

use std::{collections::VecDeque, time::Duration};

use super::{Lifecycle, chain};
use crate::{
    sandbox::{RowId, Timestamp},
    sync::{Mutex, lock},
};

/// How long a sleeper's memory stays in the page cache if nobody else needs the room.
const KEEP: Duration = Duration::from_secs(600);

/// Those that fell asleep not long ago, the longest ago first. Each sleep adds one and
/// each is taken out after `KEEP`, so it is bounded by the rate of sleeps.
#[derive(Debug, Default)]
pub(super) struct PageCache {
    /// Row, generation of the snapshot, and when. A leaf lock.
    queue: Mutex<VecDeque<(RowId, u64, Timestamp)>>,
}

impl PageCache {
    /// Has the page cache of a snapshot dropped later.
    pub(super) fn drop_later(&self, row: RowId, generation: u64, slept_at: Timestamp) {
        lock(&self.queue).push_back((row, generation, slept_at));
    }

    fn take_due(&self, now: Timestamp) -> Option<(RowId, u64)> {
        let mut queue = lock(&self.queue);
        let (row, generation, at) = *queue.front()?;
        if at.after(KEEP) > now {
            return None;
        }
        queue.pop_front();
        Some((row, generation))
    }
}

/// Drops the page cache of those that have slept for a while. Called at each tick.
pub(super) fn drop_page_cache(lifecycle: &Lifecycle) {
    while let Some((row, generation)) = lifecycle.page_cache.take_due(lifecycle.clock.now()) {
        let Some(entry) = lifecycle.by_row(row) else { continue };
        let record = entry.record();
        if record.snapshot().is_none_or(|facts| facts.generation != generation) {
            continue; // It was woken since.
        }
        if let Err(error) = lifecycle.store.home(&record).drop_page_cache(generation) {
            tracing::debug!(id = %entry.id(), error = chain(&error), "dropping page cache");
        }
    }
}
