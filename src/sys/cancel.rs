//! Cancellation of an operation by another thread.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::{Arc, Mutex, lock};

/// Something that a cancellation kills.
pub trait Victim: std::fmt::Debug + Send + Sync {
    /// Kills it. Idempotent.
    fn kill(&self);
}

/// Cancels an operation: long loops check it, and the processes that the operation waits for are
/// killed.
///
/// # Locking
/// A leaf: no other lock is taken under it.
#[derive(Debug, Default)]
pub struct Cancel {
    called_off: AtomicBool,
    /// At most one or two.
    victims: Mutex<Vec<Arc<dyn Victim>>>,
}

/// The operation was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operation was called off")]
pub struct CalledOff;

impl Cancel {
    /// Cancels the operation.
    pub fn call_off(&self) {
        let victims = lock(&self.victims);
        self.called_off.store(true, Ordering::SeqCst);
        for victim in victims.iter() {
            victim.kill();
        }
    }

    /// Returns an error if the operation was cancelled.
    ///
    /// # Errors
    /// `CalledOff` if it does not.
    pub fn check(&self) -> Result<(), CalledOff> {
        if self.called_off.load(Ordering::SeqCst) { Err(CalledOff) } else { Ok(()) }
    }

    /// Registers `victim`, which is killed on cancellation, at once if that has happened.
    pub fn ends_with(&self, victim: Arc<dyn Victim>) {
        let mut victims = lock(&self.victims);
        if self.called_off.load(Ordering::SeqCst) {
            victim.kill();
        }
        victims.push(victim);
    }
}
