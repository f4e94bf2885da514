//! Changes: executed, brought to the disk, and then shown.
//!
//! ```text
//!   lock the connection ─▶ execute ─▶ unlock ─▶ wait for the disk ─▶ show in RAM
//!                             │                        │
//!      locked by another process: unlock, again   too late: undo it
//! ```
//!
//! Nobody waits for the disk, or for another process, with the connection locked. A change
//! that the disk does not take in time is undone, so that RAM and SQLite say the same, and
//! until the disk takes something again all further changes are refused. Where it cannot be
//! undone, or a sync failed, they are refused for good: see [`Index::check`].

use std::sync::{Arc, atomic::Ordering};

use rusqlite::Connection;

use super::{
    Commit, Entry, Error, Index, LOCKED_AGAIN, NewSandbox, Phase, Record, RowId, SandboxId, Step,
    Timestamp, Users, Waking, keys_of_row, row, schema, table::Table,
};
use crate::{
    lock::Held,
    sync::{lock, write},
    sys::clock::Deadline,
};

/// What a change waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForDisk,
    ForNothing,
}

impl Index {
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
        if self.by_id(id).is_some() || self.is_name_of_malformed(id) {
            return Err(Error::Exists { id: id.clone() });
        }
        let mut record = Record {
            row: RowId(0),
            id: id.clone(),
            owner: new.owner,
            phase: Phase::Stopped,
            since: now,
            created_at: now,
            generation: 0,
            spec: self.specs.intern(new.spec),
            config_by: None,
            idle_after: new.idle_after,
            delete_after: new.delete_after,
            pinned: false,
            vmm: None,
            user: None,
            slot: None,
            sleeps: 0,
            wakes: 0,
            last_sleep: None,
            last_wake: None,
            error: None,
            retry_at: None,
            waking: Waking::default(),
        };
        let (row, commit) = self.execute(&writing(id), |open| row::insert(open, &record, now))?;
        record.row = row;
        self.await_disk(commit, |open| row::delete(open, &record))?;
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
        step: &Step,
        now: Timestamp,
        change: impl FnOnce(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        let phase = entry.record().phase.after(step)?;
        let (record, _synced) = self.update(held, entry, phase, Wait::ForDisk, |record| {
            record.since = now;
            change(record);
        })?;
        Ok(record)
    }

    /// As [`Index::advance`], and does not wait for the disk: it is synced within a second, or
    /// when somebody asks for it.
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
        step: &Step,
        now: Timestamp,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        let phase = entry.record().phase.after(step)?;
        self.update(held, entry, phase, Wait::ForNothing, |record| {
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
            self.update(held, entry, entry.record().phase.clone(), Wait::ForDisk, change)?;
        Ok(record)
    }

    /// As [`Index::amend`], and does not wait for the disk, like [`Index::advance_unsynced`].
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
        self.update(held, entry, entry.record().phase.clone(), Wait::ForNothing, change)
    }

    /// Has the disk take `commit` while its owner does something else and then waits for it.
    pub fn begin_sync(&self, commit: Commit) {
        self.wal.want(commit);
    }

    /// Waits until `commit`, and so whatever was changed before it, is on the disk.
    ///
    /// # Errors
    /// `Stalled`: it is not there yet. `Unsynced`: what is there is not known, and nothing can
    /// be changed any more.
    pub fn sync(&self, commit: Commit) -> Result<(), Error> {
        self.wal.wait_for(commit)
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
        let reserve = |table: &mut Table| {
            let free = users.free(entry.row().0, |user| table.has_user(user));
            free.inspect(|user| table.reserve_user(*user))
        };
        let set = |record: &mut Record, user| record.user = Some(user);
        let has = entry.record().user.filter(|user| users.contains(*user));
        // It is on the disk before any file belongs to it.
        self.give(held, entry, has, reserve, set, Table::release_user)
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
        let reserve = |table: &mut Table| {
            let free = Some(table.free_slot()).filter(|slot| *slot < count);
            free.inspect(|slot| table.reserve_slot(*slot, entry.row()))
        };
        let set = |record: &mut Record, slot| record.slot = Some(slot);
        let has = entry.record().slot.filter(|slot| *slot < count);
        self.give(held, entry, has, reserve, set, Table::release_slot)
    }

    /// Gives a sandbox a number that is its own: the one that it `has`, or else one that
    /// `reserve` takes from the table, which `set` writes to its record, durably. Where that
    /// fails `release` puts it back.
    fn give(
        &self,
        held: &Held,
        entry: &Entry,
        has: Option<u32>,
        reserve: impl FnOnce(&mut Table) -> Option<u32>,
        set: impl FnOnce(&mut Record, u32),
        release: impl FnOnce(&mut Table, u32),
    ) -> Result<Option<u32>, Error> {
        if has.is_some() {
            return Ok(has);
        }
        // Nobody else is given it meanwhile.
        let Some(number) = reserve(&mut write(&self.table)) else {
            return Ok(None);
        };
        let phase = entry.record().phase.clone();
        self.update(held, entry, phase, Wait::ForDisk, |record| set(record, number))
            .map(|_synced| Some(number))
            .inspect_err(|_| release(&mut write(&self.table), number))
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
        let record = entry.record();
        let doing = || format!("removing {} from the index", record.id);
        let keys = keys_of_row(record.row);
        let ((has_keys, gone), commit) = self.execute(&doing, |open| {
            Ok((schema::has_metas(open, &keys)?, row::delete(open, &record)?))
        })?;
        if !gone {
            return Err(Error::lost(&record));
        }
        self.await_disk(commit, |open| row::put_back(open, &record, entry.last_activity()))?;
        // Whoever has the count of this one and writes it to the next of its name is refused.
        self.first_count.fetch_max(entry.activity_count() + 1, Ordering::SeqCst);
        write(&self.table).remove(entry);
        if !has_keys {
            return Ok(()); // Most have none, and so cost no second write.
        }
        // What is left of it here goes at the next start.
        let doing = || format!("removing what the index has of {}", record.id);
        if let Err(error) = self.execute(&doing, |open| schema::remove_metas(open, &keys)) {
            tracing::warn!(%error, "keys of a deleted sandbox remain");
        }
        Ok(())
    }

    /// Stores a text for `key`, durably. Keys that begin with `index.` are the index's own.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn set_meta(&self, key: &str, value: &str) -> Result<(), Error> {
        self.put_meta(key, Some(value), Wait::ForDisk)
    }

    /// Removes a key, if it is there.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn remove_meta(&self, key: &str) -> Result<(), Error> {
        self.put_meta(key, None, Wait::ForDisk)
    }

    /// As [`Index::remove_meta`], but a power cut may undo it.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn remove_meta_unsynced(&self, key: &str) -> Result<(), Error> {
        self.put_meta(key, None, Wait::ForNothing)
    }

    /// Removes all keys that begin with one of these. A power cut may undo it.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn remove_metas(&self, prefixes: &[String]) -> Result<(), Error> {
        if prefixes.is_empty() {
            return Ok(());
        }
        let mut connection = lock(&self.connection);
        self.wal.check()?;
        let open = connection.as_mut().ok_or(Error::Closed)?;
        let mut remove = || -> rusqlite::Result<()> {
            let transaction = open.transaction()?;
            prefixes.iter().try_for_each(|prefix| schema::remove_metas(&transaction, prefix))?;
            transaction.commit()
        };
        remove().map_err(Error::sql(&self.path, || "removing keys from the index".to_owned()))?;
        let commit = self.wal.wrote();
        self.wal.defer(commit);
        Ok(())
    }

    /// Writes what is left to write, and notes that all is well, so that the next opening
    /// need not look. What is asked of the index from now on is refused, but for reads
    /// of entries.
    ///
    /// # Errors
    /// What SQLite says; the index is closed all the same.
    pub fn close(&self) -> Result<(), Error> {
        let mut connection = lock(&self.connection).take().ok_or(Error::Closed)?;
        // What is in the page cache then need not be what is on the disk: the next opening
        // sees to that.
        self.wal.check()?;
        while self.flush_into(&mut connection)? > 0 {}
        schema::mark_closed(&connection)
            .inspect(|()| self.in_use.end())
            .and_then(|()| connection.close().map_err(|(_, error)| error))
            .map_err(Error::sql(&self.path, || "closing the index".to_owned()))
    }

    fn put_meta(&self, key: &str, value: Option<&str>, wait: Wait) -> Result<(), Error> {
        let put = |open: &Connection, value: Option<&str>| match value {
            Some(value) => schema::set_meta(open, key, value),
            None => schema::remove_meta(open, key),
        };
        let doing = || format!("writing `{key}` to the index");
        let (before, commit) = self.execute(&doing, |open| {
            let before = schema::meta(open, key)?;
            put(open, value).map(|()| before)
        })?;
        match wait {
            Wait::ForDisk => {
                self.await_disk(commit, |open| put(open, before.as_deref()).map(|()| true))
            }
            Wait::ForNothing => {
                self.wal.defer(commit);
                Ok(())
            }
        }
    }

    fn update(
        &self,
        held: &Held,
        entry: &Entry,
        phase: Phase,
        wait: Wait,
        change: impl FnOnce(&mut Record),
    ) -> Result<(Arc<Record>, Commit), Error> {
        assert_eq!(held.id(), entry.id(), "the lock is that of the sandbox");
        let old = entry.record();
        let state = phase.state();
        let mut new = Record { phase, ..Record::clone(&old) };
        change(&mut new);
        let fixed = |record: &Record| (record.row, record.id.clone(), record.created_at);
        assert_eq!(fixed(&new), fixed(&old), "a change keeps what is fixed");
        assert_eq!(new.state(), state, "the state is changed by steps only");
        new.spec = self.specs.intern(new.spec);
        let _change = entry.begin_change();
        let (found, commit) = self.execute(&writing(&old.id), |open| {
            row::update(open, &old, &new, entry.last_activity())
        })?;
        if !found {
            return Err(Error::lost(&old));
        }
        match wait {
            Wait::ForDisk => self
                .await_disk(commit, |open| row::update(open, &new, &old, entry.last_activity()))?,
            Wait::ForNothing => self.wal.defer(commit),
        }
        let new = Arc::new(new);
        entry.publish(Arc::clone(&new));
        write(&self.table).changed(&old, &new);
        Ok((new, commit))
    }

    /// Does `work` with the connection, and gives it the number of a commit. Where another
    /// process has the file locked it is tried again for a while; meanwhile others try.
    fn execute<T>(
        &self,
        doing: &dyn Fn() -> String,
        work: impl Fn(&Connection) -> rusqlite::Result<T>,
    ) -> Result<(T, Commit), Error> {
        self.wal.check_disk()?;
        self.execute_anyway(doing, work)
    }

    /// As `execute`, also while the disk takes nothing.
    fn execute_anyway<T>(
        &self,
        doing: &dyn Fn() -> String,
        work: impl Fn(&Connection) -> rusqlite::Result<T>,
    ) -> Result<(T, Commit), Error> {
        let (at_last, soon) = (Deadline::after(self.locked_limit), Deadline::after(LOCKED_AGAIN));
        let is_over =
            || at_last.passed() || (soon.passed() && self.is_locked_out.load(Ordering::Relaxed));
        loop {
            let connection = lock(&self.connection);
            self.wal.check()?;
            match work(connection.as_ref().ok_or(Error::Closed)?) {
                Ok(done) => {
                    self.is_locked_out.store(false, Ordering::Relaxed);
                    let commit = self.wal.wrote();
                    self.checkpoints.wrote(1);
                    return Ok((done, commit));
                }
                Err(error) if schema::is_locked(&error) && !is_over() => {}
                Err(error) if schema::is_locked(&error) => {
                    self.is_locked_out.store(true, Ordering::Relaxed);
                    return Err(Error::sql(&self.path, doing)(error));
                }
                Err(error) => return Err(Error::sql(&self.path, doing)(error)),
            }
        }
    }

    /// Waits until a change is on the disk. One that the disk does not take in time is undone,
    /// by `undo`, which says whether it could.
    fn await_disk(
        &self,
        commit: Commit,
        undo: impl Fn(&Connection) -> rusqlite::Result<bool>,
    ) -> Result<(), Error> {
        let error = match self.wal.wait_for(commit) {
            Err(error @ Error::Stalled { .. }) => error,
            done => return done,
        };
        let doing = || "undoing a change of the index".to_owned();
        match self.execute_anyway(&doing, undo) {
            Ok((true, commit)) => self.wal.want(commit),
            Ok((false, _)) | Err(_) => self.wal.give_up(),
        }
        Err(error)
    }
}

fn writing(id: &SandboxId) -> impl Fn() -> String {
    move || format!("writing {id} to the index")
}
