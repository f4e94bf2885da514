//! The guest's serial console.
//!
//! In its mode `Tty` Cloud Hypervisor writes what the guest prints to its standard output,
//! which is our log, opened to append: nothing is cut off at a boot or a restore, as it
//! is with its mode `File`, and nobody has to listen, as with `Pty` and `Socket`.
//!
//! What is typed it reads from its standard input, if that is a terminal. So we make one.
//! Its standard input is the master; who types opens the other end by its name, which is
//! in the runtime directory. Cloud Hypervisor inherits that end too, and never looks at it:
//! so it is never closed by all, which would end the reading.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, OpenOptionsExt, symlink},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::OFlags,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use crate::{sys::process::Process, vmm::typing::type_on};

/// Both ends of a console, for a VMM to inherit.
#[derive(Debug)]
pub(super) struct Console {
    /// What it reads.
    pub(super) master: OwnedFd,
    /// What it holds open.
    pub(super) terminal: OwnedFd,
}

/// Makes a console anew, so that nothing is left of an earlier machine.
pub(super) fn prepare(runtime_dir: &Path) -> io::Result<Console> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let terminal = ioctl_tiocgptpeer(&master, flags)?;
    // Every byte as it is typed, and no echo, which nobody would read.
    let mut settings = tcgetattr(&terminal)?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)?;

    let name = ptsname(&master, Vec::new())?;
    let link = link(runtime_dir);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    symlink(OsStr::from_bytes(name.to_bytes()), link)?;
    Ok(Console { master, terminal })
}

/// Types `bytes` for the VMM `process`, and returns how many of them there was room for.
pub(super) fn type_in(process: &Process, runtime_dir: &Path, bytes: &[u8]) -> io::Result<usize> {
    let input = open(&link(runtime_dir))?;
    // The name is the next terminal's once the VMM has ended. If it lives now, then what
    // was opened before is its.
    if process.exited().is_some() {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "its VMM has ended"));
    }
    type_on(input, bytes)
}

fn open(link: &Path) -> io::Result<File> {
    let name = fs::read_link(link)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let input =
        OpenOptions::new().write(true).custom_flags(flags.bits().cast_signed()).open(&name)?;
    let is_terminal =
        name.starts_with("/dev/pts") && input.metadata()?.file_type().is_char_device();
    if is_terminal {
        Ok(input)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a terminal"))
    }
}

fn link(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("console")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IsTerminal, Read},
        time::Duration,
    };

    use super::*;
    use crate::{
        sync::Arc,
        sys::process::{Launch, Process},
    };

    const SOON: Duration = Duration::from_secs(180);

    /// A process that does nothing but hold the other end, as a VMM does.
    fn holder(terminal: OwnedFd) -> Arc<Process> {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let args = ["-c", "exec sleep 1000"].map(Into::into);
        let inherited = vec![terminal];
        Process::spawn(Launch { inherited, ..Launch::new(Path::new("/bin/sh"), &args, null) })
            .unwrap()
    }

    #[test]
    fn what_was_typed_stays_after_its_writer_has_left_and_comes_as_it_was_typed() {
        let dir = tempfile::tempdir().unwrap();
        let early = prepare(dir.path()).unwrap();
        let Console { master, terminal } = prepare(dir.path()).unwrap();
        drop(early);
        let mut master = File::from(master);
        // This is what Cloud Hypervisor asks before it reads.
        assert!(master.is_terminal());
        let process = holder(terminal);
        for typed in [&b"ls\n"[..], b"\x03\x04\r\xff", b""] {
            assert_eq!(type_in(&process, dir.path(), typed).unwrap(), typed.len());
            let mut read = vec![0; typed.len()];
            master.read_exact(&mut read).unwrap();
            assert_eq!(read, typed);
        }
        process.kill();
        process.wait(SOON).unwrap();
        let error = type_in(&process, dir.path(), b"too late").unwrap_err();
        assert_eq!(error.to_string(), "its VMM has ended");
        assert!(type_in(&process, Path::new("/nowhere"), b"x").is_err());
    }

    #[test]
    fn typing_at_a_guest_that_does_not_read_ends_and_tells_how_much_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        let Console { master: _master, terminal } = prepare(dir.path()).unwrap();
        let process = holder(terminal);
        let taken = type_in(&process, dir.path(), &[b'x'; 1_000_000]).unwrap();
        assert!((1..1_000_000).contains(&taken), "{taken}");
        process.kill();
        process.wait(SOON).unwrap();
    }
}
