//! The memory of the daemon: one row for each sandbox, in SQLite and in RAM.
//!
//! Each row also is an [`Entry`] in RAM, from which everything is read: reading a sandbox
//! runs no SQL and waits for no disk. A change is one UPDATE, which names the state and the
//! owner that it expects to find, and is durable before readers see it. There are two
//! exceptions. Activity is visible at once and written later, without waiting for the disk.
//! A change by one of the `…_unsynced` is visible once a kill of the daemon cannot undo it; a
//! power cut can until its [`Commit`] was waited for. A power cut undoes the last changes, never
//! one in the middle.
//!
//! ```text
//!   create, advance, amend, remove ──▶ SQLite ──▶ disk ──▶ RAM ──▶ every reader
//!   advance_unsynced, amend_unsynced ──▶ SQLite ──▶ RAM ──▶ every reader
//!                                          └──▶ (begin_sync, or within a second) ──▶ disk
//!   touch ──▶ RAM ──▶ (flush_activity, at ticks) ──▶ SQLite
//! ```
//!
//! It has no policy. `sandbox` says which step leads where and when a sandbox is due, which is
//! stored here as absolute times; the reaper says what to do then.

use std::{
    iter,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use rusqlite::Connection;

use crate::{
    sandbox::{
        Owner, Period, Phase, Record, RowId, SandboxId, Spec, State, Step, Timestamp, Users, Waking,
    },
    sync::{Mutex, RwLock, lock, read},
};

mod change;
mod checkpoint;
mod due;
mod entry;
mod error;
mod flush;
mod in_use;
mod row;
mod schema;
mod spec;
mod table;
#[cfg(test)]
mod tests;
mod wal;

use checkpoint::Checkpoints;
pub use due::Due;
use entry::Dirty;
pub use entry::Entry;
pub use error::Error;
use in_use::InUse;
pub use row::MalformedRow;
use spec::Specs;
use table::Table;
pub use wal::Commit;
use wal::WriteAheadLog;

/// How long a change waits for another process that has the file locked, such as a backup or
/// somebody who looks by hand. Longer than either takes, and a caller learns of it at last.
const LOCKED_LIMIT: Duration = Duration::from_secs(30);
/// How long each further change waits once one has waited that long in vain, until one succeeds.
/// An operation makes several changes, and they are not all to wait for the same lock.
const LOCKED_AGAIN: Duration = Duration::from_secs(1);

/// How many entries are taken out of the table in one go, for which whoever makes or removes
/// one waits.
const PAGE: usize = 256;

/// All sandboxes that there are.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    /// The connection that writes; `None` once closed. It is held for one transaction and
    /// never while somebody waits for the disk or for another process. That a sandbox changes
    /// in RAM in the same order as in SQLite is due to its lock. Leaves are taken under it.
    connection: Mutex<Option<Connection>>,
    /// How long a change may wait for another process that has the file locked.
    locked_limit: Duration,
    /// Whether a change has waited that long in vain, and none has succeeded since.
    is_locked_out: AtomicBool,
    /// How far what was committed is on the disk. Has a leaf.
    wal: WriteAheadLog,
    /// Moves the log into the file.
    checkpoints: Checkpoints,
    /// The entries by row and by name. A leaf.
    table: RwLock<Table>,
    /// The rows whose activity is to be written. Has a leaf.
    dirty: Arc<Dirty>,
    /// Equal specs, once each. Has a leaf.
    specs: Specs,
    /// The rows that cannot be decoded. They stay as they are, and nobody else is given what they
    /// have.
    malformed: Vec<MalformedRow>,
    /// What a new entry's count of activity starts at: above all that were counted to under a
    /// name that is free again.
    first_count: AtomicU64,
    /// Dropped after the connections.
    in_use: InUse,
}

/// A sandbox that is to be.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    /// Whose it is.
    pub owner: Owner,
    /// Its hardware and guest.
    pub spec: Arc<Spec>,
    /// How long without activity before the reaper puts it to sleep.
    pub idle_after: Period,
    /// How long asleep before the reaper deletes it.
    pub delete_after: Period,
}

impl Index {
    /// Opens the index in the file `path`, which is made if need be, and loads every row. One
    /// that cannot be decoded is skipped, see [`Index::malformed`].
    ///
    /// # Errors
    /// `Damaged`, `Foreign` or `Newer`: the file is then left as it is.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut connection = schema::open(path)?;
        let first_count = schema::mark_open(&mut connection, path)?;
        let wal = WriteAheadLog::open(&connection, path)?;
        let checkpoints = Checkpoints::start(path)?;
        schema::wait_briefly(&connection, path)?;
        let in_use = InUse::mark(path)?;
        let specs = Specs::default();
        let dirty = Arc::new(Dirty::default());
        let (mut table, mut malformed) = (Table::default(), Vec::new());
        row::load(&connection, path, &specs, |row| match row {
            Ok((record, last_activity)) => {
                let entry = Entry::new(record, last_activity, first_count, &dirty);
                table.insert(Arc::new(entry));
            }
            Err(row) => {
                table.reserve(&row);
                malformed.push(row);
            }
        })?;
        Ok(Self {
            path: path.to_owned(),
            connection: Mutex::new(Some(connection)),
            locked_limit: LOCKED_LIMIT,
            is_locked_out: AtomicBool::new(false),
            wal,
            checkpoints,
            table: RwLock::new(table),
            dirty,
            specs,
            malformed,
            first_count: AtomicU64::new(first_count),
            in_use,
        })
    }

    /// Returns the file that it is in.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns why nothing can be written any more, if that is so. What is in RAM may then be
    /// less than what the next opening finds, so whoever has the index ends.
    ///
    /// # Errors
    /// `Unsynced`.
    pub fn check(&self) -> Result<(), Error> {
        self.wal.check()
    }

    /// Returns the rows that cannot be decoded. Their sandboxes are not served, and everything
    /// that they have has to be left alone.
    #[must_use]
    pub fn malformed(&self) -> &[MalformedRow] {
        &self.malformed
    }

    fn is_name_of_malformed(&self, id: &SandboxId) -> bool {
        self.malformed.iter().any(|row| row.id.as_ref() == Some(id))
    }

    /// Returns the sandbox of this name.
    #[must_use]
    pub fn by_id(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        read(&self.table).by_id(id)
    }

    /// Returns the sandbox of this number.
    #[must_use]
    pub fn by_row(&self, row: RowId) -> Option<Arc<Entry>> {
        read(&self.table).by_row(row)
    }

    /// Returns the sandbox that has this slot.
    #[must_use]
    pub fn by_slot(&self, slot: u32) -> Option<Arc<Entry>> {
        read(&self.table).by_slot(slot)
    }

    /// Returns up to `limit` sandboxes with numbers above `row`, ascending.
    #[must_use]
    pub fn rows_after(&self, row: RowId, limit: usize) -> Vec<Arc<Entry>> {
        read(&self.table).rows_after(row, limit)
    }

    /// Walks over all sandboxes with numbers above `row`, ascending. Nobody who makes or
    /// removes one waits for the end of it: it goes page by page.
    pub fn entries_after(&self, row: RowId) -> impl Iterator<Item = Arc<Entry>> {
        let (mut last, mut page) = (row, Vec::new().into_iter());
        iter::from_fn(move || {
            let entry = page.next().or_else(|| {
                page = self.rows_after(last, PAGE).into_iter();
                page.next()
            })?;
            last = entry.row();
            Some(entry)
        })
    }

    /// Returns how many sandboxes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        read(&self.table).len()
    }

    /// Says whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how many sandboxes are in each state, in the order of [`State::ALL`].
    #[must_use]
    pub fn count_by_state(&self) -> [(State, usize); State::ALL.len()] {
        read(&self.table).count_by_state()
    }

    /// Returns the text that was stored for `key`.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn meta(&self, key: &str) -> Result<Option<String>, Error> {
        let connection = lock(&self.connection);
        schema::meta(connection.as_ref().ok_or(Error::Closed)?, key)
            .map_err(Error::sql(&self.path, || format!("reading `{key}` from the index")))
    }

    /// Returns every key that begins with `prefix`, with its text.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn metas(&self, prefix: &str) -> Result<Vec<(String, String)>, Error> {
        let connection = lock(&self.connection);
        schema::metas(connection.as_ref().ok_or(Error::Closed)?, prefix)
            .map_err(Error::sql(&self.path, || format!("reading `{prefix}…` from the index")))
    }

    /// Has the disk fail from now on.
    #[cfg(test)]
    pub(crate) fn fail_syncs(&self) {
        self.wal.disk(wal::Disk::Fails);
    }

    /// Spoils a row of the copy of an index.
    #[cfg(test)]
    #[allow(clippy::unused_self, reason = "only an index knows SQL")]
    pub(crate) fn break_row(&self, copy: &Path, row: RowId) {
        let copy = Connection::open(copy).unwrap();
        let spec = "UPDATE spec SET toml = 'vcpus = 0' WHERE row = ?";
        copy.execute(spec, [row.0.cast_signed()]).unwrap();
    }

    /// Has SQLite do something behind our back.
    #[cfg(test)]
    pub(crate) fn run_sql(&self, sql: &str) {
        let connection = lock(&self.connection);
        connection.as_ref().expect("it is open").execute_batch(sql).unwrap();
    }

    /// Makes at `to` what a power cut leaves of this index in the worst case, seen after
    /// the next boot.
    #[cfg(test)]
    pub(crate) fn cut_power(&self, to: &Path) {
        let connection = lock(&self.connection);
        let mut log = std::fs::read(wal::name_of(&self.path)).unwrap();
        log.truncate(usize::try_from(self.wal.needed_bytes()).unwrap());
        std::fs::write(wal::name_of(to), log).unwrap();
        std::fs::copy(&self.path, to).unwrap();
        drop(connection);
        let copy = Connection::open(to).unwrap();
        copy.execute("UPDATE sandbox SET boot_id = 'earlier' WHERE boot_id IS NOT NULL", [])
            .unwrap();
    }
}

/// Returns what the keys begin with that belong to a row, and go with it.
#[must_use]
pub fn keys_of_row(row: RowId) -> String {
    format!("row:{row}:")
}
