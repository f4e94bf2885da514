//! The states of a sandbox, as words. What exists in each, and which step leads where, is in
//! `phase`.

use std::fmt;

/// A state of the lifecycle. `state` reads as one of these seven words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Defined, never booted, shut down by its guest, or lost with its host.
    Stopped,
    /// The first boot is under way.
    Booting,
    /// Its vCPUs run.
    Running,
    /// It is being put to sleep.
    Snapshotting,
    /// It sleeps: memory and devices are on disk, nothing is in RAM.
    Snapshotted,
    /// It is being woken.
    Restoring,
    /// It is being removed.
    Deleting,
}

impl State {
    /// All of them, in the order of the contract's table.
    pub const ALL: [Self; 7] = [
        Self::Stopped,
        Self::Booting,
        Self::Running,
        Self::Snapshotting,
        Self::Snapshotted,
        Self::Restoring,
        Self::Deleting,
    ];

    /// Returns the word that `state` reads as.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Snapshotting => "snapshotting",
            Self::Snapshotted => "snapshotted",
            Self::Restoring => "restoring",
            Self::Deleting => "deleting",
        }
    }

    /// Returns the state whose word is `word`.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for state in State::ALL {
            assert_eq!(State::from_word(state.word()), Some(state));
        }
        assert_eq!(State::from_word("asleep"), None);
    }
}
