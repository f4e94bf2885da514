//! Routes, as requests to the kernel and as what it says of them.
//!
//! A route of somebody else's is never replaced: where one is in the place of ours, that is
//! an error with its name.

use std::{borrow::Cow, collections::BTreeMap, io, net::Ipv4Addr};

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NetlinkMessage};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
};

use super::{
    Error,
    link::{self, put, request},
};
use crate::sys::netlink::{Accepts, Answers, Kernel, Request};

/// Who made a route, in the words of the kernel: none of the protocols that have a number.
const OURS: RouteProtocol = RouteProtocol::Other(213);
/// What the answer for addresses that nobody has comes after: any other route of ours.
const UNREACHABLE_METRIC: u32 = 213;

/// What became of a route that is to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ensured {
    /// It was there.
    There,
    /// It was not, or went elsewhere.
    Added,
}

/// The route by which the kernel sends what is for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// What the route is for.
    pub(super) network: Ipv4Net,
    /// The number of the device, if it goes by one.
    pub(super) device: Option<u32>,
    /// Whether a daemon of ours made it.
    pub(super) is_ours: bool,
    /// Whether it leads to this host itself.
    is_local: bool,
}

/// Says whether `address` is one of the host's own.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn is_local(kernel: &Kernel, address: Ipv4Addr) -> Result<bool, Error> {
    Ok(way_to(kernel, address)?.is_some_and(|way| way.is_local))
}

/// Sees to it that what is for `network`, or an address, is sent to the link `index`, from
/// `source`.
///
/// # Errors
/// `NotOurs` where somebody else has a route to just this network.
pub(super) fn ensure(
    kernel: &Kernel,
    index: u32,
    network: impl Into<Ipv4Net>,
    source: Ipv4Addr,
) -> Result<Ensured, Error> {
    let network = network.into();
    let mut message = blank(network, RouteType::Unicast, RouteScope::Link);
    message.attributes.extend([
        RouteAttribute::Oif(index),
        RouteAttribute::PrefSource(RouteAddress::Inet(source)),
    ]);
    let add = || {
        let doing = format!("adding the route to {network}");
        kernel.apply(vec![add(doing, message.clone())], Answers::Each)
    };
    match add() {
        Ok(()) => return Ok(Ensured::Added),
        Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error.into()),
    }
    let is_as_wanted = |way: &Way| way.is_ours && way.device == Some(index);
    match exact(kernel, network)? {
        Some(way) if is_as_wanted(&way) => Ok(Ensured::There),
        Some(way) if way.is_ours => {
            // By a link that has a successor.
            kernel.apply(vec![remove(network)], Answers::Each)?;
            add()?;
            Ok(Ensured::Added)
        }
        Some(_) => Err(not_ours(network)),
        // It is there, and rules of policy routing send what is for it by another table.
        None => Ok(Ensured::There),
    }
}

/// Looks whether somebody else has a route to just this network.
///
/// # Errors
/// `NotOurs` if so.
pub(super) fn is_free(kernel: &Kernel, network: impl Into<Ipv4Net>) -> Result<(), Error> {
    let network = network.into();
    match exact(kernel, network)? {
        Some(way) if !way.is_ours => Err(not_ours(network)),
        Some(_) | None => Ok(()),
    }
}

fn not_ours(network: Ipv4Net) -> Error {
    Error::NotOurs { name: format!("the route to {network}") }
}

/// Returns the route to just this network that is in use, if there is one.
fn exact(kernel: &Kernel, network: Ipv4Net) -> Result<Option<Way>, Error> {
    let way = way_to(kernel, network.network())?;
    Ok(way.filter(|way| way.network == network))
}

/// Returns the route by which the kernel sends what is for `address`. `None`: it refuses it.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn way_to(kernel: &Kernel, address: Ipv4Addr) -> Result<Option<Way>, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 32;
    // Not what it makes of the route for this one packet, but the route.
    message.header.flags = RouteFlags::FibMatch;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
    let message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(message));
    let found = match kernel.get("looking for a route", message) {
        Ok(found) => found,
        Err(error) if is_refusal(&error.source) => None,
        Err(error) => return Err(error.into()),
    };
    let Some(RouteNetlinkMessage::NewRoute(message)) = found else { return Ok(None) };
    let is_ours = message.header.protocol == OURS;
    let is_local = message.header.kind == RouteType::Local;
    let prefix = message.header.destination_prefix_length;
    let (mut to, mut device) = (Ipv4Addr::UNSPECIFIED, None);
    for attribute in message.attributes {
        if let RouteAttribute::Destination(RouteAddress::Inet(destination)) = attribute {
            to = destination;
        } else if let RouteAttribute::Oif(index) = attribute {
            device = Some(index);
        }
    }
    Ok(Ipv4Net::new(to, prefix).ok().map(|network| Way { network, device, is_ours, is_local }))
}

/// Says whether the kernel has looked, and found that nothing is to be sent there.
fn is_refusal(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::NetworkUnreachable,
        io::ErrorKind::PermissionDenied,
        io::ErrorKind::InvalidInput,
    ];
    kinds.contains(&error.kind())
}

/// A route that is there, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Where to.
    pub(super) network: Ipv4Net,
    /// The device that it goes by, if it goes by one.
    pub(super) device: Option<String>,
    /// Whether a daemon of ours made it.
    pub(super) is_ours: bool,
}

/// Returns all IPv4 routes of this namespace, those to its own addresses included.
pub(super) fn list(kernel: &Kernel) -> Result<Vec<Found>, Error> {
    let names: BTreeMap<u32, String> =
        link::list(kernel)?.into_iter().map(|link| (link.index, link.name)).collect();
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    let message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(message));
    let found = kernel.list("listing the routes", message)?;
    Ok(found.into_iter().filter_map(|message| as_route(message, &names)).collect())
}

fn as_route(message: RouteNetlinkMessage, names: &BTreeMap<u32, String>) -> Option<Found> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    let (mut address, mut device) = (Ipv4Addr::UNSPECIFIED, None);
    for attribute in message.attributes {
        if let RouteAttribute::Destination(RouteAddress::Inet(destination)) = attribute {
            address = destination;
        } else if let RouteAttribute::Oif(index) = attribute {
            device = names.get(&index).cloned();
        }
    }
    let network = Ipv4Net::new(address, message.header.destination_prefix_length).ok()?;
    Some(Found { network, device, is_ours: message.header.protocol == OURS })
}

/// Sends all else to `gateway`, which is on the link whatever its address.
pub(super) fn by_default(index: u32, gateway: Ipv4Addr) -> Request<RouteNetlinkMessage> {
    let everywhere = Ipv4Net::default();
    let mut message = blank(everywhere, RouteType::Unicast, RouteScope::Universe);
    message.header.flags = RouteFlags::Onlink;
    message
        .attributes
        .extend([RouteAttribute::Oif(index), RouteAttribute::Gateway(RouteAddress::Inet(gateway))]);
    put("adding the default route", RouteNetlinkMessage::NewRoute(message))
}

/// Answers at once that nothing is at an address of `network` that has no route of its own.
/// It is no error if it is there.
pub(super) fn unreachable(network: Ipv4Net) -> Request<RouteNetlinkMessage> {
    Request { accepts: Accepts::Existing, ..add_unreachable(network) }
}

/// Does what [`unreachable`] does where it is not there.
pub(super) fn add_unreachable(network: Ipv4Net) -> Request<RouteNetlinkMessage> {
    let mut message = blank(network, RouteType::Unreachable, RouteScope::Universe);
    message.attributes.push(RouteAttribute::Priority(UNREACHABLE_METRIC));
    add(format!("adding the route for {network}"), message)
}

/// Takes back [`ensure`].
pub(super) fn remove(network: impl Into<Ipv4Net>) -> Request<RouteNetlinkMessage> {
    removed(blank(network.into(), RouteType::Unicast, RouteScope::Link))
}

/// Takes back [`unreachable`].
pub(super) fn remove_unreachable(network: Ipv4Net) -> Request<RouteNetlinkMessage> {
    removed(blank(network, RouteType::Unreachable, RouteScope::Universe))
}

/// Only a route of our protocol is meant.
fn removed(message: RouteMessage) -> Request<RouteNetlinkMessage> {
    let message = NetlinkMessage::from(RouteNetlinkMessage::DelRoute(message));
    Request { accepts: Accepts::Missing, ..request("removing a route", message) }
}

fn blank(network: Ipv4Net, kind: RouteType, scope: RouteScope) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = network.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = OURS;
    message.header.scope = scope;
    message.header.kind = kind;
    if network.prefix_len() > 0 {
        let destination = RouteAddress::Inet(network.network());
        message.attributes.push(RouteAttribute::Destination(destination));
    }
    message
}

/// Adds a route where there is none to the same network that comes before the same others.
fn add(doing: impl Into<Cow<'static, str>>, message: RouteMessage) -> Request<RouteNetlinkMessage> {
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
    message.header.flags = NLM_F_CREATE | NLM_F_EXCL;
    request(doing, message)
}
