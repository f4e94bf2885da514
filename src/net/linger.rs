//! Which networks have outlived their guests, and until when.

use std::collections::BTreeMap;

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
    until: Mutex<BTreeMap<SandboxId, Timestamp>>,
}

impl Lingering {
    /// Remembers that the network of `id` is to go at `until`.
    pub(super) fn add(&self, id: &SandboxId, until: Timestamp) {
        lock(&self.until).insert(id.clone(), until);
    }

    /// Forgets about it: it is in use again, or gone.
    pub(super) fn forget(&self, id: &SandboxId) {
        lock(&self.until).remove(id);
    }

    /// Returns those that are due at `now`. They are due until they are forgotten.
    pub(super) fn due(&self, now: Timestamp) -> Vec<SandboxId> {
        let until = lock(&self.until);
        until.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect()
    }

    /// Returns when the next one is due.
    pub(super) fn next(&self) -> Option<Timestamp> {
        lock(&self.until).values().min().copied()
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
    }
}
