//! Devices whose other end is a file: a tap has a guest behind it.
//!
//! They are made in the network namespace of the calling thread, and belong to it.

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

/// Where such devices are made, and opened.
pub const PATH: &str = "/dev/net/tun";

/// What passes through the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Ethernet frames, each after a header that says what the device need not compute
    /// (`struct virtio_net_hdr`, 10 bytes), as VMMs want it.
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

/// Makes the device `name`, which stays when nobody has it open, and which the user
/// `owner` may open. Doing it again changes nothing.
///
/// # Errors
/// Where there is no `/dev/net/tun`, or `name` is some other device or has another mode.
pub fn make(name: &str, device: Device, owner: u32) -> io::Result<()> {
    let file = attach(name, device)?.into();
    give(&file, owner)?;
    set(&file, libc::TUNSETPERSIST, 1)
}

/// Has the user `owner`, and nobody else without privileges, be who may open the device.
///
/// # Errors
/// Where we have no privileges over it.
pub fn give(device: &OwnedFd, owner: u32) -> io::Result<()> {
    set(device, libc::TUNSETOWNER, libc::c_ulong::from(owner))
}

/// Opens the device `name`, which exists: what is written comes out of it, and what goes
/// into it is read. Reading and writing never block.
///
/// # Errors
/// `NotFound` where there is no such device, `ResourceBusy` where another has it open.
pub fn open(name: &str, device: Device) -> io::Result<OwnedFd> {
    // The kernel would make one that is not there.
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    rustix::net::netdevice::name_to_index(&socket, name)
        .map_err(|_| io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")))?;
    Ok(attach(name, device)?.into())
}

/// The packets that the kernel sends by a device whose other end we are.
#[derive(Debug)]
pub struct Packets {
    device: OwnedFd,
    stop: OwnedFd,
}

/// Why a wait for packets is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// There may be packets.
    Packets,
    /// It has been long enough.
    Nothing,
    /// Nobody is to wait any more.
    Stop,
}

impl Packets {
    /// Opens the device `name`, as [`open`] does.
    ///
    /// # Errors
    /// As [`open`], and where there are too many open files.
    pub fn open(name: &str, device: Device) -> io::Result<Self> {
        let device = open(name, device)?;
        Ok(Self { device, stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Waits for packets, for at most `limit`.
    ///
    /// # Errors
    /// Where the device is gone.
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
        // An eventfd takes a number of this size unless it is full, and then it is readable.
        let _written = write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Reads the next packet, if there is one. What does not fit into `buffer` is cut.
    ///
    /// # Errors
    /// Where the device is gone.
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

    /// Has a packet come out of the device.
    ///
    /// # Errors
    /// Where the device is gone or down, or the kernel has no room.
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

/// Does one of the calls that take a number.
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
