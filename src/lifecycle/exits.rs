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

impl Lifecycle {
    /// Starts the thread that is told of VMMs that ended. Each end is then attended to
    /// on a thread of its own, as it may have to wait for the sandbox's lock.
    pub(super) fn attend_exits(self: &Arc<Self>) -> io::Result<()> {
        let this = Arc::downgrade(self);
        self.machines.exits().attend(move |ended| {
            let Some(lifecycle) = this.upgrade() else { return ControlFlow::Break(()) };
            let attend = Arc::clone(&lifecycle);
            if lifecycle.pool.run(move || attend.attend_exit(ended)).is_err() {
                // The pool is full of writers that wait; this cannot be delayed.
                lifecycle.attend_exit(ended);
            }
            ControlFlow::Continue(())
        })
    }

    /// Brings a sandbox whose VMM ended to `stopped`.
    fn attend_exit(&self, ended: Ended) {
        let Some(entry) = self.by_row(ended.row) else {
            return;
        };
        // After each sleep, for one: nobody who does not wait is to find the lock taken.
        if self.machines.get(ended.row).is_none() {
            return;
        }
        let held = Held::new(self.locks.lock(entry.id()), Cause::GuestExit);
        // An operation that found out by itself has removed the machine, and
        // perhaps another lives by now.
        let Some(live) = self.machines.get(ended.row) else {
            return;
        };
        if live.process.exited().is_none() || self.by_row(ended.row).is_none() {
            return;
        }
        let why = one_line(&self.reason(&entry, ended.exit));
        tracing::info!(id = %entry.id(), "its guest ended: {why}");
        if let Err(error) = self.lose(&held, &entry, &why) {
            self.record_later(&entry, "the end of its guest", &error);
        }
    }

    /// Records that the guest is no more: no VMM, no memory, `stopped`, and why. Its VMM has
    /// ended.
    ///
    /// # Errors
    /// The index's. Its machine is then still known, so that everybody sees that it has ended.
    pub(super) fn lose(&self, held: &Held, entry: &Arc<Entry>, why: &str) -> Result<(), Error> {
        remove_sockets(entry.id(), &self.runtime_dir(entry.row()));
        self.admission.give_back(entry.row());
        self.networks.abandon(entry);
        if let Err(error) = self.home(&entry.record()).end_run() {
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
        self.notes.forget(entry.row());
        self.step_because(cause, held, entry, Step::Lost, |record| {
            record.error = Some(one_line(why).into());
        })?;
        self.machines.remove(entry.row());
        self.activity.guest_ended(entry.row());
        Ok(())
    }

    /// Says why a guest is lost whose VMM has ended.
    pub(super) fn why_lost(&self, entry: &Entry) -> String {
        let live = self.machines.get(entry.row());
        let exit = live.and_then(|live| live.process.exited());
        exit.map_or_else(|| LOST.to_owned(), |exit| self.reason(entry, exit))
    }

    /// Says in one line why a sandbox stopped by itself.
    pub(super) fn reason(&self, entry: &Entry, exit: Exit) -> String {
        match exit {
            Exit::Code(0) => "the guest shut down".to_owned(),
            Exit::Code(code) => format!(
                "the VMM failed with exit code {code}; its output is in {}",
                self.home(&entry.record()).vmm_log().display()
            ),
            Exit::Signal(signal) => self.reason_of_signal(signal),
            Exit::Unknown => "the VMM ended; the kernel did not report how".to_owned(),
        }
    }

    /// Gives back what only an awake sandbox needs: the process, sockets, memory.
    ///
    /// # Errors
    /// `KillTimeout`.
    pub(super) fn release(&self, entry: &Entry) -> Result<(), Error> {
        self.activity.guest_ended(entry.row());
        self.machines.kill(entry.row(), entry.id(), &self.runtime_dir(entry.row()))?;
        self.admission.give_back(entry.row());
        Ok(())
    }
}
