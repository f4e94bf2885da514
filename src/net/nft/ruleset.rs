//! A firewall as a value: tables of chains of rules, in the kernel's own terms.
//!
//! A rule is a list of steps that are taken in order, until one does not hold: load
//! something, compare it, count, decide.

use std::{net::Ipv4Addr, ops::RangeInclusive};

/// All that is to be in force, table by table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) tables: Vec<Table>,
}

/// A table, with everything in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: String,
    pub(crate) sets: Vec<Set>,
    pub(crate) counters: Vec<&'static str>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) chains: Vec<Chain>,
}

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Frames, as they come from a device.
    Netdev,
    /// IPv4 and IPv6.
    Inet,
}

/// A named set of addresses. It stays when the rules are replaced, and only what is in it
/// changes: a set that is deleted is empty for another CPU that still has the old rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) name: &'static str,
    /// In order, and none overlaps or touches another.
    pub(crate) ranges: Vec<RangeInclusive<Ipv4Addr>>,
}

/// A named limit of packets. It stays, so that replacing the rules gives nobody more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) name: &'static str,
    pub(crate) per_second: u64,
    pub(crate) burst: u32,
    /// Whether it holds for what is over it, rather than for what is within.
    pub(crate) over: bool,
}

/// A chain of rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: &'static str,
    /// Where packets come in, if it is not only gone to by others.
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// Where in the path of a packet a chain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) kind: Kind,
    pub(crate) at: At,
    pub(crate) priority: i32,
    /// What becomes of a packet that no rule decided on.
    pub(crate) otherwise: Fate,
}

/// What the chain of a hook is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Filter,
    Nat,
}

/// A place in the path of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    /// Right after the device of this name.
    Ingress(&'static str),
    Prerouting,
    Input,
    Forward,
    Postrouting,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Accept,
    Drop,
}

pub(crate) type Rule = Vec<Step>;

/// A step of a rule. Steps that load put their value where the next one finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Loads something about the packet.
    Load(Load),
    /// Keeps the bits of the loaded value that are in the mask.
    Mask(Vec<u8>),
    /// Holds if the loaded value is this.
    Is(Vec<u8>),
    /// Holds if it is not.
    IsNot(Vec<u8>),
    /// Holds if the loaded value, the first byte of which is the highest, is not below this.
    AtLeast(Vec<u8>),
    /// Holds if it is not above this.
    AtMost(Vec<u8>),
    /// Holds if the loaded address is in the set.
    In(&'static str),
    /// Holds for packets over, or within, the named limit.
    Limited(&'static str),
    /// Holds if more than this many connections are open.
    FlowsOver(u32),
    /// Counts the packet.
    Count(&'static str),
    /// Decides.
    Verdict(Fate),
    /// Goes on in another chain and does not come back.
    Goto(&'static str),
    /// Decides, and tells the sender at once.
    Refuse(Refusal),
    /// Translates the source of the connection.
    Source(Ipv4Addr),
    /// Translates the destination of the connection.
    Destination(Ipv4Addr),
    /// Translates the source to the address of the device that the packet leaves by.
    Masquerade,
}

/// What a sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    TcpReset,
    AdminProhibited,
}

/// What can be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    InName,
    OutName,
    InGroup,
    OutGroup,
    /// 2 for IPv4, 10 for IPv6.
    NetworkProtocol,
    /// 6 for TCP, 17 for UDP.
    TransportProtocol,
    /// A number that goes round from 0 to below this.
    Turn(u32),
    Link(Field),
    Network(Field),
    Transport(Field),
    CtState,
    CtStatus,
    CtDirection,
    CtSource(Direction),
    CtDestination(Direction),
}

/// Which way the packets of a connection go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// As the packet that opened it.
    Original,
    Reply,
}

/// A part of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl Ruleset {
    /// Returns the addresses that a set has one by one, in order.
    pub(crate) fn addresses(&self, set: &str) -> Vec<Ipv4Addr> {
        let sets = self.tables.iter().flat_map(|table| &table.sets);
        let ranges = sets.filter(|it| it.name == set).flat_map(|set| &set.ranges);
        let mut addresses: Vec<Ipv4Addr> = ranges.map(|range| *range.start()).collect();
        addresses.sort_unstable();
        addresses
    }
}

/// Puts the parts of a rule together.
pub(crate) fn rule<const N: usize>(parts: [Vec<Step>; N]) -> Rule {
    parts.into_iter().flatten().collect()
}

impl Chain {
    /// Makes a chain that is only gone to by others.
    pub(crate) fn inner<const N: usize>(name: &'static str, rules: [Rule; N]) -> Self {
        Self { name, hook: None, rules: rules.into() }
    }

    /// Makes a chain that packets come to by themselves.
    pub(crate) fn base<const N: usize>(name: &'static str, hook: Hook, rules: [Rule; N]) -> Self {
        Self { name, hook: Some(hook), rules: rules.into() }
    }
}
