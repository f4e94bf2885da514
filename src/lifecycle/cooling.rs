//! Page cache of sleepers: kept for a short sleep, given back after it.
//!
//! A memory file that was just written is all in the kernel's page cache. It is clean and
//! can be reclaimed at any time, but a host whose sandboxes sleep all night should not
//! have to: so a while after a sandbox fell asleep the kernel is told to forget it. A
//! wake before that reads nothing from the disk.

use std::{collections::VecDeque, fs::File, time::Duration};

use super::Lifecycle;
use crate::{
    sandbox::{Record, RowId, State, Timestamp},
    snapshot::MEMORY,
    sync::{Mutex, lock},
    sys::files::{cached_bytes, drop_cache, open_regular},
};

/// How long a sleeper's memory stays in the page cache if nobody else needs the room.
const LINGER: Duration = Duration::from_secs(600);

/// Those that fell asleep not long ago, the longest ago first. Each sleep adds one and
/// each is taken out after `LINGER`, so it is bounded by the rate of sleeps.
#[derive(Debug, Default)]
pub(super) struct Cooling {
    /// Row, generation of the snapshot, and when. A leaf lock.
    queue: Mutex<VecDeque<(RowId, u64, Timestamp)>>,
}

impl Cooling {
    pub(super) fn add(&self, row: RowId, generation: u64, at: Timestamp) {
        lock(&self.queue).push_back((row, generation, at));
    }

    fn take_due(&self, now: Timestamp) -> Option<(RowId, u64)> {
        let mut queue = lock(&self.queue);
        let (row, generation, at) = *queue.front()?;
        if at.after(LINGER) > now {
            return None;
        }
        queue.pop_front();
        Some((row, generation))
    }
}

impl Lifecycle {
    /// Gives back the page cache of those that have slept for a while. Called at each tick.
    pub fn cool(&self) {
        while let Some((row, generation)) = self.cooling.take_due(self.now()) {
            let Some(entry) = self.by_row(row) else { continue };
            let record = entry.record();
            if record.snapshot().is_none_or(|facts| facts.generation != generation) {
                continue; // It was woken since.
            }
            let forgotten = self.open_memory(&record).map(|memory| drop_cache(&memory));
            if let Some(Err(error)) = forgotten {
                tracing::debug!(id = %entry.id(), %error, "giving back page cache");
            }
        }
    }

    /// Returns how many bytes of a sleeper's memory are in the page cache, where the
    /// kernel tells.
    #[must_use]
    pub fn cached_bytes(&self, record: &Record) -> Option<u64> {
        if record.state() != State::Snapshotted {
            return Some(0);
        }
        cached_bytes(&self.open_memory(record)?)
    }

    fn open_memory(&self, record: &Record) -> Option<File> {
        let dir = self.home(record).snapshot_dir(record.snapshot()?.generation);
        open_regular(&dir.join(MEMORY)).ok()
    }
}
