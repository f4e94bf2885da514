//! Tombstones: the names of sandboxes that the daemon deleted, as the announcer sees them.
//!
//! The announcer removes the directory of a deleted sandbox through the mount, so that the kernel
//! generates the inotify events. Until it has done so, it alone still sees the directory and its
//! files.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use crate::{
    sandbox::SandboxId,
    tree::{Attr, Errno, File, Node, Tree},
};

/// Returns the attributes of what `name` was in `parent`, for the announcer's thread `tid`.
pub(super) fn lookup(tree: &Tree, tid: u32, parent: Node, name: &[u8]) -> Result<Attr, Errno> {
    let feed = tree.feed();
    if !feed.is_announcer(tid) {
        return Err(Errno::NoEnt);
    }
    match parent {
        Node::Root => {
            let id = SandboxId::from_bytes(name).map_err(|_| Errno::NoEnt)?;
            let tombstone = feed.tombstone(&id).ok_or(Errno::NoEnt)?;
            tree.tombstone_attr(Node::Dir(tombstone.row), tombstone.owner)
        }
        Node::Dir(row) => {
            let tombstone = feed.tombstone_of_row(row).ok_or(Errno::NoEnt)?;
            let file = File::ALL.into_iter().find(|file| file.name().as_bytes() == name);
            tree.tombstone_attr(Node::File(row, file.ok_or(Errno::NoEnt)?), tombstone.owner)
        }
        Node::NetDir(_) | Node::Daemon(_) | Node::File(..) => Err(Errno::NoEnt),
    }
}

/// Returns the attributes that a node had, for the announcer's thread `tid`.
pub(super) fn attr(tree: &Tree, tid: u32, node: Node) -> Result<Attr, Errno> {
    let feed = tree.feed();
    let (Node::Dir(row) | Node::File(row, _)) = node else {
        return Err(Errno::NoEnt);
    };
    let tombstone =
        feed.tombstone_of_row(row).filter(|_| feed.is_announcer(tid)).ok_or(Errno::NoEnt)?;
    tree.tombstone_attr(node, tombstone.owner)
}

/// Answers the announcer's `rmdir`. It clears a tombstone and never deletes a sandbox.
pub(super) fn remove_dir(tree: &Tree, parent: Node, name: &OsStr) -> Result<(), Errno> {
    let id = SandboxId::from_bytes(name.as_bytes()).map_err(|_| Errno::NoEnt)?;
    if parent == Node::Root && tree.feed().clear_tombstone(&id) {
        Ok(())
    } else {
        Err(Errno::NoEnt)
    }
}
