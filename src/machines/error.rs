//! Why a VMM cannot be had, started or ended.

use std::time::Duration;

use crate::sandbox::SandboxId;

/// Why a VMM cannot be had, started or ended.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `machines::Error` outside this room")]
pub enum Error {
    /// Too many operations of that kind for too long.
    #[error(
        "no slot to {what} {id} within {} s ([limits] {}s)",
        .limit.as_secs(), if *.what == "sleep" { "sleep" } else { "wake" }
    )]
    NoSlot {
        /// Such as `wake`.
        what: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// How long we waited.
        limit: Duration,
    },
    /// The memory budget is used up.
    #[error(
        "waking {id} takes {needed_mib} MiB, and the budget ([limits] memory) has {left_mib} MiB \
         left"
    )]
    NoMemory {
        /// The sandbox.
        id: SandboxId,
        /// The memory of its machine.
        needed_mib: u64,
        /// What is left of the budget.
        left_mib: u64,
    },
    /// A wait was cancelled, because the sandbox is being deleted.
    #[error("{id} was deleted")]
    CalledOff {
        /// The sandbox.
        id: SandboxId,
    },
    /// No VMM of the kind that `config` asks for.
    #[error("{id} cannot run here: {why}")]
    NoVmm {
        /// The sandbox.
        id: SandboxId,
        /// What is missing.
        why: String,
    },
    /// A killed VMM did not exit.
    #[error("the VMM of {id} was killed but still exists after {} s", .limit.as_secs())]
    KillTimeout {
        /// The sandbox.
        id: SandboxId,
        /// How long we waited.
        limit: Duration,
    },
}

impl Error {
    /// Says whether a bounded wait for a VMM ran out.
    pub(crate) fn is_timeout(&self) -> bool {
        match self {
            Self::KillTimeout { .. } => true,
            Self::NoSlot { .. }
            | Self::NoMemory { .. }
            | Self::CalledOff { .. }
            | Self::NoVmm { .. } => false,
        }
    }
}
