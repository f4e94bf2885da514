//! Open files: what a reader sees stays the same from its first byte to its last.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Errno, Node, console::Console, document::Document, opened::OpenedBy};
use crate::{
    activity::HoldId,
    lifecycle::Reader,
    sandbox::{State, Timestamp},
    sync::{Arc, Mutex, lock},
};

/// An open file. A handle that is not known, since an earlier daemon gave it out, is
/// as good as one that nothing was read from yet.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) node: Node,
    /// Whose file descriptor it is.
    pub(super) uid: u32,
    /// Who opened it, where it is a sandbox's.
    pub(super) opened: Option<OpenedBy>,
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
    pub(super) fn new(node: Node, uid: u32) -> Self {
        Self {
            node,
            uid,
            opened: None,
            text: None,
            console: None,
            events: None,
            seen: None,
            document: None,
            hold: None,
        }
    }
}

/// How many files of the tree a user may have open at a time, but for root: a watcher may have
/// two files of each of eight thousand sandboxes open.
const OPEN_MAX: usize = 16 * 1024;
/// How many bytes of texts that were read in part are kept for a user: 16 MiB. A reader who is
/// past that sees, in a later piece, the text of that moment.
const TEXTS_MAX_BYTES: usize = 16 << 20;

/// The table of open files.
#[derive(Debug)]
pub(super) struct Handles {
    /// A leaf lock.
    table: Mutex<Table>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Handle>,
    of_uid: HashMap<u32, Usage>,
}

/// What the open files of a user take.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Usage {
    files: usize,
    text_bytes: usize,
}

impl Table {
    /// Replaces the text that is kept for an open file.
    fn set_text(&mut self, number: u64, text: Option<Arc<[u8]>>) {
        let Some(handle) = self.open.get_mut(&number) else { return };
        let usage = self.of_uid.entry(handle.uid).or_default();
        let before = handle.text.take().map_or(0, |text| text.len());
        usage.text_bytes = usage.text_bytes.saturating_sub(before);
        let fits =
            |text: &Arc<[u8]>| handle.uid == 0 || usage.text_bytes + text.len() <= TEXTS_MAX_BYTES;
        handle.text = text.filter(fits);
        usage.text_bytes += handle.text.as_ref().map_or(0, |text| text.len());
    }
}

impl Handles {
    pub(super) fn new() -> Self {
        Self { table: Mutex::default(), next: AtomicU64::new(1) }
    }

    /// Enters an open file, of which it returns the number; `Dquot` where its user has as many
    /// open as one may.
    pub(super) fn open(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = lock(&self.table);
        let usage = table.of_uid.entry(handle.uid).or_default();
        if handle.uid != 0 && usage.files >= OPEN_MAX {
            return Err(Errno::Dquot);
        }
        usage.files += 1;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        table.open.insert(number, handle);
        Ok(number)
    }

    /// Opens a file that is a hold for as long as it is open.
    pub(super) fn open_hold(
        &self,
        node: Node,
        opened: OpenedBy,
        hold: HoldId,
    ) -> Result<u64, Errno> {
        let handle = Handle::new(node, opened.uid);
        self.open(Handle { hold: Some(hold), opened: Some(opened), ..handle })
    }

    pub(super) fn get(&self, number: u64, node: Node) -> Handle {
        let known = lock(&self.table).open.get(&number).cloned();
        known.filter(|handle| handle.node == node).unwrap_or(Handle::new(node, 0))
    }

    /// Keeps what a reader saw, if it will come back for the rest of it.
    pub(super) fn keep(&self, number: u64, text: Arc<[u8]>) {
        lock(&self.table).set_text(number, Some(text));
    }

    /// Notes the state that was read.
    pub(super) fn saw(&self, number: u64, seen: (State, Timestamp)) {
        if let Some(handle) = lock(&self.table).open.get_mut(&number) {
            handle.seen = Some(seen);
        }
    }

    /// Closes a file.
    pub(super) fn close(&self, number: u64) -> Option<Handle> {
        // A log has a lock of its own, so it is let go after this one.
        let mut table = lock(&self.table);
        table.set_text(number, None);
        let handle = table.open.remove(&number)?;
        if let Some(usage) = table.of_uid.get_mut(&handle.uid) {
            usage.files -= 1;
            if usage.files == 0 {
                table.of_uid.remove(&handle.uid);
            }
        }
        Some(handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sandbox::RowId, tree::File};

    #[test]
    fn what_a_user_has_open_is_bounded_and_others_do_not_feel_it() {
        const UID: u32 = 1;
        let handles = Handles::new();
        let handle = |uid| Handle::new(Node::File(RowId(1), File::Status), uid);
        let open: Vec<u64> = (0..OPEN_MAX).map(|_| handles.open(handle(UID)).unwrap()).collect();
        assert_eq!(handles.open(handle(UID)), Err(Errno::Dquot));
        for uid in [0, 2] {
            handles.open(handle(uid)).unwrap();
        }
        let text: Arc<[u8]> = vec![0; 64 << 10].into();
        for number in &open {
            handles.keep(*number, Arc::clone(&text));
            handles.keep(*number, Arc::clone(&text));
        }
        let usage = lock(&handles.table).of_uid[&UID];
        assert_eq!(usage, Usage { files: OPEN_MAX, text_bytes: TEXTS_MAX_BYTES });
        for number in open {
            handles.close(number).unwrap();
        }
        assert_eq!(lock(&handles.table).of_uid.get(&UID), None);
        handles.open(handle(UID)).unwrap();
    }

    #[test]
    fn what_was_opened_ends_with_the_rights_that_it_was_opened_with() {
        let owner = |uid, gid| crate::sandbox::Owner { uid, gid };
        for (uid, before, after, has_ended) in [
            (1, owner(1, 2), owner(1, 2), false),
            (1, owner(1, 2), owner(7, 2), true),
            (1, owner(1, 2), owner(1, 9), false),
            (5, owner(1, 2), owner(7, 2), false),
            (5, owner(1, 2), owner(7, 9), true),
            (7, owner(1, 2), owner(7, 9), false),
            (0, owner(1, 2), owner(7, 9), false),
            (1, owner(1, 2), owner(0, 0), true),
        ] {
            let opened = OpenedBy { uid, owner: before };
            assert_eq!(opened.has_ended(after), has_ended, "{opened:?} {after:?}");
        }
    }
}
