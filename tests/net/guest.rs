//! A guest that says whatever a test wants, byte by byte.

use std::{net::Ipv4Addr, os::fd::OwnedFd, time::Duration};

use dozed::{
    sandbox::network::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC},
    sys::clock::Deadline,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, read, write},
};

use crate::host::SOON;

/// The header before each frame (`struct virtio_net_hdr`): all nought, so that nothing
/// about the frame is left for others to do.
const HEADER: [u8; 10] = [0; 10];
const FRAME_MAX_BYTES: usize = 65_550;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = SYN | ACK;

/// What is behind a tap.
pub(crate) struct Guest {
    tap: OwnedFd,
}

/// A frame that came to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame(pub(crate) Vec<u8>);

/// A packet that is to be sent, or was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) protocol: u8,
    /// What is after the IP header.
    pub(crate) payload: Vec<u8>,
}

/// How something that a guest sends is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Reset,
    Prohibited,
}

impl Guest {
    pub(crate) fn new(tap: OwnedFd) -> Self {
        Self { tap }
    }

    /// Sends a frame as it is.
    pub(crate) fn send(&self, frame: &[u8]) {
        let bytes = [&HEADER[..], frame].concat();
        // A device that is down refuses; one that is up takes all of it.
        assert_eq!(write(&self.tap, &bytes).unwrap(), bytes.len());
    }

    /// Sends a packet in a frame such as a guest sends.
    pub(crate) fn send_packet(&self, packet: &Packet) {
        self.send(&ethernet(GATEWAY_MAC.0, GUEST_MAC.0, 0x0800, &packet.bytes()));
    }

    /// Sends a datagram.
    pub(crate) fn udp(&self, from: u16, (to, port): (Ipv4Addr, u16), text: &[u8]) {
        self.send_packet(&Packet::udp((GUEST_ADDRESS, from), (to, port), text));
    }

    /// Sends a segment.
    pub(crate) fn tcp(&self, from: u16, to: (Ipv4Addr, u16), flags: u8, numbers: (u32, u32)) {
        self.send_packet(&Packet::tcp((GUEST_ADDRESS, from), to, flags, numbers, b""));
    }

    /// Returns the next frame that comes before `limit` is over.
    pub(crate) fn next(&self, limit: Duration) -> Option<Frame> {
        let deadline = Deadline::after(limit);
        let mut bytes = vec![0; FRAME_MAX_BYTES];
        loop {
            match read(&self.tap, &mut bytes) {
                Ok(length) => {
                    bytes.truncate(length);
                    return Some(Frame(bytes.split_off(HEADER.len())));
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => panic!("the tap cannot be read: {error}"),
            }
            if deadline.passed() {
                return None;
            }
            let left = Timespec::try_from(deadline.left()).unwrap();
            match poll(&mut [PollFd::new(&self.tap, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => panic!("the tap cannot be waited for: {error}"),
            }
        }
    }

    /// Returns the next packet that `is_it`; what else comes before it is dropped.
    pub(crate) fn packet(
        &self,
        limit: Duration,
        is_it: impl Fn(&Packet) -> bool,
    ) -> Option<Packet> {
        let deadline = Deadline::after(limit);
        loop {
            let packet = self.next(deadline.left())?.packet();
            if let Some(packet) = packet.filter(|packet| is_it(packet)) {
                return Some(packet);
            }
        }
    }

    /// Waits until something that was just sent to `to` is refused, and says how.
    pub(crate) fn refusal(&self, to: Ipv4Addr) -> Refusal {
        let packet = self.expect("a refusal", |packet| packet.is_reset(to) || packet.prohibits(to));
        if packet.protocol == TCP { Refusal::Reset } else { Refusal::Prohibited }
    }

    /// Opens a connection and returns the numbers that it goes on with.
    pub(crate) fn connect(&self, from: u16, to: (Ipv4Addr, u16)) -> (u32, u32) {
        self.tcp(from, to, SYN, (1000, 0));
        let answer = self.expect("the server's SYN", |packet| {
            packet.protocol == TCP && packet.source == to.0 && packet.port_to() == from
        });
        assert_eq!(answer.tcp_flags(), SYN_ACK);
        let numbers = (1001, answer.tcp_sequence() + 1);
        self.tcp(from, to, ACK, numbers);
        numbers
    }

    /// Sends text on a connection.
    pub(crate) fn say(&self, from: u16, to: (Ipv4Addr, u16), numbers: (u32, u32), text: &[u8]) {
        self.send_packet(&Packet::tcp((GUEST_ADDRESS, from), to, ACK, numbers, text));
    }

    /// Drops what has come.
    pub(crate) fn drain(&self) {
        while self.next(Duration::ZERO).is_some() {}
    }

    /// Sends a question for a MAC, and says whether it is answered before `limit` is over.
    pub(crate) fn arp(&self, limit: Duration, frame: &[u8]) -> bool {
        self.drain();
        self.send(frame);
        let deadline = Deadline::after(limit);
        while let Some(frame) = self.next(deadline.left()) {
            if frame.ether_type() == 0x0806 {
                return true;
            }
        }
        false
    }

    /// Waits until something comes that `is_it`.
    pub(crate) fn expect(&self, what: &str, is_it: impl Fn(&Packet) -> bool) -> Packet {
        self.packet(SOON, is_it).unwrap_or_else(|| panic!("{what} does not come"))
    }
}

impl Frame {
    pub(crate) fn ether_type(&self) -> u16 {
        u16::from_be_bytes([self.0[12], self.0[13]])
    }

    /// Returns the IPv4 packet in it.
    pub(crate) fn packet(&self) -> Option<Packet> {
        if self.ether_type() != 0x0800 {
            return None;
        }
        Packet::read(&self.0[14..])
    }
}

impl Packet {
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let address =
            |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
        let header = usize::from(bytes.first()? & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]));
        // An error quotes only the beginning of a packet.
        let end = total.min(bytes.len());
        Some(Self {
            source: address(12)?,
            destination: address(16)?,
            protocol: *bytes.get(9)?,
            payload: bytes.get(header..end)?.to_vec(),
        })
    }

    pub(crate) fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), text: &[u8]) -> Self {
        let length = u16::try_from(8 + text.len()).unwrap();
        let mut payload = Vec::new();
        for field in [from.1, to.1, length, 0] {
            payload.extend(field.to_be_bytes());
        }
        payload.extend(text);
        let sum = transport_sum(from.0, to.0, UDP, &payload);
        payload[6..8].copy_from_slice(&sum.to_be_bytes());
        Self { source: from.0, destination: to.0, protocol: UDP, payload }
    }

    pub(crate) fn tcp(
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
        flags: u8,
        (sequence, acknowledged): (u32, u32),
        text: &[u8],
    ) -> Self {
        Self::tcp_with_options(from, to, (flags, &[]), (sequence, acknowledged), text)
    }

    /// Makes a segment with options, which are a whole number of words.
    pub(crate) fn tcp_with_options(
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
        (flags, options): (u8, &[u8]),
        (sequence, acknowledged): (u32, u32),
        text: &[u8],
    ) -> Self {
        let words = u8::try_from(5 + options.len() / 4).unwrap();
        let mut payload = Vec::new();
        payload.extend(from.1.to_be_bytes());
        payload.extend(to.1.to_be_bytes());
        payload.extend(sequence.to_be_bytes());
        payload.extend(acknowledged.to_be_bytes());
        payload.extend([words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        payload.extend(options);
        payload.extend(text);
        let sum = transport_sum(from.0, to.0, TCP, &payload);
        payload[16..18].copy_from_slice(&sum.to_be_bytes());
        Self { source: from.0, destination: to.0, protocol: TCP, payload }
    }

    pub(crate) fn icmp(from: Ipv4Addr, to: Ipv4Addr, kind: u8, code: u8, rest: &[u8]) -> Self {
        let mut payload = vec![kind, code, 0, 0];
        payload.extend(rest);
        let sum = checksum(&[&payload]);
        payload[2..4].copy_from_slice(&sum.to_be_bytes());
        Self { source: from, destination: to, protocol: ICMP, payload }
    }

    /// Returns the packet with its header.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let length = u16::try_from(20 + self.payload.len()).unwrap();
        let mut bytes = vec![0x45, 0];
        bytes.extend(length.to_be_bytes());
        bytes.extend([0, 1, 0x40, 0, 64, self.protocol, 0, 0]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        let sum = checksum(&[&bytes]);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    pub(crate) fn port_from(&self) -> u16 {
        u16::from_be_bytes([self.payload[0], self.payload[1]])
    }

    pub(crate) fn port_to(&self) -> u16 {
        u16::from_be_bytes([self.payload[2], self.payload[3]])
    }

    pub(crate) fn tcp_sequence(&self) -> u32 {
        u32::from_be_bytes(self.payload[4..8].try_into().unwrap())
    }

    pub(crate) fn tcp_flags(&self) -> u8 {
        self.payload[13] & 0x17
    }

    /// Returns what a datagram or a segment says.
    pub(crate) fn text(&self) -> &[u8] {
        let header = match self.protocol {
            UDP => 8,
            TCP => usize::from(self.payload[12] >> 4) * 4,
            other => panic!("{other} says nothing"),
        };
        &self.payload[header..]
    }

    fn is_reset(&self, from: Ipv4Addr) -> bool {
        self.protocol == TCP && self.source == from && self.tcp_flags() & RST != 0
    }

    /// Says whether it tells that `destination` must not be sent to.
    fn prohibits(&self, destination: Ipv4Addr) -> bool {
        self.protocol == ICMP
            && self.payload[..2] == [3, 13]
            && Self::read(&self.payload[8..]).is_some_and(|about| about.destination == destination)
    }
}

/// Returns a frame.
pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &kind.to_be_bytes()[..], payload].concat()
}

/// What an ARP frame says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arp {
    pub(crate) operation: u16,
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    pub(crate) wanted: Ipv4Addr,
}

impl Arp {
    /// The only one that a guest has to send.
    pub(crate) const GOOD: Self =
        Self { operation: 1, mac: GUEST_MAC.0, address: GUEST_ADDRESS, wanted: GATEWAY_ADDRESS };

    pub(crate) fn frame(&self, from: [u8; 6]) -> Vec<u8> {
        let mut body = vec![0, 1, 8, 0, 6, 4];
        body.extend(self.operation.to_be_bytes());
        body.extend(self.mac);
        body.extend(self.address.octets());
        body.extend([0; 6]);
        body.extend(self.wanted.octets());
        ethernet([0xff; 6], from, 0x0806, &body)
    }
}

fn transport_sum(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> u16 {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let pseudo = [&from.octets()[..], &to.octets()[..], &[0, protocol], &length[..]].concat();
    checksum(&[&pseudo, payload])
}

/// The internet checksum (RFC 1071) of parts, of which only the last may be odd.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
