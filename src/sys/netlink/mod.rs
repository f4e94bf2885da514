//! Netlink sockets for links, routes and the firewall.
//!
//! A socket belongs to the network namespace of the thread that opens it, and stays with it. What
//! the messages mean is known to `net`; here they are bytes, or of any type that can be written as
//! such.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::{Errno, write},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, sendto,
        socket_with,
        sockopt::{
            Timeout, set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force,
            set_socket_timeout,
        },
    },
};

mod request;

pub use request::{Accepts, Answers, Kernel, Request, RequestError, parsed};

/// The kernel answers within the call, so this is for an overloaded host.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The kernel's dumps have at most 32 KiB.
const DATAGRAM_MAX_BYTES: usize = 64 * 1024;
/// Enough for a change of a firewall with full lists, some 300 KiB.
const BUFFER_BYTES: usize = 2 << 20;

/// The netlink family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, neighbours and routes: `rtnetlink(7)`.
    Route,
    /// The firewall and the table of connections.
    Netfilter,
}

/// A netlink socket.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
}

impl NetlinkSocket {
    /// Opens a socket in this thread's namespace.
    pub fn open(family: Family) -> io::Result<Self> {
        let protocol = match family {
            Family::Route => None,
            Family::Netfilter => Some(netlink::NETFILTER),
        };
        let flags = SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER_LIMIT))?;
        set_socket_send_buffer_size_force(&fd, BUFFER_BYTES)?;
        set_socket_recv_buffer_size_force(&fd, BUFFER_BYTES)?;
        Ok(Self { fd })
    }

    /// Sends messages to the kernel, which has processed them when this returns.
    pub fn send(&self, messages: &[u8]) -> io::Result<()> {
        let kernel = netlink::SocketAddrNetlink::new(0, 0);
        loop {
            match sendto(&self.fd, messages, SendFlags::empty(), &kernel) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Returns the next messages of the kernel.
    ///
    /// # Errors
    /// `TimedOut` where none come, and those of recv(2).
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; DATAGRAM_MAX_BYTES];
        loop {
            match recv(&self.fd, &mut buffer[..], RecvFlags::TRUNC) {
                Ok((_, length)) if length > buffer.len() => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the kernel's answer is longer than any that we know",
                    ));
                }
                Ok((_, length)) => {
                    buffer.truncate(length);
                    return Ok(buffer);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the kernel does not answer",
                    ));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A subscription to the kernel's notifications of changes.
#[derive(Debug)]
pub struct Notifications {
    sockets: Vec<(Family, OwnedFd)>,
    stop: OwnedFd,
}

/// A notification.
#[derive(Debug)]
pub enum Notification {
    /// Its messages.
    Messages(Family, Vec<u8>),
    /// Some notifications were lost.
    Lost,
    /// Waiting has ended for good.
    Stop,
}

impl Notifications {
    /// Subscribes, in this thread's namespace, to the groups of each family whose bits are set.
    pub fn listen(groups: &[(Family, u32)]) -> io::Result<Self> {
        let listen = |(family, groups): &(Family, u32)| {
            let NetlinkSocket { fd } = NetlinkSocket::open(*family)?;
            bind(&fd, &netlink::SocketAddrNetlink::new(0, *groups))?;
            Ok((*family, fd))
        };
        let sockets = groups.iter().map(listen).collect::<io::Result<_>>()?;
        Ok(Self { sockets, stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Waits for the next notification.
    pub fn wait(&self) -> io::Result<Notification> {
        loop {
            let mut fds: Vec<_> = [&self.stop]
                .into_iter()
                .chain(self.sockets.iter().map(|(_, fd)| fd))
                .map(|fd| PollFd::new(fd, PollFlags::IN))
                .collect();
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(Notification::Stop);
            }
            let ready = fds.iter().skip(1).position(|fd| !fd.revents().is_empty());
            let Some((family, fd)) = ready.and_then(|at| self.sockets.get(at)) else { continue };
            let mut buffer = vec![0; DATAGRAM_MAX_BYTES];
            match recv(fd, &mut buffer[..], RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
                Ok((_, length)) if length > buffer.len() => return Ok(Notification::Lost),
                Ok((_, length)) => {
                    buffer.truncate(length);
                    return Ok(Notification::Messages(*family, buffer));
                }
                Err(Errno::NOBUFS) => return Ok(Notification::Lost),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Ends every wait, for good.
    pub fn stop(&self) {
        // It fails only if the eventfd is full, and so readable.
        let _written = write(&self.stop, &1_u64.to_ne_bytes());
    }
}

/// Returns whether the error means that the object does not exist.
#[must_use]
pub fn is_missing(error: &io::Error) -> bool {
    let missing = [Errno::NOENT, Errno::NODEV, Errno::SRCH].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| missing.contains(&code))
}

/// Returns whether the error means that the kernel lacks the feature.
#[must_use]
pub fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::AFNOSUPPORT, Errno::OPNOTSUPP].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| unsupported.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_what_it_is_asked() {
        let socket = NetlinkSocket::open(Family::Route).unwrap();
        // RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, sequence 7, an empty ifinfomsg.
        let mut request = vec![32, 0, 0, 0, 18, 0, 1, 3, 7, 0, 0, 0, 0, 0, 0, 0];
        request.resize(32, 0);
        socket.send(&request).unwrap();
        let answer = socket.receive().unwrap();
        // RTM_NEWLINK, with our sequence number.
        assert_eq!(answer[4..6], [16, 0]);
        assert_eq!(answer[8..12], [7, 0, 0, 0]);
    }

    #[test]
    fn what_is_too_long_is_refused_and_not_cut() {
        let socket = NetlinkSocket::open(Family::Netfilter).unwrap();
        assert!(socket.send(&vec![0; BUFFER_BYTES * 3]).is_err());
    }
}
