//! What `/proc` tells of the threads that ask us for something.

use std::{ffi::CStr, fs, io, path::Path};

use super::process::is_gone;
use crate::sandbox::text::is_plain;

/// Returns the supplementary groups of a thread; none where it cannot be seen.
#[must_use]
pub fn groups_of(tid: u32) -> Vec<u32> {
    let status = status_of(tid).unwrap_or_default();
    let groups = field(&status, "Groups:").unwrap_or_default();
    groups.split_whitespace().filter_map(|group| group.parse().ok()).collect()
}

/// Names this process, as `ps` shows it, and its first thread, which must be the caller.
pub fn name_process(name: &CStr) {
    // The kernel takes what fits and refuses nothing.
    rustix::thread::set_name(name).ok();
}

/// Returns the process of a thread, where it can be seen.
#[must_use]
pub fn process_of(tid: u32) -> Option<u32> {
    field(&status_of(tid)?, "Tgid:")?.trim().parse().ok()
}

/// Returns the name of the program that a thread runs, of plain characters without blanks:
/// anybody can call theirs what they like.
#[must_use]
pub fn command_of(tid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{tid}/comm")).ok()?;
    let name = String::from_utf8_lossy(&name);
    let plain = |c: char| if is_plain(c) && !c.is_whitespace() { c } else { '_' };
    Some(name.trim_end_matches('\n').chars().map(plain).collect())
}

/// Signals that are news and no wish to end anything. A shell has a handler for the end of
/// its children, and Go sends SIGURG to its own threads; neither expects a write to fail.
const NEWS: u64 = bit(libc::SIGCHLD) | bit(libc::SIGCONT) | bit(libc::SIGURG) | bit(libc::SIGWINCH);

/// The place of a signal in the masks of `/proc`.
const fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

/// Says whether a thread has a signal pending that would end a wait of its: one that it
/// neither blocks nor ignores, and that is more than news. Also true where the thread is
/// gone, for then nobody waits. False where that cannot be told: to be told of a signal that
/// there is none of, a program does the same again.
///
/// Source of the rule: the fields `SigPnd`, `ShdPnd`, `SigBlk` and `SigIgn` of
/// `proc_pid_status(5)`. A signal that is left to its default and ignored by that, as
/// SIGCHLD, is not kept pending by the kernel.
#[must_use]
pub fn has_signal(tid: u32) -> bool {
    if tid == 0 {
        return false; // Not visible from our pid namespace.
    }
    let status = match read_status(tid) {
        Ok(status) => status,
        Err(error) => return is_gone(&error),
    };
    let mask = |name| {
        let hex = field(&status, name).unwrap_or_default();
        u64::from_str_radix(hex.trim(), 16).unwrap_or(0)
    };
    let pending = mask("SigPnd:") | mask("ShdPnd:");
    pending & !mask("SigBlk:") & !mask("SigIgn:") & !NEWS != 0
}

/// `PF_EXITING` of `include/linux/sched.h`: the thread is in `exit(2)`.
const PF_EXITING: u64 = 0x4;

/// Returns the signal that ended the process of a thread, which is still closing its files;
/// `None` if it goes on, ended by itself, or is not to be seen from our pid namespace.
///
/// Source: the fields `flags` and `exit_code` of `proc_pid_stat(5)`.
///
/// # Errors
/// Where it cannot be told.
pub fn signal_that_killed(tid: u32) -> io::Result<Option<u32>> {
    let stat = match fs::read_to_string(format!("/proc/{tid}/stat")) {
        Err(error) if is_gone(&error) => return Ok(None),
        stat => stat?,
    };
    let (flags, exit_code) = flags_and_exit_code(&stat).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some(exit_code & 0x7f).filter(|signal| *signal != 0 && flags & PF_EXITING != 0))
}

fn flags_and_exit_code(stat: &str) -> Option<(u64, u32)> {
    // The name of the program may have blanks and brackets in it.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    Some((fields.get(6)?.parse().ok()?, fields.get(49)?.parse().ok()?))
}

/// How many open files of a process are looked through. A program that writes a document has
/// few; one with more is taken to have closed it.
const FILES_LOOKED_AT: usize = 1024;

/// Says whether the process of a thread has a file open for writing whose path ends so. One
/// that is gone, or is not to be seen from our pid namespace, has none.
///
/// # Errors
/// Where it cannot be told.
pub fn has_open_for_writing(tid: u32, path_end: &str) -> io::Result<bool> {
    let files = match fs::read_dir(format!("/proc/{tid}/fd")) {
        Err(error) if is_gone(&error) => return Ok(false),
        files => files?,
    };
    // The name that a link shows is read without asking the file system that it is in.
    let is_named = |fd: &fs::DirEntry| {
        fs::read_link(fd.path()).is_ok_and(|path| path.to_string_lossy().ends_with(path_end))
    };
    for fd in files.flatten().take(FILES_LOOKED_AT).filter(is_named) {
        let info = fs::read_to_string(
            Path::new("/proc").join(tid.to_string()).join("fdinfo").join(fd.file_name()),
        );
        let info = match info {
            Err(error) if is_gone(&error) => continue, // It was closed while we looked.
            info => info?,
        };
        let flags = field(&info, "flags:").unwrap_or_default();
        let flags = libc::c_int::from_str_radix(flags.trim(), 8).unwrap_or(0);
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            return Ok(true);
        }
    }
    Ok(false)
}

fn status_of(tid: u32) -> Option<String> {
    read_status(tid).ok()
}

fn read_status(tid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{tid}/status"))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_thread_has_no_signal_and_a_thread_that_is_gone_has() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        assert!(!has_signal(tid));
        assert!(has_signal(u32::MAX / 2));
        assert!(!has_signal(0));
    }

    #[test]
    fn our_own_thread_has_a_process_and_a_command_and_a_thread_that_is_gone_has_none() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        assert_eq!(process_of(tid), Some(std::process::id()));
        assert!(command_of(tid).is_some_and(|name| !name.contains(['\n', ' '])));
        assert_eq!(process_of(u32::MAX / 2), None);
        assert_eq!(command_of(u32::MAX / 2), None);
    }

    #[test]
    fn a_file_that_is_open_for_writing_is_found_by_its_name_and_one_for_reading_is_not() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let dir = tempfile::tempdir().unwrap();
        let end = format!("{}/list", dir.path().file_name().unwrap().to_str().unwrap());
        let writing = fs::File::create(dir.path().join("list")).unwrap();
        let reading = fs::File::open(dir.path().join("list")).unwrap();
        assert!(has_open_for_writing(tid, &end).unwrap());
        drop(writing);
        assert!(!has_open_for_writing(tid, &end).unwrap());
        drop(reading);
        assert_eq!(signal_that_killed(tid).unwrap(), None);
        assert_eq!(signal_that_killed(u32::MAX / 2).unwrap(), None);
        assert!(!has_open_for_writing(u32::MAX / 2, &end).unwrap());
    }

    #[test]
    fn fields_are_found_by_their_names() {
        let status = "Name:\tx\nGroups:\t4 24 1000 \nSigPnd:\t0000000000000002\n";
        assert_eq!(field(status, "Groups:"), Some("\t4 24 1000 "));
        assert_eq!(field(status, "SigIgn:"), None);
    }
}
