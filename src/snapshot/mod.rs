//! What a sandbox is on disk while it lives, falls asleep and sleeps.
//!
//! ```text
//!  STORE/sandboxes/ROW/
//!    N.live/      memory                       the machine that was booted or woken at N
//!    M.partial/   memory vmstate               a sleep under way: memory moved, not copied
//!    M/           memory vmstate manifest      asleep: the truth about the guest
//!
//!           stage                   commit                 consume
//!  N.live ────────▶ M.partial ─────────────────▶ M ─────────────────────▶ M.live
//!    ▲    discard,      │        rename + fsync       rename + fsync
//!    └─── recover ──────┘      (its commit point)   (a wake's commit point)
//! ```
//!
//! The memory of a machine is a file that the VMM maps shared, so falling asleep moves
//! it by a rename and writes only what is still dirty. Or the VMM has it in its process
//! and writes it at each sleep; then a run has no memory, but for a while after a wake
//! the copy that it was woken from. Every directory has one meaning, told by its name
//! alone, so that after a crash a look at the names says how far it came.
//!
//! This room orders the steps on disk and proves that what is read is what was written.
//! It runs no VMM, knows no states, and never deletes a snapshot because it is damaged.
//! The format is described in `docs/snapshot-format.md`.

use std::{io, path::PathBuf};

use crate::sys::{cancel::CalledOff, files::PieceError};

mod committed;
mod digest;
mod home;
mod manifest;
mod reading;
mod staged;
#[cfg(test)]
mod tests;

pub use committed::Snapshot;
pub use home::{Home, Survey};
pub use manifest::{
    DiskFacts, FileFacts, HardwareFacts, HostFacts, Manifest, ManifestFacts, VmmFacts,
};
pub use staged::{CommitError, Committed, Staged};

/// Where the memory of a guest is that is awake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// In a file of its run, which its VMM maps.
    Mapped,
    /// In the process of its VMM. What is in a file is a copy.
    Copied,
}

/// What must be free before a sleep begins. The pages of a shared mapping have their
/// room on the disk from the moment that the guest first writes to them, so all that
/// a sleep adds is the devices' state, some hundred KiB, and a manifest.
pub const SLEEP_RESERVE_BYTES: u64 = 16 << 20;

/// The memory file, in whichever directory it is.
pub const MEMORY: &str = "memory";
/// The manifest, in a committed snapshot.
const MANIFEST: &str = "manifest";
/// The largest file beside the memory. Devices take less than a MiB; this leaves room for
/// a large framebuffer, and bounds what a wake reads before it starts a VMM.
const SMALL_FILE_MAX_BYTES: u64 = 64 << 20;

/// Why something with a snapshot did not work.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `snapshot::Error` wherever it is used")]
pub enum Error {
    /// The system refused something.
    #[error("{doing}")]
    Io {
        /// Such as `reading /var/lib/dozed/sandboxes/7`.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot at {}", .dir.display())]
    Absent {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// It is not as it was when it was committed.
    #[error("{} is damaged and was left as it is: {why}", .dir.display())]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It is a snapshot of something else.
    #[error("{} belongs to another sandbox and was left as it is: {why}", .dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Whose it is, and whose was looked for.
        why: String,
    },
    /// It was written by a later version of this program.
    #[error(
        "{} has format {found}, and this dozed reads up to {known}; use a newer dozed",
        .dir.display()
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// The format that it has.
        found: u32,
        /// The latest format that we know.
        known: u32,
    },
    /// There is more than one directory of a kind, and so no truth.
    #[error(
        "{} has {names}, of which only one can be valid; they were left as they are",
        .dir.display()
    )]
    Ambiguous {
        /// The sandbox's directory.
        dir: PathBuf,
        /// The names, such as `3.live and 5.live`.
        names: String,
    },
    /// What is to be committed is not a whole snapshot.
    #[error("{} is not a complete snapshot: {why}", .dir.display())]
    Incomplete {
        /// The directory.
        dir: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// The disk is too full.
    #[error("{needed} bytes are needed in {}, and {free} are free", .dir.display())]
    NoSpace {
        /// Where.
        dir: PathBuf,
        /// How many bytes must be free.
        needed: u64,
        /// How many are.
        free: u64,
    },
    /// The operation was called off.
    #[error(transparent)]
    CalledOff(#[from] CalledOff),
}

impl Error {
    /// Makes the function that turns what the system said while `doing` into an error.
    fn io(doing: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io { doing: doing(), source }
    }

    /// As [`Error::io`], for work in pieces.
    fn piece(doing: impl FnOnce() -> String) -> impl FnOnce(PieceError) -> Self {
        |error| match error {
            PieceError::CalledOff(called_off) => Self::CalledOff(called_off),
            PieceError::Io(source) => Self::Io { doing: doing(), source },
        }
    }
}
