//! Guests that end by themselves, and VMMs that die.

use std::{io, ops::ControlFlow};

use super::{Entry, Error, Lifecycle, chain};
use crate::{
    lifecycle::Held,
    machines::{Ended, remove_sockets},
    sandbox::{Cause, Step, text::one_line},
    sync::Arc,
    sys::process::Exit,
};

/// Why a sandbox is stopped whose VMM died unseen.
pub(super) const LOST: &str =
    "the VMM died while dozed was not running, and the guest's memory with it";

/// Starts the thread that is told of VMMs that ended. Each end is then attended to
/// on a thread of its own, as it may have to wait for the sandbox's lock.
pub(super) fn attend_exits(lifecycle: &Arc<Lifecycle>) -> io::Result<()> {
    let this = Arc::downgrade(lifecycle);
    lifecycle.machines.exits().attend(move |ended| {
        let Some(lifecycle) = this.upgrade() else { return ControlFlow::Break(()) };
        let attend = Arc::clone(&lifecycle);
        if lifecycle.pool.run(move || attend_exit(&attend, ended)).is_err() {
            // The pool is full of writers that wait; this cannot be delayed.
            attend_exit(&lifecycle, ended);
        }
        ControlFlow::Continue(())
    })
}

/// Brings a sandbox whose VMM ended to `stopped`.
fn attend_exit(lifecycle: &Lifecycle, ended: Ended) {
    let Some(entry) = lifecycle.by_row(ended.row) else {
        return;
    };
    // After each sleep, for one: nobody who does not wait is to find the lock taken.
    if lifecycle.machines.get(ended.row).is_none() {
        return;
    }
    let held = Held::new(lifecycle.locks.lock(entry.id()), Cause::GuestExit);
    // An operation that found out by itself has removed the machine, and
    // perhaps another lives by now.
    let Some(live) = lifecycle.machines.get(ended.row) else {
        return;
    };
    if live.process.exited().is_none() || lifecycle.by_row(ended.row).is_none() {
        return;
    }
    let why = one_line(&why_ended(lifecycle, &entry, ended.exit));
    tracing::info!(id = %entry.id(), "its guest ended: {why}");
    if let Err(error) = lose(lifecycle, &held, &entry, &why) {
        lifecycle.unsettled.record_later(&entry, "the end of its guest", &error);
    }
}

/// Records that the guest is no more: no VMM, no memory, `stopped`, and why. Its VMM has
/// ended.
///
/// # Errors
/// The index's. Its machine is then still known, so that everybody sees that it has ended.
pub(super) fn lose(
    lifecycle: &Lifecycle,
    held: &Held,
    entry: &Arc<Entry>,
    why: &str,
) -> Result<(), Error> {
    remove_sockets(entry.id(), &lifecycle.store.runtime_dir(entry.row()));
    lifecycle.admission.give_back(entry.row());
    lifecycle.networks.abandon(entry);
    if let Err(error) = lifecycle.store.home(&entry.record()).end_run() {
        // The next boot or the deletion removes what is left.
        tracing::warn!(id = %entry.id(), error = chain(&error), "cleaning up after a guest");
    }
    // A writer that finds the guest gone did not end it.
    let cause = match held.cause() {
        cause @ (Cause::GuestExit | Cause::Reconcile) => cause,
        Cause::Write(_)
        | Cause::Hold(_)
        | Cause::Mkdir(_)
        | Cause::Rmdir(_)
        | Cause::Packet(_)
        | Cause::Idle
        | Cause::Stale => &Cause::GuestExit,
    };
    // Why it ended is news to whoever was last told why a command was refused.
    lifecycle.notes.forget(entry.row());
    lifecycle.records.step_because(cause, held, entry, Step::Lost, |record| {
        record.error = Some(one_line(why).into());
    })?;
    lifecycle.machines.remove(entry.row());
    lifecycle.activity.guest_ended(entry.row());
    Ok(())
}

/// Says why a guest is lost whose VMM has ended.
pub(super) fn why_lost(lifecycle: &Lifecycle, entry: &Entry) -> String {
    let live = lifecycle.machines.get(entry.row());
    let exit = live.and_then(|live| live.process.exited());
    exit.map_or_else(|| LOST.to_owned(), |exit| why_ended(lifecycle, entry, exit))
}

/// Says in one line why a sandbox stopped by itself.
pub(super) fn why_ended(lifecycle: &Lifecycle, entry: &Entry, exit: Exit) -> String {
    match exit {
        Exit::Code(0) => "the guest shut down".to_owned(),
        Exit::Code(code) => format!(
            "the VMM failed with exit code {code}; its output is in {}",
            lifecycle.store.home(&entry.record()).vmm_log().display()
        ),
        Exit::Signal(signal) => lifecycle.store.reason_of_signal(signal),
        Exit::Unknown => "the VMM ended; the kernel did not report how".to_owned(),
    }
}

/// Gives back what only an awake sandbox needs: the process, sockets, memory.
///
/// # Errors
/// `KillTimeout`.
pub(super) fn release(lifecycle: &Lifecycle, entry: &Entry) -> Result<(), Error> {
    lifecycle.activity.guest_ended(entry.row());
    lifecycle.machines.kill(entry.row(), entry.id(), &lifecycle.store.runtime_dir(entry.row()))?;
    lifecycle.admission.give_back(entry.row());
    Ok(())
}
