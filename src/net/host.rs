//! The host's side, which is the same for any number of sandboxes.

use std::{fs, io, path::Path, thread};

use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::{address::AddressScope, link::InfoKind};

use super::{
    Error, conntrack, firewall,
    link::{self, Link},
    nft::{self, Family, Mode},
    range::{Range, Whose},
    route,
};
use crate::{
    sandbox::network::{AddressPlan, SandboxAddress},
    sys::{
        netlink::{self, Answers, Kernel, RequestError},
        netns, tun,
    },
};

/// How the name of a link begins that is about to be removed; its number follows.
const ASIDE: &str = "dx";
/// Whether the host forwards at all, in the namespace of the thread that reads it.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// What was made of the firewall of the host, to tell whether somebody has changed it.
#[derive(Debug)]
pub(super) struct HostFirewall {
    generation: u32,
    /// `None`: others changed the firewall all the while, so this is not known.
    contents: Option<Vec<NetfilterMessage>>,
}

/// How often the second check is put in force to know what it is, while others change the
/// firewall too. Each time takes a millisecond or two.
const HOST_FIREWALL_TRIES: usize = 4;

/// What was put back of what is the host's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PutBack {
    /// In words.
    pub(super) what: Vec<&'static str>,
    /// Whether the device is another than before. Whoever had it open has nothing.
    pub(super) has_new_device: bool,
}

/// Prepares the host: a directory for pins, a device with the host's own address in the
/// range, an answer for addresses that nobody has, and the second check.
///
/// # Errors
/// Where something cannot be made, or is somebody else's. Doing it again is no error.
pub(super) fn prepare(range: &Range, pins: &Path) -> Result<HostFirewall, Error> {
    let plan = &range.plan;
    let links = link::here()?;
    // Before anything is made. The device stands for all that is the host's.
    let there = own_device(&links, range)?;
    if there.is_none() {
        route::is_free(&links, plan.range())?;
    }
    netns::make_pin_dir(pins).map_err(Error::host("making the directory of namespaces"))?;
    let in_force = apply_host_firewall(&nft::here()?, plan)?;
    // A daemon that was killed may have left it; nobody listens there now.
    links.apply(vec![route::remove(plan.range())], Answers::Each)?;
    put_device(&links, range, there)?;
    links.apply(vec![route::unreachable(plan.range())], Answers::Each)?;
    Ok(in_force)
}

/// Compares what [`prepare`] made with what there is, and puts back what is missing. What is
/// there stays as it is.
///
/// # Errors
/// Where something cannot be put back. The rest was all the same.
pub(super) fn put_back(range: &Range, in_force: &mut HostFirewall) -> Result<PutBack, Error> {
    let plan = &range.plan;
    let mut done = PutBack::default();
    let firewall = renew_host_firewall(plan, in_force).map(|again| {
        done.what.extend(again.then_some("the host's firewall for sandboxes"));
    });
    let links = link::here()?;
    let there = own_device(&links, range)?;
    let is_whole = there.as_ref().is_some_and(|it| it.is_in_use && it.forwards)
        && route::is_local(&links, plan.host_address())?;
    if !is_whole {
        done.has_new_device = there.is_none();
        put_device(&links, range, there)?;
        done.what.push("the host's device");
    }
    match links.apply(vec![route::add_unreachable(plan.range())], Answers::Each) {
        Ok(()) => done.what.push("the route of unused addresses"),
        Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error.into()),
    }
    firewall.map(|()| done)
}

/// Returns what is missing of what a daemon has made of the host, whichever store it has.
/// `None`: none has, as there is neither a device nor a link of a sandbox.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn missing(plan: &AddressPlan) -> Result<Option<Vec<&'static str>>, Error> {
    let links = link::here()?;
    let all = link::list(&links)?;
    let device = all.iter().find(|link| link.name == device(plan));
    if device.is_none() && all.iter().all(|link| link.group != plan.link_group()) {
        return Ok(None);
    }
    let mut missing = Vec::new();
    if !device.is_some_and(|link| link.is_in_use && link.forwards)
        || !route::is_local(&links, plan.host_address())?
    {
        missing.push("the host's device, in use and with its address");
    }
    if !nft::has_table(&nft::here()?, Family::Inet, &firewall::host_table(plan))? {
        missing.push("the host's firewall for sandboxes");
    }
    Ok(Some(missing))
}

/// Puts the second check in force.
fn apply_host_firewall(netfilter: &Kernel, plan: &AddressPlan) -> Result<HostFirewall, Error> {
    let mut in_force = HostFirewall { generation: 0, contents: None };
    for _ in 0..HOST_FIREWALL_TRIES {
        in_force = try_apply_host_firewall(netfilter, plan)?;
        if in_force.contents.is_some() {
            break;
        }
    }
    // Connections keep what they began with. Where the kernel does not let go of them, they
    // are without an answer until they time out.
    if let Err(error) = conntrack::forget_untranslated(netfilter, plan.range()) {
        let error = super::chain(&error);
        tracing::warn!(
            error,
            "connections that sandboxes opened while the firewall was missing stay untranslated"
        );
    }
    Ok(in_force)
}

fn try_apply_host_firewall(netfilter: &Kernel, plan: &AddressPlan) -> Result<HostFirewall, Error> {
    let table = firewall::host_table(plan);
    let before = nft::generation(netfilter).map_err(without_nftables)?;
    let mode = match nft::has_table(netfilter, Family::Inet, &table) {
        Ok(true) => Mode::Replace,
        Ok(false) => Mode::First,
        Err(error) => return Err(without_nftables(error)),
    };
    nft::apply(netfilter, &firewall::of_host(plan, &device(plan)), mode)?;
    let contents = nft::contents(netfilter, Family::Inet, &table)?;
    let generation = nft::generation(netfilter)?;
    // Each change is one more. With another's between these, the contents may be what that has
    // left, and not what we made.
    let is_known = generation == before.wrapping_add(1);
    Ok(HostFirewall { generation, contents: is_known.then_some(contents) })
}

/// Puts the second check in force again if somebody has changed it. Most changes of a host's
/// firewall are of other tables.
fn renew_host_firewall(plan: &AddressPlan, in_force: &mut HostFirewall) -> Result<bool, Error> {
    let netfilter = nft::here()?;
    let generation = nft::generation(&netfilter)?;
    if generation == in_force.generation && in_force.contents.is_some() {
        return Ok(false);
    }
    let contents = nft::contents(&netfilter, Family::Inet, &firewall::host_table(plan))?;
    if in_force.contents.as_ref() == Some(&contents) {
        in_force.generation = generation;
        return Ok(false);
    }
    *in_force = apply_host_firewall(&netfilter, plan)?;
    Ok(true)
}

/// Takes the host's device into use with its address, and makes it if it is not there.
fn put_device(links: &Kernel, range: &Range, there: Option<Link>) -> Result<(), Error> {
    let plan = &range.plan;
    let name = device(plan);
    let index = match there {
        Some(there) => there.index,
        None => {
            tun::make(&name, tun::Device::Tun, 0).map_err(without_tun)?;
            link::find(links, &name)?.ok_or(Error::NotThere)?.index
        }
    };
    let requests = vec![
        link::group(index, plan.link_group()),
        link::alias(index, range.mark()),
        link::without_ipv6(index),
        link::forwarding_own(index),
        link::address(index, plan.host_address(), 32, AddressScope::Universe),
        link::up(index),
    ];
    Ok(links.apply(requests, Answers::Each)?)
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
    Ok(nft::remove(&nft::here()?, Family::Inet, &firewall::host_table(plan))?)
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
    Ok(links.apply(vec![link::remove(found.index)], Answers::Each)?)
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
            tracing::warn!(link = aside, error = super::chain(&error), "a link was not removed");
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

fn without_nftables(error: RequestError) -> Error {
    if netlink::is_unsupported(&error.source) {
        return Error::Lacking {
            lacks: "its kernel has no nf_tables",
            remedy: "load it with `modprobe nf_tables`",
        };
    }
    error.into()
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
