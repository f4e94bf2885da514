//! File locks.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::regular::open_image;
use crate::sys::clock::{Deadline, pause_for};

/// How long a child of a dead holder may keep the file, between its fork and exec.
const LEFTOVER_MAX: Duration = Duration::from_secs(10);
/// The interval of retries.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A lock on a file, until it is dropped or the process exits. It does not survive an exec.
#[derive(Debug)]
pub struct LockFile {
    _file: File,
}

/// Takes the lock on the file `path`, which is created if necessary, and writes the process id into
/// it, for error messages of others. `None`: another process has it.
///
/// A process that was killed while it started a program leaves the lock to the child until its
/// exec; this waits for that.
pub fn lock_file(path: &Path) -> io::Result<Option<LockFile>> {
    lock_within(path, LEFTOVER_MAX)
}

fn lock_within(path: &Path, leftover_max: Duration) -> io::Result<Option<LockFile>> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let deadline = Deadline::after(leftover_max);
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
        if !lock_holder(path).is_some_and(is_gone) || deadline.passed() {
            return Ok(None);
        }
        pause_for(LOOK_EVERY);
    }
    // Only for a message, so errors are ignored.
    drop(file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())));
    Ok(Some(LockFile { _file: file }))
}

/// Returns the process id that the holder of the lock wrote into `path`.
#[must_use]
pub fn lock_holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A shared lock on some bytes of a file, until dropped. It is an open file description lock: a
/// process's lock would end when that process closes any descriptor of the file.
#[derive(Debug)]
pub struct SharedLock {
    file: File,
    bytes: Range<libc::off_t>,
}

impl SharedLock {
    /// Takes the lock, without blocking.
    pub fn take(path: &Path, bytes: Range<libc::off_t>) -> io::Result<Self> {
        let taken = Self { file: File::open(path)?, bytes };
        taken.set(libc::F_RDLCK)?;
        Ok(taken)
    }

    /// Releases the lock, and keeps the file open.
    pub fn unlock(&self) -> io::Result<()> {
        self.set(libc::F_UNLCK)
    }

    fn set(&self, kind: libc::c_int) -> io::Result<()> {
        let lock = part(kind, self.bytes.start, self.bytes.end - self.bytes.start);
        // SAFETY: the descriptor is open and ours, and the kernel reads one struct of this type,
        // which outlives the call.
        let done =
            unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Returns a lock on `length` bytes, or up to the end if that is zero.
fn part(kind: libc::c_int, start: libc::off_t, length: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn short(number: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(number).expect("the kernel's numbers for locks are small")
}

/// Says whether a VMM that has the image `path`, or a part of it, locked (`fcntl(2)`, open file
/// description locks) keeps another from writing it.
pub fn is_image_locked(path: &Path) -> io::Result<bool> {
    let image = open_image(path)?;
    // To the end, wherever that is.
    let mut lock = part(libc::F_WRLCK, 0, 0);
    // SAFETY: the descriptor is open and ours, and the kernel reads and writes one struct
    // of this type, which outlives the call.
    let done = unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type != short(libc::F_UNLCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Locks a part of a file as a VMM does.
    fn lock_part(file: &File, kind: libc::c_int) {
        let lock = part(kind, 100, 1);
        // SAFETY: the descriptor is open, and the struct outlives the call.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        assert_eq!(done, 0);
    }

    #[test]
    fn an_image_is_locked_for_as_long_as_somebody_has_a_part_of_it() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("disk");
        let locked = || is_image_locked(&path).unwrap();
        let file = File::create_new(&path).unwrap();
        assert!(!locked());
        lock_part(&file, libc::F_WRLCK);
        assert!(locked());
        drop(file);
        assert!(!locked());
        let reader = File::open(&path).unwrap();
        lock_part(&reader, libc::F_RDLCK);
        assert!(locked());
        assert!(is_image_locked(&temp.path().join("none")).is_err());
    }

    #[test]
    fn a_shared_lock_outlasts_another_descriptor_of_the_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        drop(File::create_new(&path).unwrap());
        let held = SharedLock::take(&path, 100..101).unwrap();
        drop(File::open(&path).unwrap());
        assert!(is_image_locked(&path).unwrap());
        SharedLock::take(&path, 100..101).unwrap();
        held.unlock().unwrap();
        assert!(!is_image_locked(&path).unwrap());
    }

    #[test]
    fn a_lock_is_refused_until_its_holder_lets_go() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = lock_file(&path).unwrap().unwrap();
        assert!(lock_file(&path).unwrap().is_none());
        assert_eq!(lock_holder(&path), Some(std::process::id()));
        drop(held);
        assert!(lock_file(&path).unwrap().is_some());
    }

    /// A lock that says that it is of a process which is no more.
    fn left_over(path: &Path) -> LockFile {
        let held = lock_file(path).unwrap().unwrap();
        // No system has as many.
        fs::write(path, format!("{}\n", i32::MAX)).unwrap();
        held
    }

    #[test]
    fn a_lock_that_only_a_child_of_its_holder_has_is_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = left_over(&path);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lock_within(&path, Duration::from_secs(600)).unwrap());
            pause_for(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drop(held);
            assert!(waiting.join().unwrap().is_some());
        });
        assert_eq!(lock_holder(&path), Some(std::process::id()));
    }

    #[test]
    fn a_lock_that_a_child_of_its_holder_does_not_let_go_of_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = left_over(&path);
        assert!(lock_within(&path, Duration::from_millis(20)).unwrap().is_none());
        drop(held);
    }
}
