//! Reading the chains, rules and sets of all firewalls from the kernel.

use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_core::{DefaultNla, NetlinkMessage, Nla};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute,
        Expressions, Hook as HookAttribute, Immediate, InetHookNumber, ListAttribute, Lookup, Meta,
        MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage,
        SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage, Verdict,
        VerdictAttribute,
    },
};

use super::packet::Field;
use crate::{net::Error, sys::netlink::Kernel};

const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// A table of some firewall.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) chains: BTreeMap<String, Chain>,
    /// What is in the sets that rules look into.
    pub(super) sets: BTreeMap<String, Vec<Element>>,
}

/// A chain of rules.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Whether what is forwarded comes to it first of its table.
    pub(super) forwards: bool,
    /// Whether it drops what no rule decided on.
    pub(super) drops: bool,
    pub(super) rules: Vec<Vec<Step>>,
}

/// What a rule does, step by step, for as long as each holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Load {
        field: Field,
        to: Register,
    },
    Mask {
        from: Register,
        mask: Vec<u8>,
        xor: Vec<u8>,
        to: Register,
    },
    Compare {
        from: Register,
        value: Vec<u8>,
        is_equal: bool,
    },
    Lookup {
        from: Register,
        set: String,
        is_in: bool,
        is_map: bool,
    },
    /// Holds for connections in these states.
    States(u32),
    /// Holds for some packets, and it is not known for which.
    Some,
    Does(Does),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Does {
    Accept,
    Refuse,
    Return,
    /// Goes on in another chain, and comes back if that decides nothing.
    Jump(String),
    Goto(String),
}

/// An element of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// Without one it stands for all that is not in the set.
    pub(super) key: Option<Vec<u8>>,
    /// Whether an interval ends here, and does not begin.
    pub(super) is_end: bool,
    /// What is done with what is found here, in a map of verdicts.
    pub(super) does: Option<Does>,
}

/// A table's name with the family, as no two tables have the same.
type Names = BTreeMap<String, Table>;

/// Returns all tables that see IPv4 packets, by family and name.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn tables(kernel: &Kernel) -> Result<Names, Error> {
    let all = NetfilterProtoFamily::Unspec;
    let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let rules = NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() });
    let mut tables = Names::new();
    for message in kernel.list("listing the chains of the firewall", ask(all, chains))? {
        if let Some((table, name, chain)) = as_chain(message) {
            tables.entry(table).or_default().chains.insert(name, chain);
        }
    }
    for message in kernel.list("listing the rules of the firewall", ask(all, rules))? {
        if let Some((table, name, rule)) = as_rule(message)
            && let Some(chain) = tables.get_mut(&table).and_then(|it| it.chains.get_mut(&name))
        {
            chain.rules.push(rule);
        }
    }
    // Most have nothing to do with what is forwarded, and their sets may be large.
    for (name, table) in &mut tables {
        if table.chains.values().any(|chain| chain.forwards) {
            for set in sets_of(table) {
                let elements = elements(kernel, name, &set)?;
                table.sets.insert(set, elements);
            }
        }
    }
    Ok(tables)
}

/// Returns the sets in which rules look for something that is known of packets.
fn sets_of(table: &Table) -> BTreeSet<String> {
    let mut sets = BTreeSet::new();
    for rule in table.chains.values().flat_map(|chain| &chain.rules) {
        let mut known = BTreeSet::new();
        for step in rule {
            if let Step::Load { field, to } = step {
                let is_known = *field != Field::Other;
                let _changed = if is_known {
                    known.insert(u32::from(*to))
                } else {
                    known.remove(&u32::from(*to))
                };
            } else if let Step::Lookup { from, set, .. } = step
                && known.contains(&u32::from(*from))
            {
                sets.insert(set.clone());
            }
        }
    }
    sets
}

fn ask(family: NetfilterProtoFamily, message: NfTablesMessage) -> NetlinkMessage<NetfilterMessage> {
    NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message))
}

fn elements(kernel: &Kernel, table: &str, set: &str) -> Result<Vec<Element>, Error> {
    let Some((family, table)) = table.split_once(' ') else { return Ok(Vec::new()) };
    let family =
        if family == "ip" { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::Inet };
    let attributes =
        vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
    let message = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
    let found = kernel.list("reading a set of the firewall", ask(family, message))?;
    Ok(found.into_iter().flat_map(as_elements).collect())
}

fn as_elements(message: NetfilterMessage) -> Vec<Element> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = message.inner
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for attribute in message.attributes {
        let SetElementList::Elements(elements) = attribute else { continue };
        for element in elements {
            let ListAttribute::Element(parts) = element else { continue };
            let mut element = Element { key: None, is_end: false, does: None };
            for part in &parts {
                if let SetElementAttribute::Key(DataAttribute::Value(key)) = part {
                    element.key = Some(key.clone());
                } else if let SetElementAttribute::Data(DataAttribute::Verdict(parts)) = part {
                    element.does = verdict(parts);
                } else if let SetElementAttribute::Flags(flags) = part {
                    element.is_end = flags.contains(SetElementFlags::IntervalEnd);
                }
            }
            found.push(element);
        }
    }
    found
}

/// Tables of one name and different families are not the same.
fn of_ipv4(message: &NetfilterMessage, table: &str) -> Option<String> {
    let family = message.header.family;
    [(NetfilterProtoFamily::IPv4, "ip"), (NetfilterProtoFamily::Inet, "inet")]
        .into_iter()
        .find_map(|(it, word)| (it == family).then(|| format!("{word} {table}")))
}

fn as_chain(message: NetfilterMessage) -> Option<(String, String, Chain)> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(inner)) = &message.inner else {
        return None;
    };
    let (mut table, mut name, mut chain) = (None, None, Chain::default());
    for attribute in &inner.attributes {
        if let ChainAttribute::Table(text) = attribute {
            table = of_ipv4(&message, text);
        } else if let ChainAttribute::Name(text) = attribute {
            name = Some(text.clone());
        } else if let ChainAttribute::Policy(policy) = attribute {
            chain.drops = *policy == DROP;
        } else if let ChainAttribute::Hook(parts) = attribute {
            let number = u32::from(InetHookNumber::Forward);
            chain.forwards = parts.iter().any(
                |part| matches!(part, HookAttribute::Number(hook) if u32::from(*hook) == number),
            );
        }
    }
    Some((table?, name?, chain))
}

fn as_rule(message: NetfilterMessage) -> Option<(String, String, Vec<Step>)> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(inner)) = &message.inner else {
        return None;
    };
    let (mut table, mut chain, mut rule) = (None, None, Vec::new());
    for attribute in &inner.attributes {
        if let RuleAttribute::Table(text) = attribute {
            table = of_ipv4(&message, text);
        } else if let RuleAttribute::Chain(text) = attribute {
            chain = Some(text.clone());
        } else if let RuleAttribute::Expressions(list) = attribute {
            rule = list.iter().filter_map(step).collect();
        }
    }
    Some((table?, chain?, rule))
}

/// Returns what an expression does. `None`: nothing that matters here.
fn step(element: &ListAttribute<ExpressionAttribute>) -> Option<Step> {
    let ListAttribute::Element(parts) = element else { return None };
    let name = parts.iter().find_map(|part| {
        if let ExpressionAttribute::Name(name) = part { Some(name.as_str()) } else { None }
    });
    let data = parts.iter().find_map(|part| {
        if let ExpressionAttribute::Data(data) = part { Some(data) } else { None }
    });
    let known = match (name?, data) {
        (_, Some(Expressions::Meta(parts))) => return meta(parts),
        (_, Some(Expressions::Payload(parts))) => return payload(parts),
        (_, Some(Expressions::Immediate(parts))) => return immediate(parts),
        (_, Some(Expressions::Bitwise(parts))) => bitwise(parts),
        (_, Some(Expressions::Cmp(parts))) => compare(parts),
        (_, Some(Expressions::Lookup(parts))) => lookup(parts),
        ("reject", _) => Some(Step::Does(Does::Refuse)),
        ("counter" | "log" | "last" | "notrack" | "flow_offload", _) => return None,
        (name, Some(Expressions::Other { attributes, .. })) => match name {
            "ct" => return connection(attributes),
            "target" => {
                let refuses = attributes.iter().any(|it| bytes(it) == b"REJECT\0");
                return refuses.then_some(Step::Does(Does::Refuse));
            }
            "match" if attributes.iter().any(|it| bytes(it) == b"comment\0") => return None,
            "match" => states(attributes).map(Step::States),
            "objref" if attributes.iter().any(is_of_counter) => return None,
            _ => None,
        },
        _ => None,
    };
    Some(known.unwrap_or(Step::Some))
}

fn meta(parts: &[Meta]) -> Option<Step> {
    let field = parts.iter().find_map(|part| {
        let Meta::Key(key) = part else { return None };
        Some(if *key == MetaKey::Iifname {
            Field::InName
        } else if *key == MetaKey::Oifname {
            Field::OutName
        } else if *key == MetaKey::Iif {
            Field::InIndex
        } else if *key == MetaKey::Oif {
            Field::OutIndex
        } else if *key == MetaKey::Iifgroup {
            Field::InGroup
        } else if *key == MetaKey::Oifgroup {
            Field::OutGroup
        } else if *key == MetaKey::Nfproto {
            Field::Family
        } else {
            Field::Other
        })
    })?;
    // One that loads nothing sets something.
    let to = parts
        .iter()
        .find_map(|part| if let Meta::DestinationRegister(to) = part { Some(*to) } else { None })?;
    Some(Step::Load { field, to })
}

fn payload(parts: &[Payload]) -> Option<Step> {
    const NETWORK: u32 = 1;
    let (mut to, mut base, mut offset, mut length) = (None, None, None, None);
    for part in parts {
        if let Payload::DestinationRegister(register) = part {
            to = Some(*register);
        } else if let Payload::Base(number) = part {
            base = Some(*number);
        } else if let Payload::Offset(bytes) = part {
            offset = usize::try_from(*bytes).ok();
        } else if let Payload::Len(bytes) = part {
            length = usize::try_from(*bytes).ok();
        }
    }
    let field = match (base, offset, length) {
        (Some(NETWORK), Some(offset), Some(length)) => Field::Header { offset, length },
        _ => Field::Other,
    };
    Some(Step::Load { field, to: to? })
}

fn immediate(parts: &[Immediate]) -> Option<Step> {
    let verdict = |part: &Immediate| {
        let Immediate::Data(DataAttribute::Verdict(parts)) = part else { return None };
        verdict(parts)
    };
    parts.iter().find_map(verdict).map(Step::Does)
}

fn bitwise(parts: &[Bitwise]) -> Option<Step> {
    let (mut from, mut to, mut mask, mut xor) = (None, None, None, None);
    for part in parts {
        if let Bitwise::SourceRegister(register) = part {
            from = Some(*register);
        } else if let Bitwise::DestinationRegister(register) = part {
            to = Some(*register);
        } else if let Bitwise::Mask(DataAttribute::Value(bytes)) = part {
            mask = Some(bytes.clone());
        } else if let Bitwise::Xor(DataAttribute::Value(bytes)) = part {
            xor = Some(bytes.clone());
        }
    }
    // A shift has neither, and what it leaves is not known.
    let (mask, xor) = (mask.unwrap_or_default(), xor.unwrap_or_default());
    Some(Step::Mask { from: from?, mask, xor, to: to? })
}

fn compare(parts: &[Cmp]) -> Option<Step> {
    let (mut from, mut is_equal, mut value) = (None, None, None);
    for part in parts {
        if let Cmp::SourceRegister(register) = part {
            from = Some(*register);
        } else if let Cmp::Op(operator) = part {
            // Others compare numbers.
            is_equal = [(Operator::Equal, true), (Operator::NotEqual, false)]
                .into_iter()
                .find_map(|(it, is_equal)| (it == *operator).then_some(is_equal));
        } else if let Cmp::Data(DataAttribute::Value(bytes)) = part {
            value = Some(bytes.clone());
        }
    }
    Some(Step::Compare { from: from?, value: value?, is_equal: is_equal? })
}

fn lookup(parts: &[Lookup]) -> Option<Step> {
    const INVERTED: u32 = 1;
    let (mut from, mut set, mut is_in, mut is_map) = (None, None, true, false);
    for part in parts {
        if let Lookup::SourceRegister(register) = part {
            from = Some(*register);
        } else if let Lookup::Set(name) = part {
            set = Some(name.clone());
        } else if let Lookup::Flags(flags) = part {
            is_in = flags & INVERTED == 0;
        } else if let Lookup::DestinationRegister(register) = part {
            // Into another than this it loads data.
            is_map = *register == Register::Verdict;
            if !is_map {
                return None;
            }
        }
    }
    Some(Step::Lookup { from: from?, set: set?, is_in, is_map })
}

/// Something about the connection.
fn connection(attributes: &[DefaultNla]) -> Option<Step> {
    const REGISTER_TO: u16 = 1;
    const KEY: u16 = 2;
    const STATE: u32 = 0;
    let number = |kind: u16| attributes.iter().find(|it| it.kind() == kind).and_then(as_u32);
    let to = Register::from(number(REGISTER_TO)?);
    let field = if number(KEY) == Some(STATE) { Field::State } else { Field::Other };
    Some(Step::Load { field, to })
}

/// Reads the states of a `conntrack` match of iptables that looks at nothing else.
fn states(attributes: &[DefaultNla]) -> Option<u32> {
    const INFO: u16 = 3;
    // Places in `struct xt_conntrack_mtinfo2`, and in the next that begins as it.
    const FLAGS: usize = 146;
    const INVERTED: usize = 148;
    const STATES: usize = 150;
    const BY_STATE: u16 = 1;
    attributes.iter().find(|it| bytes(it) == b"conntrack\0")?;
    let info = bytes(attributes.iter().find(|it| it.kind() == INFO)?);
    let number = |at: usize| Some(u16::from_ne_bytes(info.get(at..at + 2)?.try_into().ok()?));
    let states = u32::from(number(STATES)?);
    match (number(FLAGS)?, number(INVERTED)?) {
        (BY_STATE, 0) => Some(states),
        (BY_STATE, BY_STATE) => Some(!states),
        _ => None,
    }
}

fn is_of_counter(nla: &DefaultNla) -> bool {
    const TYPE: u16 = 1;
    const COUNTER: u32 = 1;
    nla.kind() == TYPE && as_u32(nla) == Some(COUNTER)
}

fn as_u32(nla: &DefaultNla) -> Option<u32> {
    bytes(nla).try_into().ok().map(u32::from_be_bytes)
}

fn bytes(nla: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}

fn verdict(parts: &[VerdictAttribute]) -> Option<Does> {
    let chain = parts.iter().find_map(|part| {
        if let VerdictAttribute::Chain(name) = part { Some(name.clone()) } else { None }
    });
    let code = parts
        .iter()
        .find_map(|part| if let VerdictAttribute::Code(code) = part { Some(*code) } else { None });
    match (code?, chain) {
        (Verdict::Jump, Some(chain)) => Some(Does::Jump(chain)),
        (Verdict::Goto, Some(chain)) => Some(Does::Goto(chain)),
        (Verdict::Return, _) => Some(Does::Return),
        (code, _) if u32::from(code) == ACCEPT => Some(Does::Accept),
        (code, _) if u32::from(code) == DROP => Some(Does::Refuse),
        _ => None,
    }
}
