//! Links, addresses and neighbours, as requests to the kernel. Routes are in `route`.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
    os::fd::RawFd,
    time::Duration,
};

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkMessage};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind,
        InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::RouteType,
};

use super::Error;
use crate::{
    sandbox::network::Mac,
    sys::{
        clock::{Deadline, pause_for},
        netlink::{Accepts, Family, Kernel, Request},
    },
};

/// The kernel tells a link that somebody is at its other end within a millisecond or two,
/// and where it is in no hurry once a second.
const UP_LIMIT: Duration = Duration::from_secs(2);
const UP_PAUSE: Duration = Duration::from_micros(500);

/// Narrower networks have no broadcast.
const BROADCAST_PREFIX_MAX: u8 = 30;

/// What is known of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) group: u32,
    pub(super) mac: Option<Vec<u8>>,
    /// The number of the bridge or the like that has taken it.
    pub(super) controller: Option<u32>,
    pub(super) kind: Option<InfoKind>,
    /// Whether what is sent by it arrives somewhere.
    pub(super) is_up: bool,
    /// Whether it is in use, whether or not anybody is at its other end.
    pub(super) is_in_use: bool,
    /// Whether IPv4 packets that come in by it go on to others.
    pub(super) forwards: bool,
    /// How many packets have passed it, either way.
    pub(super) packets: u64,
}

/// Opens a socket for the links of the namespace that this thread is in.
pub(super) fn here() -> Result<Kernel, Error> {
    Ok(Kernel::here(Family::Route)?)
}

/// Finds the link called `name`.
pub(super) fn find(kernel: &Kernel, name: &str) -> Result<Option<Link>, Error> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    let message = NetlinkMessage::from(RouteNetlinkMessage::GetLink(message));
    Ok(kernel.get("looking for a link", message)?.and_then(as_link))
}

/// Waits until what is sent by the link arrives at its other end. Until the kernel has told
/// the link that somebody is there, it drops it. Returns whether it does now.
pub(super) fn wait_until_up(kernel: &Kernel, name: &str) -> Result<bool, Error> {
    let deadline = Deadline::after(UP_LIMIT);
    loop {
        if find(kernel, name)?.ok_or(Error::NotThere)?.is_up {
            return Ok(true);
        }
        if deadline.passed() {
            return Ok(false);
        }
        pause_for(UP_PAUSE);
    }
}

/// Returns all links.
pub(super) fn list(kernel: &Kernel) -> Result<Vec<Link>, Error> {
    let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let found = kernel.list("listing the links", NetlinkMessage::from(message))?;
    Ok(found.into_iter().filter_map(as_link).collect())
}

/// Says whether `mac` is said for good to be that of `address` at the link `index`.
pub(super) fn has_neighbour(
    kernel: &Kernel,
    index: u32,
    address: Ipv4Addr,
    mac: Mac,
) -> Result<bool, Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(NeighbourAddress::Inet(address))];
    let message = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(message));
    let found = kernel.get("looking for a neighbour", message)?;
    let Some(RouteNetlinkMessage::NewNeighbour(found)) = found else { return Ok(false) };
    let wanted = NeighbourAttribute::LinkLayerAddress(mac.0.into());
    Ok(found.header.state == NeighbourState::Permanent && found.attributes.contains(&wanted))
}

/// Returns all IPv4 addresses at which this namespace takes what is sent: its own, and the
/// broadcasts of its networks.
pub(super) fn addresses(kernel: &Kernel) -> Result<Vec<Ipv4Addr>, Error> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    let message = NetlinkMessage::from(RouteNetlinkMessage::GetAddress(message));
    let found = kernel.list("listing the host's addresses", message)?;
    let mut addresses: Vec<Ipv4Addr> = found.into_iter().flat_map(taken_at).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

fn taken_at(message: RouteNetlinkMessage) -> Vec<Ipv4Addr> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return Vec::new() };
    let mut taken = Vec::new();
    for attribute in message.attributes {
        if let AddressAttribute::Local(IpAddr::V4(address)) = attribute {
            taken.push(address);
        } else if let AddressAttribute::Broadcast(address) = attribute {
            taken.push(address);
        } else if let AddressAttribute::Address(IpAddr::V4(address)) = attribute
            && let Ok(network) = Ipv4Net::new(address, message.header.prefix_len)
            && network.prefix_len() <= BROADCAST_PREFIX_MAX
        {
            // Also where no broadcast is set; the first one was for that before Linux 5.14.
            taken.extend([network.network(), network.broadcast()]);
        }
    }
    taken
}

pub(super) fn as_link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: None,
        group: 0,
        mac: None,
        controller: None,
        kind: None,
        is_up: false,
        is_in_use: message.header.flags.contains(LinkFlags::Up),
        forwards: false,
        packets: 0,
    };
    for attribute in message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name = name;
        } else if let LinkAttribute::IfAlias(alias) = attribute {
            link.alias = Some(alias);
        } else if let LinkAttribute::Group(group) = attribute {
            link.group = group;
        } else if let LinkAttribute::Address(mac) = attribute {
            link.mac = Some(mac);
        } else if let LinkAttribute::Controller(index) = attribute {
            link.controller = Some(index);
        } else if let LinkAttribute::Stats64(stats) = attribute {
            link.packets = stats.rx_packets.saturating_add(stats.tx_packets);
        } else if let LinkAttribute::OperState(state) = attribute {
            link.is_up = state == State::Up;
        } else if let LinkAttribute::AfSpecUnspec(specs) = attribute {
            link.forwards = specs.iter().any(forwards);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            link.kind = infos.into_iter().find_map(kind_of);
        }
    }
    Some(link)
}

fn forwards(spec: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet(settings) = spec else { return false };
    settings
        .iter()
        .any(|it| matches!(it, AfSpecInet::DevConf(settings) if settings.forwarding != 0))
}

fn kind_of(info: LinkInfo) -> Option<InfoKind> {
    if let LinkInfo::Kind(kind) = info { Some(kind) } else { None }
}

/// One end of a pair of links.
#[derive(Debug)]
pub(super) struct End<'a> {
    pub(super) name: &'a str,
    pub(super) mac: Mac,
    pub(super) group: u32,
}

/// Makes a pair of links: `here`, and `there` in the namespace that is open as `namespace`.
pub(super) fn pair(
    here: &End<'_>,
    there: &End<'_>,
    namespace: RawFd,
) -> Request<RouteNetlinkMessage> {
    let described = |end: &End<'_>| {
        vec![
            LinkAttribute::IfName(end.name.to_owned()),
            LinkAttribute::Address(end.mac.0.into()),
            LinkAttribute::Group(end.group),
        ]
    };
    let mut peer = LinkMessage::default();
    peer.attributes = described(there);
    peer.attributes.push(LinkAttribute::NetNsFd(namespace));
    let mut message = LinkMessage::default();
    message.attributes = described(here);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewLink(message));
    message.header.flags = NLM_F_CREATE | NLM_F_EXCL;
    request(format!("making the link {}", there.name), message)
}

/// Gives a link no IPv6 address of its own. A kernel without IPv6 has no need to be told.
pub(super) fn without_ipv6(index: u32) -> Request<RouteNetlinkMessage> {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let message =
        change(index, vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])]);
    Request {
        accepts: Accepts::Unsupported,
        ..request("keeping IPv6 off a link", set_link(message))
    }
}

/// Lets IPv4 packets that come in by a link go on to others. It is a setting of the link,
/// told by this socket: the file in `/proc/sys` takes longer the more namespaces there are.
pub(super) fn forwarding(index: u32) -> Request<RouteNetlinkMessage> {
    let mut settings = InetDevConf::default();
    settings.forwarding = 1;
    let inet = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
    let message = change(index, vec![LinkAttribute::AfSpecUnspec(vec![inet])]);
    request("letting a link forward", set_link(message))
}

/// Lets packets that come in by a link go on to others although they are from the host
/// itself.
pub(super) fn forwarding_own(index: u32) -> Request<RouteNetlinkMessage> {
    let mut settings = InetDevConf::default();
    settings.forwarding = 1;
    settings.accept_local = 1;
    let inet = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
    let message = change(index, vec![LinkAttribute::AfSpecUnspec(vec![inet])]);
    request("letting the host's link forward what is the host's", set_link(message))
}

/// Makes a link one of ours.
pub(super) fn group(index: u32, group: u32) -> Request<RouteNetlinkMessage> {
    let message = change(index, vec![LinkAttribute::Group(group)]);
    request("setting the group of a link", set_link(message))
}

/// Takes a link out of a bridge or the like.
pub(super) fn release(index: u32) -> Request<RouteNetlinkMessage> {
    let message = change(index, vec![LinkAttribute::Controller(0)]);
    request("taking a link out of a bridge", set_link(message))
}

/// Changes the MAC of a link. The kernel forgets its neighbours.
pub(super) fn mac(index: u32, mac: Mac) -> Request<RouteNetlinkMessage> {
    let message = change(index, vec![LinkAttribute::Address(mac.0.into())]);
    request("setting the MAC of a link", set_link(message))
}

/// Writes down what a link is for.
pub(super) fn alias(index: u32, alias: &str) -> Request<RouteNetlinkMessage> {
    let message = change(index, vec![LinkAttribute::IfAlias(alias.to_owned())]);
    request("marking a link", set_link(message))
}

/// Takes a link into use.
pub(super) fn up(index: u32) -> Request<RouteNetlinkMessage> {
    let mut message = change(index, Vec::new());
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    request("setting a link up", set_link(message))
}

/// Takes a link out of use.
pub(super) fn down(index: u32) -> Request<RouteNetlinkMessage> {
    let mut message = change(index, Vec::new());
    message.header.change_mask = LinkFlags::Up;
    let request = request("setting a link down", set_link(message));
    Request { accepts: Accepts::Missing, ..request }
}

/// Gives a link that is down another name.
pub(super) fn rename(index: u32, name: &str) -> Request<RouteNetlinkMessage> {
    let message = change(index, vec![LinkAttribute::IfName(name.to_owned())]);
    let request = request("renaming a link", set_link(message));
    Request { accepts: Accepts::Missing, ..request }
}

/// Removes a link, and its peer if it has one.
pub(super) fn remove(index: u32) -> Request<RouteNetlinkMessage> {
    let message = NetlinkMessage::from(RouteNetlinkMessage::DelLink(change(index, Vec::new())));
    Request { accepts: Accepts::Missing, ..request("removing a link", message) }
}

fn change(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn set_link(message: LinkMessage) -> NetlinkMessage<RouteNetlinkMessage> {
    NetlinkMessage::from(RouteNetlinkMessage::SetLink(message))
}

/// Gives a link an address.
pub(super) fn address(
    index: u32,
    address: Ipv4Addr,
    prefix: u8,
    scope: AddressScope,
) -> Request<RouteNetlinkMessage> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.header.scope = scope;
    message.attributes =
        vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
    put(format!("adding the address {address}"), RouteNetlinkMessage::NewAddress(message))
}

/// Says for good which MAC an address of a link has, so that nobody asks.
pub(super) fn neighbour(index: u32, address: Ipv4Addr, mac: Mac) -> Request<RouteNetlinkMessage> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.0.into()),
    ];
    put(format!("adding the neighbour {address}"), RouteNetlinkMessage::NewNeighbour(message))
}

/// Adds, or takes the place of what is there.
pub(super) fn put(
    doing: impl Into<Cow<'static, str>>,
    message: RouteNetlinkMessage,
) -> Request<RouteNetlinkMessage> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_CREATE | NLM_F_REPLACE;
    request(doing, message)
}

pub(super) fn request(
    doing: impl Into<Cow<'static, str>>,
    message: NetlinkMessage<RouteNetlinkMessage>,
) -> Request<RouteNetlinkMessage> {
    Request { doing: doing.into(), message, accepts: Accepts::Success }
}
