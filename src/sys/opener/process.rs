//! The opener itself: a process without any of the daemon's files.

use std::{
    ffi::OsStr,
    io,
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
    path::Path,
};

use rustix::process::{Signal, set_parent_process_death_signal};

use super::{Answer, Rights};
use crate::sys::{
    files::{MagicLinks, open_machine_file, pretend},
    socket::MessageSocket,
    task::name_process,
};

/// The longest path, with the byte that ends it (`PATH_MAX`).
pub(super) const PATH_MAX_BYTES: usize = 4096;

/// Opens what it is told to until nobody has the other end of standard input, which is a socket.
///
/// # Errors
/// Where it was not started by a daemon.
pub fn serve(rights: &Rights) -> io::Result<()> {
    name_process(c"dozed-opener");
    let socket = MessageSocket::from_stdin()?;
    let links = match rights {
        Rights::Ours => Ok(MagicLinks::Followed),
        // Such links lead to what a process has open, and here that process is us.
        Rights::Of(writer) => {
            pretend(writer.uid, writer.gid, writer.groups()).map(|()| MagicLinks::Refused)
        }
    };
    // While it waits for a file system it does not see that the daemon is gone.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut buffer = [0; PATH_MAX_BYTES];
    loop {
        let length = socket.receive(&mut buffer, None)?;
        if length == 0 {
            return Ok(());
        }
        let path = Path::new(OsStr::from_bytes(&buffer[..length]));
        let opened = match &links {
            Ok(links) => open_machine_file(path, *links),
            Err(error) => {
                Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EPERM)))
            }
        };
        match opened {
            Ok(opened) => {
                let answer = Answer::Opened { size: opened.size, start: &opened.start };
                socket.send_file(&answer.bytes(), opened.file.as_fd())?;
            }
            Err(error) => socket.send(&Answer::Failed(error).bytes())?,
        }
    }
}
