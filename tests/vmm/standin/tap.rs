//! The tap of a network device: opened by its name, and held for as long as the VM is.
//!
//! What the real one sets of a tap this does not look at: it is up already, or the real one
//! needs a privilege that it does not have.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use dozed::sys::tun::{self, Device};
use rustix::thread::{CapabilitySet, capabilities};

use crate::{
    config::Net,
    failure::{Failure, Within},
    knobs::Knobs,
};

/// How the real one calls a tap that it was not told the name of.
const UNNAMED: &str = "vmtap0";

/// Opens the tap of a device, by a process that has shut itself in or not. One that is not
/// there the real one makes, where it may, and says nothing; here it is noted, and not made.
pub(crate) fn open(net: &Net, shut_in: bool, knobs: &Knobs) -> Result<Option<OwnedFd>, Failure> {
    let name = net.tap.as_deref().unwrap_or(UNNAMED);
    check_flags(name, net.num_queues, shut_in)
        .and_then(|()| attach(name, knobs))
        .within("Failed to open taps")
        .within("Cannot create virtio-net device")
}

/// Looks whether the tap has as many queues as the device. It does so by /sys, which shows
/// the devices of whoever mounted that.
fn check_flags(name: &str, queues: usize, shut_in: bool) -> Result<(), Failure> {
    const MULTI_QUEUE: u32 = 0x0100;
    let path = Path::new("/sys/class/net").join(name).join("tun_flags");
    if !path.exists() {
        return Ok(());
    }
    let read = if shut_in {
        Err(io::Error::from(rustix::io::Errno::ACCESS))
    } else {
        fs::read_to_string(path)
    };
    let flags = read.within("Failed to read the TAP flags from sysfs")?;
    let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16);
    let has_many = flags.is_ok_and(|flags| flags & MULTI_QUEUE != 0);
    let said = match (has_many, queues > 2) {
        (true, false) => "no support device side",
        (false, true) => "no support TAP side",
        (true, true) | (false, false) => return Ok(()),
    };
    Err(Failure::new(&format!("Error related to the multiqueue support ({said})")))
}

fn attach(name: &str, knobs: &Knobs) -> Result<Option<OwnedFd>, Failure> {
    const NAME_MAX_BYTES: usize = 15;
    let opened = || {
        if name.len() > NAME_MAX_BYTES {
            let said = format!("Interface name too long (max length is {NAME_MAX_BYTES}): {name}");
            return Err(Failure::new(&said));
        }
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(tun::PATH)
            .within("Couldn't open /dev/net/tun")?;
        match tun::open(name, Device::Tap) {
            Ok(tap) => Ok(Some(tap)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let may = capabilities(None)?.effective.contains(CapabilitySet::NET_ADMIN);
                if !may {
                    let refused = Err(Failure::from(rustix::io::Errno::PERM));
                    return refused.within("Unable to configure tap interface");
                }
                knobs.note(&format!("TAP {name}"));
                Ok(None)
            }
            Err(error) => Err(Failure::from(error).within("Unable to configure tap interface")),
        }
    };
    opened().within("Open tap device failed")
}
