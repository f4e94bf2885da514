//! One row in RAM, and the list of those whose activity is to be written.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};

use crate::{
    sandbox::{Owner, Record, RowId, SandboxId, Timestamp},
    sync::{Mutex, RwLock, lock, read, write},
};

/// The face of one row that everybody reads. It stays valid, and still, after its row
/// has been removed.
#[derive(Debug)]
pub struct Entry {
    row: RowId,
    id: SandboxId,
    /// The record as it is on the disk. A leaf.
    record: RwLock<Arc<Record>>,
    last_activity: AtomicI64,
    activity_count: AtomicU64,
    /// Whether the row is in the list of those to write.
    is_dirty: AtomicBool,
    /// Whether its row may be newer than `record`. What follows from the record is not written
    /// meanwhile.
    is_changing: AtomicBool,
    dirty: Arc<Dirty>,
}

/// A change of a row that is not published yet; it is, or was undone, when this is dropped.
#[derive(Debug)]
pub(super) struct Change<'a>(&'a AtomicBool);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The rows whose activity is to be written, each at most once.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// A leaf.
    rows: Mutex<Vec<RowId>>,
}

impl Entry {
    pub(super) fn new(
        record: Record,
        last_activity: Timestamp,
        activity_count: u64,
        dirty: &Arc<Dirty>,
    ) -> Self {
        Self {
            row: record.row,
            id: record.id.clone(),
            record: RwLock::new(Arc::new(record)),
            last_activity: AtomicI64::new(last_activity.as_millis()),
            activity_count: AtomicU64::new(activity_count),
            is_dirty: AtomicBool::new(false),
            is_changing: AtomicBool::new(false),
            dirty: Arc::clone(dirty),
        }
    }

    /// Returns its number.
    #[must_use]
    pub fn row(&self) -> RowId {
        self.row
    }

    /// Returns its name.
    #[must_use]
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    /// Returns what is known of it. Nothing in there changes; the next change makes
    /// another record.
    #[must_use]
    pub fn record(&self) -> Arc<Record> {
        Arc::clone(&read(&self.record))
    }

    /// Returns whose it is.
    #[must_use]
    pub fn owner(&self) -> Owner {
        read(&self.record).owner
    }

    /// Returns when it was last active.
    #[must_use]
    pub fn last_activity(&self) -> Timestamp {
        Timestamp::from_millis(self.last_activity.load(Ordering::SeqCst))
    }

    /// Returns a number that grows with each activity, and that never comes again, not
    /// even after a crash that lost some of them.
    #[must_use]
    pub fn activity_count(&self) -> u64 {
        self.activity_count.load(Ordering::SeqCst)
    }

    /// Notes that it is active at `now`. It waits neither for the disk nor for a writer.
    pub fn touch(&self, now: Timestamp) {
        let now = now.as_millis();
        let before = self.last_activity.fetch_max(now, Ordering::SeqCst);
        // The count comes last: whoever sees it grow sees the time that goes with it.
        self.activity_count.fetch_add(1, Ordering::SeqCst);
        if before < now {
            self.mark_dirty();
        }
    }

    pub(super) fn mark_dirty(&self) {
        if !self.is_dirty.swap(true, Ordering::SeqCst) {
            lock(&self.dirty.rows).push(self.row);
        }
    }

    /// Returns the last activity to write it. A later one lists the row anew.
    pub(super) fn activity_to_write(&self) -> Timestamp {
        self.is_dirty.store(false, Ordering::SeqCst);
        self.last_activity()
    }

    /// Begins a change of the row. The sandbox's lock is held.
    pub(super) fn begin_change(&self) -> Change<'_> {
        self.is_changing.store(true, Ordering::SeqCst);
        Change(&self.is_changing)
    }

    pub(super) fn is_changing(&self) -> bool {
        self.is_changing.load(Ordering::SeqCst)
    }

    /// Shows what has just been made durable.
    pub(super) fn publish(&self, record: Arc<Record>) {
        *write(&self.record) = record;
    }
}

impl Dirty {
    /// Takes up to `limit` rows from the list, those that wait longest first.
    pub(super) fn take(&self, limit: usize) -> Vec<RowId> {
        let mut rows = lock(&self.rows);
        let count = rows.len().min(limit);
        rows.drain(..count).collect()
    }
}
