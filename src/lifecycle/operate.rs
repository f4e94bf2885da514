//! Runs an operation: registered, its panic caught, its result recorded.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Entry, Error, Held, Lifecycle, chain, operation::Op, recover::recover};
use crate::sync::Arc;

/// Runs one operation: registered, its panic caught, its result recorded.
pub(super) fn operate<'a, T>(
    lifecycle: &'a Lifecycle,
    held: &'a Held,
    entry: &'a Arc<Entry>,
    work: impl FnOnce(&mut Op<'a>) -> Result<T, Error>,
) -> Result<T, Error> {
    operate_unless(lifecycle, held, entry, |_| false, work)
}

/// As `operate`, but where nothing was done, as `is_nothing` says, nothing is recorded:
/// nobody asked for what the reaper thinks better of, and so it is no success of theirs.
pub(super) fn operate_unless<'a, T>(
    lifecycle: &'a Lifecycle,
    held: &'a Held,
    entry: &'a Arc<Entry>,
    is_nothing: impl FnOnce(&T) -> bool,
    work: impl FnOnce(&mut Op<'a>) -> Result<T, Error>,
) -> Result<T, Error> {
    // The row may have gone, and another of that name come, while we waited.
    if lifecycle.index.by_row(entry.row()).is_none() {
        return Err(Error::Gone { id: entry.id().clone() });
    }
    let mut op = lifecycle.operations.begin(held, entry)?;
    let generation = entry.record().generation;
    let _in =
        tracing::debug_span!("operation", id = %entry.id(), generation, cause = %held.cause())
            .entered();
    let result = catch_unwind(AssertUnwindSafe(|| work(&mut op))).unwrap_or_else(|payload| {
        #[cfg(test)]
        let payload = super::testing::CrashPlan::pass_on(payload);
        drop(payload);
        if let Err(error) = recover(lifecycle, &op) {
            tracing::error!(id = %entry.id(), error = chain(&error), "recovering from a panic");
            lifecycle.unsettled.later(entry.row());
        }
        Err(Error::Panicked { id: entry.id().clone() })
    });
    if lifecycle.operations.is_deleting(entry.row()) {
        return Err(Error::Gone { id: entry.id().clone() });
    }
    if !result.as_ref().is_ok_and(is_nothing) {
        record_result(lifecycle, held, entry, result.as_ref().err());
    }
    result
}

/// Puts the result of an operation where `error` finds it.
fn record_result(lifecycle: &Lifecycle, held: &Held, entry: &Entry, error: Option<&Error>) {
    lifecycle.notes.forget(entry.row());
    let line = error.map(|error| chain(error).into_boxed_str());
    if entry.record().error == line {
        return;
    }
    if let Err(error) =
        lifecycle.records.amend(held, entry, |record| record.error.clone_from(&line))
    {
        tracing::error!(id = %entry.id(), error = chain(&error), "recording a result");
        lifecycle.notes.set(entry.row(), chain(&error));
    }
    if let Some(line) = line {
        lifecycle.records.publish_failure(held, entry, line);
    }
}
