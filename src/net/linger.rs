//! Which networks have outlived their guests, and until when.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    sandbox::{SandboxId, Timestamp},
    sync::{Mutex, lock},
};

/// The networks of sandboxes that sleep, at most one for each.
///
/// # Locking
/// A leaf: nothing else is locked while it is.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    table: Mutex<Table>,
}

/// The same twice, so that what is due is found without a look at what is not.
#[derive(Debug, Default)]
struct Table {
    until: BTreeMap<SandboxId, Timestamp>,
    order: BTreeSet<(Timestamp, SandboxId)>,
}

impl Table {
    fn forget(&mut self, id: &SandboxId) {
        if let Some(until) = self.until.remove(id) {
            self.order.remove(&(until, id.clone()));
        }
    }
}

impl Lingering {
    /// Remembers that the network of `id` is to go at `until`.
    pub(super) fn add(&self, id: &SandboxId, until: Timestamp) {
        let mut table = lock(&self.table);
        table.forget(id);
        table.until.insert(id.clone(), until);
        table.order.insert((until, id.clone()));
    }

    /// Forgets about it: it is in use again, or gone.
    pub(super) fn forget(&self, id: &SandboxId) {
        lock(&self.table).forget(id);
    }

    /// Returns when the network of `id` is to go.
    pub(super) fn until(&self, id: &SandboxId) -> Option<Timestamp> {
        lock(&self.table).until.get(id).copied()
    }

    /// Returns those that are due at `now`, in the order of their names. They are due until
    /// they are forgotten.
    pub(super) fn due(&self, now: Timestamp) -> Vec<SandboxId> {
        let table = lock(&self.table);
        let due = table.order.iter().take_while(|(at, _)| *at <= now);
        let ids: BTreeSet<_> = due.map(|(_, id)| id.clone()).collect();
        ids.into_iter().collect()
    }

    /// Returns when the next one is due.
    pub(super) fn next(&self) -> Option<Timestamp> {
        lock(&self.table).order.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_due_from_its_time_on_until_it_is_forgotten() {
        let (a, b): (SandboxId, SandboxId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let at = Timestamp::from_millis;
        let lingering = Lingering::default();
        assert_eq!(lingering.next(), None);
        lingering.add(&a, at(20));
        lingering.add(&b, at(10));
        assert_eq!(lingering.next(), Some(at(10)));
        assert!(lingering.due(at(9)).is_empty());
        assert_eq!(lingering.due(at(10)), std::slice::from_ref(&b));
        assert_eq!(lingering.due(at(20)), [a.clone(), b.clone()]);
        lingering.forget(&b);
        assert_eq!(lingering.due(at(20)), std::slice::from_ref(&a));
        lingering.add(&a, at(30));
        assert!(lingering.due(at(20)).is_empty());
        assert_eq!((lingering.until(&a), lingering.until(&b)), (Some(at(30)), None));
        assert_eq!(lingering.next(), Some(at(30)));
    }
}
