//! The packets that other firewalls are asked about: what is known of each, bit by bit.

use ipnet::Ipv4Net;

use crate::{net::host, sandbox::network::AddressPlan};

/// A device's name takes 16 bytes, with zeros after it (`IFNAMSIZ`).
const NAME_BYTES: usize = 16;
/// The start of an IPv4 header, up to the end of the addresses.
const HEADER_BYTES: usize = 20;
const SOURCE_AT: usize = 12;
const DESTINATION_AT: usize = 16;
/// `NFPROTO_IPV4`.
const IPV4: u8 = 2;
/// States of a connection (`NF_CT_STATE_BIT`).
const ESTABLISHED: u32 = 2;
const NEW: u32 = 8;

/// Whether a condition holds for a packet of which not everything is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    Yes,
    No,
    Maybe,
}

impl Holds {
    pub(super) fn not(self) -> Self {
        match self {
            Self::Yes => Self::No,
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
        }
    }
}

/// Some bytes, and which of their bits are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Value {
    bits: Vec<u8>,
    known: Vec<u8>,
}

impl Value {
    fn exactly(bytes: &[u8]) -> Self {
        Self { bits: bytes.to_vec(), known: vec![0xff; bytes.len()] }
    }

    fn unknown(length: usize) -> Self {
        Self { bits: vec![0; length], known: vec![0; length] }
    }

    /// A device's name that begins with `start`, and goes on for `more` bytes.
    fn name(start: &str, more: usize) -> Self {
        let mut value = Self::exactly(&[0; NAME_BYTES]);
        for (to, from) in value.bits.iter_mut().zip(start.bytes()) {
            *to = from;
        }
        value.known.iter_mut().skip(start.len()).take(more).for_each(|byte| *byte = 0);
        value
    }

    fn put(&mut self, at: usize, network: Ipv4Net) {
        for (index, (bits, known)) in
            network.network().octets().into_iter().zip(network.netmask().octets()).enumerate()
        {
            self.bits[at + index] = bits;
            self.known[at + index] = known;
        }
    }

    pub(super) fn part(&self, offset: usize, length: usize) -> Self {
        let cut = |bytes: &[u8]| bytes.get(offset..offset + length).map(<[u8]>::to_vec);
        match (cut(&self.bits), cut(&self.known)) {
            (Some(bits), Some(known)) => Self { bits, known },
            _ => Self::unknown(length),
        }
    }

    /// Keeps the bits that are in `mask`, and turns those over that are in `xor`.
    pub(super) fn masked(&self, mask: &[u8], xor: &[u8]) -> Self {
        if mask.len() != self.bits.len() || xor.len() != self.bits.len() {
            return Self::default();
        }
        let each = |job: &dyn Fn(usize) -> u8| (0..mask.len()).map(job).collect();
        Self {
            bits: each(&|at| (self.bits[at] & mask[at]) ^ xor[at]),
            known: each(&|at| self.known[at] | !mask[at]),
        }
    }

    /// Says whether it begins with `other`. Nothing is known of what is longer than it.
    pub(super) fn is(&self, other: &[u8]) -> Holds {
        if other.len() > self.bits.len() {
            return Holds::Maybe;
        }
        let mut holds = Holds::Yes;
        for ((bits, known), other) in self.bits.iter().zip(&self.known).zip(other) {
            if (bits ^ other) & known != 0 {
                return Holds::No;
            }
            if *known != 0xff {
                holds = Holds::Maybe;
            }
        }
        holds
    }

    /// Says whether it is `first` or after it, and before `end` where there is one, as numbers
    /// whose first byte is the highest.
    pub(super) fn is_within(&self, first: &[u8], end: Option<&[u8]>) -> Holds {
        if first.len() != self.bits.len() {
            return Holds::Maybe;
        }
        let filled = |with: u8| -> Vec<u8> {
            let each = self.bits.iter().zip(&self.known);
            each.map(|(bits, known)| (bits & known) | (with & !known)).collect()
        };
        let is_in = |value: &[u8]| value >= first && end.is_none_or(|end| value < end);
        let (least, most) = (filled(0), filled(0xff));
        if is_in(&least) && is_in(&most) {
            Holds::Yes
        } else if most.as_slice() < first || end.is_some_and(|end| least.as_slice() >= end) {
            Holds::No
        } else {
            Holds::Maybe
        }
    }
}

/// What a rule looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    InName,
    OutName,
    InIndex,
    OutIndex,
    InGroup,
    OutGroup,
    Family,
    State,
    /// Of the IPv4 header.
    Header {
        offset: usize,
        length: usize,
    },
    /// Something that is not known of any packet.
    Other,
}

/// What passes from one link of the host to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::net) enum Traffic {
    /// What sandboxes send.
    Sent,
    /// The answers to it.
    Answers,
    /// What was held for a sandbox while it woke, and is delivered.
    Held,
}

impl Traffic {
    pub(in crate::net) const ALL: [Self; 3] = [Self::Sent, Self::Answers, Self::Held];
}

/// The link by which the host reaches most of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Uplink {
    pub(super) name: String,
    pub(super) index: u32,
}

/// A packet, as the chains see it that are asked about what is forwarded.
#[derive(Debug)]
pub(super) struct Packet {
    in_name: Value,
    out_name: Value,
    in_index: Value,
    out_index: Value,
    in_group: Value,
    out_group: Value,
    pub(super) state: u32,
    header: Value,
}

impl Packet {
    pub(super) fn of(traffic: Traffic, plan: &AddressPlan, uplink: Option<&Uplink>) -> Self {
        let ours = || {
            // Every four bits of the range are a digit of all names.
            let digits = usize::from(plan.range().prefix_len() / 4);
            let name = format!("dz{:08x}", plan.link_group());
            let (start, rest) = name.split_at(2 + digits);
            let group = Value::exactly(&plan.link_group().to_ne_bytes());
            (Value::name(start, rest.len()), Value::unknown(4), group)
        };
        let other = || {
            let name = uplink
                .map_or_else(|| Value::unknown(NAME_BYTES), |uplink| Value::name(&uplink.name, 0));
            let index = uplink.map_or_else(
                || Value::unknown(4),
                |uplink| Value::exactly(&uplink.index.to_ne_bytes()),
            );
            (name, index, Value::unknown(4))
        };
        let mut header = Value::unknown(HEADER_BYTES);
        let ((in_name, in_index, in_group), (out_name, out_index, out_group)) = match traffic {
            Traffic::Sent => {
                header.put(SOURCE_AT, plan.range());
                (ours(), other())
            }
            Traffic::Answers => {
                header.put(DESTINATION_AT, plan.range());
                (other(), ours())
            }
            Traffic::Held => {
                header.put(SOURCE_AT, plan.host_address().into());
                header.put(DESTINATION_AT, plan.range());
                let (_, index, group) = ours();
                ((Value::name(&host::device(plan), 0), index, group), ours())
            }
        };
        let state = if traffic == Traffic::Answers { ESTABLISHED } else { NEW };
        Self { in_name, out_name, in_index, out_index, in_group, out_group, state, header }
    }

    pub(super) fn load(&self, field: Field) -> Value {
        match field {
            Field::InName => self.in_name.clone(),
            Field::OutName => self.out_name.clone(),
            Field::InIndex => self.in_index.clone(),
            Field::OutIndex => self.out_index.clone(),
            Field::InGroup => self.in_group.clone(),
            Field::OutGroup => self.out_group.clone(),
            Field::Family => Value::exactly(&[IPV4]),
            Field::State => Value::exactly(&self.state.to_ne_bytes()),
            Field::Header { offset, length } => self.header.part(offset, length),
            Field::Other => Value::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_on_what_is_not_known_may_hold() {
        let plan = AddressPlan::default();
        let uplink = Uplink { name: "eth0".to_owned(), index: 2 };
        let sent = Packet::of(Traffic::Sent, &plan, Some(&uplink));
        let name = sent.load(Field::InName);
        for (text, holds) in [
            ("dz", Holds::Yes),
            ("dz0ad5", Holds::Yes),
            ("dz0ad50002", Holds::Maybe),
            ("dz0bd5", Holds::No),
            ("dozed", Holds::No),
            ("e", Holds::No),
        ] {
            assert_eq!(name.is(text.as_bytes()), holds, "{text}");
        }
        assert_eq!(sent.load(Field::OutName).is(b"eth0\0"), Holds::Yes);
        assert_eq!(sent.load(Field::OutName).is(b"eth\0"), Holds::No);
        assert_eq!(sent.load(Field::OutIndex).is(&2_u32.to_ne_bytes()), Holds::Yes);
        assert_eq!(sent.load(Field::Other).is(b"x"), Holds::Maybe);
        let source = sent.load(Field::Header { offset: SOURCE_AT, length: 4 });
        assert_eq!(source.masked(&[0xff, 0, 0, 0], &[0; 4]).is(&[10, 0, 0, 0]), Holds::Yes);
        assert_eq!(source.is(&[10, 213, 0, 9]), Holds::Maybe);
        assert_eq!(source.is(&[10, 212, 0, 9]), Holds::No);
        assert_eq!(source.is_within(&[10, 0, 0, 0], Some(&[11, 0, 0, 0])), Holds::Yes);
        assert_eq!(source.is_within(&[10, 213, 1, 0], None), Holds::Maybe);
        assert_eq!(source.is_within(&[10, 214, 0, 0], None), Holds::No);
        let held = Packet::of(Traffic::Held, &plan, Some(&uplink));
        assert_eq!(held.load(Field::InName).is(b"dozed0ad50000\0"), Holds::Yes);
        let state = |packet: &Packet, mask: u32| {
            packet.load(Field::State).masked(&mask.to_ne_bytes(), &[0; 4]).is(&[0; 4])
        };
        assert_eq!(state(&held, ESTABLISHED), Holds::Yes, "it is none of these");
        assert_eq!(state(&held, NEW | ESTABLISHED), Holds::No);
    }
}
