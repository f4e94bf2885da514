//! The opener itself: a process without any of the daemon's files.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::process::{Signal, set_parent_process_death_signal};

use super::{Answer, CopyRequest, Rights};
use crate::sys::{
    files::{MagicLinks, Opened, PieceError, copy_data, open_found, open_machine_file, pretend},
    socket::MessageSocket,
    task::name_process,
};

/// The longest path, with the byte that ends it (`PATH_MAX`).
pub(super) const PATH_MAX_BYTES: usize = 4096;

/// Opens and copies what it is told to until nobody has the other end of standard input, which is a
/// socket.
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
        let (length, files) = socket.receive_files(&mut buffer, None)?;
        if length == 0 {
            return Ok(());
        }
        let message = &buffer[..length];
        if let Ok([source, target]) = <[OwnedFd; 2]>::try_from(files) {
            let copied = copy(&socket, message, &source, &target.into());
            socket.send(&copied.map_or_else(Answer::Failed, |()| Answer::Copied).bytes())?;
            continue;
        }
        let path = Path::new(OsStr::from_bytes(message));
        let opened = match &links {
            Ok(links) => open_machine_file(path, *links),
            Err(error) => {
                Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EPERM)))
            }
        };
        match opened {
            Ok(Opened { file, is_device, size, start }) => {
                let answer = Answer::Opened { is_device, size, start: &start };
                socket.send_files(&answer.bytes(), &[file.as_fd()])?;
            }
            Err(error) => socket.send(&Answer::Failed(error).bytes())?,
        }
    }
}

fn copy(socket: &MessageSocket, message: &[u8], source: &OwnedFd, target: &File) -> io::Result<()> {
    let request = CopyRequest::parse(message).ok_or(io::ErrorKind::InvalidData)?;
    let source = open_found(source)?;
    let copied = copy_data(&source, target, request.bytes, &mut || {
        match socket.send(&Answer::Copying.bytes()) {
            // Many are there that were not read yet, and say the same.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            sent => Ok(sent?),
        }
    });
    copied.map_err(|error| match error {
        PieceError::Io(error) => error,
        PieceError::CalledOff(called_off) => io::Error::other(called_off),
    })
}
