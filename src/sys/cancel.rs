//! How one thread calls off the work of another.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::{Arc, Mutex, lock};

/// What ends when an operation is called off.
pub trait Victim: std::fmt::Debug + Send + Sync {
    /// Kills it. Doing it again is no error.
    fn kill(&self);
}

/// Calls off an operation: long loops look at it, and the processes that the
/// operation waits for are killed, which ends the wait.
///
/// # Locking
/// A leaf: nothing else is locked while its list is.
#[derive(Debug, Default)]
pub struct Cancel {
    called_off: AtomicBool,
    /// The processes to kill. At most one or two.
    victims: Mutex<Vec<Arc<dyn Victim>>>,
}

/// The operation was called off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operation was called off")]
pub struct CalledOff;

impl Cancel {
    /// Calls the operation off, for good.
    pub fn call_off(&self) {
        let victims = lock(&self.victims);
        self.called_off.store(true, Ordering::SeqCst);
        for victim in victims.iter() {
            victim.kill();
        }
    }

    /// Says whether the operation goes on.
    ///
    /// # Errors
    /// `CalledOff` if it does not.
    pub fn check(&self) -> Result<(), CalledOff> {
        if self.called_off.load(Ordering::SeqCst) { Err(CalledOff) } else { Ok(()) }
    }

    /// Has `victim` killed if the operation is or was called off.
    pub fn ends_with(&self, victim: Arc<dyn Victim>) {
        let mut victims = lock(&self.victims);
        if self.called_off.load(Ordering::SeqCst) {
            victim.kill();
        }
        victims.push(victim);
    }
}
