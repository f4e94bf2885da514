//! Which errno answers which failure: the one table.
//!
//! `docs/SEMANTICS.md` has it for users. Where two would do, the doubt is explained here.

use std::io::ErrorKind;

use super::BadCommand;
use crate::{
    activity::HoldError,
    lifecycle::{self, Fault},
};

/// The errnos that the tree answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "errno(3) documents them")]
pub enum Errno {
    Perm,
    NoEnt,
    Intr,
    Io,
    TooBig,
    Again,
    NoMem,
    Acces,
    Busy,
    Exist,
    NoDev,
    NotDir,
    IsDir,
    Inval,
    NoSpc,
    NameTooLong,
    TimedOut,
    Dquot,
    Shutdown,
}

impl Errno {
    /// Returns the number that the kernel knows it by.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Perm => libc::EPERM,
            Self::NoEnt => libc::ENOENT,
            Self::Intr => libc::EINTR,
            Self::Io => libc::EIO,
            Self::TooBig => libc::E2BIG,
            Self::Again => libc::EAGAIN,
            Self::NoMem => libc::ENOMEM,
            Self::Acces => libc::EACCES,
            Self::Busy => libc::EBUSY,
            Self::Exist => libc::EEXIST,
            Self::NoDev => libc::ENODEV,
            Self::NotDir => libc::ENOTDIR,
            Self::IsDir => libc::EISDIR,
            Self::Inval => libc::EINVAL,
            Self::NoSpc => libc::ENOSPC,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::TimedOut => libc::ETIMEDOUT,
            Self::Dquot => libc::EDQUOT,
            Self::Shutdown => libc::ESHUTDOWN,
        }
    }
}

impl Errno {
    /// Returns the word that people know it by.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Perm => "EPERM",
            Self::NoEnt => "ENOENT",
            Self::Intr => "EINTR",
            Self::Io => "EIO",
            Self::TooBig => "E2BIG",
            Self::Again => "EAGAIN",
            Self::NoMem => "ENOMEM",
            Self::Acces => "EACCES",
            Self::Busy => "EBUSY",
            Self::Exist => "EEXIST",
            Self::NoDev => "ENODEV",
            Self::NotDir => "ENOTDIR",
            Self::IsDir => "EISDIR",
            Self::Inval => "EINVAL",
            Self::NoSpc => "ENOSPC",
            Self::NameTooLong => "ENAMETOOLONG",
            Self::TimedOut => "ETIMEDOUT",
            Self::Dquot => "EDQUOT",
            Self::Shutdown => "ESHUTDOWN",
        }
    }
}

/// Returns the errno that answers what is no command and no document.
#[must_use]
pub(super) fn of_command(bad: &BadCommand) -> Errno {
    match bad {
        BadCommand::TooLong { .. } => Errno::TooBig,
        BadCommand::TooManyDrafts { .. } => Errno::Dquot,
        BadCommand::Killed { .. } => Errno::Intr,
        BadCommand::Unseen { .. } => Errno::Io,
        BadCommand::NotText
        | BadCommand::UnknownVerb { .. }
        | BadCommand::BadCount { .. }
        | BadCommand::TwoCommands
        | BadCommand::Hole { .. }
        | BadCommand::NotASwitch { .. }
        | BadCommand::Period(_)
        | BadCommand::List(_) => Errno::Inval,
    }
}

/// Returns the errno that answers a failed operation.
#[must_use]
pub(super) fn of(error: &lifecycle::Error) -> Errno {
    use lifecycle::{Error as E, MachineError as M};
    match error {
        E::Gone { .. } | E::Machine(M::CalledOff { .. }) | E::Hold(HoldError::Gone { .. }) => {
            Errno::NoDev
        }
        E::Locked { .. } | E::Active { .. } => Errno::Again,
        E::Exists { .. } => Errno::Exist,
        E::Pinned { .. } => Errno::Perm,
        E::ChangedHands { .. } => Errno::Acces,
        E::NotStopped { .. } | E::Machine(M::NoSlot { .. }) | E::Hold(HoldError::Held { .. }) => {
            Errno::Busy
        }
        E::Machine(M::NoMemory { .. }) => Errno::NoMem,
        E::TooMany { .. }
        | E::Hold(HoldError::TooMany { .. })
        | E::NoUser { .. }
        | E::NoAddress { .. } => Errno::Dquot,
        // A sandbox without a kernel cannot be woken until its config changes: the
        // verb makes no sense in this state.
        E::Unopened { source, .. } if source.kind() == ErrorKind::InvalidInput => Errno::Inval,
        E::Refused(_)
        | E::NoKernel { .. }
        | E::Unbootable { .. }
        | E::NotRunning { .. }
        | E::NotAllowed { .. } => Errno::Inval,
        E::ShuttingDown => Errno::Shutdown,
        E::Machine(M::NoVmm { .. })
        | E::Foreign { .. }
        | E::MayHaveRun { .. }
        | E::Unwakeable { .. }
        | E::Unrecorded { .. }
        | E::Index { .. }
        | E::Panicked { .. } => Errno::Io,
        E::Vmm { .. }
        | E::Unanswered { .. }
        | E::Network { .. }
        | E::Snapshot { .. }
        | E::Host { .. }
        | E::NotWriters { .. }
        | E::Unopened { .. }
        | E::Machine(M::KillTimeout { .. })
        | E::Undo { .. } => match error.fault() {
            Fault::NoSpace => Errno::NoSpc,
            Fault::Quota => Errno::Dquot,
            Fault::TimedOut => Errno::TimedOut,
            Fault::Denied => Errno::Acces,
            Fault::CalledOff => Errno::NoDev,
            Fault::Other => Errno::Io,
        },
    }
}
