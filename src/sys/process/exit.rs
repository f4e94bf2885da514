//! Exit statuses: from `waitid`, an ioctl on the pidfd, or `/proc` of a zombie.

use std::{
    fmt,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::proc_files;
use crate::sandbox::ProcessIdentity;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not our child, and the kernel does not tell.
    Unknown,
}

impl Exit {
    /// Reads a status as `wait(2)` encodes it.
    fn from_wait_status(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Code((status >> 8) & 0xff),
            signal => Self::Signal(signal),
        }
    }

    /// Returns whether it was killed by SIGBUS, for a page of a mapped file.
    #[must_use]
    pub fn is_bus_error(self) -> bool {
        self == Self::Signal(libc::SIGBUS)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Unknown => f.write_str("for an unknown reason"),
        }
    }
}

/// Reaps our own child, if it has ended.
pub(super) fn reap(pidfd: BorrowedFd<'_>) -> Option<Exit> {
    match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(None) => None,
        Ok(Some(status)) => Some(
            status
                .exit_status()
                .map(Exit::Code)
                .or_else(|| status.terminating_signal().map(Exit::Signal))
                .unwrap_or(Exit::Unknown),
        ),
        // Somebody reaped it before us, as where SIGCHLD is ignored.
        Err(_) => Some(Exit::Unknown),
    }
}

/// Reads the exit status of a process that is not a child.
pub(super) fn of_stranger(pidfd: BorrowedFd<'_>, identity: &ProcessIdentity) -> Exit {
    // Its parent reaps it at any moment. Before that only /proc tells, after it only
    // the pidfd, so the pidfd is asked once more at the end.
    from_pidfd(pidfd)
        .or_else(|| from_zombie(identity))
        .or_else(|| from_pidfd(pidfd))
        .unwrap_or(Exit::Unknown)
}

fn from_zombie(identity: &ProcessIdentity) -> Option<Exit> {
    let stat = proc_files::stat(identity.pid).ok()?;
    (stat.is_zombie && stat.start_ticks == identity.start_ticks)
        .then(|| Exit::from_wait_status(stat.exit_status))
}

/// `struct pidfd_info` of `linux/pidfd.h`, as of its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_status: i32,
}

/// The bit of `mask` that asks for, and then tells of, `exit_status`; from Linux 6.15 on.
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `_IOWR(0xFF, 11, struct pidfd_info)`.
const PIDFD_GET_INFO: libc::c_ulong =
    (3 << 30) | ((size_of::<PidfdInfo>() as libc::c_ulong) << 16) | (0xff << 8) | 11;

fn from_pidfd(pidfd: BorrowedFd<'_>) -> Option<Exit> {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the descriptor is open for the time of the call, and the request's number
    // has in it the size of what `info` points to, so the kernel writes no further.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (done == 0 && info.mask & PIDFD_INFO_EXIT != 0)
        .then(|| Exit::from_wait_status(info.exit_status))
}
