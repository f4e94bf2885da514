//! The entries, by number and by name, how many there are in each state, and which user
//! ids they have.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashSet},
    hash::{Hash, Hasher},
    ops::Bound,
    sync::Arc,
};

use super::Entry;
use crate::sandbox::{Record, RowId, SandboxId, State};

/// The entries.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_row: BTreeMap<RowId, Arc<Entry>>,
    by_id: HashSet<ById>,
    /// The user ids that are given.
    users: HashSet<u32>,
    /// In the order of [`State::ALL`].
    counts: [usize; State::ALL.len()],
}

/// An entry that is looked up by its name, without a second copy of the name.
#[derive(Debug)]
struct ById(Arc<Entry>);

impl Table {
    pub(super) fn insert(&mut self, entry: Arc<Entry>) {
        let record = entry.record();
        *self.count(record.state) += 1;
        self.users.extend(record.user);
        self.by_id.insert(ById(Arc::clone(&entry)));
        self.by_row.insert(entry.row(), entry);
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        self.by_id.remove(entry.id());
        if self.by_row.remove(&entry.row()).is_some() {
            let record = entry.record();
            *self.count(record.state) -= 1;
            self.give_back(&record);
        }
    }

    pub(super) fn changed(&mut self, from: &Record, to: &Record) {
        *self.count(from.state) -= 1;
        *self.count(to.state) += 1;
        if from.user != to.user {
            self.give_back(from);
            self.users.extend(to.user);
        }
    }

    pub(super) fn has_user(&self, user: u32) -> bool {
        self.users.contains(&user)
    }

    fn give_back(&mut self, record: &Record) {
        if let Some(user) = record.user {
            self.users.remove(&user);
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
