//! Parses packets to sleepers, and makes the packets that refuse them. Pure.

use std::net::Ipv4Addr;

use etherparse::{
    Icmpv4Type, Ipv4Slice, PacketBuilder, TcpSlice, UdpSlice,
    icmpv4::DestUnreachableHeader,
    ip_number::{ICMP, TCP, UDP},
};

use crate::sandbox::network::Transport;

/// As far as an answer of ours goes.
const TIME_TO_LIVE: u8 = 64;
/// How much of a packet an error about it quotes: no error is longer than 576 bytes
/// (RFC 1812, 4.3.2.3), of which 28 are the error's own headers.
const QUOTE_MAX_BYTES: usize = 576 - 28;
/// The ICMP type of a ping.
const ECHO_REQUEST: u8 = 8;

/// What is known of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) what: What,
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// It opens something at a port.
    Opening(Transport, u16),
    /// It is a TCP segment to a port, of a connection that was open. It may carry data.
    Segment(u16, Carries),
    /// It is an ICMP echo request.
    Ping,
    /// Anything else.
    Other,
}

/// What a segment has after its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    Data,
    Nothing,
}

/// How a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// That nobody is at the address.
    Unreachable,
    /// That the sandbox does not want it: TCP by a reset, the rest by an error.
    Refused,
}

impl Seen {
    /// Looks at a packet. `None`: it is not IPv4, or damaged, or a part of a packet, of
    /// which nobody knows what the rest of it is for.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let packet = Ipv4Slice::from_slice(bytes).ok()?;
        if packet.is_payload_fragmented() {
            return None;
        }
        let payload = packet.payload().payload;
        let what = match packet.payload_ip_number() {
            TCP => {
                let segment = TcpSlice::from_slice(payload).ok()?;
                let opens = segment.syn() && !segment.ack() && !segment.rst() && !segment.fin();
                let port = segment.destination_port();
                if opens {
                    What::Opening(Transport::Tcp, port)
                } else if segment.rst() {
                    What::Other
                } else if segment.payload().is_empty() {
                    What::Segment(port, Carries::Nothing)
                } else {
                    What::Segment(port, Carries::Data)
                }
            }
            UDP => {
                let datagram = UdpSlice::from_slice(payload).ok()?;
                What::Opening(Transport::Udp, datagram.destination_port())
            }
            ICMP if payload.first() == Some(&ECHO_REQUEST) => What::Ping,
            _ => What::Other,
        };
        let header = packet.header();
        Some(Self { from: header.source_addr(), to: header.destination_addr(), what })
    }
}

/// Returns the packet that refuses `bytes`. `None`: such a packet is never answered.
pub(super) fn answer(bytes: &[u8], refusal: Refusal) -> Option<Vec<u8>> {
    match (Seen::of(bytes)?.what, refusal) {
        (What::Other, _) => None,
        (What::Opening(Transport::Tcp, _), Refusal::Refused) | (What::Segment(..), _) => {
            reset(bytes)
        }
        (What::Opening(Transport::Udp, _) | What::Ping, Refusal::Refused) => {
            error(bytes, DestUnreachableHeader::FilterProhibited)
        }
        (What::Opening(..) | What::Ping, Refusal::Unreachable) => {
            error(bytes, DestUnreachableHeader::Host)
        }
    }
}

/// Answers a segment as a host does that knows nothing of its connection (RFC 9293, 3.5.2).
fn reset(bytes: &[u8]) -> Option<Vec<u8>> {
    let packet = Ipv4Slice::from_slice(bytes).ok()?;
    let segment = TcpSlice::from_slice(packet.payload().payload).ok()?;
    let header = packet.header();
    let builder = PacketBuilder::ipv4(header.destination(), header.source(), TIME_TO_LIVE);
    let (from, to) = (segment.destination_port(), segment.source_port());
    let builder = if segment.ack() {
        builder.tcp(from, to, segment.acknowledgment_number(), 0).rst()
    } else {
        // SYN and FIN take a number themselves, and so does each byte that comes with them.
        let flags = u32::from(segment.syn()) + u32::from(segment.fin());
        let taken = u32::try_from(segment.payload().len()).ok()?.wrapping_add(flags);
        builder.tcp(from, to, 0, 0).rst().ack(segment.sequence_number().wrapping_add(taken))
    };
    let mut answer = Vec::with_capacity(builder.size(0));
    builder.write(&mut answer, &[]).ok()?;
    Some(answer)
}

fn error(bytes: &[u8], why: DestUnreachableHeader) -> Option<Vec<u8>> {
    let packet = Ipv4Slice::from_slice(bytes).ok()?;
    let header = packet.header();
    let whole = bytes.get(..usize::from(header.total_len())).unwrap_or(bytes);
    let quoted = whole.get(..QUOTE_MAX_BYTES).unwrap_or(whole);
    let builder = PacketBuilder::ipv4(header.destination(), header.source(), TIME_TO_LIVE)
        .icmpv4(Icmpv4Type::DestinationUnreachable(why));
    let mut answer = Vec::with_capacity(builder.size(quoted.len()));
    builder.write(&mut answer, quoted).ok()?;
    Some(answer)
}

#[cfg(test)]
pub(super) mod tests {
    use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilderStep, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    pub(in crate::net::wake_on_packet) const HOST: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
    pub(in crate::net::wake_on_packet) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);

    fn ip(from: Ipv4Addr, to: Ipv4Addr) -> PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv4(from.octets(), to.octets(), 64)
    }

    pub(in crate::net::wake_on_packet) fn syn(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        ip(from, to).tcp(40_000, port, 7, 64_000).syn().write(&mut bytes, &[]).unwrap();
        bytes
    }

    pub(in crate::net::wake_on_packet) fn udp(
        from: Ipv4Addr,
        to: Ipv4Addr,
        port: u16,
        text: &[u8],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        ip(from, to).udp(40_000, port).write(&mut bytes, text).unwrap();
        bytes
    }

    pub(in crate::net::wake_on_packet) fn ping(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let mut bytes = Vec::new();
        ip(from, to).icmpv4_echo_request(1, 1).write(&mut bytes, b"?").unwrap();
        bytes
    }

    /// A segment of a connection that is open.
    pub(in crate::net::wake_on_packet) fn data(
        from: Ipv4Addr,
        to: Ipv4Addr,
        port: u16,
        text: &[u8],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        ip(from, to).tcp(40_000, port, 7, 64_000).ack(500).write(&mut bytes, text).unwrap();
        bytes
    }

    fn what(bytes: &[u8]) -> Option<What> {
        Seen::of(bytes).map(|seen| seen.what)
    }

    #[test]
    fn only_a_lone_syn_and_a_datagram_open_something() {
        assert_eq!(what(&syn(HOST, GUEST, 22)), Some(What::Opening(Transport::Tcp, 22)));
        assert_eq!(what(&udp(HOST, GUEST, 53, b"?")), Some(What::Opening(Transport::Udp, 53)));
        assert_eq!(what(&ping(HOST, GUEST)), Some(What::Ping));
        let segment = |step: PacketBuilderStep<etherparse::TcpHeader>| {
            let mut bytes = Vec::new();
            step.write(&mut bytes, b"text").unwrap();
            what(&bytes)
        };
        let tcp = || ip(HOST, GUEST).tcp(40_000, 22, 7, 64_000);
        for step in [tcp(), tcp().ack(1), tcp().syn().ack(1), tcp().syn().fin()] {
            assert_eq!(segment(step), Some(What::Segment(22, Carries::Data)));
        }
        assert_eq!(segment(tcp().syn().rst()), Some(What::Other));
        let bare = what(&data(HOST, GUEST, 22, b""));
        assert_eq!(bare, Some(What::Segment(22, Carries::Nothing)));
        let mut echo_reply = Vec::new();
        ip(HOST, GUEST).icmpv4_echo_reply(1, 1).write(&mut echo_reply, b"!").unwrap();
        assert_eq!(what(&echo_reply), Some(What::Other));
    }

    #[test]
    fn parts_of_packets_and_what_is_not_ipv4_are_nothing() {
        let whole = syn(HOST, GUEST, 22);
        for (more, offset) in [(true, 0), (false, 3)] {
            let (mut header, payload) = Ipv4Header::from_slice(&whole).unwrap();
            header.more_fragments = more;
            header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
            header.header_checksum = header.calc_header_checksum();
            let bytes = [&header.to_bytes()[..], payload].concat();
            assert_eq!(Seen::of(&bytes), None);
            assert_eq!(answer(&bytes, Refusal::Refused), None);
        }
        let mut ipv6 = Vec::new();
        PacketBuilder::ipv6([0; 16], [1; 16], 64).udp(1, 2).write(&mut ipv6, b"").unwrap();
        assert_eq!(Seen::of(&ipv6), None);
        assert_eq!(Seen::of(&whole[..whole.len() - 1]), None);
        assert_eq!(Seen::of(&[]), None);
    }

    #[test]
    fn a_connection_is_reset_and_all_else_told_by_an_error_that_quotes_it() {
        let opening = syn(HOST, GUEST, 22);
        let reset = answer(&opening, Refusal::Refused).unwrap();
        let packet = Ipv4Slice::from_slice(&reset).unwrap();
        let segment = TcpSlice::from_slice(packet.payload().payload).unwrap();
        assert_eq!(packet.header().source_addr(), GUEST);
        assert_eq!(packet.header().destination_addr(), HOST);
        assert!(segment.rst() && segment.ack() && !segment.syn());
        assert_eq!(segment.acknowledgment_number(), 8);
        assert_eq!((segment.source_port(), segment.destination_port()), (22, 40_000));
        for (bytes, refusal, code) in [
            (&opening, Refusal::Unreachable, 1),
            (&udp(HOST, GUEST, 53, b"?"), Refusal::Unreachable, 1),
            (&udp(HOST, GUEST, 53, &[7; 1400]), Refusal::Refused, 13),
            (&ping(HOST, GUEST), Refusal::Refused, 13),
        ] {
            let told = answer(bytes, refusal).unwrap();
            assert!(told.len() <= 576, "{} bytes", told.len());
            let packet = etherparse::SlicedPacket::from_ip(&told).unwrap();
            let Some(TransportSlice::Icmpv4(icmp)) = packet.transport else { panic!("{told:?}") };
            assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, code));
            assert!(bytes.starts_with(icmp.payload()) && icmp.payload().len() >= 28);
        }
    }

    #[test]
    fn a_segment_of_an_old_connection_is_reset_with_the_number_that_its_sender_waits_for() {
        for refusal in [Refusal::Refused, Refusal::Unreachable] {
            let reset = answer(&data(HOST, GUEST, 22, b"hello"), refusal).unwrap();
            let packet = Ipv4Slice::from_slice(&reset).unwrap();
            let segment = TcpSlice::from_slice(packet.payload().payload).unwrap();
            assert!(segment.rst() && !segment.ack());
            assert_eq!(segment.sequence_number(), 500);
            assert_eq!((segment.source_port(), segment.destination_port()), (22, 40_000));
        }
    }

    #[test]
    fn an_error_or_a_reset_is_never_answered() {
        let told = answer(&udp(HOST, GUEST, 53, b"?"), Refusal::Refused).unwrap();
        let reset = answer(&syn(HOST, GUEST, 22), Refusal::Refused).unwrap();
        for bytes in [told, reset] {
            assert_eq!(answer(&bytes, Refusal::Refused), None);
            assert_eq!(answer(&bytes, Refusal::Unreachable), None);
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_looked_at_without_a_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..120),
            header: bool,
            protocol in prop::sample::select(vec![1_u8, 6, 17, 47]),
        ) {
            if header && bytes.len() >= 20 {
                // A header that holds, so that what is after it is looked at too.
                let length = u16::try_from(bytes.len() - 20).unwrap();
                let number = IpNumber(protocol);
                let head = Ipv4Header::new(length, 64, number, HOST.octets(), GUEST.octets());
                bytes[..20].copy_from_slice(&head.unwrap().to_bytes());
            }
            for refusal in [Refusal::Refused, Refusal::Unreachable] {
                if let Some(told) = answer(&bytes, refusal) {
                    prop_assert!(told.len() <= 576);
                    prop_assert_eq!(Seen::of(&told).unwrap().to, Seen::of(&bytes).unwrap().from);
                }
            }
        }
    }
}
