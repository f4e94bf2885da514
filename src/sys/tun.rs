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
}
