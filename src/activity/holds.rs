//! Holds: open files that keep a sandbox awake.
//!
//! A hold exists from before its sandbox is woken until the last process that has its file open
//! closes it; the kernel reports that also for processes that were killed. No race loses it: it
//! is added before the lock is waited for, and a sleep looks for holds under the lock and once
//! more after its intent.
//!
//! When the daemon ends, the open files become useless to their processes. Which sandboxes had a
//! hold is recorded in the index, and the next daemon's reaper leaves those alone for a while, in
//! which the processes that are still there can open the file again.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use crate::{
    index::{self, Entry, Index},
    sandbox::{RowId, SandboxId, Timestamp},
    sync::{Mutex, lock},
};

/// How long the reaper leaves alone what an earlier daemon's holds kept awake: long enough for
/// a program that looks once a minute to notice that its file is dead, and to open it again.
const GRACE: Duration = Duration::from_secs(120);
/// The prefix of the key of a sandbox with a hold, in the index.
const KEY_PREFIX: &str = "held.";
/// How many holders an error names.
const NAMED_MAX: usize = 3;

/// Who holds a sandbox awake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process that opened the file; its children may have it since.
    pub pid: u32,
    /// The user of the process.
    pub uid: u32,
    /// The name of its program, as `ps -o comm` has it.
    pub command: Box<str>,
}

/// A hold of a sandbox, by which it is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HoldId {
    row: RowId,
    number: u64,
}

impl HoldId {
    pub(super) fn row(self) -> RowId {
        self.row
    }
}

/// Why a sandbox cannot be held awake, or why a hold prevents an operation.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The sandbox was deleted, or is being deleted.
    #[error("{id} was deleted")]
    Gone {
        /// The sandbox.
        id: SandboxId,
    },
    /// It is held awake.
    #[error(
        "{id} is held awake by {by}; a hold ends when its holder closes the file `awake` or exits"
    )]
    Held {
        /// The sandbox.
        id: SandboxId,
        /// Who holds it.
        by: String,
    },
    /// The user holds as many as one may.
    #[error(
        "user {uid} has {limit} files `awake` open, which is the limit ([limits] holds), so {id} \
         is not held"
    )]
    TooMany {
        /// The sandbox.
        id: SandboxId,
        /// The user.
        uid: u32,
        /// The limit.
        limit: usize,
    },
}

/// The holds of all sandboxes. Bounded by `[limits] holds` for each user.
#[derive(Debug)]
pub(super) struct Holds {
    /// How many a user may have at a time.
    limit: usize,
    /// Inside it only the table of operations is locked, to see which sandboxes are being deleted.
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    of_row: HashMap<RowId, BTreeMap<u64, (Holder, Timestamp)>>,
    of_uid: HashMap<u32, usize>,
    /// Until when the reaper leaves alone what an earlier daemon's holds kept awake.
    grace: HashMap<RowId, Timestamp>,
    /// Which are recorded in the index.
    recorded: HashSet<RowId>,
    next: u64,
}

impl Holds {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, table: Mutex::default() }
    }

    pub(super) fn add(
        &self,
        entry: &Entry,
        holder: Holder,
        now: Timestamp,
        is_gone: impl FnOnce() -> bool,
    ) -> Result<HoldId, HoldError> {
        let mut table = lock(&self.table);
        if is_gone() {
            return Err(HoldError::Gone { id: entry.id().clone() });
        }
        let count = table.of_uid.entry(holder.uid).or_insert(0);
        if *count >= self.limit {
            let (id, uid) = (entry.id().clone(), holder.uid);
            return Err(HoldError::TooMany { id, uid, limit: self.limit });
        }
        *count += 1;
        table.next += 1;
        let id = HoldId { row: entry.row(), number: table.next };
        table.of_row.entry(id.row).or_default().insert(id.number, (holder, now));
        Ok(id)
    }

    /// Removes a hold. Says whether its sandbox may have had one.
    pub(super) fn remove(&self, id: HoldId) -> bool {
        let mut table = lock(&self.table);
        let Some(holds) = table.of_row.get_mut(&id.row) else { return false };
        let removed = holds.remove(&id.number);
        if holds.is_empty() {
            table.of_row.remove(&id.row);
        }
        if let Some((holder, _)) = removed
            && let Some(count) = table.of_uid.get_mut(&holder.uid)
        {
            *count -= 1;
            if *count == 0 {
                table.of_uid.remove(&holder.uid);
            }
        }
        true
    }

    /// Returns the holds of a sandbox by the users that `is_theirs` accepts.
    pub(super) fn of_users(&self, row: RowId, is_theirs: impl Fn(u32) -> bool) -> Vec<HoldId> {
        let table = lock(&self.table);
        let holds = table.of_row.get(&row).into_iter().flatten();
        let theirs = holds.filter(|(_, (holder, _))| is_theirs(holder.uid));
        theirs.map(|(number, _)| HoldId { row, number: *number }).collect()
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.table).of_uid.values().sum()
    }

    /// Returns the sandboxes with a hold.
    pub(super) fn rows(&self) -> Vec<RowId> {
        lock(&self.table).of_row.keys().copied().collect()
    }

    /// Returns who holds a sandbox, and since when, the first of them first.
    pub(super) fn of(&self, row: RowId) -> Vec<(Holder, Timestamp)> {
        let table = lock(&self.table);
        table.of_row.get(&row).map(|holds| holds.values().cloned().collect()).unwrap_or_default()
    }

    pub(super) fn prevents_sleep(&self, row: RowId, now: Timestamp) -> bool {
        let table = lock(&self.table);
        table.of_row.contains_key(&row) || table.grace.get(&row).is_some_and(|end| *end > now)
    }

    pub(super) fn grace_until(&self, row: RowId) -> Option<Timestamp> {
        lock(&self.table).grace.get(&row).copied()
    }

    pub(super) fn unless_held<T, E: From<HoldError>>(
        &self,
        entry: &Entry,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let table = lock(&self.table);
        match table.of_row.get(&entry.row()) {
            Some(holds) => {
                let holders: Vec<_> = holds.values().cloned().collect();
                Err(HoldError::Held { id: entry.id().clone(), by: named(&holders) }.into())
            }
            None => work(),
        }
    }

    /// Records in the index that a sandbox has a hold, unless it is recorded.
    pub(super) fn record(&self, index: &Index, row: RowId) -> Result<(), index::Error> {
        if !lock(&self.table).recorded.insert(row) {
            return Ok(());
        }
        index.set_meta(&key(row), "1").inspect_err(|_| {
            lock(&self.table).recorded.remove(&row);
        })
    }

    /// Removes from the index the sandboxes that have no hold any more.
    pub(super) fn forget_released(
        &self,
        index: &Index,
        now: Timestamp,
    ) -> Result<(), index::Error> {
        let released: Vec<RowId> = {
            let mut table = lock(&self.table);
            table.grace.retain(|_, end| *end > now);
            let Table { of_row, grace, recorded, .. } = &mut *table;
            let is_over = |row: &RowId| !of_row.contains_key(row) && !grace.contains_key(row);
            recorded.extract_if(is_over).collect()
        };
        for row in released {
            index.remove_meta_unsynced(&key(row))?;
            // A new hold may have been recorded between the two.
            if lock(&self.table).recorded.contains(&row) {
                index.set_meta(&key(row), "1")?;
            }
        }
        Ok(())
    }

    /// Begins the grace time of the sandboxes that an earlier daemon recorded, and returns them.
    pub(super) fn restore(
        &self,
        index: &Index,
        now: Timestamp,
    ) -> Result<Vec<RowId>, index::Error> {
        let recorded = index.metas(KEY_PREFIX)?;
        let end = now.after(GRACE);
        let rows: Vec<RowId> = recorded.iter().filter_map(|(key, _)| row_of(key)).collect();
        let mut table = lock(&self.table);
        table.grace.extend(rows.iter().map(|row| (*row, end)));
        table.recorded.extend(rows.iter().copied());
        Ok(rows)
    }
}

fn key(row: RowId) -> String {
    format!("{KEY_PREFIX}{row}")
}

fn row_of(key: &str) -> Option<RowId> {
    key.strip_prefix(KEY_PREFIX)?.parse().ok().map(RowId)
}

/// Names holders for an error.
fn named(holders: &[(Holder, Timestamp)]) -> String {
    let name = |Holder { pid, uid, command }: &Holder| format!("{command} (pid {pid}, uid {uid})");
    let mut names: Vec<String> =
        holders.iter().take(NAMED_MAX).map(|(holder, _)| name(holder)).collect();
    if holders.len() > NAMED_MAX {
        names.push(format!("{} more", holders.len() - NAMED_MAX));
    }
    names.join(", ")
}
