//! Processes, identified by pidfds.
//!
//! A started process has a pidfd from the start. A process of an earlier daemon is adopted: its
//! pidfd is opened first and then verified. All signals go through pidfds, so a reused pid is never
//! signalled.
//!
//! Every wait has a limit.

mod device;
mod exit;
mod fixed_fd;
mod launch;
mod proc_files;
mod watch;

use std::{
    collections::HashSet,
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    sandbox::ProcessIdentity,
    sync::{Arc, Mutex, lock},
    sys::{
        cancel::Victim,
        clock::{self, Deadline},
        files::FileId,
    },
};

pub use device::OwnDevices;
pub use exit::Exit;
pub use fixed_fd::{FixedFd, reserve_fixed_fds};
pub use launch::{Launch, Privileges, Program, User, forbid_core_files};
pub(super) use proc_files::is_gone;
pub use proc_files::{Frames, Io};
pub use watch::ExitWatch;

/// What `fstatfs` says of a pidfd where the kernel has pidfs, from Linux 6.9 on. Older kernels have
/// one inode for all pidfds.
const PIDFS_MAGIC: u64 = 0x5049_4446;

/// A VMM process, started or adopted.
///
/// # Locking
/// `ending` is a leaf: nothing else is locked while it is.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
    /// Whether it is a child, to be reaped.
    ours: bool,
    /// Its exit status, once known. The lock is held while the kernel is asked, so that a child is
    /// reaped once.
    ending: Mutex<Option<Exit>>,
}

impl Victim for Process {
    fn kill(&self) {
        Process::kill(self);
    }
}

impl Process {
    fn hold_child(pid: u32) -> io::Result<Arc<Self>> {
        let pidfd = pidfd_open(pid_of(pid)?, PidfdFlags::empty())?;
        let identity = identify(pid, pidfd.as_fd())?;
        Ok(Self::hold(identity, pidfd, true))
    }

    fn hold(identity: ProcessIdentity, pidfd: OwnedFd, ours: bool) -> Arc<Self> {
        Arc::new(Self { identity, pidfd, ours, ending: Mutex::new(None) })
    }

    /// Adopts the process with this `identity`. Returns `None` if it is gone, also if its pid was
    /// reused. `token` is its name, which is checked on kernels without pidfs.
    pub fn adopt(identity: &ProcessIdentity, token: &str) -> io::Result<Option<Arc<Self>>> {
        let Some((seen, pidfd)) = open(identity.pid)? else {
            return Ok(None);
        };
        let same = seen.boot_id == identity.boot_id
            && match (identity.pidfs_inode, seen.pidfs_inode) {
                (Some(known), Some(inode)) => known == inode,
                (None, _) | (_, None) => {
                    seen.start_ticks == identity.start_ticks
                        && proc_files::names(seen.pid)?.iter().any(|name| name == token)
                }
            };
        // Files in /proc belong to the process only if it still exists now.
        Ok((same && !has_ended(pidfd.as_fd())?).then(|| Self::hold(seen, pidfd, false)))
    }

    /// Finds all other processes that match `search`, with their names.
    pub fn find(search: &Search<'_>) -> io::Result<Vec<(Arc<Self>, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if pid == std::process::id() || !search.is_candidate(pid)? {
                continue;
            }
            let Some((identity, pidfd)) = open(pid)? else {
                continue;
            };
            let names = match proc_files::names(pid) {
                Ok(names) => names,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::TimedOut | io::ErrorKind::PermissionDenied
                    ) =>
                {
                    tracing::warn!(pid, %error, "the name of a process could not be read");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let name = names.into_iter().find(|name| name.starts_with(search.prefix));
            // Before the open, the pid may have belonged to another process.
            if let Some(name) = name
                && search.is_candidate(pid)?
                && !has_ended(pidfd.as_fd())?
            {
                found.push((Self::hold(identity, pidfd, false), name));
            }
        }
        Ok(found)
    }

    /// Returns whether it has one of these files open.
    pub fn has_open(&self, files: &HashSet<FileId>) -> io::Result<bool> {
        self.unless_ended(proc_files::has_open(self.identity.pid, files))
    }

    /// Returns its unique identity.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Sends SIGKILL, if it still exists.
    pub fn kill(&self) {
        // The only possible error is that the process is gone.
        let _gone = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Sends SIGSTOP, if it still exists.
    pub fn stop(&self) {
        let _gone = pidfd_send_signal(&self.pidfd, Signal::STOP);
    }

    /// Sends SIGCONT, if it still exists.
    pub fn go_on(&self) {
        let _gone = pidfd_send_signal(&self.pidfd, Signal::CONT);
    }

    /// Returns its exit status, or `None` while it runs. Never blocks.
    pub fn exited(&self) -> Option<Exit> {
        let mut ending = lock(&self.ending);
        if ending.is_none() {
            *ending = if self.ours {
                exit::reap(self.pidfd.as_fd())
            } else if has_ended(self.pidfd.as_fd()).unwrap_or(false) {
                Some(exit::of_stranger(self.pidfd.as_fd(), &self.identity))
            } else {
                None
            };
        }
        *ending
    }

    /// Waits for its exit, for at most `limit`; `None` if it still runs.
    pub fn wait(&self, limit: Duration) -> Option<Exit> {
        let deadline = Deadline::after(limit);
        loop {
            let left = deadline.left();
            // A poll fails permanently, or because of a signal.
            let _ready = poll_pidfd(self.pidfd.as_fd(), left);
            let exit = self.exited();
            if exit.is_some() || left.is_zero() {
                return exit;
            }
        }
    }

    /// Returns the CPU time of all its threads, in ticks of 10 ms.
    ///
    /// # Errors
    /// `NotFound` once it has ended.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        Ok(self.unless_ended(proc_files::stat(self.identity.pid))?.cpu_time)
    }

    /// Returns the bytes that its threads have read and written.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn io(&self) -> io::Result<Io> {
        self.unless_ended(proc_files::io(self.identity.pid))
    }

    /// The same for threads whose names begin with `prefix`.
    pub fn io_of_threads(&self, prefix: &str) -> io::Result<Io> {
        self.unless_ended(proc_files::io_of_threads(self.identity.pid, prefix))
    }

    /// Returns the traffic of a device in its network namespace; `None` if it does not exist.
    pub fn frames(&self, device: &str) -> io::Result<Option<Frames>> {
        self.unless_ended(proc_files::frames(self.identity.pid, device))
    }

    /// Returns its user id.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn user(&self) -> io::Result<u32> {
        self.unless_ended(proc_files::user(self.identity.pid))
    }

    /// Returns the bytes of its memfds.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn memfd_bytes(&self) -> io::Result<u64> {
        self.unless_ended(proc_files::memfd_bytes(self.identity.pid))
    }

    /// Accepts a value from /proc if the process still exists; otherwise the pid may have been
    /// reused.
    fn unless_ended<T>(&self, seen: io::Result<T>) -> io::Result<T> {
        if has_ended(self.pidfd.as_fd())? {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended"));
        }
        seen
    }
}

/// The criteria of a search.
///
/// Reading the program or the arguments of a process can block. So its user, which the kernel
/// always tells at once, is checked first.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    /// The name of the program's file contains one of these.
    pub programs: &'a [String],
    /// Returns whether it may run as this user.
    pub is_user: &'a dyn Fn(u32) -> bool,
    /// The prefix of its name, see [`Process::find`].
    pub prefix: &'a str,
}

impl Search<'_> {
    fn is_candidate(&self, pid: u32) -> io::Result<bool> {
        let is_one = |name: String| self.programs.iter().any(|part| name.contains(part.as_str()));
        // In this order: only what is read of its user never waits for the process.
        let seen = proc_files::user(pid)
            .and_then(|uid| Ok((self.is_user)(uid) && is_one(proc_files::program(pid)?)));
        match seen {
            // A process that is gone or unreadable is skipped.
            Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                tracing::warn!(pid, %error, "a process does not let its program be read");
                Ok(false)
            }
            seen => seen,
        }
    }
}

impl fmt::Debug for Search<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Search").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl AsFd for Process {
    /// Returns its pidfd, which is readable after its exit.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Otherwise a child would remain a zombie.
        let _exit = self.exited();
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.identity.pid)
    }
}

/// Opens the process that has the pid now; `None` if there is none.
fn open(pid: u32) -> io::Result<Option<(ProcessIdentity, OwnedFd)>> {
    let pidfd = match pidfd_open(pid_of(pid)?, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        // The last two mean that it is a thread id, depending on the kernel.
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match identify(pid, pidfd.as_fd()) {
        Ok(identity) => Ok(Some((identity, pidfd))),
        Err(error) if proc_files::is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn identify(pid: u32, pidfd: BorrowedFd<'_>) -> io::Result<ProcessIdentity> {
    Ok(ProcessIdentity {
        pid,
        boot_id: clock::boot_id()?.into(),
        pidfs_inode: pidfs_inode(pidfd)?,
        start_ticks: proc_files::stat(pid)?.start_ticks,
    })
}

fn pidfs_inode(pidfd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    if u64::try_from(rustix::fs::fstatfs(pidfd)?.f_type) != Ok(PIDFS_MAGIC) {
        return Ok(None);
    }
    Ok(Some(rustix::fs::fstat(pidfd)?.st_ino))
}

fn pid_of(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process id"))
}

/// Returns whether the process has exited, reaped or not.
fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    poll_pidfd(pidfd, Duration::ZERO)
}

fn poll_pidfd(pidfd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(limit).ok();
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(poll(&mut fds, timeout.as_ref())? > 0)
}

#[cfg(test)]
mod tests;
