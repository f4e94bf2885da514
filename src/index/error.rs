//! Why the index did not do what was asked.

use std::path::{Path, PathBuf};

use crate::sandbox::{Record, Refused, RowId, SandboxId, State};

/// Why the index did not do what was asked. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `index::Error` wherever it is used")]
pub enum Error {
    /// There is a sandbox of this name.
    #[error("there is a sandbox {id} already")]
    Exists {
        /// The name.
        id: SandboxId,
    },
    /// The step does not exist from the sandbox's state.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The row is not what it was a moment ago, or is gone, though we have the lock.
    #[error("{id} (row {row}) is no longer {state} in the index: another process writes to it")]
    Lost {
        /// The name.
        id: SandboxId,
        /// The row.
        row: RowId,
        /// The state that was expected.
        state: State,
    },
    /// SQLite refused.
    #[error("{doing}")]
    Sql {
        /// Such as `writing web-1 to the index`.
        doing: String,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The file cannot be made.
    #[error("making {}", .path.display())]
    Make {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is damaged.
    #[error(
        "the index {} is damaged and was left as it is; restore it from a backup, or move it away \
         to start with a new one: {why}",
        .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file is some other program's.
    #[error("{} is a database, but not an index of dozed; it was left as it is", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file was written by a later version of this program.
    #[error(
        "the index {} has version {found}, and this dozed knows versions up to {known}; use a \
         newer dozed",
        .path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The version that it has.
        found: i64,
        /// The latest that we know.
        known: i64,
    },
    /// The disk did not take what was committed.
    #[error("syncing the index, which accepts no more changes")]
    Unsynced {
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk takes too long.
    #[error(
        "the disk did not accept a change of the index within {} s, and no other is begun until \
         it has",
        .limit.as_secs()
    )]
    Stalled {
        /// How long we waited.
        limit: std::time::Duration,
    },
    /// It has been closed.
    #[error("the index is closed")]
    Closed,
}

impl Error {
    /// Makes the function that turns what SQLite said while `doing` into an error.
    pub(super) fn sql(
        path: &Path,
        doing: impl FnOnce() -> String,
    ) -> impl FnOnce(rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        move |source| match source.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) => {
                Self::Damaged { path: path.to_owned(), why: source.to_string() }
            }
            Some(_) | None => Self::Sql { doing: doing(), source },
        }
    }

    pub(super) fn lost(record: &Record) -> Self {
        Self::Lost { id: record.id.clone(), row: record.row, state: record.state() }
    }
}
