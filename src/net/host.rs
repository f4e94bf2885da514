//! The host's side, which is the same for any number of sandboxes.

use std::{fs, io, path::Path, thread};

use netlink_packet_route::{address::AddressScope, link::InfoKind};

use super::{
    Error, firewall,
    link::{self, Link},
    netlink::{Answers, Kernel},
    nftables::{self, Mode},
    range::{Range, Whose},
    route,
    ruleset::Family,
};
use crate::{
    sandbox::network::{AddressPlan, SandboxAddress},
    sys::{netlink, netns, tun},
};

/// How the name of a link begins that is about to be removed; its number follows.
const ASIDE: &str = "dx";
/// Whether the host forwards at all, in the namespace of the thread that reads it.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Prepares the host: a directory for pins, a device with the host's own address in the
/// range, an answer for addresses that nobody has, and the second guard.
///
/// # Errors
/// Where something cannot be made, or is somebody else's. Doing it again is no error.
pub(super) fn prepare(range: &Range, pins: &Path) -> Result<(), Error> {
    let plan = &range.plan;
    let links = link::here()?;
    let name = device(plan);
    // Before anything is made. It stands for all that is the host's.
    let there = own_device(&links, range)?;
    if there.is_none() {
        route::is_free(&links, plan.range())?;
    }
    netns::make_pin_dir(pins).map_err(Error::host("making the directory of namespaces"))?;
    let wall = nftables::here()?;
    let table = firewall::host_table(plan);
    let mode = match nftables::has_table(&wall, Family::Inet, &table) {
        Ok(true) => Mode::Replace,
        Ok(false) => Mode::First,
        Err(error) => return Err(without_nftables(error)),
    };
    nftables::apply(&wall, &firewall::of_host(plan, &name), mode)?;
    tun::make(&name, tun::Device::Tun, 0).map_err(without_tun)?;
    let index = link::find(&links, &name)?.ok_or(Error::NotThere)?.index;
    let requests = vec![
        // A daemon that was killed may have left it; nobody listens there now.
        route::remove(plan.range()),
        link::group(index, plan.link_group()),
        link::alias(index, range.mark()),
        link::without_ipv6(index),
        link::forwarding_own(index),
        link::address(index, plan.host_address(), 32, AddressScope::Universe),
        link::up(index),
        route::unreachable(plan.range()),
    ];
    links.apply(requests, Answers::Each)
}

/// Takes back what [`prepare`] did, but for the directory.
///
/// # Errors
/// Where something stays.
pub(super) fn dismantle(range: &Range) -> Result<(), Error> {
    let plan = &range.plan;
    let links = link::here()?;
    let device = own_device(&links, range)?;
    let mut requests = vec![route::remove(plan.range()), route::remove_unreachable(plan.range())];
    requests.extend(device.map(|device| link::remove(device.index)));
    links.apply(requests, Answers::Each)?;
    nftables::remove(&nftables::here()?, Family::Inet, &firewall::host_table(plan))
}

/// Returns the host's device, if it is there.
///
/// # Errors
/// Where one of its name is not ours.
pub(super) fn own_device(links: &Kernel, range: &Range) -> Result<Option<Link>, Error> {
    let found = link::find(links, &device(&range.plan))?;
    let is_others = |it: &Link| it.kind != Some(InfoKind::Tun) || range.whose(it) == Whose::Others;
    match found {
        Some(found) if is_others(&found) => Err(not_ours(&found)),
        found => Ok(found),
    }
}

fn not_ours(link: &Link) -> Error {
    let mark = link.alias.as_ref().map(|mark| format!(" (`{mark}`)")).unwrap_or_default();
    Error::NotOurs { name: format!("the link {}{mark}", link.name) }
}

/// Returns the name of the device that has the host's own address.
pub(super) fn device(plan: &AddressPlan) -> String {
    format!("dozed{:08x}", plan.link_group())
}

/// Says whether the host lets packets through from one link to another.
///
/// # Errors
/// A sentence that says how to let it.
pub(super) fn forwards() -> Result<(), Error> {
    let value = fs::read_to_string(FORWARDING)
        .map_err(Error::host("looking whether the host forwards packets"))?;
    if value.trim() == "0" {
        return Err(Error::Lacking {
            lacks: "it does not forward IPv4 packets",
            remedy: "set net.ipv4.ip_forward = 1 with sysctl",
        });
    }
    Ok(())
}

/// Removes the link of the host that is called `name`, if it is of a sandbox of ours.
///
/// # Errors
/// Where one of that name is not ours, or it stays.
pub(super) fn remove_link(links: &Kernel, range: &Range, name: &str) -> Result<(), Error> {
    let Some(found) = own_link(links, range, name)? else { return Ok(()) };
    links.apply(vec![link::remove(found.index)], Answers::Each)
}

/// Frees the name of a link, if it is of a sandbox of ours: nothing passes by it any more
/// when this returns, and it is removed a little later, as the kernel takes some 25 ms to.
///
/// # Errors
/// Where one of that name is not ours, or it stays.
pub(super) fn set_aside(range: &Range, name: &str) -> Result<(), Error> {
    let links = link::here()?;
    let Some(Link { index, .. }) = own_link(&links, range, name)? else { return Ok(()) };
    let aside = format!("{ASIDE}{index:08x}");
    links.apply(vec![link::down(index), link::rename(index, &aside)], Answers::Each)?;
    let remove = move || {
        if let Err(error) = links.apply(vec![link::remove(index)], Answers::Each) {
            // The next start removes it.
            tracing::warn!(link = aside, error = super::real::chain(&error), "a link stays");
        }
    };
    thread::Builder::new()
        .name("dozed-unlink".to_owned())
        .spawn(remove)
        .map(drop)
        .map_err(Error::host("starting to remove a link"))
}

/// Returns the link of the host that is called `name`, if it is there.
///
/// # Errors
/// Where one of that name is not ours.
pub(super) fn own_link(links: &Kernel, range: &Range, name: &str) -> Result<Option<Link>, Error> {
    match link::find(links, name)? {
        Some(found) if !is_of_a_sandbox(range, &found) => Err(not_ours(&found)),
        found => Ok(found),
    }
}

/// Says whether a link is, or was, the host's end of a sandbox of this range, and not of
/// another daemon's.
pub(super) fn is_of_a_sandbox(range: &Range, link: &Link) -> bool {
    let plan = &range.plan;
    let address = SandboxAddress::of_host_link(&link.name);
    let is_aside = || link.name.strip_prefix(ASIDE).is_some_and(|rest| rest.len() == 8);
    range.whose(link) != Whose::Others
        && link.group == plan.link_group()
        && link.kind == Some(InfoKind::Veth)
        && address.map_or_else(is_aside, |address| plan.sandbox(address).is_some())
}

fn without_nftables(error: Error) -> Error {
    if let Error::Host { source, .. } = &error
        && netlink::is_unsupported(source)
    {
        return Error::Lacking {
            lacks: "its kernel has no nf_tables",
            remedy: "load it with `modprobe nf_tables`",
        };
    }
    error
}

fn without_tun(source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound || netlink::is_missing(&source) {
        return Error::Lacking {
            lacks: "there is no /dev/net/tun",
            remedy: "load it with `modprobe tun`",
        };
    }
    Error::Host { doing: "making the host's device".into(), source }
}
