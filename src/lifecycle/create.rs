//! Making a sandbox: a row, and nothing more until its first wake.

use std::time::Duration;

use super::{Entry, Error, Held, Lifecycle, error::host_failed};
use crate::{
    index::{self, NewSandbox},
    sandbox::{Cause, Owner, SandboxId},
    sync::Arc,
};

/// How long a create waits for the lock of its name, which only the end of an earlier
/// sandbox of that name can have. `mkdir` holds up its directory meanwhile.
const NAME_WAIT: Duration = Duration::from_secs(2);

impl Lifecycle {
    /// Makes a `stopped` sandbox from the template, owned by `owner`.
    ///
    /// # Errors
    /// `Exists`, `TooMany`, or the index's.
    pub fn create(&self, id: &SandboxId, owner: Owner, cause: Cause) -> Result<Arc<Entry>, Error> {
        let lock = self.locks.lock_within(id, NAME_WAIT);
        let lock = lock.ok_or_else(|| Error::Locked { id: id.clone() })?;
        let held = Held::new(lock, cause);
        if self.operations.is_closing() {
            return Err(Error::ShuttingDown);
        }
        let taken = self.index.by_id(id);
        if taken.as_ref().is_some_and(|entry| self.operations.is_deleting(entry.row())) {
            return Err(Error::Locked { id: id.clone() });
        }
        let limit = self.settings.sandboxes_max;
        if self.index.len() as u64 >= limit && taken.is_none() {
            return Err(Error::TooMany { limit });
        }
        let new = NewSandbox {
            owner,
            spec: Arc::clone(&self.settings.template),
            idle_after: self.settings.idle_after,
            delete_after: self.settings.delete_after,
        };
        let entry = self.index.create(&held, new, self.clock.now()).map_err(|source| {
            let id = id.clone();
            if matches!(source, index::Error::Exists { .. }) {
                Error::Exists { id }
            } else {
                Error::Index { id, source }
            }
        })?;
        let made = self
            .store
            .keep_strangers_files(entry.row())
            .map_err(host_failed(&entry, "making room for"))
            .and_then(|()| self.networks.give_address(&held, &entry));
        if let Err(error) = made {
            self.index
                .remove(&held, &entry)
                .map_err(|source| Error::Index { id: id.clone(), source })?;
            return Err(error);
        }
        self.records.publish_created(&held, &entry);
        tracing::info!(%id, uid = owner.uid, "created");
        Ok(entry)
    }
}
