//! Telling the kernel a ruleset, in one transaction and without a gap.
//!
//! A first ruleset is added. A later one replaces it in place: the rules are swapped and
//! the sets refilled, but no table, set, counter or limit is ever deleted and made again,
//! since for a moment that lets through on one CPU what both rulesets refuse.

use std::{borrow::Cow, net::Ipv4Addr};

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NetlinkMessage, Nla};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, DevHookNumber, Expressions,
        GenAttribute, GenMessage, Hook as HookAttribute, HookNumber, Immediate, InetHookNumber,
        ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register,
        RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags,
        SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableFlags,
        TableMessage, Verdict, VerdictAttribute,
    },
    none::ControlMessage,
};

use super::{
    Error,
    netlink::{Accepts, Answers, Kernel, Request},
    ruleset::{
        At, Chain, Direction, Family, Fate, Field, Kind, Limit, Load, Refusal, Ruleset, Set, Step,
        Table,
    },
};
use crate::{sandbox::network::Span, sys};

/// How a ruleset takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// There is nothing of it yet. Costs half of replacing.
    First,
    /// It takes the place of one of the same names.
    Replace,
}

/// The subsystem that a transaction is for (`NFNL_SUBSYS_NFTABLES`).
const SUBSYSTEM: u16 = 10;
/// What `nft` knows the type of an IPv4 address as; it is only for its listing.
const TYPE_IPADDR: u32 = 7;
/// An attribute has at most 64 KiB, and a span takes at most 56 bytes of one.
const SPANS_PER_MESSAGE: usize = 1000;
/// The register that loads write and the others read.
const REGISTER: Register = Register::Reg1;

/// Puts `ruleset` in force in the namespace of `kernel`: all of it, or nothing.
///
/// # Errors
/// Where the kernel refuses, which it says of the first thing that it refuses.
pub(super) fn apply(kernel: &Kernel, ruleset: &Ruleset, mode: Mode) -> Result<(), Error> {
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
pub(super) fn remove(kernel: &Kernel, family: Family, name: &str) -> Result<(), Error> {
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

/// Opens a socket for the firewall of the namespace that this thread is in.
///
/// # Errors
/// Where the kernel has no netfilter.
pub(super) fn here() -> Result<Kernel, Error> {
    Kernel::here(sys::netlink::Family::Netfilter)
}

/// Says whether the namespace of `kernel` has the table.
///
/// # Errors
/// Where the kernel does not say, as where it has no nf_tables.
pub(super) fn has_table(kernel: &Kernel, family: Family, name: &str) -> Result<bool, Error> {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    let message = NfTablesMessage::GetTable(TableMessage { attributes });
    let found = kernel.get("looking for a table of the firewall", netfilter(family, message))?;
    Ok(found.is_some())
}

/// Returns the number of the firewall of the namespace of `kernel`: another one after each
/// change of it, whoever makes it.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn generation(kernel: &Kernel) -> Result<u32, Error> {
    let message = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let found = kernel.get("looking at the firewall", netfilter(Family::Inet, message))?;
    let Some(NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(message))) =
        found.map(|message| message.inner)
    else {
        return Err(Error::NotThere);
    };
    let id = message
        .attributes
        .iter()
        .find_map(|attribute| if let GenAttribute::Id(id) = attribute { Some(*id) } else { None });
    id.ok_or(Error::NotThere)
}

/// Returns a table with all its chains and rules and their numbers, which are others for a
/// rule that takes the place of one. No two tables have the same.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn contents(
    kernel: &Kernel,
    family: Family,
    table: &str,
) -> Result<Vec<NetfilterMessage>, Error> {
    // A table may be there and dormant.
    let attributes = vec![TableAttribute::Name(table.to_owned())];
    let itself = NfTablesMessage::GetTable(TableMessage { attributes });
    let itself = kernel.get("looking for a table of the firewall", netfilter(family, itself))?;
    let mut found: Vec<NetfilterMessage> = itself.into_iter().collect();
    let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let named = ChainAttribute::Table(table.to_owned());
    let is_of_table = |message: &NetfilterMessage| {
        matches!(&message.inner, NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain))
            if chain.attributes.contains(&named))
    };
    found.extend(kernel.list_some("listing the chains", netfilter(family, chains), |message| {
        is_of_table(&message).then_some(message)
    })?);
    let attributes = vec![RuleAttribute::Table(table.to_owned())];
    let rules = NfTablesMessage::GetRule(RuleMessage { attributes });
    found.extend(kernel.list("listing the rules", netfilter(family, rules))?);
    // Their headers have the number of the whole firewall.
    for message in &mut found {
        message.header = NetfilterHeader::new(message.header.family, 0, 0);
    }
    Ok(found)
}

/// Returns the packets and the bytes that the counters of the table have counted, by name.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn counters(
    kernel: &Kernel,
    family: Family,
    table: &str,
) -> Result<Vec<(String, u64, u64)>, Error> {
    let attributes = vec![text(OBJECT_TABLE, table), number(OBJECT_TYPE, OBJECT_IS_COUNTER)];
    let message = NfTablesMessage::GetObject(attributes);
    let found = kernel.list("reading the counters", netfilter(family, message))?;
    Ok(found.into_iter().filter_map(counted).collect())
}

/// Returns where the spans of a set begin, in order.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn starts(
    kernel: &Kernel,
    family: Family,
    table: &str,
    set: &str,
) -> Result<Vec<Ipv4Addr>, Error> {
    let attributes =
        vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
    let message = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
    let found = kernel.list("reading a set of the firewall", netfilter(family, message))?;
    let mut starts: Vec<Ipv4Addr> = found.into_iter().flat_map(starts_of).collect();
    starts.sort_unstable();
    Ok(starts)
}

fn starts_of(message: NetfilterMessage) -> Vec<Ipv4Addr> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = message.inner
    else {
        return Vec::new();
    };
    let mut starts = Vec::new();
    for attribute in message.attributes {
        let SetElementList::Elements(elements) = attribute else { continue };
        for element in elements {
            let ListAttribute::Element(parts) = element else { continue };
            let ends = SetElementAttribute::Flags(SetElementFlags::IntervalEnd);
            let key = parts.iter().find_map(|part| {
                let SetElementAttribute::Key(DataAttribute::Value(key)) = part else { return None };
                <[u8; 4]>::try_from(key.as_slice()).ok()
            });
            if !parts.contains(&ends) {
                starts.extend(key.map(Ipv4Addr::from));
            }
        }
    }
    starts
}

const OBJECT_TABLE: u16 = 1;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
const OBJECT_IS_COUNTER: u32 = 1;
const OBJECT_IS_LIMIT: u32 = 4;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// Reads what one counter has counted.
fn counted(message: NetfilterMessage) -> Option<(String, u64, u64)> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewObject(attributes)) = message.inner
    else {
        return None;
    };
    let value =
        |kind: u16| attributes.iter().find(|nla| nla.kind() & KIND_MASK == kind).map(bytes_of);
    let name = value(OBJECT_NAME)?;
    let name = String::from_utf8(name.strip_suffix(b"\0").unwrap_or(&name).to_vec()).ok()?;
    let data = value(OBJECT_DATA)?;
    let count = |wanted: u16| {
        let nlas = netlink_packet_core::NlasIterator::new(&data);
        nlas.flatten()
            .find(|nla| nla.kind() == wanted)
            .and_then(|nla| nla.value().try_into().ok())
            .map(u64::from_be_bytes)
    };
    Some((name, count(COUNTER_PACKETS)?, count(COUNTER_BYTES)?))
}

/// The kind of an attribute without its flags.
const KIND_MASK: u16 = netlink_packet_core::NLA_TYPE_MASK;

fn bytes_of(nla: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}

fn netfilter(family: Family, message: NfTablesMessage) -> NetlinkMessage<NetfilterMessage> {
    let family = match family {
        Family::Netdev => NetfilterProtoFamily::NetDev,
        Family::Inet => NetfilterProtoFamily::Inet,
    };
    NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message))
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
    let Set { name, spans } = set;
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
    for spans in spans.chunks(SPANS_PER_MESSAGE) {
        let elements = spans.iter().flat_map(|span| elements(*span)).collect();
        let attributes = named().into_iter().chain([SetElementList::Elements(elements)]).collect();
        let add = NfTablesMessage::NewSetElement(SetElementMessage { attributes });
        requests.push(request(format!("filling the set {name}"), table.family, add));
    }
    requests
}

/// A span is where it begins and where what follows it begins, if anything does.
fn elements(span: Span) -> impl Iterator<Item = ListAttribute<SetElementAttribute>> {
    let key = |bits: u32| SetElementAttribute::Key(DataAttribute::Value(bits.to_be_bytes().into()));
    let start = ListAttribute::Element(vec![key(span.first.to_bits())]);
    let end = span.last.to_bits().checked_add(1).map(|bits| {
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

/// Returns what one step is in the kernel's language; a translation takes two.
fn expressions(step: &Step) -> Vec<Expressions> {
    let one = match step {
        Step::Load(what) => load(*what),
        Step::Mask(mask) => Expressions::Bitwise(vec![
            Bitwise::SourceRegister(REGISTER),
            Bitwise::DestinationRegister(REGISTER),
            Bitwise::Length(u32::try_from(mask.len()).expect("a register has 16 bytes")),
            Bitwise::Mask(DataAttribute::Value(mask.clone())),
            Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
        ]),
        Step::Is(value) => compare(Operator::Equal, value),
        Step::IsNot(value) => compare(Operator::NotEqual, value),
        Step::AtLeast(value) => compare(Operator::GreatherThanEqual, value),
        Step::AtMost(value) => compare(Operator::LessThanEqual, value),
        Step::In(set) => Expressions::Lookup(vec![
            Lookup::Set((*set).to_owned()),
            Lookup::SourceRegister(REGISTER),
        ]),
        Step::Limited(limit) => object(OBJECT_IS_LIMIT, limit),
        Step::Count(counter) => object(OBJECT_IS_COUNTER, counter),
        Step::FlowsOver(count) => {
            const COUNT: u16 = 1;
            const FLAGS: u16 = 2;
            const OVER: u32 = 1;
            other("connlimit", vec![number(COUNT, *count), number(FLAGS, OVER)])
        }
        Step::Verdict(decided) => verdict(Verdict::Other(fate(*decided)), None),
        Step::Goto(chain) => verdict(Verdict::Goto, Some(chain)),
        Step::Refuse(refusal) => refuse(*refusal),
        Step::Source(address) => return translate(TRANSLATE_SOURCE, address.octets()),
        Step::Destination(address) => return translate(TRANSLATE_DESTINATION, address.octets()),
        Step::Masquerade => other("masq", Vec::new()),
    };
    vec![one]
}

fn load(what: Load) -> Expressions {
    const LINK: u32 = 0;
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    match what {
        Load::InName => meta(MetaKey::Iifname),
        Load::OutName => meta(MetaKey::Oifname),
        Load::InGroup => meta(MetaKey::Iifgroup),
        Load::OutGroup => meta(MetaKey::Oifgroup),
        Load::NetworkProtocol => meta(MetaKey::Nfproto),
        Load::TransportProtocol => meta(MetaKey::L4Proto),
        Load::Link(field) => payload(LINK, field),
        Load::Network(field) => payload(NETWORK, field),
        Load::Transport(field) => payload(TRANSPORT, field),
        Load::CtState => connection(0, None),
        Load::CtDirection => connection(1, None),
        Load::CtStatus => connection(2, None),
        Load::CtSource(direction) => connection(19, Some(direction)),
        Load::CtDestination(direction) => connection(20, Some(direction)),
        Load::Turn(turns) => {
            const REGISTER_TO: u16 = 1;
            const MODULUS: u16 = 2;
            const TYPE: u16 = 3;
            const COUNTING: u32 = 0;
            let attributes = vec![
                number(REGISTER_TO, REGISTER.into()),
                number(MODULUS, turns),
                number(TYPE, COUNTING),
            ];
            other("numgen", attributes)
        }
    }
}

fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::DestinationRegister(REGISTER), Meta::Key(key)])
}

fn payload(base: u32, field: Field) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(REGISTER),
        Payload::Base(base),
        Payload::Offset(field.offset),
        Payload::Len(field.length),
    ])
}

/// Something about the connection, by the number of `enum nft_ct_keys`.
fn connection(key: u32, direction: Option<Direction>) -> Expressions {
    const REGISTER_TO: u16 = 1;
    const KEY: u16 = 2;
    const DIRECTION: u16 = 3;
    let direction = direction.map(|direction| match direction {
        Direction::Original => 0,
        Direction::Reply => 1,
    });
    let attributes = [number(REGISTER_TO, REGISTER.into()), number(KEY, key)]
        .into_iter()
        .chain(direction.map(|way| DefaultNla::new(DIRECTION, vec![way])));
    other("ct", attributes.collect())
}

fn compare(operator: Operator, value: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(REGISTER),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value.to_vec())),
    ])
}

/// Refers to a counter or a limit of the table.
fn object(kind: u32, name: &str) -> Expressions {
    const TYPE: u16 = 1;
    const NAME: u16 = 2;
    other("objref", vec![number(TYPE, kind), text(NAME, name)])
}

fn verdict(code: Verdict, chain: Option<&str>) -> Expressions {
    let mut attributes = vec![VerdictAttribute::Code(code)];
    attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.to_owned())));
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(attributes)),
    ])
}

fn fate(fate: Fate) -> u32 {
    match fate {
        Fate::Drop => 0,
        Fate::Accept => 1,
    }
}

fn refuse(refusal: Refusal) -> Expressions {
    const TYPE: u16 = 1;
    const CODE: u16 = 2;
    const TCP_RESET: u32 = 1;
    const ICMP_OF_THE_FAMILY: u32 = 2;
    const ADMIN_PROHIBITED: u8 = 3;
    let attributes = match refusal {
        Refusal::TcpReset => vec![number(TYPE, TCP_RESET), DefaultNla::new(CODE, vec![0])],
        Refusal::AdminProhibited => {
            vec![number(TYPE, ICMP_OF_THE_FAMILY), DefaultNla::new(CODE, vec![ADMIN_PROHIBITED])]
        }
    };
    other("reject", attributes)
}

const TRANSLATE_SOURCE: u32 = 0;
const TRANSLATE_DESTINATION: u32 = 1;

fn translate(kind: u32, address: [u8; 4]) -> Vec<Expressions> {
    const TYPE: u16 = 1;
    const FAMILY: u16 = 2;
    const ADDRESS: u16 = 3;
    const IPV4: u32 = 2;
    let loaded = Expressions::Immediate(vec![
        Immediate::DestinationRegister(REGISTER),
        Immediate::Data(DataAttribute::Value(address.into())),
    ]);
    let attributes =
        vec![number(TYPE, kind), number(FAMILY, IPV4), number(ADDRESS, REGISTER.into())];
    vec![loaded, other("nat", attributes)]
}

/// An expression that the library has no words for.
fn other(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.to_owned(), attributes }
}

fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().into())
}

fn long(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().into())
}

fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), b"\0"].concat())
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    use netlink_packet_core::{Emitable, NLA_F_NESTED};
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}
