//! Equal specs, once each: most sandboxes are made from one template.

use std::{collections::HashSet, sync::Arc};

use crate::{
    sandbox::Spec,
    sync::{Mutex, lock},
};

/// Below this many there is nothing to be gained by dropping those that nobody uses.
const FEW: usize = 64;

/// The specs in use, and some that were.
#[derive(Debug, Default)]
pub(super) struct Specs {
    /// A leaf.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    specs: HashSet<Arc<Spec>>,
    /// How many there were after those that nobody used were dropped.
    used: usize,
}

impl Specs {
    /// Returns the one that stands for all that equal `spec`.
    pub(super) fn intern(&self, spec: Arc<Spec>) -> Arc<Spec> {
        let mut known = lock(&self.known);
        if let Some(same) = known.specs.get(&spec) {
            return Arc::clone(same);
        }
        if known.specs.len() >= FEW.max(2 * known.used) {
            known.specs.retain(|spec| Arc::strong_count(spec) > 1);
            known.used = known.specs.len();
        }
        known.specs.insert(Arc::clone(&spec));
        spec
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(memory_bytes: u64) -> Arc<Spec> {
        Arc::new(Spec { memory_bytes, ..Spec::default() })
    }

    #[test]
    fn equal_specs_are_one() {
        let specs = Specs::default();
        let first = specs.intern(spec(1));
        assert!(Arc::ptr_eq(&first, &specs.intern(spec(1))));
        assert!(!Arc::ptr_eq(&first, &specs.intern(spec(2))));
    }

    #[test]
    fn specs_that_nobody_uses_do_not_pile_up() {
        let specs = Specs::default();
        let used = specs.intern(spec(0));
        for memory_bytes in 1..10_000 {
            specs.intern(spec(memory_bytes));
        }
        assert!(lock(&specs.known).specs.len() <= FEW + 1);
        assert!(Arc::ptr_eq(&used, &specs.intern(spec(0))));
    }
}
