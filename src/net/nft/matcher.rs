//! Matchers and actions, of which rules are made.
//!
//! Each is one condition or action in the kernel's terms, with the check of the protocol
//! that the condition depends on.

use std::{net::Ipv4Addr, ops::RangeInclusive};

use ipnet::Ipv4Net;

use super::ruleset::{Direction, Fate, Field, Load, Refusal, Step};

/// A device's name takes 16 bytes, with zeros after it (`IFNAMSIZ`).
const NAME_BYTES: usize = 16;
/// `NFPROTO_IPV4`.
const IPV4: u8 = 2;
/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;
/// Where the flags of TCP are in its header.
const TCP_FLAGS: Field = Field { offset: 13, length: 1 };
const SOURCE_PORT: Field = Field { offset: 0, length: 2 };
const DESTINATION_PORT: Field = Field { offset: 2, length: 2 };
const IP_LENGTH: Field = Field { offset: 2, length: 2 };
const IP_SOURCE: Field = Field { offset: 12, length: 4 };
const IP_DESTINATION: Field = Field { offset: 16, length: 4 };

/// A protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn matcher(self) -> Vec<Step> {
        match self {
            Self::Tcp => tcp(),
            Self::Udp => udp(),
        }
    }
}

/// States of a connection (`NF_CT_STATE_BIT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CtState(u32);

pub(crate) const INVALID: CtState = CtState(1);
pub(crate) const ESTABLISHED_OR_RELATED: CtState = CtState(2 | 4);
pub(crate) const NEW: CtState = CtState(8);
/// All but invalid and untracked.
pub(crate) const NEW_OR_KNOWN: CtState = CtState(2 | 4 | 8);

/// Facts about a connection (`enum ip_conntrack_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CtStatus(u32);

/// Its first packet went through.
pub(crate) const CONFIRMED: CtStatus = CtStatus(1 << 3);
/// Its destination is translated.
pub(crate) const DNAT: CtStatus = CtStatus(1 << 5);

fn is(load: Load, value: &[u8]) -> Vec<Step> {
    vec![Step::Load(load), Step::Is(value.to_vec())]
}

fn is_not(load: Load, value: &[u8]) -> Vec<Step> {
    vec![Step::Load(load), Step::IsNot(value.to_vec())]
}

fn named(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(NAME_BYTES - 1)) {
        *to = from;
    }
    bytes
}

pub(crate) fn from_device(name: &str) -> Vec<Step> {
    is(Load::InName, &named(name))
}

pub(crate) fn to_device(name: &str) -> Vec<Step> {
    is(Load::OutName, &named(name))
}

pub(crate) fn from_group(group: u32) -> Vec<Step> {
    is(Load::InGroup, &group.to_ne_bytes())
}

pub(crate) fn to_group(group: u32) -> Vec<Step> {
    is(Load::OutGroup, &group.to_ne_bytes())
}

pub(crate) fn not_to_group(group: u32) -> Vec<Step> {
    is_not(Load::OutGroup, &group.to_ne_bytes())
}

fn ipv4() -> Vec<Step> {
    is(Load::NetworkProtocol, &[IPV4])
}

pub(crate) fn not_ipv4() -> Vec<Step> {
    is_not(Load::NetworkProtocol, &[IPV4])
}

pub(crate) fn tcp() -> Vec<Step> {
    is(Load::TransportProtocol, &[TCP])
}

fn udp() -> Vec<Step> {
    is(Load::TransportProtocol, &[UDP])
}

/// A field of the Ethernet header.
pub(crate) fn ethernet(field: Field, value: &[u8]) -> Vec<Step> {
    is(Load::Link(field), value)
}

pub(crate) fn not_from_mac(mac: [u8; 6]) -> Vec<Step> {
    is_not(Load::Link(Field { offset: 6, length: 6 }), &mac)
}

pub(crate) fn to_mac(mac: [u8; 6]) -> Vec<Step> {
    ethernet(Field { offset: 0, length: 6 }, &mac)
}

/// The type of an Ethernet frame. A frame with a VLAN's tag is of another type.
pub(crate) fn ether_type(number: u16) -> Vec<Step> {
    ethernet(Field { offset: 12, length: 2 }, &number.to_be_bytes())
}

/// A field after the Ethernet header.
pub(crate) fn after_ethernet(field: Field, value: &[u8]) -> Vec<Step> {
    is(Load::Network(field), value)
}

pub(crate) fn from_address(address: Ipv4Addr) -> Vec<Step> {
    [ipv4(), is(Load::Network(IP_SOURCE), &address.octets())].concat()
}

pub(crate) fn to_address(address: Ipv4Addr) -> Vec<Step> {
    [ipv4(), is(Load::Network(IP_DESTINATION), &address.octets())].concat()
}

pub(crate) fn from_network(network: Ipv4Net) -> Vec<Step> {
    let mask = Step::Mask(network.netmask().octets().to_vec());
    let own = Step::Is(network.network().octets().to_vec());
    [ipv4(), vec![Step::Load(Load::Network(IP_SOURCE)), mask, own]].concat()
}

pub(crate) fn not_from_network(network: Ipv4Net) -> Vec<Step> {
    let mask = Step::Mask(network.netmask().octets().to_vec());
    let own = Step::IsNot(network.network().octets().to_vec());
    [ipv4(), vec![Step::Load(Load::Network(IP_SOURCE)), mask, own]].concat()
}

pub(crate) fn to_any_of(set: &'static str) -> Vec<Step> {
    [ipv4(), vec![Step::Load(Load::Network(IP_DESTINATION)), Step::In(set)]].concat()
}

pub(crate) fn to_port(protocol: impl Into<Protocol>, port: u16) -> Vec<Step> {
    at_port(protocol.into(), DESTINATION_PORT, port)
}

pub(crate) fn from_port(protocol: impl Into<Protocol>, port: u16) -> Vec<Step> {
    at_port(protocol.into(), SOURCE_PORT, port)
}

/// One of the ends of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// The address at that end is in the set.
pub(crate) fn end_in(end: End, set: &'static str) -> Vec<Step> {
    let address = match end {
        End::Source => IP_SOURCE,
        End::Destination => IP_DESTINATION,
    };
    [ipv4(), vec![Step::Load(Load::Network(address)), Step::In(set)]].concat()
}

/// The port at that end is in `range`.
pub(crate) fn port_in(
    end: End,
    protocol: impl Into<Protocol>,
    range: &RangeInclusive<u16>,
) -> Vec<Step> {
    let protocol = protocol.into();
    let field = match end {
        End::Source => SOURCE_PORT,
        End::Destination => DESTINATION_PORT,
    };
    let (first, last) = (*range.start(), *range.end());
    if first == last {
        return at_port(protocol, field, first);
    }
    let within = vec![
        Step::Load(Load::Transport(field)),
        Step::AtLeast(first.to_be_bytes().into()),
        Step::AtMost(last.to_be_bytes().into()),
    ];
    [protocol.matcher(), within].concat()
}

/// TCP that says nothing, opens nothing and closes nothing, by the lengths of its headers:
/// without options, and with the time stamps that most have. Other options come with data
/// that was lost.
pub(crate) fn says_nothing() -> [Vec<Step>; 2] {
    const OFFSET_AND_FLAGS: Field = Field { offset: 12, length: 2 };
    const OFFSET_FIN_SYN_RST_ACK: [u8; 2] = [0xf0, 0x17];
    const ACK: u8 = 0x10;
    [5_u8, 8].map(|words| {
        let length = 20 + 4 * u16::from(words);
        let whole = is(Load::Network(IP_LENGTH), &length.to_be_bytes());
        let flags = vec![
            Step::Load(Load::Transport(OFFSET_AND_FLAGS)),
            Step::Mask(OFFSET_FIN_SYN_RST_ACK.into()),
            Step::Is(vec![words << 4, ACK]),
        ];
        [whole, flags].concat()
    })
}

/// TCP after an IPv4 header without options.
pub(crate) fn tcp_after_bare_header() -> Vec<Step> {
    const VERSION_4_AND_FIVE_WORDS: u8 = 0x45;
    let first = Field { offset: 0, length: 1 };
    [tcp(), is(Load::Network(first), &[VERSION_4_AND_FIVE_WORDS])].concat()
}

fn at_port(protocol: Protocol, field: Field, port: u16) -> Vec<Step> {
    [protocol.matcher(), is(Load::Transport(field), &port.to_be_bytes())].concat()
}

/// TCP that does not begin a connection: of FIN, SYN, RST and ACK it has not just SYN.
pub(crate) fn no_syn() -> Vec<Step> {
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    let flags = [
        Step::Load(Load::Transport(TCP_FLAGS)),
        Step::Mask(vec![FIN_SYN_RST_ACK]),
        Step::IsNot(vec![SYN]),
    ];
    [tcp(), flags.to_vec()].concat()
}

/// TCP that has SYN or FIN.
pub(crate) fn begins_or_ends() -> Vec<Step> {
    const FIN_SYN: u8 = 0x03;
    let flags =
        [Step::Load(Load::Transport(TCP_FLAGS)), Step::Mask(vec![FIN_SYN]), Step::IsNot(vec![0])];
    [tcp(), flags.to_vec()].concat()
}

/// The connection is in one of these states.
pub(crate) fn state(state: CtState) -> Vec<Step> {
    has(Load::CtState, state.0)
}

/// The fact is none of the connection.
pub(crate) fn no_status(status: CtStatus) -> Vec<Step> {
    let bits = status.0.to_ne_bytes().to_vec();
    vec![Step::Load(Load::CtStatus), Step::Mask(bits), Step::Is(vec![0; 4])]
}

fn has(load: Load, bits: u32) -> Vec<Step> {
    let bits = bits.to_ne_bytes().to_vec();
    vec![Step::Load(load), Step::Mask(bits), Step::IsNot(vec![0; 4])]
}

pub(crate) fn direction(direction: Direction) -> Vec<Step> {
    let number = match direction {
        Direction::Original => 0,
        Direction::Reply => 1,
    };
    is(Load::CtDirection, &[number])
}

/// Whom the connection was opened to, before any translation, is in the set.
pub(crate) fn opened_to_any_of(set: &'static str) -> Vec<Step> {
    vec![Step::Load(Load::CtDestination(Direction::Original)), Step::In(set)]
}

/// Whom the connection was opened to, before any translation.
pub(crate) fn opened_to(address: Ipv4Addr) -> Vec<Step> {
    is(Load::CtDestination(Direction::Original), &address.octets())
}

/// Who answers, after all translation, is in the set.
pub(crate) fn answered_by_any_of(set: &'static str) -> Vec<Step> {
    vec![Step::Load(Load::CtSource(Direction::Reply)), Step::In(set)]
}

/// One packet in so many.
pub(crate) fn one_in(turns: u32) -> Vec<Step> {
    is(Load::Turn(turns), &0_u32.to_ne_bytes())
}

pub(crate) fn limited(limit: &'static str) -> Vec<Step> {
    vec![Step::Limited(limit)]
}

pub(crate) fn flows_over(count: u32) -> Vec<Step> {
    vec![Step::FlowsOver(count)]
}

pub(crate) fn count(counter: &'static str) -> Vec<Step> {
    vec![Step::Count(counter)]
}

pub(crate) fn accept() -> Vec<Step> {
    vec![Step::Verdict(Fate::Accept)]
}

pub(crate) fn drop_it() -> Vec<Step> {
    vec![Step::Verdict(Fate::Drop)]
}

pub(crate) fn goto(chain: &'static str) -> Vec<Step> {
    vec![Step::Goto(chain)]
}

pub(crate) fn reset() -> Vec<Step> {
    vec![Step::Refuse(Refusal::TcpReset)]
}

pub(crate) fn prohibit() -> Vec<Step> {
    vec![Step::Refuse(Refusal::AdminProhibited)]
}

pub(crate) fn as_source(address: Ipv4Addr) -> Vec<Step> {
    vec![Step::Source(address)]
}

pub(crate) fn as_destination(address: Ipv4Addr) -> Vec<Step> {
    vec![Step::Destination(address)]
}

pub(crate) fn masquerade() -> Vec<Step> {
    vec![Step::Masquerade]
}
