//! Holds: open files that keep a sandbox awake.
//!
//! A hold is a fact of this daemon's: it is there from before its sandbox is woken until its
//! file is closed by the last who has it, and the kernel tells of that also where they were
//! killed. So it is never lost to a race: it is entered before the lock is waited for, and a
//! sleep looks for holds under the lock and once more after its intent.
//!
//! The files of a daemon that is gone are of no use to their holders. What it held is noted
//! in the index, and the next daemon's reaper leaves it alone for a while, in which holders
//! that still live can open it anew.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use super::{Entry, Error, Lifecycle, Signal, chain};
use crate::{
    sandbox::{RowId, Timestamp},
    sync::{Mutex, lock},
};

/// How long the reaper leaves alone what an earlier daemon held: long enough for whoever
/// looks once a minute to notice that its file is dead, and to open it again.
const GRACE: Duration = Duration::from_secs(120);
/// What the key of a sandbox that is held begins with, in the index.
const HELD_KEY: &str = "held.";
/// How many holders an error names.
const NAMED_MAX: usize = 3;

/// Who holds a sandbox awake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process that opened the file; its children may have it since.
    pub pid: u32,
    /// The user that it was of.
    pub uid: u32,
    /// The name of its program, as `ps -o comm` has it.
    pub command: Box<str>,
}

/// A hold of a sandbox, by which it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HoldId {
    row: RowId,
    number: u64,
}

/// The holds of all sandboxes. Bounded by `[limits] holds` for each user.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// Under it only the table of operations is locked, to see who is being deleted.
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    held: HashMap<RowId, BTreeMap<u64, (Holder, Timestamp)>>,
    of_uid: HashMap<u32, usize>,
    /// Until when the reaper leaves alone what an earlier daemon held.
    grace: HashMap<RowId, Timestamp>,
    /// Which are noted in the index.
    noted: HashSet<RowId>,
    next: u64,
}

impl Lifecycle {
    /// Holds a sandbox. It need not be awake, and does not become so by this: that is the
    /// caller's to do.
    ///
    /// # Errors
    /// `Gone`, and `TooManyHolds`.
    pub fn hold(&self, entry: &Entry, holder: Holder) -> Result<HoldId, Error> {
        let mut table = lock(&self.holds.table);
        if self.operations.is_claimed(entry.row()) || self.index.by_row(entry.row()).is_none() {
            return Err(Error::Gone { id: entry.id().clone() });
        }
        let limit = self.settings.holds_max;
        let count = table.of_uid.entry(holder.uid).or_insert(0);
        if *count >= limit {
            let (id, uid) = (entry.id().clone(), holder.uid);
            return Err(Error::TooManyHolds { id, uid, limit });
        }
        *count += 1;
        table.next += 1;
        let id = HoldId { row: entry.row(), number: table.next };
        table.held.entry(id.row).or_default().insert(id.number, (holder, self.now()));
        drop(table);
        self.saw(entry, Signal::Hold);
        Ok(id)
    }

    /// Notes in the index that a sandbox is held, for the next daemon; unless it is noted.
    pub fn note_hold(&self, entry: &Entry) {
        let row = entry.row();
        if !lock(&self.holds.table).noted.insert(row) {
            return;
        }
        if let Err(error) = self.index.set_meta(&key(row), "1") {
            lock(&self.holds.table).noted.remove(&row);
            // Only what comes after a crash depends on it.
            tracing::warn!(id = %entry.id(), error = chain(&error), "noting a hold");
        }
    }

    /// Gives a hold up. The sandbox was active until now. Nothing is written to the disk by
    /// this, as nobody waits for a close: see [`Lifecycle::forget_holds`].
    pub fn give_up(&self, id: HoldId) {
        let mut table = lock(&self.holds.table);
        let Some(holds) = table.held.get_mut(&id.row) else {
            return;
        };
        let given_up = holds.remove(&id.number);
        if holds.is_empty() {
            table.held.remove(&id.row);
        }
        if let Some((holder, _)) = given_up
            && let Some(count) = table.of_uid.get_mut(&holder.uid)
        {
            *count -= 1;
            if *count == 0 {
                table.of_uid.remove(&holder.uid);
            }
        }
        drop(table);
        if let Some(entry) = self.by_row(id.row) {
            self.saw(&entry, Signal::Hold);
        }
    }

    /// Ends the holds of a sandbox by the users of whom `has_ended` says so.
    pub fn end_holds(&self, entry: &Entry, has_ended: impl Fn(u32) -> bool) {
        let row = entry.row();
        let ended: Vec<HoldId> = {
            let table = lock(&self.holds.table);
            let holds = table.held.get(&row).into_iter().flatten();
            let ended = holds.filter(|(_, (holder, _))| has_ended(holder.uid));
            ended.map(|(number, _)| HoldId { row, number: *number }).collect()
        };
        for hold in ended {
            self.give_up(hold);
        }
    }

    /// Returns how many holds there are of all sandboxes.
    #[must_use]
    pub fn holds_in_use(&self) -> usize {
        lock(&self.holds.table).of_uid.values().sum()
    }

    /// Returns who holds a sandbox, and since when, the first of them first.
    #[must_use]
    pub fn holders(&self, row: RowId) -> Vec<(Holder, Timestamp)> {
        let table = lock(&self.holds.table);
        table.held.get(&row).map(|holds| holds.values().cloned().collect()).unwrap_or_default()
    }

    /// Says whether the reaper has to leave a sandbox alone, for a hold of now or of before.
    #[must_use]
    pub fn is_held(&self, row: RowId) -> bool {
        let table = lock(&self.holds.table);
        table.held.contains_key(&row) || table.grace.get(&row).is_some_and(|end| *end > self.now())
    }

    /// Returns until when the reaper leaves a sandbox alone for a hold of before.
    #[must_use]
    pub fn spared_until(&self, row: RowId) -> Option<Timestamp> {
        lock(&self.holds.table).grace.get(&row).copied()
    }

    /// Does `work` unless the sandbox is held; nobody begins to hold it meanwhile.
    pub(super) fn unless_held<T>(
        &self,
        entry: &Entry,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let table = lock(&self.holds.table);
        match table.held.get(&entry.row()) {
            Some(holds) => {
                let holders: Vec<_> = holds.values().cloned().collect();
                Err(Error::Held { id: entry.id().clone(), by: named(&holders) })
            }
            None => work(),
        }
    }

    /// Counts each hold as activity of this moment. Called at each tick.
    pub fn sample_holds(&self) {
        let held: Vec<RowId> = lock(&self.holds.table).held.keys().copied().collect();
        for entry in held.into_iter().filter_map(|row| self.by_row(row)) {
            self.saw(&entry, Signal::Hold);
        }
    }

    /// Takes out of the index what is no longer held. Called at each tick.
    ///
    /// # Errors
    /// Where the index cannot be written.
    pub fn forget_holds(&self) -> Result<(), crate::index::Error> {
        let now = self.now();
        let over: Vec<RowId> = {
            let mut table = lock(&self.holds.table);
            table.grace.retain(|_, end| *end > now);
            let Table { held, grace, noted, .. } = &mut *table;
            let is_over = |row: &RowId| !held.contains_key(row) && !grace.contains_key(row);
            noted.extract_if(is_over).collect()
        };
        for row in over {
            self.index.remove_meta_unsynced(&key(row))?;
            // It may have been held and noted anew between the two.
            if lock(&self.holds.table).noted.contains(&row) {
                self.index.set_meta(&key(row), "1")?;
            }
        }
        Ok(())
    }

    /// Spares for a while what an earlier daemon held. Called once, at start-up.
    pub(super) fn respect_earlier_holds(&self) {
        let noted = self.index.metas(HELD_KEY).unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "looking for what was held");
            Vec::new()
        });
        let end = self.now().after(GRACE);
        let rows: Vec<RowId> = noted.iter().filter_map(|(key, _)| row_of(key)).collect();
        let mut table = lock(&self.holds.table);
        table.grace.extend(rows.iter().map(|row| (*row, end)));
        table.noted.extend(rows.iter().copied());
        drop(table);
        for entry in rows.into_iter().filter_map(|row| self.index.by_row(row)) {
            tracing::info!(id = %entry.id(), "it was held awake; it may be opened again");
            self.saw(&entry, Signal::Hold);
        }
    }
}

fn key(row: RowId) -> String {
    format!("{HELD_KEY}{row}")
}

fn row_of(key: &str) -> Option<RowId> {
    key.strip_prefix(HELD_KEY)?.parse().ok().map(RowId)
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
