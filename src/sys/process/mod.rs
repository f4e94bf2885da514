//! Processes, held by pidfd.
//!
//! A process that we start is held by its pidfd from birth, and one that an earlier
//! daemon started is adopted: its pidfd is opened first and then shown to be of the
//! process that was meant. Whatever is done to a process is done by its pidfd, so
//! that a number which was given to somebody else is never signalled.
//!
//! Nothing here knows what the processes do, and nothing here waits without a limit.

mod device;
mod exit;
mod launch;
mod place;
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
pub use launch::{Launch, Privileges, Program, User, forbid_core_files};
pub use place::{Place, reserve_places};
pub(super) use proc_files::is_gone;
pub use proc_files::{Frames, Io};
pub use watch::ExitWatch;

/// What `fstatfs` says of a pidfd where the kernel has pidfs, from Linux 6.9 on.
/// Before that all pidfds were of one anonymous inode.
const PIDFS_MAGIC: u64 = 0x5049_4446;

/// A process that is not our thread: a VMM, ours from birth or adopted.
///
/// # Locking
/// `ending` is a leaf: nothing else is locked while it is.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
    /// Whether we started it, and so have to reap it.
    ours: bool,
    /// How it ended, once we know. The lock is held while we ask the kernel, so that
    /// a child is reaped once and everybody hears the same.
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

    /// Takes over the process that an earlier daemon knew as `identity`. Returns `None`
    /// if it is gone, also if its number is another's now. `token` is its name, which is looked
    /// at where the kernel has no pidfs to tell them apart.
    ///
    /// # Errors
    /// Where the kernel does not let us look.
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
        // Only of a process that is still there can it be said that its files in /proc,
        // which go by number, were its own.
        Ok((same && !has_ended(pidfd.as_fd())?).then(|| Self::hold(seen, pidfd, false)))
    }

    /// Finds all processes but our own that are what `search` says, with their names.
    ///
    /// # Errors
    /// Where `/proc` cannot be read, or something of a process that may be one of them.
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
            // What was seen before the opening may have been another's of the same number.
            if let Some(name) = name
                && search.is_candidate(pid)?
                && !has_ended(pidfd.as_fd())?
            {
                found.push((Self::hold(identity, pidfd, false), name));
            }
        }
        Ok(found)
    }

    /// Says whether it has one of these files open.
    ///
    /// # Errors
    /// As [`Process::io`].
    pub fn has_open(&self, files: &HashSet<FileId>) -> io::Result<bool> {
        self.unless_ended(proc_files::has_open(self.identity.pid, files))
    }

    /// Returns what tells it from every other process.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Kills it with SIGKILL. It may be gone already.
    pub fn kill(&self) {
        // The only answer other than success that a SIGKILL of ours can get is that
        // there is no such process any more.
        let _gone = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Stops it with SIGSTOP, until [`Process::go_on`] or a kill. It may be gone already.
    pub fn stop(&self) {
        let _gone = pidfd_send_signal(&self.pidfd, Signal::STOP);
    }

    /// Has it go on with SIGCONT. It may be gone already.
    pub fn go_on(&self) {
        let _gone = pidfd_send_signal(&self.pidfd, Signal::CONT);
    }

    /// Returns how it ended, or `None` while it has not. Never blocks.
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

    /// Waits until it has ended, for at most `limit`; `None` if it is still there.
    pub fn wait(&self, limit: Duration) -> Option<Exit> {
        let deadline = Deadline::after(limit);
        loop {
            let left = deadline.left();
            // What goes wrong with a poll goes wrong again, or was a signal.
            let _ready = poll_pidfd(self.pidfd.as_fd(), left);
            let exit = self.exited();
            if exit.is_some() || left.is_zero() {
                return exit;
            }
        }
    }

    /// Returns how long it ran on CPUs, in user and in kernel mode, all threads
    /// together, in steps of the kernel's tick of 10 ms.
    ///
    /// # Errors
    /// `NotFound` once it has ended.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        Ok(self.unless_ended(proc_files::stat(self.identity.pid))?.cpu_time)
    }

    /// Returns what it has read and written, all threads together.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn io(&self) -> io::Result<Io> {
        self.unless_ended(proc_files::io(self.identity.pid))
    }

    /// Returns what those of its threads have read and written whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Process::io`].
    pub fn io_of_threads(&self, prefix: &str) -> io::Result<Io> {
        self.unless_ended(proc_files::io_of_threads(self.identity.pid, prefix))
    }

    /// Returns what went through a device of the network namespace that it is in; `None` where
    /// there is none of that name.
    ///
    /// # Errors
    /// As [`Process::io`].
    pub fn frames(&self, device: &str) -> io::Result<Option<Frames>> {
        self.unless_ended(proc_files::frames(self.identity.pid, device))
    }

    /// Returns the user that it acts as.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn user(&self) -> io::Result<u32> {
        self.unless_ended(proc_files::user(self.identity.pid))
    }

    /// Returns how much memory its files in memory (`memfd_create(2)`) take, in bytes.
    ///
    /// # Errors
    /// `NotFound` once it has ended; otherwise where the kernel does not let us look.
    pub fn memfd_bytes(&self) -> io::Result<u64> {
        self.unless_ended(proc_files::memfd_bytes(self.identity.pid))
    }

    /// Takes what was just seen of it in /proc for its own. Once it has ended that may have
    /// been another's of the same number.
    fn unless_ended<T>(&self, seen: io::Result<T>) -> io::Result<T> {
        if has_ended(self.pidfd.as_fd())? {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended"));
        }
        seen
    }
}

/// Which processes are looked for.
///
/// A process of somebody else may make the kernel wait when its memory is looked at, which has
/// its arguments. So whose it is and which program it runs is looked at first, and that is in
/// the kernel's own memory.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    /// The name of the program's file contains one of these.
    pub programs: &'a [String],
    /// Says whether it may run as this user.
    pub is_user: &'a dyn Fn(u32) -> bool,
    /// What the name that it was given begins with, see [`Process::find`].
    pub prefix: &'a str,
}

impl Search<'_> {
    fn is_candidate(&self, pid: u32) -> io::Result<bool> {
        let is_one = |name: String| self.programs.iter().any(|part| name.contains(part.as_str()));
        let seen = proc_files::program(pid)
            .and_then(|name| Ok(is_one(name) && (self.is_user)(proc_files::user(pid)?)));
        match seen {
            // A process that is gone meanwhile, or that we may not look at, is none.
            Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => {
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
    /// Returns its pidfd, which is readable once it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A child that nobody asked about would stay a zombie for as long as we live.
        let _exit = self.exited();
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.identity.pid)
    }
}

/// Opens whatever process has the number now; `None` if there is none.
fn open(pid: u32) -> io::Result<Option<(ProcessIdentity, OwnedFd)>> {
    let pidfd = match pidfd_open(pid_of(pid)?, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        // The last two say that the number is a thread's; which one depends on the kernel.
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

/// Says whether the process has ended, be it reaped or not.
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
