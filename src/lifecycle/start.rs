//! What booting and waking have in common: a budget, a plan for the VMM, and the end of a failure.

use super::{Entry, Error, Held, Lifecycle, chain, operation::Op, recover::recover};
use crate::{sandbox::Step, vmm::Vmm};

/// Does the acts of a boot or a wake, within the budget, and takes them back if they fail.
pub(super) fn run_acts<'a, T>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
    acts: impl FnOnce(&mut Op<'a>) -> Result<T, Error>,
) -> Result<T, Error> {
    let (entry, record) = (op.entry, op.entry.record());
    lifecycle.admission.book(record.row, &record.id, record.spec.memory_bytes)?;
    op.undo.push("giving back its memory", || {
        lifecycle.admission.give_back(entry.row());
        Ok(())
    });
    acts(op).map_err(|cause| {
        if matches!(cause, Error::Unanswered { .. }) {
            lifecycle.unsettled.later(entry.row());
            return cause;
        }
        let error = op.undo.run(cause);
        if op.intent.is_some() {
            end_failed_start(lifecycle, op, &error);
        }
        error
    })
}

/// Gives a sandbox its user id, if its VMM is to run as one and it has none yet. It keeps
/// it until it is deleted.
pub(super) fn give_user(
    lifecycle: &Lifecycle,
    held: &Held,
    entry: &Entry,
    vmm: &dyn Vmm,
) -> Result<(), Error> {
    let Some(users) = lifecycle.settings.users.filter(|_| vmm.takes_user()) else {
        return Ok(());
    };
    let given = lifecycle
        .index
        .give_user(held, entry, users)
        .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
    given.map(drop).ok_or_else(|| Error::NoUser { id: entry.id().clone(), users })
}

/// After a failed and undone wake or boot: takes the intent back too. Where undoing
/// failed, the rules of `recover` say what is left.
fn end_failed_start(lifecycle: &Lifecycle, op: &Op<'_>, error: &Error) {
    let entry = op.entry;
    if lifecycle.operations.is_deleting(entry.row()) {
        return; // The next to have the lock removes it from whatever state.
    }
    let ended = if matches!(error, Error::Undo { .. }) {
        recover(lifecycle, op)
    } else {
        lifecycle
            .records
            .step(op.held, entry, Step::Undo, |_| ())
            .map(|_| lifecycle.networks.after_sleep(entry))
    };
    if let Err(error) = ended {
        tracing::error!(id = %entry.id(), error = chain(&error), "ending an operation");
        lifecycle.unsettled.later(entry.row());
    }
}
