//! Which operations are under way, and which sandboxes are doomed.
//!
//! An operation of a sandbox is registered while it acts, so that `destroy` can call
//! it off. A doomed sandbox is one that `destroy` has begun with: it is no longer
//! seen, no operation on it starts, and whoever waited for its lock learns that it
//! is gone.

use std::{
    collections::{HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use super::{Entry, Error, Lifecycle, chain};
use crate::{
    lifecycle::Held,
    sandbox::RowId,
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
    doomed: HashSet<RowId>,
    closing: bool,
}

/// One operation under way; ended when dropped.
#[derive(Debug)]
pub(super) struct Operation<'a> {
    operations: &'a Operations,
    row: RowId,
    pub(super) cancel: Arc<Cancel>,
}

impl Operations {
    /// Says whether `destroy` has begun with this sandbox.
    pub(super) fn is_doomed(&self, row: RowId) -> bool {
        lock(&self.table).doomed.contains(&row)
    }

    /// Says whether no more operations are taken.
    pub(super) fn is_closing(&self) -> bool {
        lock(&self.table).closing
    }

    /// Dooms a sandbox and calls off what is under way on it. False if it was already.
    pub(super) fn doom(&self, row: RowId) -> bool {
        let mut table = lock(&self.table);
        if !table.doomed.insert(row) {
            return false;
        }
        if let Some(cancel) = table.under_way.get(&row) {
            cancel.call_off();
        }
        true
    }

    /// Takes a doom back: the row is gone for good, or deleting it failed.
    pub(super) fn pardon(&self, row: RowId) {
        lock(&self.table).doomed.remove(&row);
    }

    /// Begins an operation. The caller has the sandbox's lock.
    pub(super) fn begin(&self, entry: &Entry) -> Result<Operation<'_>, Error> {
        let mut table = lock(&self.table);
        if table.doomed.contains(&entry.row()) {
            return Err(Error::Gone { id: entry.id().clone() });
        }
        if table.closing {
            return Err(Error::ShuttingDown);
        }
        let cancel = Arc::new(Cancel::default());
        table.under_way.insert(entry.row(), Arc::clone(&cancel));
        Ok(Operation { operations: self, row: entry.row(), cancel })
    }

    /// Lets no more begin, and waits for those under way. Returns how many are left.
    pub(super) fn close(&self, limit: Duration) -> usize {
        let mut table = lock(&self.table);
        table.closing = true;
        let busy = |table: &mut Table| !table.under_way.is_empty();
        wait_while_within(&self.ended, table, limit, busy).under_way.len()
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        lock(&self.operations.table).under_way.remove(&self.row);
        self.operations.ended.notify_all();
    }
}

impl Lifecycle {
    /// Runs one operation: registered, its panic caught, its result recorded.
    pub(super) fn operate<T>(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        work: impl FnOnce(&Operation<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.operate_unless(held, entry, |_| false, work)
    }

    /// As `operate`, but where nothing was done, as `is_nothing` says, nothing is recorded:
    /// nobody asked for what the reaper thinks better of, and so it is no success of theirs.
    pub(super) fn operate_unless<T>(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        is_nothing: impl FnOnce(&T) -> bool,
        work: impl FnOnce(&Operation<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // The row may have gone, and another of that name come, while we waited.
        if self.index.by_row(entry.row()).is_none() {
            return Err(Error::Gone { id: entry.id().clone() });
        }
        let operation = self.operations.begin(entry)?;
        let result = catch_unwind(AssertUnwindSafe(|| work(&operation))).unwrap_or_else(|payload| {
            #[cfg(test)]
            let payload = super::testing::CrashPlan::pass_on(payload);
            drop(payload);
            let recovered = self.recover(held, entry, &operation);
            if let Err(error) = recovered {
                tracing::error!(id = %entry.id(), error = chain(&error), "recovering from a panic");
            }
            Err(Error::Panicked { id: entry.id().clone() })
        });
        if self.operations.is_doomed(entry.row()) {
            return Err(Error::Gone { id: entry.id().clone() });
        }
        if !result.as_ref().is_ok_and(is_nothing) {
            self.record_result(held, entry, result.as_ref().err());
        }
        result
    }

    /// Puts the result of an operation where `error` finds it.
    fn record_result(&self, held: &Held, entry: &Entry, error: Option<&Error>) {
        self.activities.forget_note(entry.row());
        let line = error.map(|error| chain(error).into_boxed_str());
        if entry.record().error == line {
            return;
        }
        if let Err(error) = self.amend(held, entry, |record| record.error.clone_from(&line)) {
            tracing::error!(id = %entry.id(), error = chain(&error), "recording a result");
            self.activities.note(entry.row(), chain(&error));
        }
        if let Some(line) = line {
            self.tell_failed(held, entry, line);
        }
    }
}
