//! The entries, by number and by name, how many there are in each state, and which user
//! ids and slots they have.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, HashSet},
    hash::{Hash, Hasher},
    ops::Bound,
    sync::Arc,
};

use super::{Entry, MalformedRow};
use crate::sandbox::{Record, RowId, SandboxId, State};

/// The entries.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_row: BTreeMap<RowId, Arc<Entry>>,
    by_id: HashSet<ById>,
    /// The user ids that are given.
    users: HashSet<u32>,
    slots: Slots,
    /// In the order of [`State::ALL`].
    counts: [usize; State::ALL.len()],
}

/// Which slots are given.
#[derive(Debug, Default)]
struct Slots {
    given: HashMap<u32, RowId>,
    /// All below this one are given.
    low: u32,
}

impl Slots {
    fn take(&mut self, slot: u32, row: RowId) {
        self.given.insert(slot, row);
        while self.given.contains_key(&self.low) {
            self.low += 1;
        }
    }

    fn give_back(&mut self, slot: u32) {
        self.given.remove(&slot);
        self.low = self.low.min(slot);
    }

    fn lowest_free(&self) -> u32 {
        self.low
    }
}

/// An entry that is looked up by its name, without a second copy of the name.
#[derive(Debug)]
struct ById(Arc<Entry>);

impl Table {
    pub(super) fn insert(&mut self, entry: Arc<Entry>) {
        let record = entry.record();
        *self.count(record.state()) += 1;
        self.take(&record);
        self.by_id.insert(ById(Arc::clone(&entry)));
        self.by_row.insert(entry.row(), entry);
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        self.by_id.remove(entry.id());
        if self.by_row.remove(&entry.row()).is_some() {
            let record = entry.record();
            *self.count(record.state()) -= 1;
            self.give_back(&record);
        }
    }

    /// Gives nobody else the user id and the slot of a row that cannot be decoded.
    pub(super) fn reserve(&mut self, row: &MalformedRow) {
        self.users.extend(row.user);
        if let Some(slot) = row.slot {
            self.slots.take(slot, row.row);
        }
    }

    /// Counts a user id as given, before a record says it.
    pub(super) fn reserve_user(&mut self, user: u32) {
        self.users.insert(user);
    }

    /// Undoes [`Table::reserve_user`].
    pub(super) fn release_user(&mut self, user: u32) {
        self.users.remove(&user);
    }

    /// Counts a slot as given, before a record says it.
    pub(super) fn reserve_slot(&mut self, slot: u32, row: RowId) {
        self.slots.take(slot, row);
    }

    /// Undoes [`Table::reserve_slot`].
    pub(super) fn release_slot(&mut self, slot: u32) {
        self.slots.give_back(slot);
    }

    pub(super) fn changed(&mut self, from: &Record, to: &Record) {
        *self.count(from.state()) -= 1;
        *self.count(to.state()) += 1;
        if (from.user, from.slot) != (to.user, to.slot) {
            self.give_back(from);
            self.take(to);
        }
    }

    pub(super) fn by_slot(&self, slot: u32) -> Option<Arc<Entry>> {
        self.by_row(*self.slots.given.get(&slot)?)
    }

    pub(super) fn free_slot(&self) -> u32 {
        self.slots.lowest_free()
    }

    pub(super) fn has_user(&self, user: u32) -> bool {
        self.users.contains(&user)
    }

    fn take(&mut self, record: &Record) {
        self.users.extend(record.user);
        if let Some(slot) = record.slot {
            self.slots.take(slot, record.row);
        }
    }

    fn give_back(&mut self, record: &Record) {
        if let Some(user) = record.user {
            self.users.remove(&user);
        }
        if let Some(slot) = record.slot {
            self.slots.give_back(slot);
        }
    }

    pub(super) fn by_id(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        self.by_id.get(id).map(|found| Arc::clone(&found.0))
    }

    pub(super) fn by_row(&self, row: RowId) -> Option<Arc<Entry>> {
        self.by_row.get(&row).map(Arc::clone)
    }

    pub(super) fn rows_after(&self, row: RowId, limit: usize) -> Vec<Arc<Entry>> {
        let after = (Bound::Excluded(row), Bound::Unbounded);
        let entries = self.by_row.range(after).map(|(_, entry)| entry);
        entries.take(limit).map(Arc::clone).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.by_row.len()
    }

    pub(super) fn count_by_state(&self) -> [(State, usize); State::ALL.len()] {
        let mut counts = State::ALL.map(|state| (state, 0));
        for (place, count) in counts.iter_mut().zip(self.counts) {
            place.1 = count;
        }
        counts
    }

    fn count(&mut self, state: State) -> &mut usize {
        let place = State::ALL.iter().position(|known| *known == state);
        &mut self.counts[place.expect("ALL has every state")]
    }
}

impl Borrow<SandboxId> for ById {
    fn borrow(&self) -> &SandboxId {
        self.0.id()
    }
}

impl Hash for ById {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id().hash(state);
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.id() == other.0.id()
    }
}

impl Eq for ById {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_slot_that_is_free_is_the_next() {
        let mut slots = Slots::default();
        for expected in 0..4 {
            assert_eq!(slots.lowest_free(), expected);
            slots.take(expected, RowId(9));
        }
        slots.give_back(1);
        slots.give_back(2);
        assert_eq!(slots.lowest_free(), 1);
        slots.take(1, RowId(9));
        assert_eq!(slots.lowest_free(), 2);
        slots.give_back(3);
        assert_eq!(slots.lowest_free(), 2);
        // As when an index is loaded, whose rows are in another order.
        slots.take(7, RowId(9));
        slots.take(u32::MAX, RowId(9));
        assert_eq!(slots.lowest_free(), 2);
        slots.take(2, RowId(9));
        assert_eq!(slots.lowest_free(), 3);
        slots.give_back(0);
        assert_eq!(slots.lowest_free(), 0);
    }
}
