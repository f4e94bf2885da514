//! One sandbox's namespace: made, verified, put back in order.

use std::{
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use netlink_packet_route::{address::AddressScope, link::InfoKind};

use super::{
    Error, Wanted, conntrack,
    firewall::{self, NAMESERVERS, TABLE, TAP, UPLINK},
    link::{self, End, Link},
    nft::{self, Family, Mode, Ruleset},
    range::{Range, Whose},
    route::{self, Ensured},
};
use crate::{
    sandbox::network::{
        AddressPlan, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX, Ignored,
        SandboxAddress,
    },
    sync::Arc,
    sys::{
        netlink::{Answers, Kernel},
        netns::{self, Inside, Namespace},
        tun,
    },
};

/// What the way out of a namespace goes to. Nobody has the address: the neighbour is
/// known for good, and the link has only one other end.
const NEXT_HOP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
const PORT_DNS: u16 = 53;
/// An address that is reached by the way out, whichever route there is.
const ANYWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A sandbox's namespace as it is to be.
#[derive(Debug, Clone)]
pub(super) struct Design {
    pub(super) wanted: Wanted,
    pub(super) group: u32,
    pub(super) rules: Ruleset,
    /// The host's addresses that the rules protect.
    pub(super) protected: Arc<[Ipv4Addr]>,
}

impl Design {
    pub(super) fn new(
        plan: &AddressPlan,
        protected: Arc<[Ipv4Addr]>,
        wanted: &Wanted,
        ignored: &Ignored,
    ) -> Self {
        Self {
            wanted: wanted.clone(),
            group: plan.link_group(),
            rules: firewall::of_sandbox(plan, wanted.address, &protected, &wanted.policy, ignored),
            protected,
        }
    }

    /// Returns the mark of the namespace. A namespace with another is not used again.
    fn mark(&self) -> String {
        let Wanted { id, address, tap_owner, .. } = &self.wanted;
        format!("dozed {LAYOUT} {id} {address} {tap_owner}")
    }
}

/// The version of what a namespace has in it, rules aside. One that an older daemon made
/// otherwise is made anew.
const LAYOUT: u32 = 1;

/// Makes the namespace and pins it to `pin` when all of it is in place. Its link's other
/// end is in the namespace of the caller, and down.
///
/// # Errors
/// Where something cannot be made. Nothing is left then.
pub(super) fn make(pin: &Path, design: Design) -> Result<Namespace, Error> {
    let host = Namespace::current()
        .and_then(|host| host.file())
        .map_err(Error::host("looking for the host's namespace"))?;
    let pin = pin.to_owned();
    netns::in_a_new_one(move |inside| {
        let netfilter = nft::here()?;
        let made = fill(&netfilter, &host, &design)
            .and_then(|()| inside.pin(&pin).map_err(Error::host("pinning the namespace")));
        // It takes the kernel long to close it.
        inside.drop_later(netfilter);
        made
    })
    .map_err(Error::host("making a namespace"))?
}

/// Puts all that it is to have into the new namespace that this thread is in. The firewall
/// is there before any of its links is in use.
fn fill(netfilter: &Kernel, host: &OwnedFd, design: &Design) -> Result<(), Error> {
    let tap_owner = design.wanted.tap_owner;
    tun::make(TAP, tun::Device::Tap, tap_owner).map_err(Error::host("making the tap"))?;
    let links = link::here()?;
    add_uplink(&links, host, design)?;
    let tap = link::find(&links, TAP)?.ok_or(Error::NotThere)?.index;
    links.apply(vec![link::mac(tap, GATEWAY_MAC), link::without_ipv6(tap)], Answers::Each)?;
    nft::apply(netfilter, &design.rules, Mode::First)?;
    put_in_order(&links, design)
}

/// Makes the pair of links between the namespace of this thread and the host's.
fn add_uplink(links: &Kernel, host: &OwnedFd, design: &Design) -> Result<(), Error> {
    let address = design.wanted.address;
    let inner = End { name: UPLINK, mac: address.inner_mac(), group: 0 };
    let outer = End { name: &address.host_link(), mac: address.host_mac(), group: design.group };
    Ok(links.apply(vec![link::pair(&inner, &outer, host.as_raw_fd())], Answers::Each)?)
}

/// Gives the links their addresses, neighbours and routes, and takes them into use. What
/// is as it is to be stays so.
fn put_in_order(links: &Kernel, design: &Design) -> Result<(), Error> {
    let address = design.wanted.address;
    let tap = link::find(links, TAP)?.ok_or(Error::NotThere)?.index;
    let uplink = link::find(links, UPLINK)?.ok_or(Error::NotThere)?.index;
    let requests = vec![
        link::without_ipv6(uplink),
        link::forwarding(tap),
        link::forwarding(uplink),
        link::address(tap, GATEWAY_ADDRESS, GUEST_PREFIX, AddressScope::Link),
        link::address(uplink, address.ip(), 32, AddressScope::Universe),
        link::neighbour(tap, GUEST_ADDRESS, GUEST_MAC),
        link::neighbour(uplink, NEXT_HOP, address.host_mac()),
        link::alias(uplink, &design.mark()),
        link::up(tap),
        link::up(uplink),
        route::by_default(uplink, NEXT_HOP),
    ];
    Ok(links.apply(requests, Answers::Each)?)
}

/// Whether a namespace that is there can be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usability {
    /// It is this sandbox's, and all is in it.
    Whole,
    /// It is another's, or an older daemon's, or somebody took something out of it.
    Unusable,
}

/// Looks whether the namespace is this sandbox's and whole, and if so puts it in order and
/// the firewall in force.
///
/// # Errors
/// Where it cannot be looked into, or put in order.
pub(super) fn renew(namespace: &Namespace, design: Design) -> Result<Usability, Error> {
    enter(namespace, move |inside| {
        let links = link::here()?;
        let netfilter = nft::here()?;
        if !is_whole(&links, &netfilter, &design)? {
            return Ok(Usability::Unusable);
        }
        let done = replace_rules(&netfilter, &design)
            .and_then(|()| put_in_order(&links, &design))
            .map(|()| Usability::Whole);
        inside.drop_later(netfilter);
        done
    })
}

fn is_whole(links: &Kernel, netfilter: &Kernel, design: &Design) -> Result<bool, Error> {
    let tap = link::find(links, TAP)?;
    let uplink = link::find(links, UPLINK)?;
    let tap_is_ours = tap.is_some_and(|tap| {
        tap.kind == Some(InfoKind::Tun) && tap.mac.as_deref() == Some(&GATEWAY_MAC.0)
    });
    let uplink_is_ours = uplink.is_some_and(|uplink| {
        uplink.kind == Some(InfoKind::Veth) && uplink.alias == Some(design.mark())
    });
    Ok(tap_is_ours
        && uplink_is_ours
        && nft::has_table(netfilter, Family::Netdev, TABLE)?
        && nft::has_table(netfilter, Family::Inet, TABLE)?)
}

/// What is known of a namespace before it is looked over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    /// Whether it is proven to be the sandbox's, as its VMM is in it, whatever its mark says.
    pub(super) is_proven: bool,
    /// The number of its firewall, if that was in force as it is to be.
    pub(super) generation: Option<u32>,
    /// Whether the host has the other end of its link, by its name.
    pub(super) has_outer: bool,
}

/// What was put back in a namespace.
#[derive(Debug, Default)]
pub(super) struct PutBack {
    /// In words.
    pub(super) what: Vec<&'static str>,
    /// The number of its firewall now.
    pub(super) generation: u32,
}

/// Compares a namespace in which a guest runs with what it is to be, and puts back what is
/// missing. What is there stays, so no connection of the guest's ends by it.
///
/// # Errors
/// Where it is another's, or something cannot be put back: the guest's device, which its VMM
/// has opened, cannot.
pub(super) fn put_back(
    namespace: &Namespace,
    design: Design,
    before: Before,
) -> Result<PutBack, Error> {
    let host = Namespace::current()
        .and_then(|host| host.file())
        .map_err(Error::host("looking for the host's namespace"))?;
    enter(namespace, move |inside| {
        let links = link::here()?;
        let netfilter = nft::here()?;
        let mut done = PutBack::default();
        let tap = link::find(&links, TAP)?.ok_or(Error::NoDevice)?;
        let uplink = link::find(&links, UPLINK)?;
        let has_mark = |link: &Link| link.alias == Some(design.mark());
        if !before.is_proven && uplink.as_ref().is_some_and(|link| !has_mark(link)) {
            return Err(Error::NotOurs { name: "the namespace".to_owned() });
        }
        let tables = nft::has_table(&netfilter, Family::Netdev, TABLE)?
            && nft::has_table(&netfilter, Family::Inet, TABLE)?;
        // The firewall first: what is put back after it may let packets through.
        if !tables || before.generation != Some(nft::generation(&netfilter)?) {
            if tables {
                replace_rules(&netfilter, &design)?;
            } else {
                nft::apply(&netfilter, &design.rules, Mode::Replace)?;
            }
            let is_unexpected = !tables || before.generation.is_some();
            done.what.extend(is_unexpected.then_some("the firewall"));
        }
        done.generation = nft::generation(&netfilter)?;
        if let Some(uplink) = uplink.as_ref().filter(|_| !before.has_outer) {
            // Its other end has another name, or is in another namespace, and goes with it.
            links.apply(vec![link::remove(uplink.index)], Answers::Each)?;
        }
        if uplink.is_none() || !before.has_outer {
            add_uplink(&links, &host, &design)?;
            done.what.push("the link to the host");
        }
        if !is_in_order(&links, &tap, &design)? {
            if tap.mac.as_deref() != Some(&GATEWAY_MAC.0) {
                links.apply(vec![link::mac(tap.index, GATEWAY_MAC)], Answers::Each)?;
            }
            put_in_order(&links, &design)?;
            done.what.push("the links' settings");
        }
        inside.drop_later(netfilter);
        Ok(done)
    })
}

/// Says whether the links are in use, with their addresses, neighbours and routes.
fn is_in_order(links: &Kernel, tap: &Link, design: &Design) -> Result<bool, Error> {
    let address = design.wanted.address;
    let uplink = link::find(links, UPLINK)?.ok_or(Error::NotThere)?;
    let way_out = route::way_to(links, ANYWHERE)?;
    Ok([tap, &uplink].iter().all(|link| link.is_in_use && link.forwards)
        && tap.mac.as_deref() == Some(&GATEWAY_MAC.0)
        && uplink.alias == Some(design.mark())
        && way_out.is_some_and(|way| way.device == Some(uplink.index))
        && route::is_local(links, GATEWAY_ADDRESS)?
        && route::is_local(links, address.ip())?
        && link::has_neighbour(links, tap.index, GUEST_ADDRESS, GUEST_MAC)?
        && link::has_neighbour(links, uplink.index, NEXT_HOP, address.host_mac())?)
}

/// Puts the firewall of `design` in force in the namespace, in place.
///
/// # Errors
/// Where the kernel refuses; the one before is in force then.
pub(super) fn apply_policy(namespace: &Namespace, design: Design) -> Result<(), Error> {
    enter(namespace, move |inside| {
        let netfilter = nft::here()?;
        let done = replace_rules(&netfilter, &design);
        inside.drop_later(netfilter);
        done
    })
}

/// Puts the rules in force. Where the nameservers are others now, what the guest's
/// resolver asked of the ones before is forgotten, which takes the kernel a walk over the
/// connections of all namespaces, some 10 ms.
fn replace_rules(netfilter: &Kernel, design: &Design) -> Result<(), Error> {
    let today = design.rules.addresses(NAMESERVERS);
    let before = nft::starts(netfilter, Family::Inet, TABLE, NAMESERVERS)?;
    nft::apply(netfilter, &design.rules, Mode::Replace)?;
    if before == today {
        return Ok(());
    }
    // A resolver that asks from one port for ever is to get answers again. That nothing
    // goes to yesterday's nameservers does not depend on it, so a failure is no failure.
    if let Err(error) = conntrack::forget(netfilter, (GATEWAY_ADDRESS, PORT_DNS), &today) {
        let id = &design.wanted.id;
        tracing::warn!(%id, %error, "a resolver may have to wait for its questions to time out");
    }
    Ok(())
}

/// Opens the guest's device in the namespace.
///
/// # Errors
/// Where it is not there, or somebody has it open.
pub(super) fn open_tap(namespace: &Namespace) -> Result<OwnedFd, Error> {
    enter(namespace, |_| {
        tun::open(TAP, tun::Device::Tap).map_err(Error::host("opening the guest's device"))
    })
}

/// Returns what the counters of the namespace have counted, by name.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn counters(namespace: &Namespace) -> Result<Vec<(String, u64, u64)>, Error> {
    enter(namespace, |inside| {
        let netfilter = nft::here()?;
        let mut counted = nft::counters(&netfilter, Family::Inet, TABLE)?;
        counted.extend(nft::counters(&netfilter, Family::Netdev, TABLE)?);
        inside.drop_later(netfilter);
        Ok(counted)
    })
}

/// Takes the host's end of the link into use.
///
/// # Errors
/// Where there is none, or the kernel refuses.
pub(super) fn connect(links: &Kernel, range: &Range, address: SandboxAddress) -> Result<(), Error> {
    let there = link::find(links, &address.host_link())?.ok_or(Error::NotThere)?;
    let outer = there.index;
    let mut requests = Vec::new();
    if there.controller.is_some() {
        requests.push(link::release(outer));
    }
    // The other end sends to this one, and to no other.
    if !has_mac(&there, address) {
        requests.push(link::mac(outer, address.host_mac()));
    }
    requests.extend([
        link::alias(outer, range.mark()),
        link::without_ipv6(outer),
        link::forwarding(outer),
        link::neighbour(outer, address.ip(), address.inner_mac()),
        link::up(outer),
    ]);
    Ok(links.apply(requests, Answers::Each)?)
}

fn has_mac(outer: &Link, address: SandboxAddress) -> bool {
    outer.mac.as_deref() == Some(&address.host_mac().0)
}

/// Says whether [`connect`] has nothing to do.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn is_connected(
    links: &Kernel,
    range: &Range,
    outer: &Link,
    address: SandboxAddress,
) -> Result<bool, Error> {
    Ok(outer.is_in_use
        && outer.forwards
        && outer.controller.is_none()
        && has_mac(outer, address)
        && range.whose(outer) == Whose::Ours
        && link::has_neighbour(links, outer.index, address.ip(), address.inner_mac())?)
}

/// Sends what is for the sandbox to its link, which is the last thing to do.
///
/// # Errors
/// Where there is no link, or the kernel refuses.
pub(super) fn route(
    links: &Kernel,
    plan: &AddressPlan,
    address: SandboxAddress,
) -> Result<Ensured, Error> {
    let outer = link::find(links, &address.host_link())?.ok_or(Error::NotThere)?.index;
    route::ensure(links, outer, address.ip(), plan.host_address())
}

/// Waits until a packet to the sandbox gets to whoever has its guest's device open. Returns
/// whether it does.
///
/// # Errors
/// Where a link is missing.
pub(super) fn wait_until_up(namespace: &Namespace) -> Result<bool, Error> {
    enter(namespace, |_| {
        let links = link::here()?;
        Ok(link::wait_until_up(&links, UPLINK)? && link::wait_until_up(&links, TAP)?)
    })
}

fn enter<T: Send + 'static>(
    namespace: &Namespace,
    job: impl FnOnce(&Inside) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    namespace.run(job).map_err(Error::host("entering the namespace"))?
}
