//! What to take back when an operation fails: a list of acts, undone in reverse.

use super::{Error, chain};

/// One act that can be taken back.
type Act<'a> = Box<dyn FnOnce() -> Result<(), Box<dyn std::error::Error>> + 'a>;

/// The acts of an operation so far. Dropping it without `run` keeps them: that is
/// what a commit means, and what a panic means until the record is recovered.
#[derive(Default)]
#[must_use = "an operation that fails has to run it"]
pub(super) struct Undo<'a> {
    acts: Vec<Option<(&'static str, Act<'a>)>>,
}

/// One of the acts, by which it is forgotten.
#[derive(Debug, Clone, Copy)]
pub(super) struct ActId(usize);

impl<'a> Undo<'a> {
    /// Notes how to take back what was just done.
    pub(super) fn push(
        &mut self,
        name: &'static str,
        act: impl FnOnce() -> Result<(), Box<dyn std::error::Error>> + 'a,
    ) -> ActId {
        self.acts.push(Some((name, Box::new(act))));
        ActId(self.acts.len() - 1)
    }

    /// Forgets an act: it must not be taken back any more.
    pub(super) fn forget(&mut self, act: ActId) {
        self.acts[act.0] = None;
    }

    /// Takes everything back, the last act first, and goes on past failures.
    ///
    /// Returns `cause`, together with what could not be taken back.
    pub(super) fn run(&mut self, cause: Error) -> Error {
        let mut failures = Vec::new();
        for (name, act) in self.acts.drain(..).rev().flatten() {
            if let Err(error) = act() {
                failures.push(format!("{name}: {}", chain(error.as_ref())));
            }
        }
        if failures.is_empty() {
            cause
        } else {
            Error::Undo { failures: failures.join("; "), source: Box::new(cause) }
        }
    }
}

impl std::fmt::Debug for Undo<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.acts.iter().flatten().map(|(name, _)| name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn acts_are_taken_back_in_reverse_past_failures_and_all_are_reported() {
        let order = RefCell::new(Vec::new());
        let mut undo = Undo::default();
        for name in ["first", "second", "third"] {
            let order = &order;
            undo.push(name, move || {
                order.borrow_mut().push(name);
                if name == "second" { Err("stuck".into()) } else { Ok(()) }
            });
        }
        let error = undo.run(Error::ShuttingDown);
        assert_eq!(*order.borrow(), ["third", "second", "first"]);
        assert_eq!(chain(&error), "undoing it failed too (second: stuck): dozed is shutting down");
    }
}
