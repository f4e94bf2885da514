//! A request's answer, which is given once: by the operation, or by the interrupt.

use crate::sync::{Arc, Mutex, lock};

/// A request's answer, which is given once: by the operation or by the interrupt.
#[derive(Debug)]
pub(super) struct Once<R> {
    reply: Arc<Mutex<Option<R>>>,
}

impl<R> Clone for Once<R> {
    fn clone(&self) -> Self {
        Self { reply: Arc::clone(&self.reply) }
    }
}

impl<R> Once<R> {
    pub(super) fn new(reply: R) -> Self {
        Self { reply: Arc::new(Mutex::new(Some(reply))) }
    }

    /// Takes the answer, unless it was given.
    pub(super) fn take(&self) -> Option<R> {
        lock(&self.reply).take()
    }

    /// Says whether the answer was given.
    pub(super) fn is_given(&self) -> bool {
        lock(&self.reply).is_none()
    }
}
