//! Why an operation on a sandbox failed.

use std::{io, path::PathBuf};

use crate::{
    activity::HoldError,
    index::{self, Entry},
    machines, net,
    sandbox::{Refused, SandboxId, State, Users, network::AddressPlan},
    snapshot, vmm,
};

/// Why an operation failed. The caller is told which errno by `tree::errno`.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `lifecycle::Error` wherever it is used")]
pub enum Error {
    /// The sandbox was deleted, or is just being.
    #[error("{id} was deleted")]
    Gone {
        /// The sandbox.
        id: SandboxId,
    },
    /// Another operation has the sandbox's lock and the caller does not wait.
    #[error("another operation on {id} is under way")]
    Locked {
        /// The sandbox.
        id: SandboxId,
    },
    /// There is a sandbox of that name.
    #[error("{id} exists")]
    Exists {
        /// The sandbox.
        id: SandboxId,
    },
    /// The step does not exist from the state that it is in.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It is pinned.
    #[error("{id} is pinned; write 0 to its file `pinned` before deleting it")]
    Pinned {
        /// The sandbox.
        id: SandboxId,
    },
    /// A hold prevents it, or it cannot be held.
    #[error(transparent)]
    Hold(HoldError),
    /// Hardware changes only while stopped.
    #[error("the hardware of {id} cannot change while it is {state}, only while it is stopped")]
    NotStopped {
        /// The sandbox.
        id: SandboxId,
        /// Where it is.
        state: State,
    },
    /// Only what runs can be typed at.
    #[error("{id} is {state}; wake it first")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it is.
        state: State,
    },
    /// Who wrote `config` cannot open a file that it names.
    #[error(
        "the user who wrote the `config` of {id} (uid {uid}, gid {gid}) cannot open {}, which it \
         names; grant access, or have a user with access write it again",
        .path.display()
    )]
    NotWriters {
        /// The sandbox.
        id: SandboxId,
        /// The file.
        path: PathBuf,
        /// The user who wrote it.
        uid: u32,
        /// And their group.
        gid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// A file that `config` names cannot be opened.
    #[error("{}, which the `config` of {id} names, cannot be opened", .path.display())]
    Unopened {
        /// The sandbox.
        id: SandboxId,
        /// The file.
        path: PathBuf,
        /// What the system said; `InvalidInput` where it is not a file that a machine can use.
        source: io::Error,
    },
    /// It was given to another owner since a file of it was opened.
    #[error("{id} was given to another owner since this file was opened; open it again")]
    ChangedHands {
        /// The sandbox.
        id: SandboxId,
    },
    /// Nothing to boot.
    #[error("{id} has no kernel; set `kernel` in its file `config`, or in [template]")]
    NoKernel {
        /// The sandbox.
        id: SandboxId,
    },
    /// A file that its config names is of a kind that no machine boots with.
    #[error("{id} cannot boot: {why}")]
    Unbootable {
        /// The sandbox.
        id: SandboxId,
        /// Which file, and how to mend it.
        why: String,
    },
    /// There was activity since the caller looked.
    #[error("{id} was active since: its count is {count} now")]
    Active {
        /// The sandbox.
        id: SandboxId,
        /// What the count is now.
        count: u64,
    },
    /// There are as many sandboxes as there may be.
    #[error("there are {limit} sandboxes, which is the limit ([limits] sandboxes)")]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// All user ids are given.
    #[error(
        "there is no user id for {id}: other sandboxes have all of {users} ([vmm] users); delete \
         some, or widen it"
    )]
    NoUser {
        /// The sandbox.
        id: SandboxId,
        /// All that there are.
        users: Users,
    },
    /// All addresses are given.
    #[error(
        "there is no address for {id}: other sandboxes have all of {range} ([network] range); \
         delete some, or widen it"
    )]
    NoAddress {
        /// The sandbox.
        id: SandboxId,
        /// All that there are.
        range: AddressPlan,
    },
    /// The firewall would never let through what is to be allowed.
    #[error("`{network}` cannot be allowed: {why}")]
    NotAllowed {
        /// What is to be allowed.
        network: String,
        /// What it is, as a clause.
        why: String,
    },
    /// The network failed.
    #[error("{doing} {id}")]
    Network {
        /// Such as `making the network of`.
        doing: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// What went wrong.
        source: net::Error,
    },
    /// The daemon is about to end.
    #[error("dozed is shutting down")]
    ShuttingDown,
    /// The snapshot was made by something else than what would load it.
    #[error("the snapshot of {id} does not fit this host: {why}")]
    Foreign {
        /// The sandbox.
        id: SandboxId,
        /// What differs, and what to do.
        why: String,
    },
    /// The files of the sandbox say more than its record.
    #[error(
        "the index does not match the files of {id}: {why}; nothing was changed; restore the \
         index (index.db and index.db-wal) that was last in use, or delete the sandbox"
    )]
    Unrecorded {
        /// The sandbox.
        id: SandboxId,
        /// What its files show.
        why: String,
    },
    /// What runs the guest is not what would have to wake it.
    #[error("{id} was not put to sleep, because nothing on this host could wake it: {why}")]
    Unwakeable {
        /// The sandbox.
        id: SandboxId,
        /// What differs, and what to do.
        why: String,
    },
    /// A wake failed so late that its snapshot may be used up.
    #[error("the guest of {id} may have run, so it cannot be woken from its snapshot again")]
    MayHaveRun {
        /// The sandbox.
        id: SandboxId,
    },
    /// A VMM did not say whether the guest runs that it was told to let run.
    #[error(
        "the VMM of {id} did not say whether its guest runs; nothing was undone, and it is asked \
         again"
    )]
    Unanswered {
        /// The sandbox.
        id: SandboxId,
        /// What the driver says.
        source: vmm::Error,
    },
    /// The VMM did not do its part.
    #[error("{doing} {id}")]
    Vmm {
        /// Such as `pausing`.
        doing: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// What the driver says.
        source: vmm::Error,
    },
    /// The snapshot's directory did not do its part.
    #[error("{doing} {id}")]
    Snapshot {
        /// Such as `committing the snapshot of`.
        doing: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// What is wrong with it.
        source: snapshot::Error,
    },
    /// Something of the host failed.
    #[error("{doing} {id}")]
    Host {
        /// Such as `copying a disk of`.
        doing: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// What the system said.
        source: io::Error,
    },
    /// A VMM cannot be had, started or ended.
    #[error(transparent)]
    Machine(machines::Error),
    /// The index failed.
    #[error("recording the state of {id}")]
    Index {
        /// The sandbox.
        id: SandboxId,
        /// What it says.
        source: index::Error,
    },
    /// An operation failed, and taking it back failed too.
    #[error("undoing it failed too ({failures})")]
    Undo {
        /// What failed while undoing, in the order tried.
        failures: String,
        /// What failed first.
        source: Box<Error>,
    },
    /// A bug of ours.
    #[error("an operation on {id} panicked, which is a bug in dozed; the log has the details")]
    Panicked {
        /// The sandbox.
        id: SandboxId,
    },
}

/// What a failure of a VMM, a file or a directory comes down to, for whoever answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk is full.
    NoSpace,
    /// The owner's quota of the disk is used up.
    Quota,
    /// A bounded wait ran out.
    TimedOut,
    /// Whoever it was done as may not.
    Denied,
    /// The operation was called off, which only deleting does.
    CalledOff,
    /// Anything else.
    Other,
}

impl From<machines::Error> for Error {
    fn from(error: machines::Error) -> Self {
        if let machines::Error::CalledOff { id } = error {
            Self::Gone { id }
        } else {
            Self::Machine(error)
        }
    }
}

impl From<HoldError> for Error {
    fn from(error: HoldError) -> Self {
        if let HoldError::Gone { id } = error { Self::Gone { id } } else { Self::Hold(error) }
    }
}

impl Error {
    /// Returns what an error of the host's, a VMM's or a snapshot's comes down to.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Vmm { source, .. } | Self::Unanswered { source, .. } => match source {
                vmm::Error::Host { source, .. } => fault_of_io(source),
                vmm::Error::TimedOut { .. } => Fault::TimedOut,
                vmm::Error::Cancelled { .. } => Fault::CalledOff,
                vmm::Error::Missing { .. }
                | vmm::Error::Refused { .. }
                | vmm::Error::Nonsense { .. }
                | vmm::Error::Died { .. } => Fault::Other,
            },
            Self::Snapshot { source, .. } => match source {
                snapshot::Error::NoSpace { .. } => Fault::NoSpace,
                snapshot::Error::CalledOff(_) => Fault::CalledOff,
                snapshot::Error::Io { source, .. } => fault_of_io(source),
                snapshot::Error::Absent { .. }
                | snapshot::Error::Damaged { .. }
                | snapshot::Error::Foreign { .. }
                | snapshot::Error::Newer { .. }
                | snapshot::Error::Ambiguous { .. }
                | snapshot::Error::Incomplete { .. } => Fault::Other,
            },
            Self::NotWriters { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Fault::Denied
            }
            Self::Host { source, .. }
            | Self::NotWriters { source, .. }
            | Self::Unopened { source, .. } => fault_of_io(source),
            Self::Network { source, .. } => match source {
                net::Error::Host { source, .. } => fault_of_io(source),
                net::Error::Lacking { .. }
                | net::Error::NotOurs { .. }
                | net::Error::RangeInUse { .. }
                | net::Error::NotThere
                | net::Error::NoDevice
                | net::Error::Several(_) => Fault::Other,
            },
            Self::Undo { source, .. } => source.fault(),
            Self::Machine(source) if source.is_timeout() => Fault::TimedOut,
            Self::Machine(_)
            | Self::Gone { .. }
            | Self::Locked { .. }
            | Self::Exists { .. }
            | Self::Refused(_)
            | Self::Pinned { .. }
            | Self::Hold(_)
            | Self::NotStopped { .. }
            | Self::NotRunning { .. }
            | Self::NoKernel { .. }
            | Self::Unbootable { .. }
            | Self::ChangedHands { .. }
            | Self::Active { .. }
            | Self::TooMany { .. }
            | Self::NoUser { .. }
            | Self::NoAddress { .. }
            | Self::NotAllowed { .. }
            | Self::ShuttingDown
            | Self::MayHaveRun { .. }
            | Self::Unwakeable { .. }
            | Self::Unrecorded { .. }
            | Self::Foreign { .. }
            | Self::Index { .. }
            | Self::Panicked { .. } => Fault::Other,
        }
    }
}

pub(super) fn vmm_failed(
    entry: &Entry,
    doing: &'static str,
) -> impl Fn(vmm::Error) -> Error + Copy {
    move |source| Error::Vmm { doing, id: entry.id().clone(), source }
}

pub(super) fn snapshot_failed(
    entry: &Entry,
    doing: &'static str,
) -> impl Fn(snapshot::Error) -> Error + Copy {
    move |source| Error::Snapshot { doing, id: entry.id().clone(), source }
}

pub(super) fn host_failed(
    entry: &Entry,
    doing: &'static str,
) -> impl Fn(io::Error) -> Error + Copy {
    move |source| Error::Host { doing, id: entry.id().clone(), source }
}

pub(super) fn net_failed(
    entry: &Entry,
    doing: &'static str,
) -> impl Fn(net::Error) -> Error + Copy {
    move |source| Error::Network { doing, id: entry.id().clone(), source }
}

/// Of all that a system can say, only a full disk is something that a caller can tell
/// from the rest and do something about.
fn fault_of_io(error: &io::Error) -> Fault {
    if error.kind() == io::ErrorKind::StorageFull {
        Fault::NoSpace
    } else if error.kind() == io::ErrorKind::QuotaExceeded {
        Fault::Quota
    } else if error.kind() == io::ErrorKind::TimedOut {
        Fault::TimedOut
    } else {
        Fault::Other
    }
}
