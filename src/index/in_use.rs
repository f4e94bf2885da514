//! Keeping other processes from taking our log for a leftover.
//!
//! SQLite tells by locks on the files whether anybody else has a database open, and whoever is
//! the last to close it deletes the log. These are locks of a process (`fcntl(2)`, `F_SETLK`),
//! and all of them end when that process closes any descriptor of the file: the daemon would
//! lose them by opening its own index as the image of a disk, because a `config` names it. The
//! next `sqlite3 index.db` would then delete the log under us, and what we write from then on
//! would be gone with our process. So the same bytes are locked in a way that closing another
//! descriptor does not end.

use std::{ops::Range, path::Path};

use super::Error;
use crate::sys::files::SharedLock;

/// The bytes of the database that are locked by whoever reads it (`SHARED_FIRST`, `SHARED_SIZE`
/// of SQLite's file format).
const SHARED: Range<i64> = 0x4000_0002..0x4000_0200;
/// The byte of the `-shm` that is locked by whoever has it (`UNIX_SHM_DMS`). Without that lock
/// it is emptied by the next that opens it.
const SHM_IN_USE: Range<i64> = 128..129;

/// Says to other processes that the index is open, until this is dropped.
#[derive(Debug)]
pub(super) struct InUse([SharedLock; 2]);

impl InUse {
    /// Says so of the index in the file `path`, which is open.
    pub(super) fn mark(path: &Path) -> Result<Self, Error> {
        let lock = |file: &Path, bytes| {
            SharedLock::take(file, bytes)
                .map_err(|source| Error::Make { path: file.to_owned(), source })
        };
        let mut shm = path.as_os_str().to_owned();
        shm.push("-shm");
        Ok(Self([lock(path, SHARED)?, lock(shm.as_ref(), SHM_IN_USE)?]))
    }

    /// Lets the last connection delete the log. The files stay open until this is dropped, as
    /// to close them would end that connection's own locks.
    pub(super) fn end(&self) {
        for lock in &self.0 {
            // Where this fails the log stays, which does no harm.
            lock.unlock().ok();
        }
    }
}
