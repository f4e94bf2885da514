//! What there is in the tree, and the numbers of its inodes.
//!
//! An inode number is a row times 64 plus a file's own number, so it is as stable as
//! the row and is never used again.

use crate::sandbox::RowId;

/// Inode numbers per row: more than a sandbox will ever have files.
const INODES_PER_ROW: u64 = 64;
/// The kernel's number for the root (`FUSE_ROOT_ID`).
const ROOT: u64 = 1;

/// A place in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mount point.
    Root,
    /// A file of the daemon's.
    Daemon(DaemonFile),
    /// A sandbox's directory.
    Dir(RowId),
    /// A sandbox's file.
    File(RowId, File),
}

/// The files in the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DaemonFile {
    /// `dozed.status`
    Status,
    /// `dozed.list`
    List,
    /// `dozed.events`
    Events,
}

/// The files of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the contract documents them by these names")]
pub enum File {
    State,
    Status,
    Error,
    Config,
    Awake,
    Activity,
    Idle,
    IdleAfter,
    DeleteAfter,
    Pinned,
    Events,
    Console,
}

impl DaemonFile {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 3] = [Self::Status, Self::List, Self::Events];

    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Status => "dozed.status",
            Self::List => "dozed.list",
            Self::Events => "dozed.events",
        }
    }

    /// The number within row 0; 0 and 1 are not for files. These never change.
    fn number(self) -> u64 {
        match self {
            Self::Status => 2,
            Self::List => 3,
            Self::Events => 4,
        }
    }
}

impl File {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 12] = [
        Self::State,
        Self::Status,
        Self::Error,
        Self::Config,
        Self::Awake,
        Self::Activity,
        Self::Idle,
        Self::IdleAfter,
        Self::DeleteAfter,
        Self::Pinned,
        Self::Events,
        Self::Console,
    ];

    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Status => "status",
            Self::Error => "error",
            Self::Config => "config",
            Self::Awake => "awake",
            Self::Activity => "activity",
            Self::Idle => "idle",
            Self::IdleAfter => "idle_after",
            Self::DeleteAfter => "delete_after",
            Self::Pinned => "pinned",
            Self::Events => "events",
            Self::Console => "console",
        }
    }

    /// Returns its permissions: what is written by the group, by the owner, or read only.
    #[must_use]
    pub fn mode(self) -> u16 {
        match self {
            Self::State
            | Self::Awake
            | Self::Activity
            | Self::IdleAfter
            | Self::DeleteAfter
            | Self::Pinned
            | Self::Console => 0o660,
            Self::Config => 0o640,
            Self::Status | Self::Error | Self::Idle | Self::Events => 0o440,
        }
    }

    /// The number within the row; 0 is the directory. These never change.
    fn number(self) -> u64 {
        match self {
            Self::State => 1,
            Self::Status => 2,
            Self::Error => 3,
            Self::Config => 4,
            Self::Activity => 5,
            Self::Idle => 6,
            Self::IdleAfter => 7,
            Self::DeleteAfter => 8,
            Self::Pinned => 9,
            Self::Console => 10,
            Self::Awake => 11,
            Self::Events => 12,
        }
    }
}

impl Node {
    /// Returns the inode number.
    #[must_use]
    pub fn inode(self) -> u64 {
        match self {
            Self::Root => ROOT,
            Self::Daemon(file) => file.number(),
            Self::Dir(row) => row.0 * INODES_PER_ROW,
            Self::File(row, file) => row.0 * INODES_PER_ROW + file.number(),
        }
    }

    /// Returns the place that has this inode number, whether or not it exists.
    #[must_use]
    pub fn from_inode(inode: u64) -> Option<Self> {
        let (row, number) = (inode / INODES_PER_ROW, inode % INODES_PER_ROW);
        if row == 0 {
            return if number == ROOT {
                Some(Self::Root)
            } else {
                let mut files = DaemonFile::ALL.into_iter();
                files.find(|file| file.number() == number).map(Self::Daemon)
            };
        }
        if number == 0 {
            return Some(Self::Dir(RowId(row)));
        }
        let mut files = File::ALL.into_iter();
        files.find(|file| file.number() == number).map(|file| Self::File(RowId(row), file))
    }

    /// Says whether it is a directory.
    #[must_use]
    pub fn is_dir(self) -> bool {
        matches!(self, Self::Root | Self::Dir(_))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_node_has_an_inode_of_its_own_that_leads_back_to_it() {
        let mut nodes = vec![Node::Root];
        nodes.extend(DaemonFile::ALL.map(Node::Daemon));
        for row in [RowId(1), RowId(2), RowId(1 << 40)] {
            nodes.push(Node::Dir(row));
            nodes.extend(File::ALL.map(|file| Node::File(row, file)));
        }
        let inodes: HashSet<u64> = nodes.iter().map(|node| node.inode()).collect();
        assert_eq!(inodes.len(), nodes.len());
        for node in nodes {
            assert_eq!(Node::from_inode(node.inode()), Some(node));
        }
        assert_eq!(Node::from_inode(0), None);
        assert_eq!(Node::from_inode(63), None);
        assert_eq!(Node::from_inode(127), None);
    }
}
