//! Deleting, from every state, without ever waking.
//!
//! ```text
//! a place on a thread → claimed → intent RECORDED → out of sight, operation cancelled, VMM killed
//!   → lock → network removed → files set aside → row removed → told
//! ```
//!
//! Whatever fails before the intent is on the disk changes nothing: the guest runs, the name is
//! there. Whatever fails after it is tried again until the deletion is finished, by the next
//! daemon too, and nobody sees the sandbox meanwhile.
//!
//! The intent is the state `deleting` where the sandbox's lock is free. Where an operation has
//! it, which the deletion is to cancel, the intent is a mark of its own in the index, as the
//! row is that operation's.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use super::{
    CrashPoint, Entry, Error, Lifecycle, Outcome, chain, crash_point, error::host_failed,
    evidence::process_of, exits::release, operation::Claim,
};
use crate::{
    lifecycle::Held,
    machines::end,
    sandbox::{Cause, RowId, State, Step},
    sync::Arc,
    sys::{files::remove_tree, pool::PoolError},
};

/// How many deletions may have a thread at once. The kernel sends the removals of one mount
/// one after the other, and a thread stays only with one that is slow to end.
pub(super) const DELETIONS_MAX: usize = 64;
/// How long the caller waits for a deletion whose intent is recorded. It holds its directory.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a deletion keeps its thread while it waits for the operation that it cancelled.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
/// When to try again to finish a deletion. What fails is a busy index, a full disk or a
/// process that does not end, and each of these may be over in seconds.
const AGAIN: Duration = Duration::from_secs(5);
/// How long to wait while another deletion of the same sandbox records its intent: longer
/// than the index waits for whoever has it locked.
const CLAIM_LIMIT: Duration = Duration::from_secs(30);
/// What the key of a marked deletion begins with, in the index.
const MARK_KEY: &str = "deleting.";

impl Lifecycle {
    /// Runs `work`, which deletes, on a thread that other operations cannot take.
    ///
    /// # Errors
    /// Where there are too many deletions, or no thread; nothing has happened then.
    pub fn queue_deletion(&self, work: impl FnOnce() + Send + 'static) -> Result<(), PoolError> {
        self.deletions.run(work)
    }

    /// Deletes a sandbox. `answer` is called as soon as it is gone, or when finishing takes
    /// long: the deletion goes on then.
    ///
    /// Its error is `Pinned`, `Held`, `Gone`, `ShuttingDown` or the index's, and nothing has
    /// changed then.
    pub fn delete(
        &self,
        entry: &Arc<Entry>,
        cause: &Cause,
        answer: impl FnOnce(Result<(), Error>),
    ) {
        if let Err(error) = begin_deletion(self, entry, cause) {
            return answer(Err(error));
        }
        if finish_deletion(self, entry, cause, ANSWER_WITHIN) {
            return answer(Ok(()));
        }
        answer(Ok(()));
        if !finish_deletion(self, entry, cause, LOCK_LIMIT) {
            put_off_deletion(self, entry.row());
        }
    }
}

/// Deletes a sandbox whose lock is held, unless it is pinned, held or being deleted.
///
/// # Errors
/// The index's, and then nothing has changed.
pub(super) fn delete_locked(
    lifecycle: &Lifecycle,
    held: &Held,
    entry: &Arc<Entry>,
) -> Result<Outcome, Error> {
    if !matches!(try_claim(lifecycle, entry, held.cause()), Ok(Claim::Taken)) {
        return Ok(Outcome::Skipped);
    }
    intend_deletion(lifecycle, held, entry)
        .inspect_err(|_| lifecycle.operations.forget_deletion(entry.row()))?;
    lifecycle.operations.mark_deleting(entry.row(), false);
    finish_locked_deletion(lifecycle, held, entry);
    Ok(Outcome::Done)
}

/// Tries again to finish the deletions that are due for it, each on a thread of its own.
pub(super) fn resume_deletions(lifecycle: &Arc<Lifecycle>) {
    for row in lifecycle.operations.take_due_deletions(lifecycle.clock.now()) {
        let this = Arc::clone(lifecycle);
        let queued = lifecycle.queue_deletion(move || {
            let (entry, deletion) = (this.index.by_row(row), this.operations.deletion(row));
            let (Some(entry), Some(deletion)) = (entry, deletion) else {
                return this.operations.forget_deletion(row);
            };
            if !finish_deletion(&this, &entry, &deletion.cause, LOCK_LIMIT) {
                put_off_deletion(&this, row);
            }
        });
        if queued.is_err() {
            put_off_deletion(lifecycle, row);
        }
    }
}

/// Enters the deletions that an earlier daemon recorded and did not finish. Called once,
/// before anybody sees the sandboxes.
pub(super) fn restore_deletions(lifecycle: &Lifecycle) {
    let now = lifecycle.clock.now();
    for entry in lifecycle.index.entries_after(RowId(0)) {
        if entry.record().state() == State::Deleting {
            lifecycle.operations.restore_deletion(entry.row(), false, now);
        }
    }
    let marks = lifecycle.index.metas(MARK_KEY).unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "looking for deletions to finish");
        Vec::new()
    });
    for row in marks.iter().filter_map(|(key, _)| row_of(key)) {
        if lifecycle.index.by_row(row).is_some() {
            lifecycle.operations.restore_deletion(row, true, now);
        } else {
            remove_mark(lifecycle, row);
        }
    }
}

/// Claims a deletion, records its intent, and does what makes it certain.
fn begin_deletion(lifecycle: &Lifecycle, entry: &Arc<Entry>, cause: &Cause) -> Result<(), Error> {
    lifecycle.records.make_room_for(&Step::Delete);
    let claim = match try_claim(lifecycle, entry, cause)? {
        Claim::Pending => {
            lifecycle.operations.wait_for_claim(entry.row(), CLAIM_LIMIT);
            try_claim(lifecycle, entry, cause)?
        }
        claim @ (Claim::Taken | Claim::Gone) => claim,
    };
    match claim {
        Claim::Taken => {}
        Claim::Pending => return Err(Error::Locked { id: entry.id().clone() }),
        Claim::Gone => return Err(Error::Gone { id: entry.id().clone() }),
    }
    record_deletion(lifecycle, entry, cause)
        .inspect_err(|_| lifecycle.operations.forget_deletion(entry.row()))?;
    crash_point(lifecycle, CrashPoint::DeleteIntended);
    if let Some(live) = lifecycle.machines.get(entry.row()) {
        live.process.kill();
    }
    Ok(())
}

fn try_claim(lifecycle: &Lifecycle, entry: &Entry, cause: &Cause) -> Result<Claim, Error> {
    if entry.record().pinned {
        return Err(Error::Pinned { id: entry.id().clone() });
    }
    lifecycle
        .activity
        .unless_held(entry, || lifecycle.operations.claim_deletion(entry.row(), cause))
}

/// Brings the intent to the disk, and takes the sandbox out of sight.
fn record_deletion(lifecycle: &Lifecycle, entry: &Arc<Entry>, cause: &Cause) -> Result<(), Error> {
    if let Some(lock) = lifecycle.locks.try_lock(entry.id()) {
        let held = Held::new(lock, cause.clone());
        intend_deletion(lifecycle, &held, entry)?;
        // Whoever has the lock next is to find it deleted, not `deleting`.
        lifecycle.operations.mark_deleting(entry.row(), false);
        drop(held);
        return Ok(());
    }
    lifecycle
        .index
        .set_meta(&mark_key(entry.row()), "1")
        .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
    lifecycle.operations.mark_deleting(entry.row(), true);
    Ok(())
}

fn intend_deletion(lifecycle: &Lifecycle, held: &Held, entry: &Arc<Entry>) -> Result<(), Error> {
    if lifecycle.index.by_row(entry.row()).is_none() {
        return Err(Error::Gone { id: entry.id().clone() });
    }
    // It may have been pinned since the claim.
    if entry.record().pinned {
        return Err(Error::Pinned { id: entry.id().clone() });
    }
    lifecycle.records.step(held, entry, Step::Delete, |_| ()).map(drop)
}

/// Finishes a deletion as soon as the sandbox's lock is free. False if that was not
/// within `limit`.
fn finish_deletion(
    lifecycle: &Lifecycle,
    entry: &Arc<Entry>,
    cause: &Cause,
    limit: Duration,
) -> bool {
    let lock = lifecycle.locks.lock_within(entry.id(), limit);
    let Some(lock) = lock else { return false };
    finish_locked_deletion(lifecycle, &Held::new(lock, cause.clone()), entry);
    true
}

/// Finishes a deletion; where that fails, has it tried again.
fn finish_locked_deletion(lifecycle: &Lifecycle, held: &Held, entry: &Arc<Entry>) {
    if let Err(error) = destroy(lifecycle, held, entry) {
        let error = chain(&error);
        tracing::error!(id = %entry.id(), error, retry_in = ?AGAIN, "finishing a deletion");
    }
}

fn put_off_deletion(lifecycle: &Lifecycle, row: RowId) {
    lifecycle.operations.put_off_deletion(row, lifecycle.clock.now().after(AGAIN));
    lifecycle.reaper_wakeup.notify(); // It may be earlier than what the reaper waits for.
}

/// Does what comes after the intent.
pub(super) fn destroy(lifecycle: &Lifecycle, held: &Held, entry: &Arc<Entry>) -> Result<(), Error> {
    if lifecycle.index.by_row(entry.row()).is_none() {
        lifecycle.operations.forget_deletion(entry.row());
        return Ok(());
    }
    let acts = || destroy_acts(lifecycle, held, entry);
    let result = catch_unwind(AssertUnwindSafe(acts)).unwrap_or_else(|payload| {
        #[cfg(test)]
        let payload = super::testing::CrashPlan::pass_on(payload);
        drop(payload);
        Err(Error::Panicked { id: entry.id().clone() })
    });
    if result.is_err() {
        put_off_deletion(lifecycle, entry.row());
        return result;
    }
    if lifecycle.operations.deletion(entry.row()).is_some_and(|deletion| deletion.is_marked) {
        remove_mark(lifecycle, entry.row());
    }
    lifecycle.activity.forget(entry.row());
    lifecycle.notes.forget(entry.row());
    tracing::info!(id = %entry.id(), "deleted");
    lifecycle.operations.forget_deletion(entry.row());
    lifecycle.records.publish_deletion(held, entry);
    Ok(())
}

fn destroy_acts(lifecycle: &Lifecycle, held: &Held, entry: &Arc<Entry>) -> Result<(), Error> {
    if entry.record().state() != State::Deleting {
        // The intent was a mark. A crash after this line is found at start-up.
        lifecycle.records.step(held, entry, Step::Delete, |_| ())?;
    }
    if let Some(process) = process_of(lifecycle, entry)? {
        end(entry.id(), &process)?;
    }
    release(lifecycle, entry)?;
    // Nobody removes them later, as no other sandbox has their directory.
    remove_tree(&lifecycle.store.runtime_dir(entry.row()))
        .map_err(host_failed(entry, "removing the sockets of"))?;
    crash_point(lifecycle, CrashPoint::DeleteKilled);
    lifecycle.networks.disconnect(entry)?;
    lifecycle
        .trash
        .take(&lifecycle.store.sandboxes(), entry.row())
        .map_err(host_failed(entry, "setting aside the files of"))?;
    crash_point(lifecycle, CrashPoint::DeleteTrashed);
    lifecycle
        .index
        .remove(held, entry)
        .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
    lifecycle.trash.empty_later();
    Ok(())
}

/// Removes the mark of a deletion that is done. No row is used twice, so one that stays
/// means nothing, and the next start removes it.
fn remove_mark(lifecycle: &Lifecycle, row: RowId) {
    if let Err(error) = lifecycle.index.remove_meta(&mark_key(row)) {
        tracing::warn!(%row, error = chain(&error), "removing the mark of a deletion");
    }
}

fn mark_key(row: RowId) -> String {
    format!("{MARK_KEY}{row}")
}

fn row_of(key: &str) -> Option<RowId> {
    key.strip_prefix(MARK_KEY)?.parse().ok().map(RowId)
}
