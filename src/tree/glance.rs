//! Texts whose length is told before they are read.
//!
//! The kernel asks for attributes right before each open, and some ways of reading (splice,
//! sendfile, tar) go no further than the size that it was told. But some texts change while
//! nobody does anything: ages grow, packets are counted, guests write to their disks. So what
//! such a text is made of is kept when its length is told, and the read that follows uses it.
//!
//! Some of that waits for a disk or the kernel. It is taken by a job, never by a thread that
//! serves requests.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use super::{File, Node, Tree, view};
use crate::{
    lifecycle::{Counters, Entry, Error},
    sandbox::{State, Timestamp},
    sync::{Mutex, lock},
};

/// How long a read uses what its file was when its length was told. A program opens and reads
/// in less, also on a busy machine.
const GLANCE_LIFE: Duration = Duration::from_millis(1500);
/// How many are kept: of as many programs as may be between the two at a time. With more, the
/// length of some may be off by a digit.
const GLANCES_MAX: usize = 1024;

/// What the text of a file was made of, as far as it is not the record.
#[derive(Debug, Clone)]
pub(super) struct Glance {
    /// The moment that its ages are counted to.
    pub(super) at: Timestamp,
    pub(super) facts: SlowFacts,
}

/// What waits for a disk or for the kernel.
#[derive(Debug, Clone, Default)]
pub(super) enum SlowFacts {
    #[default]
    None,
    /// The bytes of the sandbox's disks, and of its snapshot in the page cache.
    Disks { disk_bytes: u64, cached_bytes: Option<u64> },
    /// What its firewall counted.
    Counters(Counters),
    /// Where its namespace is.
    Namespace(Option<PathBuf>),
}

impl Glance {
    /// One without anything that takes long.
    pub(super) fn quick(at: Timestamp) -> Self {
        Self { at, facts: SlowFacts::None }
    }
}

/// What was told of lengths lately.
#[derive(Debug, Default)]
pub(super) struct Glances {
    /// A leaf lock.
    table: Mutex<HashMap<Node, Glance>>,
}

impl Glances {
    pub(super) fn keep(&self, node: Node, glance: Glance) {
        let mut table = lock(&self.table);
        if table.len() >= GLANCES_MAX {
            table.retain(|_, kept| kept.at.after(GLANCE_LIFE) > glance.at);
        }
        if table.len() >= GLANCES_MAX {
            table.clear();
        }
        table.insert(node, glance);
    }

    /// Takes what the last length that was told is of, if that was just now.
    pub(super) fn take(&self, node: Node, now: Timestamp) -> Option<Glance> {
        let glance = lock(&self.table).remove(&node)?;
        (glance.at.after(GLANCE_LIFE) > now).then_some(glance)
    }

    fn peek(&self, node: Node) -> Option<Glance> {
        lock(&self.table).get(&node).cloned()
    }
}

impl Tree {
    /// Says whether a file's text changes by itself.
    pub(super) fn changes_by_itself(file: File) -> bool {
        matches!(file, File::Activity | File::Idle | File::Awake) || Self::is_slow(file)
    }

    /// Says whether a part of a file's text waits for a disk or the kernel.
    pub(super) fn is_slow(file: File) -> bool {
        matches!(file, File::Status | File::Counters | File::Namespace)
    }

    /// Looks at what a file's text is made of.
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub(super) fn glance(&self, entry: &Entry, file: File) -> Result<Glance, Error> {
        let record = entry.record();
        let facts = if file == File::Status {
            let home = self.lifecycle.store().home(&record);
            let cached_bytes = match record.snapshot() {
                Some(facts) if record.state() == State::Snapshotted => {
                    home.page_cache_bytes(facts.generation)
                }
                Some(_) | None => Some(0),
            };
            SlowFacts::Disks { disk_bytes: home.disk_bytes(&record.spec.disks), cached_bytes }
        } else if file == File::Counters {
            let counted = self.lifecycle.networks().counters(entry)?;
            SlowFacts::Counters(counted.unwrap_or_default())
        } else if file == File::Namespace {
            SlowFacts::Namespace(self.lifecycle.networks().namespace(&record))
        } else {
            SlowFacts::None
        };
        Ok(Glance { at: self.lifecycle.clock().now(), facts })
    }

    /// Returns the length of a file's text from memory: that which was told last, where it
    /// would take a look.
    pub(super) fn known_len(&self, entry: &Entry, file: File) -> u64 {
        let glance = Self::changes_by_itself(file)
            .then(|| self.glances.peek(Node::File(entry.row(), file)))
            .flatten();
        let glance = glance.unwrap_or_else(|| Glance::quick(self.lifecycle.clock().now()));
        self.text(entry, file, &glance).len() as u64
    }

    /// Looks at a file, and keeps what was seen for the read that follows.
    pub(super) fn told_len(&self, entry: &Entry, file: File) -> u64 {
        // Where the kernel does not tell, the read says so.
        let glance = self.glance(entry, file);
        let glance = glance.unwrap_or_else(|_| Glance::quick(self.lifecycle.clock().now()));
        let len = self.text(entry, file, &glance).len() as u64;
        if !matches!((file, &glance.facts), (File::Counters, SlowFacts::None)) {
            self.glances.keep(Node::File(entry.row(), file), glance);
        }
        len
    }
}

impl SlowFacts {
    pub(super) fn counters(&self) -> String {
        match self {
            Self::Counters(counted) => view::counters(counted),
            Self::None | Self::Disks { .. } | Self::Namespace(_) => String::new(),
        }
    }

    pub(super) fn namespace(&self) -> Option<&PathBuf> {
        match self {
            Self::Namespace(path) => path.as_ref(),
            Self::None | Self::Disks { .. } | Self::Counters(_) => None,
        }
    }

    pub(super) fn disks(&self) -> (u64, Option<u64>) {
        match self {
            Self::Disks { disk_bytes, cached_bytes } => (*disk_bytes, *cached_bytes),
            Self::None | Self::Counters(_) | Self::Namespace(_) => (0, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::RowId;

    #[test]
    fn what_was_told_is_used_once_and_only_for_a_while_and_is_bounded() {
        let glances = Glances::default();
        let node = |row| Node::File(RowId(row), File::Activity);
        let at = Timestamp::from_millis(10_000);
        glances.keep(node(1), Glance::quick(at));
        assert_eq!(glances.take(node(1), at).map(|glance| glance.at), Some(at));
        assert!(glances.take(node(1), at).is_none());
        glances.keep(node(1), Glance::quick(at));
        assert!(glances.take(node(1), at.after(GLANCE_LIFE)).is_none());
        for row in 0..3 * GLANCES_MAX as u64 {
            glances.keep(node(row), Glance::quick(at));
        }
        assert!(lock(&glances.table).len() <= GLANCES_MAX);
    }
}
