//! A bell: wakes one waiter before its time.

use std::time::Duration;

use crate::sync::{Condvar, Mutex, lock, wait_while_within};

/// Wakes whoever waits; rung while nobody does, it ends the next wait at once.
#[derive(Debug, Default)]
pub struct Bell {
    /// A leaf lock.
    state: Mutex<Rung>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Rung {
    rung: bool,
    closed: bool,
}

impl Bell {
    /// Ends the wait.
    pub fn ring(&self) {
        lock(&self.state).rung = true;
        self.changed.notify_all();
    }

    /// Ends this wait and all later ones.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    /// Waits for the bell, for at most `limit`. False once it is closed.
    pub fn wait(&self, limit: Duration) -> bool {
        let state = lock(&self.state);
        let waiting = |state: &mut Rung| !state.rung && !state.closed;
        let mut state = wait_while_within(&self.changed, state, limit, waiting);
        state.rung = false;
        !state.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_ends_it_and_is_used_up() {
        let bell = Bell::default();
        bell.ring();
        assert!(bell.wait(Duration::from_secs(3600)));
        assert!(bell.wait(Duration::from_millis(1)));
        bell.close();
        assert!(!bell.wait(Duration::from_secs(3600)));
        assert!(!bell.wait(Duration::from_secs(3600)));
    }
}
