//! What there is in the tree, and the numbers of its inodes.
//!
//! An inode number is a row times 64 plus a file's own number, so it is as stable as
//! the row and is never used again.

use crate::sandbox::RowId;

/// Inode numbers per row: more than a sandbox will ever have files.
const INODES_PER_ROW: u64 = 64;
/// The number of a sandbox's `net` within its row.
const NET_DIR: u64 = 13;
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
    /// The directory of a sandbox's network.
    NetDir(RowId),
    /// A sandbox's file, in either of its directories.
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
    /// `dozed.metrics`
    Metrics,
    /// `dozed.error`
    Error,
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
    Address,
    Mac,
    Namespace,
    Nameservers,
    Denied,
    Allowed,
    Counters,
}

impl DaemonFile {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 5] = [Self::Status, Self::List, Self::Events, Self::Metrics, Self::Error];

    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Status => "dozed.status",
            Self::List => "dozed.list",
            Self::Events => "dozed.events",
            Self::Metrics => "dozed.metrics",
            Self::Error => "dozed.error",
        }
    }

    /// The number within row 0; 0 and 1 are not for files. These never change.
    fn number(self) -> u64 {
        match self {
            Self::Status => 2,
            Self::List => 3,
            Self::Events => 4,
            Self::Metrics => 5,
            Self::Error => 6,
        }
    }
}

impl File {
    /// All in the directory of a sandbox, in the order in which they are listed.
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

    /// All in the directory of its network, in the order in which they are listed.
    pub const NET: [Self; 7] = [
        Self::Address,
        Self::Mac,
        Self::Namespace,
        Self::Nameservers,
        Self::Denied,
        Self::Allowed,
        Self::Counters,
    ];

    /// Returns all of them.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(Self::NET)
    }

    /// Returns its path below the directory of its sandbox.
    #[must_use]
    pub fn path(self) -> String {
        let dir = if Self::NET.contains(&self) { "net/" } else { "" };
        format!("{dir}{}", self.name())
    }

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
            Self::Address => "address",
            Self::Mac => "mac",
            Self::Namespace => "namespace",
            Self::Nameservers => "nameservers",
            Self::Denied => "denied",
            Self::Allowed => "allowed",
            Self::Counters => "counters",
        }
    }

    /// Returns its permissions: what is written by the group, by the owner, or read only.
    #[must_use]
    pub fn mode(self) -> u16 {
        match self {
            Self::State | Self::Awake | Self::Activity | Self::IdleAfter | Self::Console => 0o660,
            // What deletes, or says what a guest is and reaches, is the owner's.
            Self::DeleteAfter
            | Self::Pinned
            | Self::Config
            | Self::Nameservers
            | Self::Denied
            | Self::Allowed => 0o640,
            Self::Status
            | Self::Error
            | Self::Idle
            | Self::Events
            | Self::Address
            | Self::Mac
            | Self::Namespace
            | Self::Counters => 0o440,
        }
    }

    /// The number within the row; 0 and 13 are the directories. These never change.
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
            Self::Address => 14,
            Self::Mac => 15,
            Self::Namespace => 16,
            Self::Nameservers => 17,
            Self::Denied => 18,
            Self::Allowed => 19,
            Self::Counters => 20,
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
            Self::NetDir(row) => row.0 * INODES_PER_ROW + NET_DIR,
            Self::File(row, file) => row.0 * INODES_PER_ROW + file.number(),
        }
    }

    /// Returns the row and the number within it that the inode number is made of.
    pub(super) fn row_and_number(self) -> (RowId, u64) {
        let inode = self.inode();
        (RowId(inode / INODES_PER_ROW), inode % INODES_PER_ROW)
    }

    /// Returns the inode number of a row and a number within it.
    pub(super) fn inode_at(row: RowId, number: u64) -> Option<u64> {
        let first = row.0.checked_mul(INODES_PER_ROW)?;
        (number < INODES_PER_ROW).then(|| first.checked_add(number)).flatten()
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
        match number {
            0 => return Some(Self::Dir(RowId(row))),
            NET_DIR => return Some(Self::NetDir(RowId(row))),
            _ => {}
        }
        let mut files = File::every();
        files.find(|file| file.number() == number).map(|file| Self::File(RowId(row), file))
    }

    /// Says whether it is a directory.
    #[must_use]
    pub fn is_dir(self) -> bool {
        matches!(self, Self::Root | Self::Dir(_) | Self::NetDir(_))
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
            nodes.extend([Node::Dir(row), Node::NetDir(row)]);
            nodes.extend(File::every().map(|file| Node::File(row, file)));
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
