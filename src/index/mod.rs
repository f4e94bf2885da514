//! The memory of the daemon: one row for each sandbox, in SQLite and in RAM.
//!
//! Every row also is an [`Entry`] in RAM, from which everything is read: a look at a
//! sandbox runs no SQL and waits for no disk. A change is one UPDATE that is durable
//! before it shows in RAM, and that says which state and owner it expects to find. There
//! are two exceptions. Activity is the other way round: it shows at once and is written
//! behind. And a change by one of the `…_unsynced` shows when a kill of the daemon cannot
//! take it back any more, while a power cut can until its [`Commit`] was waited for. Such
//! changes get lost from the last one backwards, never from the middle.
//!
//! ```text
//!   create, advance, amend, remove ──▶ SQLite ──▶ disk ──▶ RAM ──▶ every reader
//!   advance_unsynced, amend_unsynced ──▶ SQLite ──▶ RAM ──▶ every reader
//!                                          └──▶ (sync) ──▶ disk
//!   touch ──▶ RAM ──▶ (flush_activity, at leisure) ──▶ SQLite ──▶ disk
//! ```
//!
//! It has no policy: which step leads where is `sandbox`'s, when a sandbox is due is
//! `sandbox`'s and stored here as absolute times, and what to do then is the reaper's.

use std::{
    iter,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rusqlite::Connection;

use crate::{
    lock::Held,
    sandbox::{
        Owner, Period, Record, RowId, SandboxId, Spec, State, Step, Timestamp, Users, Waking,
    },
    sync::{Mutex, RwLock, lock, read, write},
};

mod due;
mod entry;
mod error;
mod log;
mod row;
mod schema;
mod spec;
mod table;
#[cfg(test)]
mod tests;

pub use due::Due;
use entry::Dirty;
pub use entry::Entry;
pub use error::Error;
pub use log::Commit;
use log::Log;
pub use row::MalformedRow;
use spec::Specs;
use table::Table;

/// How many activities one transaction writes: some milliseconds of work, during which
/// a change of state has to wait.
const FLUSH_MAX: usize = 1000;

/// How many entries are taken out of the table in one go, for which whoever makes or removes
/// one waits.
const PAGE: usize = 256;

/// What a change waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForDisk,
    ForNothing,
}

/// All sandboxes that there are.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    /// The one connection; `None` once closed. It is held for one transaction and until
    /// that shows in RAM, so that RAM and disk change in the same order. Leaves are taken
    /// under it.
    connection: Mutex<Option<Connection>>,
    /// How far what was committed is on the disk. Has a leaf.
    log: Log,
    /// The entries by row and by name. A leaf.
    table: RwLock<Table>,
    /// The rows whose activity is to be written. Has a leaf.
    dirty: Arc<Dirty>,
    /// Equal specs, once each. Has a leaf.
    specs: Specs,
    /// The rows that make no sense. They stay as they are, and what they have is nobody else's.
    malformed: Vec<MalformedRow>,
    /// What a new entry's count of activity starts at: above all that were counted to under a
    /// name that is free again.
    first_count: AtomicU64,
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
    /// that makes no sense is left out, see [`Index::malformed`].
    ///
    /// # Errors
    /// `Damaged`, `Foreign` or `Newer`: the file is then left as it is.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut connection = schema::open(path)?;
        let first_count = schema::mark_open(&mut connection, path)?;
        let log = Log::open(path).map_err(|source| Error::Unsynced { source })?;
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
            log,
            table: RwLock::new(table),
            dirty,
            specs,
            malformed,
            first_count: AtomicU64::new(first_count),
        })
    }

    /// Makes a sandbox, `stopped`, with the name whose lock is held.
    ///
    /// # Errors
    /// `Exists`, or what SQLite says.
    pub fn create(
        &self,
        held: &Held,
        new: NewSandbox,
        now: Timestamp,
    ) -> Result<Arc<Entry>, Error> {
        let id = held.id();
        let connection = lock(&self.connection);
        let open = self.writable(&connection)?;
        if self.by_id(id).is_some() || self.is_name_of_malformed(id) {
            return Err(Error::Exists { id: id.clone() });
        }
        let mut record = Record {
            row: RowId(0),
            id: id.clone(),
            owner: new.owner,
            state: State::Stopped,
            since: now,
            created_at: now,
            generation: 0,
            spec: self.specs.intern(new.spec),
            idle_after: new.idle_after,
            delete_after: new.delete_after,
            pinned: false,
            vmm: None,
            user: None,
            slot: None,
            process: None,
            snapshot: None,
            sleeps: 0,
            wakes: 0,
            last_sleep: None,
            last_wake: None,
            error: None,
            retry_at: None,
            waking: Waking::default(),
        };
        record.row = row::insert(open, &record, now)
            .map_err(Error::sql(&self.path, || format!("writing {id} to the index")))?;
        self.sync(self.log.wrote())?;
        let first_count = self.first_count.load(Ordering::SeqCst);
        let entry = Arc::new(Entry::new(record, now, first_count, &self.dirty));
        write(&self.table).insert(Arc::clone(&entry));
        Ok(entry)
    }

    /// Moves a sandbox to the state that `step` leads to, and sets with `change` what
    /// goes with it. Every reader sees either all of it or nothing.
    ///
    /// # Errors
    /// `Refused`, `Lost`, or what SQLite says.
    ///
    /// # Panics
    /// Where `held` is another sandbox's lock, or `change` changes what no step changes.
    pub fn advance(
        &self,
        held: &Held,
        entry: &Entry,
        step: Step,
        now: Timestamp,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        let state = entry.record().state.after(step)?;
        let (record, _synced) = self.update(held, entry, state, Wait::ForDisk, |record| {
            record.since = now;
            change(record);
        })?;
        Ok(record)
    }

    /// As [`Index::advance`], and does not wait for the disk. It is on its way there.
    ///
    /// # Errors
    /// As [`Index::advance`].
    ///
    /// # Panics
    /// As [`Index::advance`].
    pub fn advance_unsynced(
        &self,
        held: &Held,
        entry: &Entry,
        step: Step,
        now: Timestamp,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        let state = entry.record().state.after(step)?;
        self.update(held, entry, state, Wait::ForNothing, |record| {
            record.since = now;
            change(record);
        })
    }

    /// Changes what is known of a sandbox, but for its state.
    ///
    /// # Errors
    /// `Lost`, or what SQLite says.
    ///
    /// # Panics
    /// As [`Index::advance`].
    pub fn amend(
        &self,
        held: &Held,
        entry: &Entry,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        let (record, _synced) =
            self.update(held, entry, entry.record().state, Wait::ForDisk, change)?;
        Ok(record)
    }

    /// As [`Index::amend`], and does not wait for the disk. It is on its way there.
    ///
    /// # Errors
    /// As [`Index::amend`].
    ///
    /// # Panics
    /// As [`Index::advance`].
    pub fn amend_unsynced(
        &self,
        held: &Held,
        entry: &Entry,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        self.update(held, entry, entry.record().state, Wait::ForNothing, change)
    }

    /// Waits until `commit`, and so whatever was changed before it, is on the disk.
    ///
    /// # Errors
    /// `Unsynced`. What is on the disk is then not known, and nothing can be changed any
    /// more.
    pub fn sync(&self, commit: Commit) -> Result<(), Error> {
        self.log.wait_for(commit).map_err(|source| Error::Unsynced { source })
    }

    /// Gives a sandbox one of `users` that no other has, or returns `None` where all are
    /// given. One that it has already it keeps.
    ///
    /// # Errors
    /// As [`Index::amend`].
    ///
    /// # Panics
    /// As [`Index::advance`].
    pub fn give_user(
        &self,
        held: &Held,
        entry: &Entry,
        users: Users,
    ) -> Result<Option<u32>, Error> {
        let connection = lock(&self.connection);
        let open = self.writable(&connection)?;
        let record = entry.record();
        if let Some(user) = record.user.filter(|user| users.contains(*user)) {
            return Ok(Some(user));
        }
        // Nobody else is given one meanwhile, as that takes the connection.
        let free = {
            let table = read(&self.table);
            users.free(entry.row().0, |user| table.has_user(user))
        };
        let Some(user) = free else {
            return Ok(None);
        };
        // It is on the disk before any file belongs to it.
        let give = |record: &mut Record| record.user = Some(user);
        let _synced = self.update_in(open, held, entry, record.state, Wait::ForDisk, give)?;
        Ok(Some(user))
    }

    /// Gives a sandbox the lowest number below `count` that no other has as its slot, or
    /// returns `None` where all are given. One that it has already it keeps.
    ///
    /// # Errors
    /// As [`Index::amend`].
    ///
    /// # Panics
    /// As [`Index::advance`].
    pub fn give_slot(&self, held: &Held, entry: &Entry, count: u32) -> Result<Option<u32>, Error> {
        let connection = lock(&self.connection);
        let open = self.writable(&connection)?;
        let record = entry.record();
        if let Some(slot) = record.slot.filter(|slot| *slot < count) {
            return Ok(Some(slot));
        }
        let free = read(&self.table).free_slot();
        let Some(slot) = Some(free).filter(|slot| *slot < count) else {
            return Ok(None);
        };
        let give = |record: &mut Record| record.slot = Some(slot);
        let _synced = self.update_in(open, held, entry, record.state, Wait::ForDisk, give)?;
        Ok(Some(slot))
    }

    /// Removes a sandbox. Its number is never used again.
    ///
    /// # Errors
    /// `Lost`, or what SQLite says.
    ///
    /// # Panics
    /// Where `held` is another sandbox's lock.
    pub fn remove(&self, held: &Held, entry: &Entry) -> Result<(), Error> {
        assert_eq!(held.id(), entry.id(), "the lock is that of the sandbox");
        let connection = lock(&self.connection);
        let open = self.writable(&connection)?;
        let record = entry.record();
        let gone = row::delete(open, &record)
            .map_err(Error::sql(&self.path, || format!("removing {} from the index", record.id)))?;
        if !gone {
            return Err(Error::lost(&record));
        }
        self.sync(self.log.wrote())?;
        // Whoever has the count of this one and writes it to the next of its name is refused.
        self.first_count.fetch_max(entry.activity_count() + 1, Ordering::SeqCst);
        write(&self.table).remove(entry);
        Ok(())
    }

    /// Returns the file that it is in.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the rows that make no sense. Their sandboxes are not seen, and everything that
    /// they have has to be left as it is.
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

    /// Writes activities that have not been written, up to a thousand, and returns how many
    /// it was. The deadlines to sleep that follow from them are written with them, so a
    /// sweep that must not see stale ones flushes first, until nought is returned.
    ///
    /// # Errors
    /// What SQLite says; the activities then wait for the next time.
    pub fn flush_activity(&self) -> Result<usize, Error> {
        let mut connection = lock(&self.connection);
        self.flush_into(connection.as_mut().ok_or(Error::Closed)?)
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

    /// Stores a text for `key`, durably. Keys that begin with `index.` are the index's own.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn set_meta(&self, key: &str, value: &str) -> Result<(), Error> {
        let connection = lock(&self.connection);
        schema::set_meta(self.writable(&connection)?, key, value)
            .map_err(Error::sql(&self.path, || format!("writing `{key}` to the index")))?;
        self.sync(self.log.wrote())
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

    /// Removes a key, if it is there.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn remove_meta(&self, key: &str) -> Result<(), Error> {
        let connection = lock(&self.connection);
        schema::remove_meta(self.writable(&connection)?, key)
            .map_err(Error::sql(&self.path, || format!("removing `{key}` from the index")))?;
        self.sync(self.log.wrote())
    }

    /// Writes what is left to write, and notes that all is well, so that the next opening
    /// need not look. What is asked of the index from now on is refused, but for reads
    /// of entries.
    ///
    /// # Errors
    /// What SQLite says; the index is closed all the same.
    pub fn close(&self) -> Result<(), Error> {
        let mut connection = lock(&self.connection).take().ok_or(Error::Closed)?;
        while self.flush_into(&mut connection)? > 0 {}
        schema::mark_closed(&connection)
            .and_then(|()| connection.close().map_err(|(_, error)| error))
            .map_err(Error::sql(&self.path, || "closing the index".to_owned()))
    }

    fn update(
        &self,
        held: &Held,
        entry: &Entry,
        state: State,
        wait: Wait,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        let connection = lock(&self.connection);
        let open = self.writable(&connection)?;
        self.update_in(open, held, entry, state, wait, change)
    }

    fn update_in(
        &self,
        open: &Connection,
        held: &Held,
        entry: &Entry,
        state: State,
        wait: Wait,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        assert_eq!(held.id(), entry.id(), "the lock is that of the sandbox");
        let old = entry.record();
        let mut new = Record { state, ..Record::clone(&old) };
        change(&mut new);
        let fixed = |record: &Record| (record.row, record.id.clone(), record.created_at);
        assert_eq!(fixed(&new), fixed(&old), "a change keeps what is fixed");
        assert_eq!(new.state, state, "the state is changed by steps only");
        new.spec = self.specs.intern(new.spec);
        let found = row::update(open, &old, &new, entry.last_activity())
            .map_err(Error::sql(&self.path, || format!("writing {} to the index", old.id)))?;
        if !found {
            return Err(Error::lost(&old));
        }
        let commit = self.log.wrote();
        match wait {
            Wait::ForDisk => self.sync(commit)?,
            Wait::ForNothing => self.log.want(commit),
        }
        let new = Arc::new(new);
        entry.publish(Arc::clone(&new));
        write(&self.table).changed(&old, &new);
        Ok((new, commit))
    }

    /// Returns the connection, if what is written by it can reach the disk.
    fn writable<'a>(&self, connection: &'a Option<Connection>) -> Result<&'a Connection, Error> {
        self.log.check().map_err(|source| Error::Unsynced { source })?;
        connection.as_ref().ok_or(Error::Closed)
    }

    /// Has the disk fail from now on.
    #[cfg(test)]
    pub(crate) fn fail_syncs(&self) {
        self.log.fail();
    }

    /// Spoils a row of the copy of an index.
    #[cfg(test)]
    #[allow(clippy::unused_self, reason = "only an index knows SQL")]
    pub(crate) fn break_row(&self, copy: &Path, row: RowId) {
        let copy = Connection::open(copy).unwrap();
        let spec = "UPDATE sandbox SET spec = 'vcpus = 0' WHERE row = ?";
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
        let mut log = std::fs::read(log::name_of(&self.path)).unwrap();
        log.truncate(usize::try_from(self.log.needed_bytes()).unwrap());
        std::fs::write(log::name_of(to), log).unwrap();
        std::fs::copy(&self.path, to).unwrap();
        drop(connection);
        let copy = Connection::open(to).unwrap();
        copy.execute("UPDATE sandbox SET boot_id = 'earlier' WHERE boot_id IS NOT NULL", [])
            .unwrap();
    }

    fn flush_into(&self, connection: &mut Connection) -> Result<usize, Error> {
        let rows = self.dirty.take(FLUSH_MAX);
        if rows.is_empty() {
            return Ok(0);
        }
        // One that has been removed meanwhile has nothing to write.
        let entries: Vec<_> = rows.iter().filter_map(|row| self.by_row(*row)).collect();
        let written = connection.transaction().and_then(|transaction| {
            for entry in &entries {
                let last_activity = entry.activity_to_write();
                row::update_activity(&transaction, &entry.record(), last_activity)?;
            }
            transaction.commit()
        });
        if written.is_err() {
            for entry in &entries {
                entry.mark_dirty();
            }
        }
        written.map_err(Error::sql(&self.path, || "writing activities to the index".to_owned()))?;
        self.sync(self.log.wrote())?;
        Ok(rows.len())
    }
}
