//! Runs short-lived programs.
//!
//! For queries such as `--version`; `sys::process` starts long-lived programs.

use std::{
    io::{self, Read},
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::clock::Deadline;

/// The PATH of service managers, so that the daemon finds the same programs when a shell starts it.
const PROGRAM_DIRS: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// No answer that we ask for is longer; `qemu -machine help` is 10 KiB.
const OUTPUT_MAX_BYTES: u64 = 64 * 1024;

/// How a program ended, and what it printed.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
}

/// Returns the program called `name`, if it is in one of the system's usual directories.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    PROGRAM_DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| is_program(path))
}

/// Says whether there is a program at `path`.
#[must_use]
pub fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Runs `program` with nothing on its standard input, and returns once it has ended.
///
/// # Errors
/// `TimedOut` where it takes longer than `limit` and `FileTooLarge` where it prints more
/// than 64 KiB; it is then killed. `InvalidData` where it prints no UTF-8.
#[allow(
    clippy::disallowed_methods,
    reason = "the child is waited for before this returns, so its number stays its own"
)]
pub fn output(program: &Path, args: &[&str], limit: Duration) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let printed = listen(&mut child, &Deadline::after(limit));
    if printed.is_err() {
        // It may have ended by itself in the meantime, which is as good.
        child.kill().ok();
    }
    let status = child.wait()?;
    let stdout = String::from_utf8(printed?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "its output is not UTF-8"))?;
    Ok(Output { status, stdout })
}

/// Reads all that `child` prints, until it has ended.
fn listen(child: &mut Child, deadline: &Deadline) -> io::Result<Vec<u8>> {
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut pipe = child.stdout.take().expect("standard output is a pipe");
    let mut printed = Vec::new();
    loop {
        wait_for(&pipe, deadline)?;
        let mut chunk = [0; 4096];
        let count = pipe.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        printed.extend_from_slice(&chunk[..count]);
        if printed.len() as u64 > OUTPUT_MAX_BYTES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it prints too much"));
        }
    }
    wait_for(&ended, deadline)?;
    Ok(printed)
}

/// Waits until `fd` can be read or is at its end.
fn wait_for(fd: &impl AsFd, deadline: &Deadline) -> io::Result<()> {
    loop {
        let left = Timespec::try_from(deadline.left()).expect("a deadline is within a year");
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(0) if deadline.passed() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not exit in time"));
            }
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::clock::Stopwatch;

    fn shell(script: &str, limit: Duration) -> io::Result<Output> {
        output(&find("sh").unwrap(), &["-c", script], limit)
    }

    #[test]
    fn what_a_program_prints_and_how_it_ends_is_told() {
        let said =
            shell("cat; echo hello; echo oops >&2; exit 3", Duration::from_secs(10)).unwrap();
        assert_eq!(said.stdout, "hello\n");
        assert_eq!(said.status.code(), Some(3));
    }

    #[test]
    fn a_program_that_goes_on_for_too_long_is_killed() {
        for script in ["exec sleep 600", "exec >/dev/null; exec sleep 600"] {
            let watch = Stopwatch::start();
            let error = shell(script, Duration::from_millis(50)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{script}");
            assert!(watch.elapsed() < Duration::from_secs(120), "{script}");
        }
    }

    #[test]
    fn a_program_that_prints_without_end_is_killed() {
        let error = shell("while :; do echo yes; done", Duration::from_secs(30)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        assert_eq!(find("no-such-program"), None);
        assert!(is_program(Path::new("/bin/sh")));
        assert!(!is_program(Path::new("/etc/passwd")) && !is_program(Path::new("/bin")));
        let error = output(Path::new("/no/such"), &[], Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
