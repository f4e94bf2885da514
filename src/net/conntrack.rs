//! Forgetting connections that began with another translation than they are to have.
//!
//! A resolver that always asks from the same port has one connection for ever, and a
//! connection keeps the translation that it began with. When the nameservers are others,
//! the firewall refuses those connections, and so they have to be forgotten. So has what a
//! sandbox opened while the host's firewall for sandboxes was gone: it would leave the host
//! with the sandbox's own address for as long as it goes on.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use netlink_packet_core::NetlinkMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple},
};

use super::Error;
use crate::sys::netlink::{Accepts, Answers, Kernel, Request};

/// Forgets the connections to port `port` of `address` that are answered by none of
/// `answering`, in the namespace of `kernel`.
///
/// # Errors
/// Where the kernel has no such list, or does not let go of them.
pub(super) fn forget(
    kernel: &Kernel,
    (address, port): (Ipv4Addr, u16),
    answering: &[Ipv4Addr],
) -> Result<(), Error> {
    forget_all(kernel, |connection| {
        connection.is_to(address, port)
            && !answering.iter().any(|by| connection.is_answered_by(*by))
    })
}

/// Forgets the connections from `range` to elsewhere whose source is not translated, in the
/// namespace of `kernel`.
///
/// # Errors
/// Where the kernel has no such list, or does not let go of them.
pub(super) fn forget_untranslated(kernel: &Kernel, range: Ipv4Net) -> Result<(), Error> {
    let is_in_range = |address: &Option<Ipv4Addr>| address.is_some_and(|it| range.contains(&it));
    forget_all(kernel, |connection| {
        let source = source_of(&connection.original);
        is_in_range(&source)
            && !is_in_range(&destination_of(&connection.original))
            && destination_of(&connection.reply) == source
    })
}

fn forget_all(kernel: &Kernel, is_stale: impl Fn(&Connection) -> bool) -> Result<(), Error> {
    let all = conntrack(ConntrackMessage::Get(Vec::new()));
    // The list of a host may have hundreds of thousands.
    let stale = kernel.list_some("listing the connections", all, |message| {
        Connection::from_message(message).filter(|connection| is_stale(connection))
    })?;
    let requests = stale
        .into_iter()
        .map(|connection| Request {
            doing: "forgetting a connection".into(),
            message: conntrack(ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(
                connection.original,
            )])),
            // It may have timed out just now.
            accepts: Accepts::Missing,
        })
        .collect();
    Ok(kernel.apply(requests, Answers::Each)?)
}

/// The two sides of a connection.
struct Connection {
    original: Vec<Tuple>,
    reply: Vec<Tuple>,
}

impl Connection {
    fn from_message(message: NetfilterMessage) -> Option<Self> {
        let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner
        else {
            return None;
        };
        let (mut original, mut reply) = (None, None);
        for attribute in attributes {
            if let ConntrackAttribute::CtaTupleOrig(tuple) = attribute {
                original = Some(tuple);
            } else if let ConntrackAttribute::CtaTupleReply(tuple) = attribute {
                reply = Some(tuple);
            }
        }
        Some(Self { original: original?, reply: reply? })
    }

    fn is_to(&self, address: Ipv4Addr, port: u16) -> bool {
        let to = IPTuple::DestinationAddress(IpAddr::V4(address));
        let at = ProtoTuple::DestinationPort(port);
        self.original.iter().any(|part| matches!(part, Tuple::Ip(ip) if ip.contains(&to)))
            && self.original.iter().any(|part| matches!(part, Tuple::Proto(p) if p.contains(&at)))
    }

    fn is_answered_by(&self, address: Ipv4Addr) -> bool {
        let from = IPTuple::SourceAddress(IpAddr::V4(address));
        self.reply.iter().any(|part| matches!(part, Tuple::Ip(ip) if ip.contains(&from)))
    }
}

fn source_of(tuple: &[Tuple]) -> Option<Ipv4Addr> {
    address_in(tuple, |part| {
        if let IPTuple::SourceAddress(IpAddr::V4(address)) = part { Some(*address) } else { None }
    })
}

fn destination_of(tuple: &[Tuple]) -> Option<Ipv4Addr> {
    address_in(tuple, |part| {
        if let IPTuple::DestinationAddress(IpAddr::V4(address)) = part {
            Some(*address)
        } else {
            None
        }
    })
}

fn address_in(tuple: &[Tuple], read: impl Fn(&IPTuple) -> Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    tuple.iter().find_map(|part| {
        if let Tuple::Ip(parts) = part { parts.iter().find_map(&read) } else { None }
    })
}

fn conntrack(message: ConntrackMessage) -> NetlinkMessage<NetfilterMessage> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
    NetlinkMessage::from(NetfilterMessage::new(header, message))
}
