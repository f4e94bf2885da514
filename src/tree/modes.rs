//! Permissions that somebody changed with `chmod`.

use std::collections::HashMap;

use super::Node;
use crate::{
    lifecycle::{Index, IndexError},
    sandbox::RowId,
    sync::{Mutex, lock},
};

/// What the keys of the index begin with; the inode number follows.
const KEY: &str = "mode:";

/// The changed permissions, in memory and in the index.
#[derive(Debug)]
pub(super) struct Modes {
    /// By inode number. A leaf lock.
    changed: Mutex<HashMap<u64, u16>>,
}

impl Modes {
    /// Reads them from the index, and drops those of rows that are gone.
    pub(super) fn load(index: &Index) -> Result<Self, IndexError> {
        let mut changed = HashMap::new();
        for (key, value) in index.metas(KEY)? {
            let inode = key.strip_prefix(KEY).and_then(|inode| inode.parse().ok());
            let mode = u16::from_str_radix(&value, 8).ok();
            let (Some(inode), Some(mode)) = (inode, mode) else {
                continue;
            };
            let exists = match Node::from_inode(inode) {
                Some(Node::Root | Node::Daemon(_)) => true,
                Some(Node::Dir(row) | Node::NetDir(row) | Node::File(row, _)) => {
                    index.by_row(row).is_some()
                }
                None => false,
            };
            if exists {
                changed.insert(inode, mode);
            } else {
                index.remove_meta(&key)?;
            }
        }
        Ok(Self { changed: Mutex::new(changed) })
    }

    pub(super) fn get(&self, node: Node) -> Option<u16> {
        lock(&self.changed).get(&node.inode()).copied()
    }

    pub(super) fn set(&self, index: &Index, node: Node, mode: u16) -> Result<(), IndexError> {
        index.set_meta(&format!("{KEY}{}", node.inode()), &format!("{mode:o}"))?;
        lock(&self.changed).insert(node.inode(), mode);
        Ok(())
    }

    /// Forgets those of a sandbox that is gone. Its inodes are never used again, so
    /// what the index keeps of it until the next start does no harm.
    pub(super) fn forget(&self, row: RowId) {
        lock(&self.changed).retain(|inode, _| match Node::from_inode(*inode) {
            Some(Node::Dir(other) | Node::NetDir(other) | Node::File(other, _)) => other != row,
            Some(Node::Root | Node::Daemon(_)) | None => true,
        });
    }
}
