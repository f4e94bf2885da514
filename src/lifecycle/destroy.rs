//! Deleting, from every state, without ever waking.

use std::{io, time::Duration};

use super::{Arrow, Entry, Error, Lifecycle, Outcome, exits::end};
use crate::{
    lifecycle::Held,
    sandbox::{Cause, Record, RowId, State, Step, Timestamp},
    sync::Arc,
    sys::files::{remove_tree, rename, sync_dir},
};

/// Where the index keeps the basis of the time line.
pub const CLOCK_KEY: &str = "clock";

/// When a sandbox has slept for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stale {
    /// From then on it may be deleted.
    pub at: Timestamp,
    /// Whether it may be earlier, once the wall clock of this boot is synchronised.
    pub waits_for_clock: bool,
}

impl Lifecycle {
    /// Begins to delete a sandbox: from now on nobody sees it, what is under way on it
    /// is called off, and its VMM is killed. `finish_destroy` must follow.
    ///
    /// # Errors
    /// `Pinned`, `Held`; `Gone` where somebody else has begun.
    pub fn doom(&self, entry: &Entry) -> Result<(), Error> {
        if entry.record().pinned {
            return Err(Error::Pinned { id: entry.id().clone() });
        }
        self.unless_held(entry, || {
            let first = self.operations.doom(entry.row());
            first.then_some(()).ok_or_else(|| Error::Gone { id: entry.id().clone() })
        })?;
        if let Some(live) = self.machines.get(entry.row()) {
            live.process.kill();
        }
        Ok(())
    }

    /// Deletes a doomed sandbox as soon as its lock can be had. False if that was not
    /// within `limit`; without one it waits as long as it takes.
    ///
    /// # Errors
    /// After an error the sandbox is seen again, `deleting`, and can be deleted again.
    pub fn finish_destroy(
        &self,
        entry: &Arc<Entry>,
        limit: Option<Duration>,
        cause: Cause,
    ) -> Result<bool, Error> {
        let lock = match limit {
            None => self.locks.lock(entry.id()),
            Some(limit) => match self.locks.lock_within(entry.id(), limit) {
                Some(lock) => lock,
                None => return Ok(false),
            },
        };
        self.destroy(&Held::new(lock, cause), entry).map(|()| true)
    }

    /// Deletes a sandbox that has slept for longer than its `delete_after`, if that is
    /// still so and nobody has pinned it, or holds it or did under an earlier daemon.
    ///
    /// # Errors
    /// As `finish_destroy`.
    pub fn destroy_stale(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        let (record, now) = (entry.record(), self.now());
        let due = self.stale_at(&record);
        let is_due = due.is_some_and(|due| due.at <= now) && !self.is_held(entry.row());
        if !is_due {
            // The index does not know that it is younger than it seems.
            let seems_due = record.delete_at().is_some_and(|at| at <= now);
            if let Some(later) = due.filter(|due| seems_due && !due.waits_for_clock && due.at > now)
            {
                self.postpone(held, entry, later.at)?;
            }
            return Ok(Outcome::Spared);
        }
        self.check_sleeps_as_recorded(entry)?;
        if self.doom(entry).is_err() {
            return Ok(Outcome::Spared);
        }
        self.destroy(held, entry).map(|()| Outcome::Done)
    }

    /// Returns when the reaper is to delete a sandbox if nothing more happens; `None` where
    /// it is not. Time of before a boot counts only where it is certain to have passed.
    #[must_use]
    pub fn stale_at(&self, record: &Record) -> Option<Stale> {
        let excess = self.clock.excess(record.asleep_since());
        let at = record.delete_at_without(excess.certain)?;
        let waits = excess.unknown_until.filter(|until| *until > at);
        Some(Stale { at: waits.unwrap_or(at), waits_for_clock: waits.is_some() })
    }

    /// Says whether a sandbox that the index has as stale waits for the wall clock of this
    /// boot to be synchronised.
    #[must_use]
    pub fn waits_for_clock(&self, row: RowId) -> bool {
        let entry = self.by_row(row);
        entry.and_then(|entry| self.stale_at(&entry.record())).is_some_and(|due| {
            // What is due without it need not wait.
            due.waits_for_clock && due.at > self.now()
        })
    }

    /// Believes the wall clock once it is synchronised. Called at each look of the reaper.
    ///
    /// # Errors
    /// Where the index cannot be written; what was learnt is kept in memory, and by the end
    /// of the daemon.
    pub fn confirm_clock(&self) -> Result<(), crate::index::Error> {
        match self.clock.confirm() {
            Some(basis) => self.index.set_meta(CLOCK_KEY, &basis.to_text()),
            None => Ok(()),
        }
    }

    /// Does the deleting, or goes on with it after a crash.
    pub(super) fn destroy(&self, held: &Held, entry: &Arc<Entry>) -> Result<(), Error> {
        let result = self.destroy_acts(held, entry);
        match &result {
            Ok(()) => {
                self.activities.forget(entry.row());
                tracing::info!(id = %entry.id(), "deleted");
            }
            Err(error) => self.note(entry, error),
        }
        self.operations.pardon(entry.row());
        if result.is_ok() {
            self.tell_deleted(held, entry);
        }
        result
    }

    fn destroy_acts(&self, held: &Held, entry: &Arc<Entry>) -> Result<(), Error> {
        if entry.record().state != State::Deleting {
            // A crash after this line is found at start-up.
            self.step(held, entry, Step::Delete, |_| ())?;
        }
        self.reach(Arrow::DeleteIntended);
        if let Some(process) = self.process_of(entry)? {
            end(entry, &process)?;
        }
        self.release(entry)?;
        self.reach(Arrow::DeleteKilled);
        self.disconnect(entry)?;
        self.set_aside(entry.row()).map_err(|source| Error::Host {
            doing: "setting aside the files of",
            id: entry.id().clone(),
            source,
        })?;
        self.reach(Arrow::DeleteTrashed);
        self.index
            .remove(held, entry)
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        self.empty_trash_later();
        Ok(())
    }

    /// Moves a sandbox's files to the trash: at once, however many GiB they have.
    fn set_aside(&self, row: RowId) -> io::Result<()> {
        let name = row.to_string();
        let sandboxes = self.settings.store.join("sandboxes");
        let trash = self.settings.store.join("trash");
        match rename(&sandboxes.join(&name), &trash.join(&name)) {
            // A sandbox that was never woken has no files.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        sync_dir(&trash)?;
        sync_dir(&sandboxes)
    }

    /// Has the trash removed by a thread that nobody waits for.
    pub(super) fn empty_trash_later(&self) {
        let trash = self.settings.store.join("trash");
        let emptying = self.pool.run(move || {
            let emptied = std::fs::read_dir(&trash).and_then(|entries| {
                entries.into_iter().try_for_each(|entry| remove_tree(&entry?.path()))
            });
            if let Err(error) = emptied {
                tracing::warn!(%error, trash = %trash.display(), "emptying the trash");
            }
        });
        if emptying.is_err() {
            tracing::debug!("the trash stays until the next delete, as all threads are busy");
        }
    }
}
