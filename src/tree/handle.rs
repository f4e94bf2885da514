//! Open files: what a reader sees stays the same from its first byte to its last.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Node, console::Console, document::Document};
use crate::{
    lifecycle::{HoldId, Reader},
    sandbox::{State, Timestamp},
    sync::{Arc, Mutex, lock},
};

/// An open file. A handle that is not known, since an earlier daemon gave it out, is
/// as good as one that nothing was read from yet.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) node: Node,
    /// What a read at offset 0 saw; later offsets are of the same.
    pub(super) text: Option<Arc<[u8]>>,
    /// How far a console was read.
    pub(super) console: Option<Arc<Console>>,
    /// How far a log of events was read.
    pub(super) events: Option<Arc<Reader>>,
    /// The state that was read last, and since when it was so.
    pub(super) seen: Option<(State, Timestamp)>,
    /// The document that is written through it.
    pub(super) document: Option<Arc<Document>>,
    /// The hold that it is.
    pub(super) hold: Option<HoldId>,
}

impl Handle {
    /// Nothing was read of it yet.
    pub(super) fn new(node: Node) -> Self {
        Self {
            node,
            text: None,
            console: None,
            events: None,
            seen: None,
            document: None,
            hold: None,
        }
    }
}

/// The table of open files.
#[derive(Debug)]
pub(super) struct Handles {
    /// A leaf lock.
    table: Mutex<HashMap<u64, Handle>>,
    next: AtomicU64,
}

impl Handles {
    pub(super) fn new() -> Self {
        Self { table: Mutex::default(), next: AtomicU64::new(1) }
    }

    pub(super) fn open(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.table).insert(number, handle);
        number
    }

    /// Opens a file that is a hold for as long as it is open.
    pub(super) fn open_hold(&self, node: Node, hold: HoldId) -> u64 {
        self.open(Handle { hold: Some(hold), ..Handle::new(node) })
    }

    pub(super) fn get(&self, number: u64, node: Node) -> Handle {
        let known = lock(&self.table).get(&number).cloned();
        known.filter(|handle| handle.node == node).unwrap_or(Handle::new(node))
    }

    /// Keeps what a reader saw, if it will come back for the rest of it.
    pub(super) fn keep(&self, number: u64, text: Arc<[u8]>) {
        if let Some(handle) = lock(&self.table).get_mut(&number) {
            handle.text = Some(text);
        }
    }

    /// Notes the state that was read.
    pub(super) fn saw(&self, number: u64, seen: (State, Timestamp)) {
        if let Some(handle) = lock(&self.table).get_mut(&number) {
            handle.seen = Some(seen);
        }
    }

    /// Closes a file.
    pub(super) fn close(&self, number: u64) -> Option<Handle> {
        // A log has a lock of its own, so it is let go after this one.
        lock(&self.table).remove(&number)
    }
}
