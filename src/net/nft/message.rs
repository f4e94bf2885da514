//! The parts of messages that batches, expressions and queries share.

use netlink_packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED, NetlinkMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily, nftables::NfTablesMessage,
};

use super::ruleset::Family;

pub(super) const OBJECT_TABLE: u16 = 1;
pub(super) const OBJECT_NAME: u16 = 2;
pub(super) const OBJECT_TYPE: u16 = 3;
pub(super) const OBJECT_DATA: u16 = 4;
pub(super) const OBJECT_IS_COUNTER: u32 = 1;
pub(super) const OBJECT_IS_LIMIT: u32 = 4;
pub(super) const COUNTER_BYTES: u16 = 1;
pub(super) const COUNTER_PACKETS: u16 = 2;

pub(super) fn netfilter(
    family: Family,
    message: NfTablesMessage,
) -> NetlinkMessage<NetfilterMessage> {
    let family = match family {
        Family::Netdev => NetfilterProtoFamily::NetDev,
        Family::Inet => NetfilterProtoFamily::Inet,
    };
    NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message))
}

pub(super) fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().into())
}

pub(super) fn long(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().into())
}

pub(super) fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), b"\0"].concat())
}

pub(super) fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}
