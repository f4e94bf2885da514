//! TUN and TAP devices.
//!
//! They belong to the network namespace of the thread that makes them.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::{Errno, read, write},
};

/// The device that makes TUN and TAP devices.
pub const PATH: &str = "/dev/net/tun";

/// The kind of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Ethernet frames, each after a `struct virtio_net_hdr` of 10 bytes, as VMMs need.
    Tap,
    /// IP packets, bare.
    Tun,
}

impl Device {
    fn flags(self) -> libc::c_short {
        let flags = match self {
            Self::Tap => libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
            Self::Tun => libc::IFF_TUN | libc::IFF_NO_PI,
        };
        libc::c_short::try_from(flags).expect("the kernel's flags are a short")
    }
}

/// Creates the persistent device `name`, which the user `owner` may open. Idempotent.
pub fn make(name: &str, device: Device, owner: u32) -> io::Result<()> {
    let file = attach(name, device)?.into();
    give(&file, owner)?;
    set(&file, libc::TUNSETPERSIST, 1)
}

/// Sets the only unprivileged user that may open the device.
pub fn give(device: &OwnedFd, owner: u32) -> io::Result<()> {
    set(device, libc::TUNSETOWNER, libc::c_ulong::from(owner))
}

/// Opens the existing device `name`, without blocking.
///
/// # Errors
/// `NotFound` where there is no such device, `ResourceBusy` where another has it open.
pub fn open(name: &str, device: Device) -> io::Result<OwnedFd> {
    // The kernel would create a missing one.
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    rustix::net::netdevice::name_to_index(&socket, name)
        .map_err(|_| io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")))?;
    Ok(attach(name, device)?.into())
}

/// The packets that the kernel routes to a TUN device.
#[derive(Debug)]
pub struct Packets {
    device: OwnedFd,
    stop: OwnedFd,
}

/// The end of a wait for packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// There may be packets.
    Packets,
    /// The limit has passed.
    Nothing,
    /// Waiting has ended for good.
    Stop,
}

impl Packets {
    /// Opens the device `name`, as [`open`] does.
    pub fn open(name: &str, device: Device) -> io::Result<Self> {
        let device = open(name, device)?;
        Ok(Self { device, stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Waits for packets, for at most `limit`.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<Awaited> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [&self.device, &self.stop].map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut fds, limit.as_ref()) {
            Ok(0) => return Ok(Awaited::Nothing),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Awaited::Packets),
            Err(errno) => return Err(errno.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(Awaited::Stop);
        }
        if fds[0].revents().contains(PollFlags::ERR) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the device is gone"));
        }
        Ok(Awaited::Packets)
    }

    /// Ends every wait, for good.
    pub fn stop(&self) {
        // It fails only if the eventfd is full, and so readable.
        let _written = write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Reads the next packet, if there is one, truncated to the size of `buffer`.
    pub fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        loop {
            match read(&self.device, &mut *buffer) {
                Ok(length) => return Ok(Some(&buffer[..length])),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends a packet from the device to the kernel.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            match write(&self.device, packet) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn attach(name: &str, device: Device) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: device.flags() },
    };
    if name.len() >= libc::IFNAMSIZ || name.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such name is possible"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the descriptor is open and ours; the kernel reads and writes one struct of
    // this type, whose name ends with a nought, and which outlives the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Makes an ioctl that takes a number.
fn set(file: &OwnedFd, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open and ours, and these requests take a number by value.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, value) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    #[test]
    fn a_device_stays_and_is_one_persons_at_a_time() {
        netns::in_a_new_one(|_| {
            let missing = open("tap0", Device::Tap).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
            make("tap0", Device::Tap, 1000).unwrap();
            make("tap0", Device::Tap, 1000).unwrap();
            let first = open("tap0", Device::Tap).unwrap();
            let second = open("tap0", Device::Tap).unwrap_err();
            assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
            drop(first);
            drop(open("tap0", Device::Tap).unwrap());
            // Of another kind it is not.
            assert!(make("tap0", Device::Tun, 1000).is_err());
            assert!(make("a-name-that-is-too-long", Device::Tap, 0).is_err());
            assert!(make("", Device::Tap, 0).is_err());
        })
        .unwrap();
    }

    #[test]
    fn a_wait_for_packets_ends_by_the_clock_by_a_word_and_with_the_device() {
        netns::in_a_new_one(|_| {
            make("tun0", Device::Tun, 0).unwrap();
            let packets = Packets::open("tun0", Device::Tun).unwrap();
            let moment = Some(Duration::from_millis(1));
            assert_eq!(packets.wait(moment).unwrap(), Awaited::Nothing);
            assert_eq!(packets.read(&mut [0; 64]).unwrap(), None);
            // The device is down.
            packets.write(&[0x45; 20]).unwrap_err();
            packets.stop();
            assert_eq!(packets.wait(None).unwrap(), Awaited::Stop);
            drop(packets);
            let packets = Packets::open("tun0", Device::Tun).unwrap();
            let ip = crate::sys::command::find("ip").unwrap();
            let limit = Duration::from_secs(30);
            crate::sys::command::output(&ip, &["link", "del", "tun0"], limit).unwrap();
            packets.wait(None).unwrap_err();
            packets.read(&mut [0; 64]).unwrap_err();
        })
        .unwrap();
    }
}
