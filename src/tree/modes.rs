//! Permissions that somebody changed with `chmod`.

use std::collections::BTreeMap;

use super::Node;
use crate::{
    lifecycle::{Index, IndexError, keys_of_row},
    sandbox::RowId,
    sync::{Mutex, lock},
};

/// What comes after the row in the keys of the index; the number within the row follows.
const KEY: &str = "mode:";
/// What all keys of rows begin with.
const ROW_KEY: &str = "row:";

/// The changed permissions, in memory and in the index, where they go with their row.
#[derive(Debug)]
pub(super) struct Modes {
    /// By inode number, so that those of a row are beside one another. A leaf lock.
    changed: Mutex<BTreeMap<u64, u16>>,
}

impl Modes {
    /// Reads them from the index, and drops those of rows that are gone.
    pub(super) fn load(index: &Index) -> Result<Self, IndexError> {
        let mut changed = BTreeMap::new();
        let mut stale = Vec::new();
        for (key, value) in index.metas(ROW_KEY)? {
            let Some(inode) = inode_of(&key) else { continue };
            let Ok(mode) = u16::from_str_radix(&value, 8) else { continue };
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
                stale.extend(row_of(&key).map(keys_of_row));
            }
        }
        index.remove_metas(&stale)?;
        Ok(Self { changed: Mutex::new(changed) })
    }

    pub(super) fn get(&self, node: Node) -> Option<u16> {
        lock(&self.changed).get(&node.inode()).copied()
    }

    pub(super) fn set(&self, index: &Index, node: Node, mode: u16) -> Result<(), IndexError> {
        index.set_meta(&key_of(node), &format!("{mode:o}"))?;
        lock(&self.changed).insert(node.inode(), mode);
        Ok(())
    }

    /// Forgets those of a sandbox that is gone, which the index has forgotten by then.
    pub(super) fn forget(&self, row: RowId) {
        let inodes = Node::Dir(row).inode()..Node::Dir(RowId(row.0 + 1)).inode();
        let mut changed = lock(&self.changed);
        let gone: Vec<u64> = changed.range(inodes).map(|(inode, _)| *inode).collect();
        for inode in gone {
            changed.remove(&inode);
        }
    }
}

fn key_of(node: Node) -> String {
    let (row, number) = node.row_and_number();
    format!("{}{KEY}{number}", keys_of_row(row))
}

fn row_of(key: &str) -> Option<RowId> {
    let (row, _) = key.strip_prefix(ROW_KEY)?.split_once(':')?;
    row.parse().ok().map(RowId)
}

fn inode_of(key: &str) -> Option<u64> {
    let (_, rest) = key.strip_prefix(ROW_KEY)?.split_once(':')?;
    Node::inode_at(row_of(key)?, rest.strip_prefix(KEY)?.parse().ok()?)
}
