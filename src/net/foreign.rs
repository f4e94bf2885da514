//! What other firewalls of the host do with packets that are forwarded. It only looks.
//!
//! A chain refuses what is forwarded by its policy, or by a rule without conditions at which
//! every packet ends that no rule before it decided on, as firewalld has it. A rule that
//! accepts what comes in by the sandboxes' links is taken for the remedy.

use std::collections::BTreeMap;

use netlink_packet_core::{DefaultNla, NetlinkMessage, Nla};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions,
        Hook as HookAttribute, Immediate, InetHookNumber, ListAttribute, Meta, MetaKey,
        NfTablesMessage, Payload, RuleAttribute, RuleMessage, Verdict, VerdictAttribute,
    },
};

use super::{Error, netlink::Kernel};

/// How the names of the sandboxes' links begin.
const LINKS: &[u8] = b"dz";
/// How many chains deep a rule is followed; the kernel allows 16.
const DEPTH_MAX: usize = 16;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// A chain of some firewall.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Chain {
    forwards: bool,
    drops: bool,
    rules: Vec<Rule>,
}

/// What is known of a rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Rule {
    /// Whether it holds for some packets only.
    has_conditions: bool,
    /// Whether it holds for what comes in by links of sandboxes.
    is_of_sandboxes: bool,
    does: Does,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Does {
    #[default]
    Nothing,
    Accept,
    Refuse,
    Return,
    /// Goes on in another chain, and comes back if that decides nothing.
    Jump(String),
    Goto(String),
}

/// What becomes of the packets of sandboxes in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Passes,
    Refused,
    Undecided,
}

/// A chain that refuses what sandboxes send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusing {
    pub(super) table: String,
    pub(super) chain: String,
    /// Whether its policy does, rather than its last rule.
    pub(super) by_policy: bool,
    /// The other chains of its table, which tell whose it is.
    pub(super) chains: Vec<String>,
}

/// Returns the chains that refuse what sandboxes send, of all that there are for IPv4.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn refusing(kernel: &Kernel) -> Result<Vec<Refusing>, Error> {
    let all = |message| {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        NetlinkMessage::from(NetfilterMessage::new(header, message))
    };
    let chains = all(NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }));
    let rules = all(NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() }));
    let mut tables: BTreeMap<String, BTreeMap<String, Chain>> = BTreeMap::new();
    for message in kernel.list("listing the chains of the firewall", chains)? {
        if let Some((table, name, chain)) = as_chain(message) {
            tables.entry(table).or_default().insert(name, chain);
        }
    }
    for message in kernel.list("listing the rules of the firewall", rules)? {
        if let Some((table, name, rule)) = as_rule(message)
            && let Some(chain) = tables.get_mut(&table).and_then(|chains| chains.get_mut(&name))
        {
            chain.rules.push(rule);
        }
    }
    let of_table = |(table, chains): (String, BTreeMap<String, Chain>)| {
        let found: Vec<_> = chains
            .iter()
            .filter(|(_, chain)| chain.forwards)
            .filter_map(|(name, chain)| {
                let fate = walk(&chains, chain, DEPTH_MAX);
                let by_policy = fate == Fate::Undecided && chain.drops;
                (by_policy || fate == Fate::Refused).then(|| Refusing {
                    table: table.clone(),
                    chain: name.clone(),
                    by_policy,
                    chains: chains.keys().cloned().collect(),
                })
            })
            .collect();
        found
    };
    Ok(tables.into_iter().flat_map(of_table).collect())
}

/// Follows a packet of a sandbox through a chain. Of rules with conditions only those count
/// that are of the sandboxes' links.
fn walk(chains: &BTreeMap<String, Chain>, chain: &Chain, depth: usize) -> Fate {
    for rule in &chain.rules {
        if rule.has_conditions && !rule.is_of_sandboxes {
            // A zone of the sandboxes' links may be chosen further in.
            let (Does::Jump(to) | Does::Goto(to)) = &rule.does else { continue };
            let inner = chains.get(to).filter(|_| depth > 0);
            if inner.is_some_and(|inner| accepts_sandboxes(chains, inner, depth - 1)) {
                return Fate::Passes;
            }
            continue;
        }
        let follow = |to: &String| match chains.get(to).filter(|_| depth > 0) {
            Some(inner) => walk(chains, inner, depth - 1),
            None => Fate::Undecided,
        };
        match &rule.does {
            Does::Nothing => {}
            Does::Accept => return Fate::Passes,
            Does::Refuse => return Fate::Refused,
            Does::Return => return Fate::Undecided,
            Does::Goto(to) => return follow(to),
            Does::Jump(to) => match follow(to) {
                Fate::Undecided => {}
                fate @ (Fate::Passes | Fate::Refused) => return fate,
            },
        }
    }
    Fate::Undecided
}

/// Says whether a rule of the chain is of the sandboxes' links and lets them pass.
fn accepts_sandboxes(chains: &BTreeMap<String, Chain>, chain: &Chain, depth: usize) -> bool {
    let own = Chain {
        rules: chain.rules.iter().filter(|rule| rule.is_of_sandboxes).cloned().collect(),
        ..Chain::default()
    };
    walk(chains, &own, depth) == Fate::Passes
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

fn as_rule(message: NetfilterMessage) -> Option<(String, String, Rule)> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(inner)) = &message.inner else {
        return None;
    };
    let (mut table, mut chain, mut rule) = (None, None, Rule::default());
    for attribute in &inner.attributes {
        if let RuleAttribute::Table(text) = attribute {
            table = of_ipv4(&message, text);
        } else if let RuleAttribute::Chain(text) = attribute {
            chain = Some(text.clone());
        } else if let RuleAttribute::Expressions(list) = attribute {
            rule = read_rule(list);
        }
    }
    Some((table?, chain?, rule))
}

fn read_rule(list: &[ListAttribute<ExpressionAttribute>]) -> Rule {
    let mut rule = Rule::default();
    let (mut conditions, mut of_links) = (0, 0);
    let mut loads_link = false;
    for element in list {
        let ListAttribute::Element(parts) = element else { continue };
        let name = parts.iter().find_map(|part| {
            if let ExpressionAttribute::Name(name) = part { Some(name.as_str()) } else { None }
        });
        let data = parts.iter().find_map(|part| {
            if let ExpressionAttribute::Data(data) = part { Some(data) } else { None }
        });
        match (name, data) {
            (_, Some(Expressions::Meta(parts))) => {
                loads_link = parts.contains(&Meta::Key(MetaKey::Iifname));
            }
            (_, Some(Expressions::Cmp(parts))) => {
                conditions += 1;
                of_links += usize::from(loads_link && parts.iter().any(is_prefix_of_links));
            }
            (_, Some(Expressions::Immediate(parts))) => {
                if let Some(does) = parts.iter().find_map(verdict) {
                    rule.does = does;
                }
            }
            (Some("reject"), _) => rule.does = Does::Refuse,
            (Some("target"), Some(Expressions::Other { attributes, .. })) => {
                let refuses = attributes.iter().any(|it| is_text(it, b"REJECT"));
                rule.does = if refuses { Does::Refuse } else { Does::Nothing };
            }
            (Some("counter" | "log" | "objref"), _) => {}
            // It loads something for the next one.
            (_, Some(Expressions::Payload(parts)))
                if parts.iter().any(|part| matches!(part, Payload::DestinationRegister(_))) => {}
            _ => conditions += 1,
        }
    }
    rule.has_conditions = conditions > 0;
    rule.is_of_sandboxes = conditions > 0 && conditions == of_links;
    rule
}

fn is_text(nla: &DefaultNla, text: &[u8]) -> bool {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes.strip_suffix(b"\0").unwrap_or(&bytes) == text
}

fn verdict(part: &Immediate) -> Option<Does> {
    let Immediate::Data(DataAttribute::Verdict(parts)) = part else { return None };
    let chain = parts.iter().find_map(|part| {
        if let VerdictAttribute::Chain(name) = part { Some(name.clone()) } else { None }
    });
    let code = parts
        .iter()
        .find_map(|part| if let VerdictAttribute::Code(code) = part { Some(*code) } else { None });
    Some(match (code?, chain) {
        (Verdict::Jump, Some(chain)) => Does::Jump(chain),
        (Verdict::Goto, Some(chain)) => Does::Goto(chain),
        (Verdict::Return, _) => Does::Return,
        (code, _) if u32::from(code) == ACCEPT => Does::Accept,
        (code, _) if u32::from(code) == DROP => Does::Refuse,
        _ => Does::Nothing,
    })
}

/// Says whether a link's name is compared with what the names of our links begin with.
fn is_prefix_of_links(part: &Cmp) -> bool {
    matches!(part, Cmp::Data(DataAttribute::Value(value)) if value == LINKS)
}
