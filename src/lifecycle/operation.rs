//! Which operations are under way, and which sandboxes are being deleted.
//!
//! An operation of a sandbox is registered while it acts, so that a deletion can cancel
//! it. A deletion is first claimed, while its intent is being recorded and everybody still
//! sees the sandbox. Once the intent is recorded the sandbox is out of sight, no operation
//! on it starts, and whoever waited for its lock learns that it is gone.

use std::{collections::HashMap, time::Duration};

use super::{Commit, Entry, Error, Held, undo::Undo};
use crate::{
    sandbox::{Cause, RowId, Timestamp},
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::cancel::Cancel,
};

/// The operations under way.
#[derive(Debug, Default)]
pub(super) struct Operations {
    /// A leaf lock.
    table: Mutex<Table>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    under_way: HashMap<RowId, Arc<Cancel>>,
    /// Bounded by the count of sandboxes.
    deletions: HashMap<RowId, Deletion>,
    closing: bool,
}

/// The deletion of one sandbox.
#[derive(Debug, Clone)]
pub(super) struct Deletion {
    pub(super) cause: Cause,
    /// Whether its intent is a mark in the index rather than a state.
    pub(super) is_marked: bool,
    phase: DeletionPhase,
}

/// How far a deletion is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeletionPhase {
    /// Its intent is being recorded. The sandbox is still in sight.
    Claimed,
    /// Its intent is recorded, and a thread is at it.
    UnderWay,
    /// Its intent is recorded. It could not be finished, and is tried again then.
    PutOff(Timestamp),
}

/// How an attempt to claim a deletion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is the caller's.
    Taken,
    /// Another caller is recording its intent.
    Pending,
    /// The sandbox is being deleted.
    Gone,
}

/// An operation under way, which each of its steps gets. It has ended when it is dropped.
#[derive(Debug)]
pub(super) struct Op<'a> {
    pub(super) held: &'a Held,
    pub(super) entry: &'a Arc<Entry>,
    /// Called off if the sandbox is to be deleted.
    pub(super) cancel: Arc<Cancel>,
    /// How to take back what was done so far.
    pub(super) undo: Undo<'a>,
    /// What says in the index that it is under way, once that is recorded.
    pub(super) intent: Option<Commit>,
    operations: &'a Operations,
}

impl Operations {
    /// Says whether the intent to delete this sandbox is recorded.
    pub(super) fn is_deleting(&self, row: RowId) -> bool {
        let table = lock(&self.table);
        table.deletions.get(&row).is_some_and(|deletion| deletion.phase != DeletionPhase::Claimed)
    }

    /// Says whether this sandbox is being deleted, or is about to be.
    pub(super) fn is_claimed(&self, row: RowId) -> bool {
        lock(&self.table).deletions.contains_key(&row)
    }

    /// Says whether no more operations are taken.
    pub(super) fn is_closing(&self) -> bool {
        lock(&self.table).closing
    }

    /// Claims the deletion of a sandbox, before its intent is recorded.
    pub(super) fn claim_deletion(&self, row: RowId, cause: &Cause) -> Result<Claim, Error> {
        let mut table = lock(&self.table);
        if table.closing {
            return Err(Error::ShuttingDown);
        }
        match table.deletions.get(&row).map(|deletion| deletion.phase) {
            Some(DeletionPhase::Claimed) => return Ok(Claim::Pending),
            Some(DeletionPhase::UnderWay | DeletionPhase::PutOff(_)) => return Ok(Claim::Gone),
            None => {}
        }
        let claimed =
            Deletion { cause: cause.clone(), is_marked: false, phase: DeletionPhase::Claimed };
        table.deletions.insert(row, claimed);
        Ok(Claim::Taken)
    }

    /// Waits until a claimed deletion is recorded or given up.
    pub(super) fn wait_for_claim(&self, row: RowId, limit: Duration) {
        let pending = |table: &mut Table| {
            table
                .deletions
                .get(&row)
                .is_some_and(|deletion| deletion.phase == DeletionPhase::Claimed)
        };
        drop(wait_while_within(&self.ended, lock(&self.table), limit, pending));
    }

    /// Notes that the intent of a claimed deletion is recorded, and cancels what is under way.
    pub(super) fn mark_deleting(&self, row: RowId, is_marked: bool) {
        let mut table = lock(&self.table);
        if let Some(deletion) = table.deletions.get_mut(&row) {
            (deletion.phase, deletion.is_marked) = (DeletionPhase::UnderWay, is_marked);
        }
        if let Some(cancel) = table.under_way.get(&row) {
            cancel.call_off();
        }
        self.ended.notify_all();
    }

    /// Enters a deletion that an earlier daemon recorded.
    pub(super) fn restore_deletion(&self, row: RowId, is_marked: bool, now: Timestamp) {
        let phase = DeletionPhase::PutOff(now);
        let recorded = Deletion { cause: Cause::Reconcile, is_marked, phase };
        lock(&self.table).deletions.insert(row, recorded);
    }

    /// Returns the deletion of a sandbox.
    pub(super) fn deletion(&self, row: RowId) -> Option<Deletion> {
        lock(&self.table).deletions.get(&row).cloned()
    }

    /// Has a deletion that could not be finished tried again at `at`.
    pub(super) fn put_off_deletion(&self, row: RowId, at: Timestamp) {
        if let Some(deletion) = lock(&self.table).deletions.get_mut(&row) {
            deletion.phase = DeletionPhase::PutOff(at);
        }
        self.ended.notify_all();
    }

    /// Returns when the next deletion is to be tried again.
    pub(super) fn next_deletion(&self) -> Option<Timestamp> {
        let table = lock(&self.table);
        let at = |deletion: &Deletion| match deletion.phase {
            DeletionPhase::PutOff(at) => Some(at),
            DeletionPhase::Claimed | DeletionPhase::UnderWay => None,
        };
        table.deletions.values().filter_map(at).min()
    }

    /// Takes the deletions in hand that are to be tried again by `now`.
    pub(super) fn take_due_deletions(&self, now: Timestamp) -> Vec<RowId> {
        let mut table = lock(&self.table);
        if table.closing {
            return Vec::new();
        }
        let mut due = Vec::new();
        for (row, deletion) in &mut table.deletions {
            if matches!(deletion.phase, DeletionPhase::PutOff(at) if at <= now) {
                deletion.phase = DeletionPhase::UnderWay;
                due.push(*row);
            }
        }
        due
    }

    #[cfg(test)]
    pub(super) fn deletions_left(&self) -> usize {
        lock(&self.table).deletions.len()
    }

    /// Forgets a deletion: its sandbox is gone for good, or its intent was not recorded.
    pub(super) fn forget_deletion(&self, row: RowId) {
        lock(&self.table).deletions.remove(&row);
        self.ended.notify_all();
    }

    /// Begins an operation.
    pub(super) fn begin<'a>(
        &'a self,
        held: &'a Held,
        entry: &'a Arc<Entry>,
    ) -> Result<Op<'a>, Error> {
        let mut table = lock(&self.table);
        let deletion = table.deletions.get(&entry.row());
        if deletion.is_some_and(|deletion| deletion.phase != DeletionPhase::Claimed) {
            return Err(Error::Gone { id: entry.id().clone() });
        }
        if table.closing {
            return Err(Error::ShuttingDown);
        }
        let cancel = Arc::new(Cancel::default());
        table.under_way.insert(entry.row(), Arc::clone(&cancel));
        let undo = Undo::default();
        Ok(Op { held, entry, cancel, undo, intent: None, operations: self })
    }

    /// Lets no more begin, and waits for those under way. Returns how many are left.
    pub(super) fn close(&self, limit: Duration) -> usize {
        let mut table = lock(&self.table);
        table.closing = true;
        let table = wait_while_within(&self.ended, table, limit, |table| table.busy() > 0);
        table.busy()
    }
}

impl Table {
    /// Returns how many operations and deletions have a thread.
    fn busy(&self) -> usize {
        let has_thread = |deletion: &&Deletion| !matches!(deletion.phase, DeletionPhase::PutOff(_));
        self.under_way.len() + self.deletions.values().filter(has_thread).count()
    }
}

impl Drop for Op<'_> {
    fn drop(&mut self) {
        lock(&self.operations.table).under_way.remove(&self.entry.row());
        self.operations.ended.notify_all();
    }
}
