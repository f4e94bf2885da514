//! Which openings of a document its opener has not closed yet.
//!
//! The kernel tells of each close of a descriptor, and not whether the process has a copy of
//! it left: a shell that writes by `>&3` closes a copy after each command. It can be asked how
//! many openings of the file the process still has. Those that are known here, without the one
//! that is being closed, are all among them; so if there are no more than those, this one is
//! closed.
//!
//! An opening may be missing among what the process has: it was opened by another thread that
//! does not have its descriptor yet, or its close is under way. And a process may have some that
//! it did not open: a parent's. Where that may be, an opening counts as open. It is committed
//! when nobody has it open any more.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    sync::{Arc, Mutex, lock},
    tree::Node,
};

/// The openings of all documents that are open for writing.
#[derive(Debug, Default)]
pub(in crate::tree) struct Openings {
    /// A leaf lock.
    by_node: Mutex<HashMap<Node, Vec<Known>>>,
    next: AtomicU64,
}

/// What is known of an opening.
#[derive(Debug)]
struct Known {
    number: u64,
    /// The process and the thread that opened it.
    pid: u32,
    tid: u32,
    /// Whether its descriptor is in the opener's table for certain.
    is_installed: bool,
    status: Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    /// The opener has it open.
    Open,
    /// The opener may have it open.
    Unsure,
    /// The opener has closed it, and others may have it open.
    Closed,
}

/// One opening of a document.
#[derive(Debug)]
pub(super) struct Opening {
    openings: Arc<Openings>,
    node: Node,
    number: u64,
    /// The process that opened it.
    pub(super) pid: u32,
}

impl Opening {
    /// Enters an opening by the thread `tid` of the process `pid`.
    pub(super) fn new(openings: &Arc<Openings>, node: Node, pid: u32, tid: u32) -> Self {
        let number = openings.next.fetch_add(1, Ordering::Relaxed);
        let known = Known { number, pid, tid, is_installed: false, status: Status::Open };
        lock(&openings.by_node).entry(node).or_default().push(known);
        Self { openings: Arc::clone(openings), node, number, pid }
    }

    /// It was written to, so its descriptor is there.
    pub(super) fn used(&self) {
        self.with(|known, at| known[at].is_installed = true);
    }

    /// The opener closes one of its descriptors.
    pub(super) fn closing(&self) {
        self.with(|known, at| {
            known[at].is_installed = true;
            known[at].status = Status::Unsure;
        });
    }

    /// Says whether the opener has closed its last descriptor of this. It does so in the thread
    /// `tid`, and has so many openings of the file left.
    pub(super) fn is_closed(&self, left: usize, tid: u32) -> bool {
        self.with(|known, at| {
            let is_ours = |it: &Known| it.pid == self.pid && it.status != Status::Closed;
            let is_other = |it: &&Known| it.number != self.number;
            let ours = known.iter().filter(|it| is_ours(it)).count();
            let certain = known.iter().filter(is_other).filter(|it| {
                is_ours(it) && it.status == Status::Open && (it.is_installed || it.tid == tid)
            });
            if left <= certain.count() {
                known[at].status = Status::Closed;
                return true;
            }
            // What it has left can only be these, and all of them.
            if left == ours && known.iter().all(is_ours) {
                known.iter_mut().for_each(|it| it.status = Status::Open);
            }
            false
        })
    }

    fn with<T: Default>(&self, act: impl FnOnce(&mut Vec<Known>, usize) -> T) -> T {
        let mut by_node = lock(&self.openings.by_node);
        let Some(known) = by_node.get_mut(&self.node) else { return T::default() };
        let at = known.iter().position(|it| it.number == self.number);
        at.map(|at| act(known, at)).unwrap_or_default()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let mut by_node = lock(&self.openings.by_node);
        let Some(known) = by_node.get_mut(&self.node) else { return };
        known.retain(|it| it.number != self.number);
        if known.is_empty() {
            by_node.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sandbox::RowId, tree::File};

    const NODE: Node = Node::File(RowId(1), File::Denied);
    const OPENER: u32 = 10;
    const OTHER: u32 = 20;
    /// The first thread of the opener.
    const TID: u32 = 10;

    fn open(openings: &Arc<Openings>, pid: u32) -> Opening {
        Opening::new(openings, NODE, pid, pid)
    }

    /// One descriptor of an opening is closed, after which the opener has so many openings.
    fn close(opening: &Opening, left: usize) -> bool {
        opening.closing();
        opening.is_closed(left, TID)
    }

    #[test]
    fn each_opening_of_a_process_is_closed_by_its_own_last_close() {
        let openings = Arc::default();
        let (one, other) = (open(&openings, OPENER), open(&openings, OPENER));
        assert!(!close(&one, 2), "a copy of it was closed");
        assert!(!close(&other, 2), "a copy of it was closed");
        assert!(close(&one, 1));
        assert!(!close(&other, 1), "a copy of it was closed");
        assert!(close(&other, 0));
        drop((one, other));
        assert!(lock(&openings.by_node).is_empty());
    }

    #[test]
    fn an_opening_that_others_have_too_is_none_of_the_openers() {
        let openings = Arc::default();
        let one = open(&openings, OPENER);
        assert!(close(&one, 0));
        // A child has the first one still.
        let other = open(&openings, OPENER);
        assert!(!close(&other, 1), "a copy of it was closed");
        assert!(close(&other, 0));
    }

    #[test]
    fn what_may_be_a_parents_counts_as_open() {
        let openings = Arc::default();
        let parents = open(&openings, OTHER);
        let (one, other) = (open(&openings, OPENER), open(&openings, OPENER));
        assert!(!close(&one, 2), "what is left may be this one and the other");
        // The one that may be closed is not counted on.
        assert!(!close(&other, 1));
        assert!(close(&other, 0));
        drop(parents);
    }

    #[test]
    fn one_whose_thread_may_not_have_it_yet_is_not_counted_on() {
        let openings = Arc::default();
        let one = open(&openings, OPENER);
        let of_thread = Opening::new(&openings, NODE, OPENER, TID + 1);
        assert!(!close(&one, 1), "what is left may be this one");
        of_thread.used();
        assert!(close(&one, 1));
    }
}
