//! A sandbox's lock, and why it was taken.

use std::ops::Deref;

use crate::{lock, sandbox::Cause};

/// The lock of a sandbox, with who or what wants to change it. Whatever is done under it
/// is told with that cause.
#[must_use = "the lock is let go where this is dropped"]
#[derive(Debug)]
pub struct Held {
    lock: lock::Held,
    cause: Cause,
}

impl Held {
    pub(super) fn new(lock: lock::Held, cause: Cause) -> Self {
        Self { lock, cause }
    }

    /// Returns why the lock was taken.
    #[must_use]
    pub fn cause(&self) -> &Cause {
        &self.cause
    }
}

impl Deref for Held {
    type Target = lock::Held;

    fn deref(&self) -> &lock::Held {
        &self.lock
    }
}
