//! Sandboxes that the daemon has deleted, as the announcer sees them.
//!
//! To make the kernel tell of a deletion the announcer removes the directory through the
//! mount. For it alone, and until it has done so, there are still names to be removed;
//! nothing stands behind them.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use crate::{
    sandbox::SandboxId,
    tree::{Attr, Errno, File, Node, Tree},
};

/// Returns the attributes of what `name` was in `parent`, for the announcer's thread `tid`.
pub(super) fn lookup(tree: &Tree, tid: u32, parent: Node, name: &[u8]) -> Result<Attr, Errno> {
    let news = tree.news();
    if !news.is_announcer(tid) {
        return Err(Errno::NoEnt);
    }
    match parent {
        Node::Root => {
            let id = SandboxId::from_bytes(name).map_err(|_| Errno::NoEnt)?;
            let ghost = news.ghost(&id).ok_or(Errno::NoEnt)?;
            tree.ghost_attr(Node::Dir(ghost.row), ghost.owner)
        }
        Node::Dir(row) => {
            let ghost = news.ghost_of(row).ok_or(Errno::NoEnt)?;
            let file = File::ALL.into_iter().find(|file| file.name().as_bytes() == name);
            tree.ghost_attr(Node::File(row, file.ok_or(Errno::NoEnt)?), ghost.owner)
        }
        Node::NetDir(_) | Node::Daemon(_) | Node::File(..) => Err(Errno::NoEnt),
    }
}

/// Returns the attributes that a node had, for the announcer's thread `tid`.
pub(super) fn attr(tree: &Tree, tid: u32, node: Node) -> Result<Attr, Errno> {
    let news = tree.news();
    let (Node::Dir(row) | Node::File(row, _)) = node else {
        return Err(Errno::NoEnt);
    };
    let ghost = news.ghost_of(row).filter(|_| news.is_announcer(tid)).ok_or(Errno::NoEnt)?;
    tree.ghost_attr(node, ghost.owner)
}

/// The announcer removes a directory. It never removes what there is.
pub(super) fn remove_dir(tree: &Tree, parent: Node, name: &OsStr) -> Result<(), Errno> {
    let id = SandboxId::from_bytes(name.as_bytes()).map_err(|_| Errno::NoEnt)?;
    if parent == Node::Root && tree.news().lay(&id) { Ok(()) } else { Err(Errno::NoEnt) }
}
