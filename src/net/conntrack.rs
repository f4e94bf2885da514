//! Forgetting which nameserver a question went to.
//!
//! A resolver that always asks from the same port has one connection for ever, and a
//! connection keeps the translation that it began with. When the nameservers are others,
//! the firewall refuses those connections, and so they have to be forgotten.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_core::NetlinkMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple},
};

use super::{
    Error,
    netlink::{Accepts, Answers, Kernel, Request},
};

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
    let all = conntrack(ConntrackMessage::Get(Vec::new()));
    let found = kernel.list("listing the connections", all)?;
    let stale: Vec<_> = found
        .into_iter()
        .filter_map(Connection::from_message)
        .filter(|connection| connection.is_to(address, port))
        .filter(|connection| !answering.iter().any(|by| connection.is_answered_by(*by)))
        .map(|connection| Request {
            doing: "forgetting a connection".into(),
            message: conntrack(ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(
                connection.original,
            )])),
            // It may have timed out just now.
            accepts: Accepts::Missing,
        })
        .collect();
    kernel.apply(stale, Answers::Each)
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

fn conntrack(message: ConntrackMessage) -> NetlinkMessage<NetfilterMessage> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
    NetlinkMessage::from(NetfilterMessage::new(header, message))
}
