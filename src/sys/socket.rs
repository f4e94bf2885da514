//! A socket pair between two processes, for short messages and open files.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recv, recvmsg, send,
        sendmsg, shutdown, socketpair,
    },
};

/// How many open files a message may come with.
pub const FILES_MAX: usize = 2;

/// One end of the pair. Messages keep their order and boundaries.
#[derive(Debug)]
pub struct MessageSocket(OwnedFd);

impl MessageSocket {
    /// Creates a pair.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Takes the end that is standard input.
    pub fn from_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Returns the descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends a message, without blocking.
    pub fn send(&self, message: &[u8]) -> io::Result<()> {
        // NOSIGNAL prevents a SIGPIPE.
        send(&self.0, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Sends a message with open files, at most [`FILES_MAX`], which the other end then has too;
    /// never waits.
    pub fn send_files(&self, message: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        send_all_with(&self.0, message, files, SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// As [`MessageSocket::receive`]; returns the files too that came with the message.
    pub fn receive_files(
        &self,
        buffer: &mut [u8],
        limit: Option<Duration>,
    ) -> io::Result<(usize, Vec<OwnedFd>)> {
        self.wait(limit)?;
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let (mut parts, flags) = ([IoSliceMut::new(buffer)], RecvFlags::CMSG_CLOEXEC);
            let length = match recvmsg(&self.0, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => 0,
                received => received?.bytes,
            };
            let files = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                RecvAncillaryMessage::ScmCredentials(_) | _ => None,
            });
            return Ok((length, files.flatten().collect()));
        }
    }

    /// Waits for a message and returns its length, zero if the other end is closed.
    ///
    /// # Errors
    /// `TimedOut` where there is none within `limit`.
    pub fn receive(&self, buffer: &mut [u8], limit: Option<Duration>) -> io::Result<usize> {
        self.wait(limit)?;
        loop {
            match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                // The other end was closed with unread messages.
                Err(Errno::CONNRESET) => return Ok(0),
                received => return Ok(received?.0),
            }
        }
    }

    /// Waits for a message or a close.
    fn wait(&self, limit: Option<Duration>) -> io::Result<()> {
        let Some(limit) = limit else { return Ok(()) };
        let limit = Timespec::try_from(limit).ok();
        if poll(&mut [PollFd::new(&self.0, PollFlags::IN)], limit.as_ref())? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// Shuts both directions down.
    pub fn end(&self) {
        // It fails only if it is shut down already.
        shutdown(&self.0, Shutdown::Both).ok();
    }
}

/// Sends `bytes` with `file`; returns the number of bytes sent. A closed end is an error, not a
/// signal.
pub fn send_with(
    socket: &impl AsFd,
    bytes: &[u8],
    file: BorrowedFd<'_>,
    flags: SendFlags,
) -> io::Result<usize> {
    send_all_with(socket, bytes, &[file], flags)
}

fn send_all_with(
    socket: &impl AsFd,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other("there is no room for so many descriptors"));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    Ok(sendmsg(socket.as_fd(), &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_ends_and_a_closed_end_is_seen() {
        let (one, other) = MessageSocket::pair().unwrap();
        let mut buffer = [0; 16];
        let timed_out = other.receive(&mut buffer, Some(Duration::from_millis(1))).unwrap_err();
        assert_eq!(timed_out.kind(), io::ErrorKind::TimedOut);
        one.send(b"first").unwrap();
        one.send(b"second").unwrap();
        assert_eq!(other.receive(&mut buffer, None).unwrap(), 5);
        assert_eq!(other.receive(&mut buffer, None).unwrap(), 6);
        assert_eq!(&buffer[..6], b"second");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| other.receive(&mut [0; 1], None).unwrap());
            one.end();
            assert_eq!(waiting.join().unwrap(), 0);
        });
        assert!(other.send(b"x").is_err());
    }

    #[test]
    fn open_files_come_with_their_message_and_with_no_other() {
        let (one, other) = MessageSocket::pair().unwrap();
        let files = [(); FILES_MAX].map(|()| OwnedFd::from(tempfile::tempfile().unwrap()));
        one.send(b"without").unwrap();
        one.send_files(b"with", &files.each_ref().map(AsFd::as_fd)).unwrap();
        let mut buffer = [0; 16];
        let limit = Some(Duration::from_secs(60));
        let (length, none) = other.receive_files(&mut buffer, limit).unwrap();
        assert_eq!((&buffer[..length], none.len()), (&b"without"[..], 0));
        let (length, came) = other.receive_files(&mut buffer, limit).unwrap();
        assert_eq!(&buffer[..length], b"with");
        let inode = |file: &OwnedFd| rustix::fs::fstat(file).unwrap().st_ino;
        assert!(came.iter().map(inode).eq(files.iter().map(inode)));
        drop(one);
        let (length, none) = other.receive_files(&mut buffer, limit).unwrap();
        assert_eq!((length, none.len()), (0, 0));
    }

    #[test]
    fn a_send_that_finds_no_room_does_not_wait() {
        let (one, _other) = MessageSocket::pair().unwrap();
        let full = (0..1_000_000).find_map(|_| one.send(&[0; 64]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
    }
}
