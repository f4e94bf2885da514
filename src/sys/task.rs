//! Facts from `/proc` about threads that make requests.

use std::{cmp::Ordering, ffi::CStr, fs, io, mem::MaybeUninit, time::Duration};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, StatxFlags, statx};

use super::{bounded, mount::Device, process::is_gone};
use crate::sandbox::text::is_plain;

/// Returns the supplementary groups of a thread with this user and group; none if it is invisible
/// or has changed its user.
///
/// Only jobs may call this: the kernel takes some 16 ms to list 65,536 groups.
#[must_use]
pub fn groups_of(tid: u32, uid: u32, gid: u32) -> Vec<u32> {
    let status = read_status(tid).unwrap_or_default();
    // Real, effective, saved, and file system id; requests have the last.
    let acts_as = |name, id| {
        let ids = field(&status, name).unwrap_or_default();
        ids.split_whitespace().nth(3).is_some_and(|acts_as| acts_as.parse() == Ok(id))
    };
    if !(acts_as("Uid:", uid) && acts_as("Gid:", gid)) {
        return Vec::new();
    }
    let groups = field(&status, "Groups:").unwrap_or_default();
    groups.split_whitespace().filter_map(|group| group.parse().ok()).collect()
}

/// Sets the name of this process. Call it on the first thread.
pub fn name_process(name: &CStr) {
    // The kernel truncates it.
    rustix::thread::set_name(name).ok();
}

/// Returns the process of a visible thread.
///
/// `status` has it too, but is as long as the thread has groups. The kernel lists the threads of a
/// process beginning with the one that the process is named by.
#[must_use]
pub fn process_of(tid: u32) -> Option<u32> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let threads = rustix::fs::open(format!("/proc/{tid}/task"), flags, Mode::empty()).ok()?;
    // Room for `.`, `..` and a few: the kernel lists no more threads than fit.
    let mut buffer = [MaybeUninit::uninit(); 128];
    let mut listed = RawDir::new(threads, &mut buffer);
    while let Some(thread) = listed.next() {
        if let Some(pid) = thread.ok()?.file_name().to_str().ok().and_then(|id| id.parse().ok()) {
            return Some(pid);
        }
    }
    None
}

/// Returns the name of a thread's program, escaped, because anybody can choose it.
#[must_use]
pub fn command_of(tid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{tid}/comm")).ok()?;
    let name = String::from_utf8_lossy(&name);
    let plain = |c: char| if is_plain(c) && !c.is_whitespace() { c } else { '_' };
    Some(name.trim_end_matches('\n').chars().map(plain).collect())
}

/// Signals that only notify. Shells handle SIGCHLD, and Go sends SIGURG to its own threads; neither
/// expects a write to fail.
const NEWS: u64 = bit(libc::SIGCHLD) | bit(libc::SIGCONT) | bit(libc::SIGURG) | bit(libc::SIGWINCH);

/// The bit of a signal in the masks of `/proc`.
const fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

/// The result of a check for signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalLook {
    /// Whether there is one that would interrupt the thread.
    pub has_signal: bool,
    /// The bytes that the kernel wrote, a measure of the cost: 1.5 KiB, up to 500 KiB for a thread
    /// in many groups.
    pub cost_bytes: usize,
}

/// Checks whether a thread has a pending signal that would interrupt it: neither blocked, ignored,
/// nor one that only notifies. True if the thread is gone. False if unknown, because a program
/// retries after an EINTR without a signal.
///
/// Source: the fields `SigPnd`, `ShdPnd`, `SigBlk` and `SigIgn` of `proc_pid_status(5)`. The kernel
/// does not keep a signal pending whose default action is to ignore it.
#[must_use]
pub fn look_for_signal(tid: u32) -> SignalLook {
    if tid == 0 {
        // Not visible from our pid namespace.
        return SignalLook { has_signal: false, cost_bytes: 0 };
    }
    let status = match read_status(tid) {
        Ok(status) => status,
        Err(error) => return SignalLook { has_signal: is_gone(&error), cost_bytes: 0 },
    };
    let mask = |name| {
        let hex = field(&status, name).unwrap_or_default();
        u64::from_str_radix(hex.trim(), 16).unwrap_or(0)
    };
    let pending = mask("SigPnd:") | mask("ShdPnd:");
    let has_signal = pending & !mask("SigBlk:") & !mask("SigIgn:") & !NEWS != 0;
    SignalLook { has_signal, cost_bytes: status.len() }
}

/// `PF_EXITING` of `include/linux/sched.h`: the thread is in `exit(2)`.
const PF_EXITING: u64 = 0x4;

/// Returns the signal that killed the process of a thread, while it closes its files; `None` if it
/// runs, exited by itself, or is not in this pid namespace.
///
/// Source: the fields `flags` and `exit_code` of `proc_pid_stat(5)`. They are read only of a thread
/// without memory: a thread that exits releases its memory before it closes its files. A thread in
/// execve(2) closes its close-on-exec files with `exec_update_lock` held (`fs/exec.c`). Reading its
/// `stat` waits for that close, and so for us.
pub fn signal_that_killed(tid: u32) -> io::Result<Option<u32>> {
    match read_status(tid) {
        Ok(status) if field(&status, "VmSize:").is_some() => return Ok(None),
        Ok(_) => {}
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    // The thread's own file: the process's sums over all threads.
    let stat = match fs::read_to_string(format!("/proc/{tid}/task/{tid}/stat")) {
        Err(error) if is_gone(&error) => return Ok(None),
        stat => stat?,
    };
    let (flags, exit_code) = flags_and_exit_code(&stat).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some(exit_code & 0x7f).filter(|signal| *signal != 0 && flags & PF_EXITING != 0))
}

fn flags_and_exit_code(stat: &str) -> Option<(u64, u32)> {
    // The program's name may contain blanks and brackets.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    Some((fields.get(6)?.parse().ok()?, fields.get(49)?.parse().ok()?))
}

/// How many open files of a process are examined. A program with more is treated as having closed
/// the document.
const FILES_LOOKED_AT: usize = 1024;

/// Counts how often the process of a thread has opened a file for writing, and has it open still:
/// several descriptors may be of one opening. Where the kernel does not compare descriptors, each
/// counts. The file system that the file is in is not asked.
pub fn count_open_for_writing(tid: u32, device: Device, inode: u64) -> io::Result<usize> {
    let mut open = Vec::new();
    for fd in fs::read_dir(format!("/proc/{tid}/fd"))?.flatten().take(FILES_LOOKED_AT) {
        let Some(number) = fd.file_name().to_str().and_then(|number| number.parse().ok()) else {
            continue;
        };
        let info = match fs::read_to_string(format!("/proc/{tid}/fdinfo/{number}")) {
            Err(error) if is_gone(&error) => continue, // It was closed while we looked.
            info => info?,
        };
        // Linux before 5.14 does not say the inode.
        let is_it = field(&info, "ino:").is_none_or(|ino| ino.trim().parse() == Ok(inode));
        let flags = field(&info, "flags:").unwrap_or_default();
        let flags = libc::c_int::from_str_radix(flags.trim(), 8).unwrap_or(0);
        if is_it && flags & libc::O_ACCMODE != libc::O_RDONLY {
            open.push(number);
        }
    }
    let count = open.len();
    if count == 0 {
        return Ok(0);
    }
    let look = move || count_distinct(tid, &open, device, inode);
    Ok(bounded::within(COMPARE_LIMIT, look).unwrap_or(count))
}

/// How long it may take to look at descriptors. The kernel lets nobody look at those of a process
/// that is in execve(2) and waits there for a file to be closed, which is up to us.
const COMPARE_LIMIT: Duration = Duration::from_secs(2);

/// Counts of how many openings of a file these descriptors are. What cannot be compared counts.
fn count_distinct(tid: u32, open: &[u32], device: Device, inode: u64) -> usize {
    let is_it = |number: &&u32| {
        // What is known of a file without asking has to do, as it may be of a file system that
        // does not answer.
        let path = format!("/proc/{tid}/fd/{number}");
        let known = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO);
        known.is_ok_and(|known| {
            let of = Device { major: known.stx_dev_major, minor: known.stx_dev_minor };
            of == device && known.stx_ino == inode
        })
    };
    // In the kernel's order.
    let mut distinct: Vec<u32> = Vec::new();
    for file in open.iter().filter(is_it) {
        let place = distinct
            .binary_search_by(|known| compare_files(tid, *known, *file).unwrap_or(Ordering::Less));
        if let Err(place) = place {
            distinct.insert(place, *file);
        }
    }
    distinct.len()
}

/// `KCMP_FILE` of `include/uapi/linux/kcmp.h`.
const KCMP_FILE: libc::c_int = 0;

/// Compares what two descriptors of a process are of. They are equal exactly if one is a copy
/// of the other; see `kcmp(2)`.
fn compare_files(tid: u32, one: u32, other: u32) -> io::Result<Ordering> {
    // SAFETY: the call takes numbers, and changes nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, tid, tid, KCMP_FILE, one, other) };
    match order {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        -1 => Err(io::Error::last_os_error()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn read_status(tid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{tid}/status"))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn our_own_thread_has_no_signal_and_a_thread_that_is_gone_has() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let ours = look_for_signal(tid);
        assert!(!ours.has_signal && ours.cost_bytes > 0);
        assert!(look_for_signal(u32::MAX / 2).has_signal);
        assert!(!look_for_signal(0).has_signal);
    }

    #[test]
    fn our_own_thread_has_a_process_and_a_command_and_a_thread_that_is_gone_has_none() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        assert_eq!(process_of(tid), Some(std::process::id()));
        assert!(command_of(tid).is_some_and(|name| !name.contains(['\n', ' '])));
        let other = std::thread::scope(|scope| {
            let tid = || rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
            let named = move || (tid(), process_of(tid()));
            scope.spawn(named).join().unwrap()
        });
        assert_eq!(other.1, Some(std::process::id()));
        assert_ne!(other.0, std::process::id());
        assert_eq!(process_of(u32::MAX / 2), None);
        assert_eq!(command_of(u32::MAX / 2), None);
    }

    #[test]
    fn openings_for_writing_are_counted_and_copies_and_those_for_reading_are_not() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let dir = tempfile::tempdir().unwrap();
        let writing = fs::File::create(dir.path().join("list")).unwrap();
        let reading = fs::File::open(dir.path().join("list")).unwrap();
        let meta = reading.metadata().unwrap();
        let major_minor = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        let device = Device { major: major_minor.0, minor: major_minor.1 };
        let count = || count_open_for_writing(tid, device, meta.ino()).unwrap();
        assert_eq!(count(), 1);
        let copies: Vec<_> = (0..5).map(|_| writing.try_clone().unwrap()).collect();
        assert_eq!(count(), 1);
        let again = fs::OpenOptions::new().append(true).open(dir.path().join("list")).unwrap();
        assert_eq!(count(), 2);
        drop(writing);
        assert_eq!(count(), 2);
        drop(copies);
        assert_eq!(count(), 1);
        drop(again);
        assert_eq!(count(), 0);
        drop(reading);
        assert_eq!(signal_that_killed(tid).unwrap(), None);
        assert_eq!(signal_that_killed(u32::MAX / 2).unwrap(), None);
        assert!(is_gone(&count_open_for_writing(u32::MAX / 2, device, 1).unwrap_err()));
    }

    #[test]
    fn groups_are_those_of_a_thread_that_still_acts_as_the_caller() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let groups = rustix::process::getgroups().unwrap();
        let groups: Vec<_> = groups.into_iter().map(|group| group.as_raw()).collect();
        assert_eq!(groups_of(tid, uid, gid), groups);
        assert_eq!(groups_of(tid, uid + 1, gid), [0_u32; 0]);
        assert_eq!(groups_of(tid, uid, gid + 1), [0_u32; 0]);
        assert_eq!(groups_of(u32::MAX / 2, uid, gid), [0_u32; 0]);
    }

    #[test]
    fn fields_are_found_by_their_names() {
        let status = "Name:\tx\nGroups:\t4 24 1000 \nSigPnd:\t0000000000000002\n";
        assert_eq!(field(status, "Groups:"), Some("\t4 24 1000 "));
        assert_eq!(field(status, "SigIgn:"), None);
    }
}
