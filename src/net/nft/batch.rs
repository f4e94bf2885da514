//! Puts a ruleset in force, in one transaction and without a gap.
//!
//! A first ruleset is added. A later one replaces it in place: the rules are swapped and
//! the sets refilled, but no table, set, counter or limit is ever deleted and made again,
//! since for a moment that lets through on one CPU what both rulesets refuse.

use std::{borrow::Cow, net::Ipv4Addr, ops::RangeInclusive};

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NetlinkMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, DevHookNumber, Hook as HookAttribute,
        HookNumber, InetHookNumber, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage,
        SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
        SetFlags, SetMessage, TableAttribute, TableFlags, TableMessage,
    },
    none::ControlMessage,
};

use super::{
    expression::{expressions, fate},
    message::{
        COUNTER_BYTES, COUNTER_PACKETS, OBJECT_DATA, OBJECT_IS_COUNTER, OBJECT_IS_LIMIT,
        OBJECT_NAME, OBJECT_TABLE, OBJECT_TYPE, long, nested, netfilter, number, text,
    },
    ruleset::{At, Chain, Family, Kind, Limit, Ruleset, Set, Table},
};
use crate::sys::netlink::{Accepts, Answers, Kernel, Request, RequestError};

/// How a ruleset takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// There is nothing of it yet. Costs half of replacing.
    First,
    /// It takes the place of one of the same names.
    Replace,
}

/// The subsystem that a transaction is for (`NFNL_SUBSYS_NFTABLES`).
const SUBSYSTEM: u16 = 10;
/// What `nft` knows the type of an IPv4 address as; it is only for its listing.
const TYPE_IPADDR: u32 = 7;
/// An attribute has at most 64 KiB, and a range takes at most 56 bytes of one.
const RANGES_PER_MESSAGE: usize = 1000;

/// Puts `ruleset` in force in the namespace of `kernel`: all of it, or nothing.
///
/// # Errors
/// Where the kernel refuses, which it says of the first thing that it refuses.
pub(crate) fn apply(kernel: &Kernel, ruleset: &Ruleset, mode: Mode) -> Result<(), RequestError> {
    let mut requests = vec![bracket(ControlMessage::BatchBegin)];
    for table in &ruleset.tables {
        requests.extend(of_table(table, mode));
    }
    requests.push(bracket(ControlMessage::BatchEnd));
    kernel.apply(requests, Answers::Transaction)
}

/// Removes the tables of `names`, of those that there are.
///
/// # Errors
/// Where the kernel refuses.
pub(crate) fn remove(kernel: &Kernel, family: Family, name: &str) -> Result<(), RequestError> {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    let requests = vec![
        bracket(ControlMessage::BatchBegin),
        Request {
            accepts: Accepts::Missing,
            ..request(
                "removing a table of the firewall",
                family,
                NfTablesMessage::DeleteTable(TableMessage { attributes }),
            )
        },
        bracket(ControlMessage::BatchEnd),
    ];
    kernel.apply(requests, Answers::Transaction)
}

fn request(
    doing: impl Into<Cow<'static, str>>,
    family: Family,
    message: NfTablesMessage,
) -> Request<NetfilterMessage> {
    let mut message = netfilter(family, message);
    message.header.flags = NLM_F_CREATE;
    Request { doing: doing.into(), message, accepts: Accepts::Success }
}

fn bracket(message: ControlMessage) -> Request<NetfilterMessage> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
    Request {
        doing: "changing the firewall".into(),
        message: NetlinkMessage::from(NetfilterMessage::new(header, message)),
        accepts: Accepts::Success,
    }
}

fn of_table(table: &Table, mode: Mode) -> Vec<Request<NetfilterMessage>> {
    let Table { family, name, .. } = table;
    // Without flags one that is dormant stays so.
    let attributes =
        vec![TableAttribute::Name(name.clone()), TableAttribute::Flags(TableFlags::empty())];
    let new_table = NfTablesMessage::NewTable(TableMessage { attributes });
    let mut requests = vec![request(format!("adding the table {name}"), *family, new_table)];
    if mode == Mode::Replace {
        let attributes = vec![RuleAttribute::Table(name.clone())];
        let flush = NfTablesMessage::DeleteRule(RuleMessage { attributes });
        requests.push(request(format!("flushing the table {name}"), *family, flush));
    }
    for counter in &table.counters {
        let data = nested(OBJECT_DATA, &[long(COUNTER_BYTES, 0), long(COUNTER_PACKETS, 0)]);
        requests.push(of_object(table, counter, OBJECT_IS_COUNTER, data));
    }
    for limit in &table.limits {
        let data = nested(OBJECT_DATA, &limit_attributes(limit));
        requests.push(of_object(table, limit.name, OBJECT_IS_LIMIT, data));
    }
    for (at, set) in table.sets.iter().enumerate() {
        requests.extend(of_set(table, at, set, mode));
    }
    requests.extend(table.chains.iter().map(|chain| of_chain(table, chain)));
    for chain in &table.chains {
        requests.extend(of_rules(table, chain));
    }
    requests
}

fn of_object(table: &Table, name: &str, kind: u32, data: DefaultNla) -> Request<NetfilterMessage> {
    let attributes = vec![
        text(OBJECT_TABLE, &table.name),
        text(OBJECT_NAME, name),
        number(OBJECT_TYPE, kind),
        data,
    ];
    request(format!("adding {name}"), table.family, NfTablesMessage::NewObject(attributes))
}

/// A limit's attributes are the same in an object and in a rule.
fn limit_attributes(limit: &Limit) -> [DefaultNla; 5] {
    const RATE: u16 = 1;
    const UNIT: u16 = 2;
    const BURST: u16 = 3;
    const TYPE: u16 = 4;
    const FLAGS: u16 = 5;
    const A_SECOND: u64 = 1;
    const OF_PACKETS: u32 = 0;
    [
        long(RATE, limit.per_second),
        long(UNIT, A_SECOND),
        number(BURST, limit.burst),
        number(TYPE, OF_PACKETS),
        number(FLAGS, u32::from(limit.over)),
    ]
}

fn of_set(table: &Table, at: usize, set: &Set, mode: Mode) -> Vec<Request<NetfilterMessage>> {
    const ADDRESS_BYTES: u32 = 4;
    let Set { name, ranges } = set;
    let attributes = vec![
        SetAttribute::Table(table.name.clone()),
        SetAttribute::Name((*name).to_owned()),
        SetAttribute::Flags(SetFlags::Interval),
        SetAttribute::KeyType(TYPE_IPADDR),
        SetAttribute::KeyLen(ADDRESS_BYTES),
        SetAttribute::Id(u32::try_from(at).expect("a table has a few sets")),
    ];
    let new = NfTablesMessage::NewSet(SetMessage { attributes });
    let mut requests = vec![request(format!("adding the set {name}"), table.family, new)];
    let named =
        || [SetElementList::Table(table.name.clone()), SetElementList::Set((*name).to_owned())];
    if mode == Mode::Replace {
        let attributes = named().into();
        let flush = NfTablesMessage::DeleteSetElement(SetElementMessage { attributes });
        requests.push(request(format!("emptying the set {name}"), table.family, flush));
    }
    for ranges in ranges.chunks(RANGES_PER_MESSAGE) {
        let elements = ranges.iter().flat_map(elements).collect();
        let attributes = named().into_iter().chain([SetElementList::Elements(elements)]).collect();
        let add = NfTablesMessage::NewSetElement(SetElementMessage { attributes });
        requests.push(request(format!("filling the set {name}"), table.family, add));
    }
    requests
}

/// A range is its first address, and the one after its last, if there is one.
fn elements(
    range: &RangeInclusive<Ipv4Addr>,
) -> impl Iterator<Item = ListAttribute<SetElementAttribute>> + use<> {
    let key = |bits: u32| SetElementAttribute::Key(DataAttribute::Value(bits.to_be_bytes().into()));
    let start = ListAttribute::Element(vec![key(range.start().to_bits())]);
    let end = range.end().to_bits().checked_add(1).map(|bits| {
        ListAttribute::Element(vec![
            key(bits),
            SetElementAttribute::Flags(SetElementFlags::IntervalEnd),
        ])
    });
    [start].into_iter().chain(end)
}

fn of_chain(table: &Table, chain: &Chain) -> Request<NetfilterMessage> {
    let mut attributes = vec![
        ChainAttribute::Table(table.name.clone()),
        ChainAttribute::Name(chain.name.to_owned()),
    ];
    if let Some(hook) = &chain.hook {
        let number = match hook.at {
            At::Ingress(_) => HookNumber::Dev(DevHookNumber::Ingress),
            At::Prerouting => HookNumber::Inet(InetHookNumber::PreRouting),
            At::Input => HookNumber::Inet(InetHookNumber::LocalIn),
            At::Forward => HookNumber::Inet(InetHookNumber::Forward),
            At::Postrouting => HookNumber::Inet(InetHookNumber::PostRouting),
        };
        let priority = u32::from_ne_bytes(hook.priority.to_ne_bytes());
        let mut place = vec![HookAttribute::Number(number), HookAttribute::Priority(priority)];
        if let At::Ingress(device) = hook.at {
            place.push(HookAttribute::NetDeviceName(device.to_owned()));
        }
        let kind = match hook.kind {
            Kind::Filter => "filter",
            Kind::Nat => "nat",
        };
        attributes.extend([
            ChainAttribute::Hook(place),
            ChainAttribute::Policy(fate(hook.otherwise)),
            ChainAttribute::Type(kind.to_owned()),
        ]);
    }
    let new = NfTablesMessage::NewChain(ChainMessage { attributes });
    request(format!("adding the chain {}", chain.name), table.family, new)
}

fn of_rules(table: &Table, chain: &Chain) -> impl Iterator<Item = Request<NetfilterMessage>> {
    chain.rules.iter().enumerate().map(move |(at, rule)| {
        let expressions = rule.iter().flat_map(expressions).map(ListAttribute::from).collect();
        let attributes = vec![
            RuleAttribute::Table(table.name.clone()),
            RuleAttribute::Chain(chain.name.to_owned()),
            RuleAttribute::Expressions(expressions),
        ];
        let new = NfTablesMessage::NewRule(RuleMessage { attributes });
        let doing = format!("adding rule {} of the chain {}", at + 1, chain.name);
        let mut request = request(doing, table.family, new);
        request.message.header.flags |= NLM_F_APPEND;
        request
    })
}
