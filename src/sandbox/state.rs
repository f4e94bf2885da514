//! The lifecycle of a sandbox, as one table.
//!
//! ```text
//!            Boot            Booted
//!  stopped ───────▶ booting ───────▶ running ◀──────────────┐
//!     ▲ ▲              │             │  ▲  │ Sleep          │ Woken
//!     │ └──────────────┘             │  │  ▼                │
//!     │    Undo, Lost           Lost │  snapshotting      restoring
//!     ├──────────────────────────────┘  Undo │ Slept      ▲   │ Undo
//!     │  Lost                                ▼       Wake │   ▼
//!     └───────────────────────────────────  snapshotted ──┘◀──┘
//!
//!  every state ── Delete ──▶ deleting
//! ```

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

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A boot begins.
    Boot,
    /// The boot is done and vCPUs run.
    Booted,
    /// Putting it to sleep begins.
    Sleep,
    /// The snapshot is committed and the VMM is gone.
    Slept,
    /// Waking it begins.
    Wake,
    /// vCPUs run again.
    Woken,
    /// What was under way is taken back.
    Undo,
    /// The guest ended, or its VMM died.
    Lost,
    /// Removing it begins.
    Delete,
}

/// A step that does not exist from a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox that is {from} cannot {step}")]
pub struct Refused {
    /// The state that it is in.
    pub from: State,
    /// What was asked of it.
    pub step: Step,
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

    /// Returns the state that `step` leads to.
    ///
    /// # Errors
    /// `Refused` for every pair that is not in the table.
    pub fn after(self, step: Step) -> Result<Self, Refused> {
        match (self, step) {
            (Self::Stopped, Step::Boot) => Ok(Self::Booting),
            (Self::Booting, Step::Booted) => Ok(Self::Running),
            (Self::Running, Step::Sleep) => Ok(Self::Snapshotting),
            (Self::Snapshotting, Step::Slept) => Ok(Self::Snapshotted),
            (Self::Snapshotted, Step::Wake) => Ok(Self::Restoring),
            (Self::Restoring, Step::Woken) => Ok(Self::Running),
            (Self::Booting, Step::Undo) => Ok(Self::Stopped),
            (Self::Snapshotting, Step::Undo) => Ok(Self::Running),
            (Self::Restoring, Step::Undo) => Ok(Self::Snapshotted),
            (Self::Booting | Self::Running | Self::Snapshotting | Self::Restoring, Step::Lost) => {
                Ok(Self::Stopped)
            }
            (
                Self::Stopped
                | Self::Booting
                | Self::Running
                | Self::Snapshotting
                | Self::Snapshotted
                | Self::Restoring,
                Step::Delete,
            ) => Ok(Self::Deleting),
            (from, step) => Err(Refused { from, step }),
        }
    }

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

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Booted => "finish a boot",
            Self::Sleep => "be put to sleep",
            Self::Slept => "finish going to sleep",
            Self::Wake => "wake",
            Self::Woken => "finish waking",
            Self::Undo => "go back",
            Self::Lost => "lose its VMM",
            Self::Delete => "be deleted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 9] = [
        Step::Boot,
        Step::Booted,
        Step::Sleep,
        Step::Slept,
        Step::Wake,
        Step::Woken,
        Step::Undo,
        Step::Lost,
        Step::Delete,
    ];

    /// The table once more, written by hand as the contract tells it.
    fn expected(state: State) -> Vec<(Step, State)> {
        let mut steps = match state {
            State::Stopped => vec![(Step::Boot, State::Booting)],
            State::Booting => vec![
                (Step::Booted, State::Running),
                (Step::Undo, State::Stopped),
                (Step::Lost, State::Stopped),
            ],
            State::Running => {
                vec![(Step::Sleep, State::Snapshotting), (Step::Lost, State::Stopped)]
            }
            State::Snapshotting => vec![
                (Step::Slept, State::Snapshotted),
                (Step::Undo, State::Running),
                (Step::Lost, State::Stopped),
            ],
            State::Snapshotted => vec![(Step::Wake, State::Restoring)],
            State::Restoring => vec![
                (Step::Woken, State::Running),
                (Step::Undo, State::Snapshotted),
                (Step::Lost, State::Stopped),
            ],
            State::Deleting => vec![],
        };
        if state != State::Deleting {
            steps.push((Step::Delete, State::Deleting));
        }
        steps
    }

    #[test]
    fn every_pair_of_state_and_step_is_as_the_contract_says() {
        for state in State::ALL {
            for step in STEPS {
                let want = expected(state)
                    .into_iter()
                    .find_map(|(known, to)| (known == step).then_some(to))
                    .ok_or(Refused { from: state, step });
                assert_eq!(state.after(step), want, "{state} {step}");
            }
        }
    }

    #[test]
    fn words_read_back() {
        for state in State::ALL {
            assert_eq!(State::from_word(state.word()), Some(state));
        }
        assert_eq!(State::from_word("asleep"), None);
    }
}
