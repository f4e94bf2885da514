//! Reads `/proc/PID`. The caller has to verify with a pidfd that the pid was not reused.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::sys::{bounded, files::FileId};

/// How long the arguments of a process may take to be read. The kernel answers at once unless
/// the process has its memory locked, or served by somebody who does not answer.
const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// Names are at the beginning of the arguments.
const CMDLINE_MAX_BYTES: u64 = 64 * 1024;
/// What the links in `/proc/PID/fd` to files of `memfd_create` begin with.
const MEMFD: &[u8] = b"/memfd:";

/// What we need of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) is_zombie: bool,
    pub(super) start_ticks: u64,
    pub(super) cpu_time: Duration,
    /// As `wait(2)` encodes it; of use for a zombie.
    pub(super) exit_status: i32,
}

pub(super) fn stat(pid: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text, rustix::param::clock_ticks_per_second()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat has an unexpected format")
    })
}

fn parse_stat(text: &str, ticks_per_second: u64) -> Option<Stat> {
    // The second field is the program's name in brackets, and may have any of them in it.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Numbers are those of proc(5), where the state is field 3.
    let field = |number: usize| fields.get(number.checked_sub(3)?).copied();
    let ticks = field(14)?.parse::<u64>().ok()? + field(15)?.parse::<u64>().ok()?;
    let nanos_per_tick = 1_000_000_000 / ticks_per_second;
    Some(Stat {
        is_zombie: field(3)? == "Z",
        start_ticks: field(22)?.parse().ok()?,
        cpu_time: Duration::from_nanos(ticks.checked_mul(nanos_per_tick)?),
        exit_status: field(52)?.parse().ok()?,
    })
}

/// What a process has read and written since it began, its threads that have ended included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Io {
    /// By calls such as `read` and `pwritev`, of files and of everything else, wherever it came
    /// from. Not by `io_uring` nor by Linux's native asynchronous I/O.
    pub call_bytes: u64,
    /// From disks, and into pages of files that are to be written to disks, however it came to
    /// that; also by memory that is a file.
    pub block_bytes: u64,
}

pub(super) fn io(pid: u32) -> io::Result<Io> {
    read_io(Path::new(&format!("/proc/{pid}")))
}

fn read_io(dir: &Path) -> io::Result<Io> {
    parse_io(&fs::read_to_string(dir.join("io"))?).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/io has an unexpected format")
    })
}

/// Returns what those threads that live have read and written whose names begin with `prefix`.
pub(super) fn io_of_threads(pid: u32, prefix: &str) -> io::Result<Io> {
    let mut sum = Io { call_bytes: 0, block_bytes: 0 };
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let dir = thread?.path();
        let io = fs::read_to_string(dir.join("comm"))
            .and_then(|name| name.starts_with(prefix).then(|| read_io(&dir)).transpose());
        match io {
            Ok(Some(io)) => {
                sum.call_bytes = sum.call_bytes.saturating_add(io.call_bytes);
                sum.block_bytes = sum.block_bytes.saturating_add(io.block_bytes);
            }
            Ok(None) => {}
            Err(error) if is_gone(&error) => {} // It ended while we looked.
            Err(error) => return Err(error),
        }
    }
    Ok(sum)
}

fn parse_io(text: &str) -> Option<Io> {
    let field = |name: &str| -> Option<u64> {
        let line = |line: &str| line.strip_prefix(name)?.strip_prefix(": ")?.parse().ok();
        text.lines().find_map(line)
    };
    Some(Io {
        call_bytes: field("rchar")?.saturating_add(field("wchar")?),
        block_bytes: field("read_bytes")?.saturating_add(field("write_bytes")?),
    })
}

/// What went through a network device, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frames {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Returns what went through a device of the network namespace that the process is in; `None`
/// where there is none of that name.
pub(super) fn frames(pid: u32, device: &str) -> io::Result<Option<Frames>> {
    Ok(parse_frames(&fs::read_to_string(format!("/proc/{pid}/net/dev"))?, device))
}

fn parse_frames(text: &str, device: &str) -> Option<Frames> {
    let numbers = text.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == device).then_some(numbers)
    })?;
    let numbers: Vec<u64> =
        numbers.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    // Eight columns for what came in, and eight for what went out; bytes and frames are first.
    let sum = |column: usize| Some(numbers.get(column)?.saturating_add(*numbers.get(column + 8)?));
    Some(Frames { count: sum(1)?, bytes: sum(0)? })
}

/// Returns the user that the process acts as.
pub(super) fn user(pid: u32) -> io::Result<u32> {
    // The owner of its directory is root's where others must not look into it.
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    parse_user(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status has an unexpected format")
    })
}

/// Finds the second of four: the real, the effective, the saved, and that for files.
fn parse_user(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Returns the name of the file of the program that the process runs.
///
/// # Errors
/// `TimedOut` where the process is becoming a program and closes a file of a FUSE file system
/// that does not answer: until the file is closed, the kernel lets nobody read this.
pub(super) fn program(pid: u32) -> io::Result<String> {
    let path = bounded::within(LOOK_LIMIT, move || fs::read_link(format!("/proc/{pid}/exe")))??;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
}

/// Returns the names that a process was given: its first argument, and what follows `-name`
/// or `-name guest=`.
pub(super) fn names(pid: u32) -> io::Result<Vec<String>> {
    // These are in the memory of the process, which may have the kernel wait.
    let read = bounded::within(LOOK_LIMIT, move || {
        let mut cmdline = Vec::new();
        let file = File::open(format!("/proc/{pid}/cmdline"))?;
        file.take(CMDLINE_MAX_BYTES).read_to_end(&mut cmdline)?;
        Ok(cmdline)
    })?;
    match read {
        Ok(cmdline) => Ok(names_in(&cmdline)),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn names_in(cmdline: &[u8]) -> Vec<String> {
    let arguments: Vec<_> = cmdline.split(|byte| *byte == 0).collect();
    let named = arguments.windows(2).filter(|pair| pair[0] == b"-name").map(|pair| pair[1]);
    let named = named.map(|name| name.strip_prefix(b"guest=").unwrap_or(name));
    let first = arguments.first().copied();
    first.into_iter().chain(named).map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

/// Returns whether the process has one of these files open.
pub(super) fn has_open(pid: u32, files: &HashSet<FileId>) -> io::Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may be closed while we look, and no file system is asked.
        if FileId::of(&entry?.path()).is_ok_and(|id| files.contains(&id)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the bytes in memory of all files that the process has by `memfd_create`.
pub(super) fn memfd_bytes(pid: u32) -> io::Result<u64> {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let is_memfd = |target: PathBuf| target.as_os_str().as_encoded_bytes().starts_with(MEMFD);
        // A descriptor may be closed while we look.
        if !fs::read_link(&path).is_ok_and(is_memfd) {
            continue;
        }
        match fs::metadata(&path) {
            // One file may have several descriptors.
            Ok(meta) if seen.insert(meta.ino()) => bytes += meta.blocks() * 512,
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// Returns whether the error means that the process is gone.
pub(in crate::sys) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks_does_not_mislead() {
        let numbers = (4..=52).map(|n| n.to_string()).collect::<Vec<_>>();
        let text = format!("7 (a) Z (b 9) S {}\n", numbers.join(" "));
        let stat = parse_stat(&text, 100).unwrap();
        assert_eq!(
            stat,
            Stat {
                is_zombie: false,
                start_ticks: 22,
                cpu_time: Duration::from_millis((14 + 15) * 10),
                exit_status: 52,
            }
        );
        assert_eq!(parse_stat("7 (a) S 1 2", 100), None);
    }

    #[test]
    fn io_is_counted_by_calls_and_by_blocks() {
        let text = "rchar: 1\nwchar: 20\nsyscr: 300\nsyscw: 4000\nread_bytes: 50000\n\
                    write_bytes: 600000\ncancelled_write_bytes: 7000000\n";
        assert_eq!(parse_io(text), Some(Io { call_bytes: 21, block_bytes: 650_000 }));
        assert_eq!(parse_io("rchar: 1\nwchar: 2\n"), None);
    }

    #[test]
    fn frames_are_those_of_the_device_that_was_asked_for() {
        let text = "Inter-|   Receive    |  Transmit\n face |bytes packets |bytes packets\n    \
                    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  tap0: 10 20 0 0 0 0 0 9 300 400 0 0 0 0 \
                    0 0\n tap00: 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5\n";
        assert_eq!(parse_frames(text, "tap0"), Some(Frames { count: 420, bytes: 310 }));
        assert_eq!(parse_frames(text, "tap"), None);
        assert_eq!(parse_frames("tap0: 1 2 3\n", "tap0"), None);
    }

    #[test]
    fn a_name_is_the_first_argument_or_what_is_said_to_be_one() {
        let names = |cmdline: &str| names_in(cmdline.replace(' ', "\0").as_bytes());
        assert_eq!(names("dozed:a:1: --api x"), ["dozed:a:1:"]);
        assert_eq!(names("/bin/qemu -name guest=dozed:a:1: -S"), ["/bin/qemu", "dozed:a:1:"]);
        assert_eq!(names("bash -c dozed:a:1: guest=dozed:a:1:"), ["bash"]);
        assert_eq!(names(""), [""]);
    }

    #[test]
    fn a_user_is_the_effective_one() {
        let text = "Name:\tUid: 9 9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n";
        assert_eq!(parse_user(text), Some(2));
        assert_eq!(parse_user("Gid:\t5\n"), None);
    }
}
