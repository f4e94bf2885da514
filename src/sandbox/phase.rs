//! Where a sandbox is in its lifecycle, with what exists only there, and the one table of
//! transitions.
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

use super::{State, Timestamp};

/// A state, with what exists only in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Defined, never booted, shut down by its guest, or lost with its host.
    Stopped,
    /// The first boot is under way.
    Booting {
        /// The VMM's process, from just before its first instruction.
        process: Option<ProcessIdentity>,
    },
    /// Its vCPUs run.
    Running {
        /// The VMM's process.
        process: ProcessIdentity,
    },
    /// It is being put to sleep.
    Snapshotting {
        /// The VMM's process.
        process: ProcessIdentity,
    },
    /// It sleeps.
    Snapshotted {
        /// The snapshot that it sleeps on.
        snapshot: SnapshotFacts,
    },
    /// It is being woken.
    Restoring {
        /// The snapshot that it is woken from.
        snapshot: SnapshotFacts,
        /// The VMM's process, from just before its first instruction.
        process: Option<ProcessIdentity>,
    },
    /// It is being removed, with what it had before.
    Deleting {
        /// The VMM's process.
        process: Option<ProcessIdentity>,
        /// The snapshot.
        snapshot: Option<SnapshotFacts>,
    },
}

/// What tells one process from every other that has had its number.
///
/// Where the kernel has pidfs (Linux 6.9), the inode of a pidfd is unique for the
/// time of a boot; otherwise the start time in clock ticks, which two processes may
/// share, has to do, together with executable and command line.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessIdentity {
    /// The process id in the daemon's pid namespace.
    pub pid: u32,
    /// `/proc/sys/kernel/random/boot_id` of the boot that it was started in.
    pub boot_id: Box<str>,
    /// The inode of its pidfd, where the kernel has pidfs.
    pub pidfs_inode: Option<u64>,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub start_ticks: u64,
}

/// What the index remembers of the snapshot that a sandbox sleeps on. Its manifest
/// is the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotFacts {
    /// The number that its directory is named by.
    pub generation: u64,
    /// The bytes that it takes on disk.
    pub bytes: u64,
    /// When it was committed.
    pub at: Timestamp,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A boot begins.
    Boot,
    /// The boot is done and vCPUs run, in this process.
    Booted(ProcessIdentity),
    /// Putting it to sleep begins.
    Sleep,
    /// This snapshot is committed and the VMM is gone.
    Slept(SnapshotFacts),
    /// Waking it begins.
    Wake,
    /// vCPUs run again, in this process.
    Woken(ProcessIdentity),
    /// What was under way is undone.
    Undo,
    /// The guest ended, or its VMM died.
    Lost,
    /// Removing it begins.
    Delete,
}

/// A step that does not exist from a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox that is {from} cannot {step}")]
pub struct Refused {
    /// The state that it is in.
    pub from: State,
    /// What was asked of it.
    pub step: Step,
}

/// A state that does not go with the process and the snapshot beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is {state} and has {} and {}",
    if *.has_process { "a process" } else { "no process" },
    if *.has_snapshot { "a snapshot" } else { "no snapshot" }
)]
pub struct Mismatched {
    state: State,
    has_process: bool,
    has_snapshot: bool,
}

impl Phase {
    /// Puts a phase together from a state and what was stored beside it.
    ///
    /// # Errors
    /// `Mismatched` where something is missing, or exists that cannot exist in this state.
    pub fn of(
        state: State,
        process: Option<ProcessIdentity>,
        snapshot: Option<SnapshotFacts>,
    ) -> Result<Self, Mismatched> {
        match (state, process, snapshot) {
            (State::Stopped, None, None) => Ok(Self::Stopped),
            (State::Booting, process, None) => Ok(Self::Booting { process }),
            (State::Running, Some(process), None) => Ok(Self::Running { process }),
            (State::Snapshotting, Some(process), None) => Ok(Self::Snapshotting { process }),
            (State::Snapshotted, None, Some(snapshot)) => Ok(Self::Snapshotted { snapshot }),
            (State::Restoring, process, Some(snapshot)) => {
                Ok(Self::Restoring { snapshot, process })
            }
            (State::Deleting, process, snapshot) => Ok(Self::Deleting { process, snapshot }),
            (state, process, snapshot) => Err(Mismatched {
                state,
                has_process: process.is_some(),
                has_snapshot: snapshot.is_some(),
            }),
        }
    }

    /// Returns the state.
    #[must_use]
    pub fn state(&self) -> State {
        match self {
            Self::Stopped => State::Stopped,
            Self::Booting { .. } => State::Booting,
            Self::Running { .. } => State::Running,
            Self::Snapshotting { .. } => State::Snapshotting,
            Self::Snapshotted { .. } => State::Snapshotted,
            Self::Restoring { .. } => State::Restoring,
            Self::Deleting { .. } => State::Deleting,
        }
    }

    /// Returns the VMM's process, from just before its first instruction to its end.
    #[must_use]
    pub fn process(&self) -> Option<&ProcessIdentity> {
        match self {
            Self::Running { process } | Self::Snapshotting { process } => Some(process),
            Self::Booting { process }
            | Self::Restoring { process, .. }
            | Self::Deleting { process, .. } => process.as_ref(),
            Self::Stopped | Self::Snapshotted { .. } => None,
        }
    }

    /// Returns the snapshot that it sleeps on or is being woken from.
    #[must_use]
    pub fn snapshot(&self) -> Option<SnapshotFacts> {
        match self {
            Self::Snapshotted { snapshot } | Self::Restoring { snapshot, .. } => Some(*snapshot),
            Self::Deleting { snapshot, .. } => *snapshot,
            Self::Stopped
            | Self::Booting { .. }
            | Self::Running { .. }
            | Self::Snapshotting { .. } => None,
        }
    }

    /// Notes the process of a VMM that was started to boot or wake the sandbox.
    ///
    /// # Panics
    /// In every other state.
    pub fn set_process(&mut self, started: ProcessIdentity) {
        match self {
            Self::Booting { process } | Self::Restoring { process, .. } => *process = Some(started),
            Self::Stopped
            | Self::Running { .. }
            | Self::Snapshotting { .. }
            | Self::Snapshotted { .. }
            | Self::Deleting { .. } => panic!("no VMM is started for one that is {}", self.state()),
        }
    }

    /// Returns the phase that `step` leads to.
    ///
    /// # Errors
    /// `Refused` for every pair that is not in the table.
    pub fn after(&self, step: &Step) -> Result<Self, Refused> {
        match (self.clone(), step.clone()) {
            (Self::Stopped, Step::Boot) => Ok(Self::Booting { process: None }),
            (Self::Booting { .. }, Step::Booted(process)) => Ok(Self::Running { process }),
            (Self::Running { process }, Step::Sleep) => Ok(Self::Snapshotting { process }),
            (Self::Snapshotting { .. }, Step::Slept(snapshot)) => {
                Ok(Self::Snapshotted { snapshot })
            }
            (Self::Snapshotted { snapshot }, Step::Wake) => {
                Ok(Self::Restoring { snapshot, process: None })
            }
            (Self::Restoring { .. }, Step::Woken(process)) => Ok(Self::Running { process }),
            (Self::Booting { .. }, Step::Undo) => Ok(Self::Stopped),
            (Self::Snapshotting { process }, Step::Undo) => Ok(Self::Running { process }),
            (Self::Restoring { snapshot, .. }, Step::Undo) => Ok(Self::Snapshotted { snapshot }),
            (
                Self::Booting { .. }
                | Self::Running { .. }
                | Self::Snapshotting { .. }
                | Self::Restoring { .. },
                Step::Lost,
            ) => Ok(Self::Stopped),
            (
                from @ (Self::Stopped
                | Self::Booting { .. }
                | Self::Running { .. }
                | Self::Snapshotting { .. }
                | Self::Snapshotted { .. }
                | Self::Restoring { .. }),
                Step::Delete,
            ) => Ok(Self::Deleting { process: from.process().cloned(), snapshot: from.snapshot() }),
            (from, step) => Err(Refused { from: from.state(), step }),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Booted(_) => "finish a boot",
            Self::Sleep => "be put to sleep",
            Self::Slept(_) => "finish going to sleep",
            Self::Wake => "wake",
            Self::Woken(_) => "finish waking",
            Self::Undo => "go back",
            Self::Lost => "lose its VMM",
            Self::Delete => "be deleted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: SnapshotFacts =
        SnapshotFacts { generation: 1, bytes: 0, at: Timestamp::from_millis(1) };
    const NEW: SnapshotFacts =
        SnapshotFacts { generation: 2, bytes: 0, at: Timestamp::from_millis(2) };

    fn process(pid: u32) -> ProcessIdentity {
        ProcessIdentity { pid, boot_id: "boot".into(), pidfs_inode: None, start_ticks: 0 }
    }

    fn steps() -> [Step; 9] {
        [
            Step::Boot,
            Step::Booted(process(2)),
            Step::Sleep,
            Step::Slept(NEW),
            Step::Wake,
            Step::Woken(process(2)),
            Step::Undo,
            Step::Lost,
            Step::Delete,
        ]
    }

    fn phases() -> [Phase; 10] {
        let known = process(1);
        [
            Phase::Stopped,
            Phase::Booting { process: None },
            Phase::Booting { process: Some(known.clone()) },
            Phase::Running { process: known.clone() },
            Phase::Snapshotting { process: known.clone() },
            Phase::Snapshotted { snapshot: OLD },
            Phase::Restoring { snapshot: OLD, process: None },
            Phase::Restoring { snapshot: OLD, process: Some(known.clone()) },
            Phase::Deleting { process: None, snapshot: None },
            Phase::Deleting { process: Some(known), snapshot: Some(OLD) },
        ]
    }

    /// The table once more, written by hand as the contract tells it.
    fn expected(phase: &Phase) -> Vec<(Step, Phase)> {
        let [old, new] = [1, 2].map(process);
        let mut steps = match phase.state() {
            State::Stopped => vec![(Step::Boot, Phase::Booting { process: None })],
            State::Booting => vec![
                (Step::Booted(new.clone()), Phase::Running { process: new }),
                (Step::Undo, Phase::Stopped),
                (Step::Lost, Phase::Stopped),
            ],
            State::Running => vec![
                (Step::Sleep, Phase::Snapshotting { process: old }),
                (Step::Lost, Phase::Stopped),
            ],
            State::Snapshotting => vec![
                (Step::Slept(NEW), Phase::Snapshotted { snapshot: NEW }),
                (Step::Undo, Phase::Running { process: old }),
                (Step::Lost, Phase::Stopped),
            ],
            State::Snapshotted => {
                vec![(Step::Wake, Phase::Restoring { snapshot: OLD, process: None })]
            }
            State::Restoring => vec![
                (Step::Woken(new.clone()), Phase::Running { process: new }),
                (Step::Undo, Phase::Snapshotted { snapshot: OLD }),
                (Step::Lost, Phase::Stopped),
            ],
            State::Deleting => vec![],
        };
        if phase.state() != State::Deleting {
            let (process, snapshot) = (phase.process().cloned(), phase.snapshot());
            steps.push((Step::Delete, Phase::Deleting { process, snapshot }));
        }
        steps
    }

    #[test]
    fn every_pair_of_phase_and_step_is_as_the_contract_says() {
        for phase in phases() {
            for step in steps() {
                let want = expected(&phase)
                    .into_iter()
                    .find_map(|(known, to)| (known == step).then_some(to))
                    .ok_or(Refused { from: phase.state(), step: step.clone() });
                assert_eq!(phase.after(&step), want, "{phase:?} {step}");
            }
        }
    }

    #[test]
    fn a_phase_is_put_together_from_its_parts_and_from_nothing_else() {
        for state in State::ALL {
            for process in [None, Some(process(1))] {
                for snapshot in [None, Some(OLD)] {
                    let known = phases().into_iter().find(|phase| {
                        (phase.state(), phase.process(), phase.snapshot())
                            == (state, process.as_ref(), snapshot)
                    });
                    let both = [process.is_some(), snapshot.is_some()];
                    let is_possible = match state {
                        State::Stopped => both == [false, false],
                        State::Booting => !both[1],
                        State::Running | State::Snapshotting => both == [true, false],
                        State::Snapshotted => both == [false, true],
                        State::Restoring => both[1],
                        State::Deleting => true,
                    };
                    let made = Phase::of(state, process.clone(), snapshot);
                    assert_eq!(made.is_ok(), is_possible, "{state} {both:?}");
                    if let Some(known) = known {
                        assert_eq!(made, Ok(known));
                    }
                }
            }
        }
        let error = Phase::of(State::Snapshotted, None, None).unwrap_err();
        assert_eq!(error.to_string(), "it is snapshotted and has no process and no snapshot");
    }
}
