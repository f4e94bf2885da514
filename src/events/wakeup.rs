//! Ends a timed wait of another thread early.

use std::time::Duration;

use crate::sync::{Condvar, Mutex, lock, wait_while_within};

/// Ends the wait of one thread. A notification without a waiter ends the next wait at once.
#[derive(Debug, Default)]
pub struct Wakeup {
    /// A leaf lock.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_notified: bool,
    closed: bool,
}

impl Wakeup {
    /// Ends the wait.
    pub fn notify(&self) {
        lock(&self.state).is_notified = true;
        self.changed.notify_all();
    }

    /// Ends this wait and all later ones.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    /// Waits for a notification, for at most `limit`. Returns false once it is closed.
    pub fn wait(&self, limit: Duration) -> bool {
        let state = lock(&self.state);
        let waiting = |state: &mut State| !state.is_notified && !state.closed;
        let mut state = wait_while_within(&self.changed, state, limit, waiting);
        state.is_notified = false;
        !state.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_before_the_wait_ends_it_and_is_used_up() {
        let wakeup = Wakeup::default();
        wakeup.notify();
        assert!(wakeup.wait(Duration::from_secs(3600)));
        assert!(wakeup.wait(Duration::from_millis(1)));
        wakeup.close();
        assert!(!wakeup.wait(Duration::from_secs(3600)));
        assert!(!wakeup.wait(Duration::from_secs(3600)));
    }
}
