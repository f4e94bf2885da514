//! What this process may not do that networks need, such as where its unit forbids it.

use std::{fs::File, io, net::UdpSocket};

use crate::sys::{
    host::may_configure_networks,
    netlink::{Family, NetlinkSocket},
};

/// Where taps are made.
const TUN_FILE: &str = "/dev/net/tun";

/// Returns a few words for each thing that this process is forbidden, and that the networks
/// of sandboxes need. They are its own and do not change while it runs.
#[must_use]
pub fn missing_privileges() -> Vec<String> {
    let netlink = NetlinkSocket::open(Family::Route).map(drop);
    let inet = UdpSocket::bind("127.0.0.1:0").map(drop);
    let tun = File::options().read(true).write(true).open(TUN_FILE).map(drop);
    let mut missing = describe_failed(&[
        ("sockets of AF_NETLINK", netlink),
        ("sockets of AF_INET", inet.or_else(unless_unavailable)),
        (TUN_FILE, tun),
    ]);
    if !may_configure_networks() {
        missing.push("CAP_NET_ADMIN".to_owned());
    }
    missing
}

/// Of an address family that may be used there may be no address.
fn unless_unavailable(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AddrNotAvailable { Ok(()) } else { Err(error) }
}

fn describe_failed(tried: &[(&str, io::Result<()>)]) -> Vec<String> {
    let failed = tried.iter().filter_map(|(what, result)| Some((what, result.as_ref().err()?)));
    failed.map(|(what, error)| format!("{what} ({error})")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_that_is_forbidden_is_named_with_its_reason() {
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(describe_failed(&[("a", Ok(())), ("b", denied())]), ["b (permission denied)"]);
        assert_eq!(missing_privileges(), [""; 0], "tests of networks need all of them");
    }
}
