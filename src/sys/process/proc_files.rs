//! What `/proc` tells of a process. It goes by number, so whoever asks has to make
//! sure by a pidfd that the number was not another's meanwhile.

use std::{collections::HashSet, fs, io, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

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
    parse_stat(&text, rustix::param::clock_ticks_per_second())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat makes no sense"))
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

/// Returns the user that the process acts as.
pub(super) fn user(pid: u32) -> io::Result<u32> {
    // The owner of its directory is root's where others must not look into it.
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    parse_user(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status makes no sense")
    })
}

/// Finds the second of four: the real, the effective, the saved, and that for files.
fn parse_user(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Says whether an argument of the process, its name included, contains `token`.
pub(super) fn has_argument(pid: u32, token: &str) -> io::Result<bool> {
    match fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(cmdline) => Ok(cmdline
            .split(|byte| *byte == 0)
            .any(|argument| contains(argument, token.as_bytes()))),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn contains(argument: &[u8], token: &[u8]) -> bool {
    !token.is_empty() && argument.windows(token.len()).any(|part| part == token)
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

/// Says whether a file of `/proc` could not be read because its process is gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
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
    fn a_user_is_the_effective_one() {
        let text = "Name:\tUid: 9 9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n";
        assert_eq!(parse_user(text), Some(2));
        assert_eq!(parse_user("Gid:\t5\n"), None);
    }
}
