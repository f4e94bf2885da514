//! Open files: what a reader sees stays the same from its first byte to its last.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use super::Node;
use crate::{
    lifecycle::HoldId,
    sync::{Arc, Mutex, lock},
};

/// An open file. A handle that is not known, since an earlier daemon gave it out, is
/// as good as one that nothing was read from yet.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) node: Node,
    /// What a read at offset 0 saw; later offsets are of the same.
    pub(super) text: Option<Arc<[u8]>>,
    /// Where the console's log began when it was opened.
    pub(super) start: u64,
    /// Whether something was written to it.
    pub(super) written: bool,
    /// The hold that it is.
    hold: Option<HoldId>,
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

    pub(super) fn open(&self, node: Node, start: u64) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.table)
            .insert(number, Handle { node, text: None, start, written: false, hold: None });
        number
    }

    /// Opens a file that is a hold for as long as it is open.
    pub(super) fn open_hold(&self, node: Node, hold: HoldId) -> u64 {
        let number = self.open(node, 0);
        if let Some(handle) = lock(&self.table).get_mut(&number) {
            handle.hold = Some(hold);
        }
        number
    }

    pub(super) fn get(&self, number: u64, node: Node) -> Handle {
        let known = lock(&self.table).get(&number).cloned();
        known.filter(|handle| handle.node == node).unwrap_or(Handle {
            node,
            text: None,
            start: 0,
            written: false,
            hold: None,
        })
    }

    /// Keeps what a reader saw, if it will come back for the rest of it.
    pub(super) fn keep(&self, number: u64, text: Arc<[u8]>) {
        if let Some(handle) = lock(&self.table).get_mut(&number) {
            handle.text = Some(text);
        }
    }

    /// Notes a write; says whether it is the first one.
    pub(super) fn is_first_write(&self, number: u64) -> bool {
        let mut table = lock(&self.table);
        table.get_mut(&number).is_none_or(|handle| !std::mem::replace(&mut handle.written, true))
    }

    /// Closes a file; returns the hold that ends with it.
    pub(super) fn close(&self, number: u64) -> Option<HoldId> {
        lock(&self.table).remove(&number)?.hold
    }
}
