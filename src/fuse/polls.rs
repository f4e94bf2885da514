//! Programs that poll: which of them are woken when a file has changed.
//!
//! The kernel asks for a wake-up when a program begins to wait; the wake-up makes it ask
//! again whether the file has changed. It is a message on the device and waits for nothing, but
//! is sent by a thread that serves no requests, as all of them are.

use std::collections::HashMap;

use fuser::{PollEvents, PollNotifier};

use crate::{
    sync::{Mutex, lock},
    tree::{Node, Readiness},
};

/// The programs that wait. Bounded by the count of open files.
#[derive(Debug, Default)]
pub(super) struct Polls {
    /// By file and open file. A leaf lock.
    waiting: Mutex<HashMap<Node, HashMap<u64, PollNotifier>>>,
}

impl Polls {
    /// Has an open file woken at the next change of `node`, once.
    pub(super) fn enter(&self, node: Node, handle: u64, notifier: PollNotifier) {
        lock(&self.waiting).entry(node).or_default().insert(handle, notifier);
    }

    /// The file was closed.
    pub(super) fn leave(&self, node: Node, handle: u64) {
        let mut waiting = lock(&self.waiting);
        if let Some(handles) = waiting.get_mut(&node) {
            handles.remove(&handle);
            if handles.is_empty() {
                waiting.remove(&node);
            }
        }
    }

    /// Wakes the programs that poll `node`.
    pub(super) fn wake(&self, node: Node) {
        let woken = lock(&self.waiting).remove(&node).unwrap_or_default();
        for notifier in woken.into_values() {
            if let Err(error) = notifier.notify() {
                tracing::debug!(%error, "waking a program that polls");
            }
        }
    }
}

/// Returns what poll(2) says of a file.
pub(super) fn events(ready: Readiness) -> PollEvents {
    let writable = PollEvents::POLLOUT | PollEvents::POLLWRNORM;
    let readable = PollEvents::POLLIN | PollEvents::POLLRDNORM;
    let changed = PollEvents::POLLPRI | PollEvents::POLLERR;
    match ready {
        Readiness::Always => readable | writable,
        // As a file in sysfs of which somebody was told.
        Readiness::Changed => readable | writable | changed,
        Readiness::More => readable | writable,
        Readiness::AtEnd => writable,
        Readiness::Gone => readable | writable | changed | PollEvents::POLLHUP,
    }
}
