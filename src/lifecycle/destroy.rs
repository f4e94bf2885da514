//! Deleting, from every state, without ever waking.

use std::{io, time::Duration};

use super::{Arrow, Entry, Error, Lifecycle, Outcome, exits::end};
use crate::{
    lifecycle::Held,
    sandbox::{Cause, RowId, State, Step},
    sync::Arc,
    sys::files::{remove_tree, rename, sync_dir},
};

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
        let due = entry.record().delete_at();
        let is_due = due.is_some_and(|due| due <= self.now()) && !self.is_held(entry.row());
        if is_due {
            self.check_sleeps_as_recorded(entry)?;
        }
        if !is_due || self.doom(entry).is_err() {
            return Ok(Outcome::Spared);
        }
        self.destroy(held, entry).map(|()| Outcome::Done)
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
