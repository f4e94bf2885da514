//! Letting a guest run that was woken, and what it means when its VMM does not say that it does.

use super::{Entry, Error, Lifecycle, error::vmm_failed};
use crate::{machines::Live, snapshot::Memory, sync::lock, sys::cancel::Cancel, vmm};

/// Lets a guest run whose snapshot `generation` is consumed.
///
/// # Errors
/// `Unanswered` where it may run all the same: nothing must be taken back then.
pub(super) fn let_run(
    lifecycle: &Lifecycle,
    entry: &Entry,
    live: &Live,
    memory: Memory,
    generation: u64,
) -> Result<(), Error> {
    // The machine must be free again when it is looked at.
    let resumed = lock(&live.machine).resume();
    let Err(source) = resumed else { return Ok(()) };
    if may_run(lifecycle, entry, live, memory, generation, &source) {
        return Err(Error::Unanswered { id: entry.id().clone(), source });
    }
    Err(vmm_failed(entry, "resuming")(source))
}

/// Says whether a guest may run whose VMM failed to let it run with `error`. Killing it
/// would then lose what it has done since. Its memory, where that is mapped, tells.
fn may_run(
    lifecycle: &Lifecycle,
    entry: &Entry,
    live: &Live,
    memory: Memory,
    generation: u64,
    error: &vmm::Error,
) -> bool {
    let is_over = matches!(
        error,
        vmm::Error::Missing { .. } | vmm::Error::Died { .. } | vmm::Error::Cancelled { .. }
    );
    if is_over || live.process.exited().is_some() {
        return false;
    }
    if memory == Memory::Copied {
        return !lock(&live.machine).never_ran();
    }
    if matches!(error, vmm::Error::Refused { .. }) {
        return false;
    }
    // What does not run cannot change its memory behind the look at it.
    live.process.stop();
    let home = lifecycle.store.home(&entry.record());
    let unchanged = home.check_unchanged(entry.id(), generation, &Cancel::default());
    if unchanged.is_err() {
        live.process.go_on();
    }
    unchanged.is_err()
}
