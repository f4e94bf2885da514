//! What other firewalls of the host do with packets that are forwarded. It only looks.
//!
//! Each chain is asked about three packets: what a sandbox sends, the answer to it, and what
//! was held for a wake. Of each not everything is known, such as its ports, so a condition
//! holds, does not hold, or may hold. A rule that may hold decides on some packets only; what
//! becomes of the others is decided after it.

use std::collections::BTreeMap;

use netlink_packet_netfilter::nftables::Register;

use super::{Error, link, route};
use crate::sandbox::network::AddressPlan;
use crate::sys::netlink::Kernel;

mod packet;
mod read;

pub(super) use packet::Traffic;
use packet::{Holds, Packet, Uplink, Value};
use read::{Chain, Does, Element, Step, Table};

/// How many chains deep a rule is followed; the kernel allows 16.
const DEPTH_MAX: usize = 16;

/// What becomes of a packet in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Passes,
    Refused,
    Undecided,
}

/// A chain that refuses what sandboxes send or are to get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusing {
    /// With the family.
    pub(super) table: String,
    pub(super) chain: String,
    /// What it refuses.
    pub(super) what: Vec<Traffic>,
    /// Whether its policy does, rather than a rule.
    pub(super) by_policy: bool,
    /// All chains of its table, which tell whose it is.
    pub(super) chains: Vec<String>,
}

/// Returns the chains that refuse what sandboxes of `plan` send or are to get, of all that
/// there are for IPv4.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn refusing(kernel: &Kernel, plan: &AddressPlan) -> Result<Vec<Refusing>, Error> {
    let uplink = uplink()?;
    let packets = Traffic::ALL.map(|traffic| (traffic, Packet::of(traffic, plan, uplink.as_ref())));
    let mut found = Vec::new();
    for (name, table) in read::tables(kernel)? {
        for (chain_name, chain) in table.chains.iter().filter(|(_, chain)| chain.forwards) {
            let fates: Vec<_> = packets
                .iter()
                .map(|(traffic, packet)| (*traffic, walk(&table, chain, packet, DEPTH_MAX)))
                .collect();
            let is_refused =
                |fate: Fate| fate == Fate::Refused || (fate == Fate::Undecided && chain.drops);
            let what: Vec<_> = fates
                .iter()
                .filter(|(_, fate)| is_refused(*fate))
                .map(|(traffic, _)| *traffic)
                .collect();
            if what.is_empty() {
                continue;
            }
            found.push(Refusing {
                table: name.clone(),
                chain: chain_name.clone(),
                what,
                by_policy: fates.iter().all(|(_, fate)| *fate != Fate::Refused),
                chains: table.chains.keys().cloned().collect(),
            });
        }
    }
    Ok(found)
}

/// Returns the link by which the host reaches what it knows no better way to, if there is one.
fn uplink() -> Result<Option<Uplink>, Error> {
    let links = link::here()?;
    let routes = route::list(&links)?;
    let name = routes
        .into_iter()
        .filter(|route| route.network.prefix_len() == 0)
        .find_map(|route| route.device);
    let Some(name) = name else { return Ok(None) };
    Ok(link::find(&links, &name)?.map(|link| Uplink { name, index: link.index }))
}

/// Follows a packet through a chain.
fn walk(table: &Table, chain: &Chain, packet: &Packet, depth: usize) -> Fate {
    for rule in &chain.rules {
        let Some(does) = certain(table, rule, packet) else { continue };
        let follow = |to: &String| match table.chains.get(to).filter(|_| depth > 0) {
            Some(inner) => walk(table, inner, packet, depth - 1),
            None => Fate::Undecided,
        };
        match &does {
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

/// Returns what a rule does with a packet, if it does that with all that are like it.
fn certain(table: &Table, rule: &[Step], packet: &Packet) -> Option<Does> {
    let mut loaded: BTreeMap<u32, Value> = BTreeMap::new();
    let key = |register: &Register| u32::from(*register);
    let mut does = None;
    for step in rule {
        let value = |from: &Register, loaded: &BTreeMap<u32, Value>| {
            loaded.get(&key(from)).cloned().unwrap_or_default()
        };
        let holds = match step {
            Step::Load { field, to } => {
                loaded.insert(key(to), packet.load(*field));
                continue;
            }
            Step::Mask { from, mask, xor, to } => {
                let masked = value(from, &loaded).masked(mask, xor);
                loaded.insert(key(to), masked);
                continue;
            }
            Step::Compare { from, value: with, is_equal: true } => value(from, &loaded).is(with),
            Step::Compare { from, value: with, is_equal: false } => {
                value(from, &loaded).is(with).not()
            }
            Step::Lookup { from, set, is_in, is_map } => {
                let elements = table.sets.get(set)?;
                let (holds, found) = look_up(&value(from, &loaded), elements);
                does = found.filter(|_| *is_map).or(does);
                if *is_in { holds } else { holds.not() }
            }
            Step::States(states) if packet.state & states != 0 => Holds::Yes,
            Step::States(_) => Holds::No,
            Step::Some => Holds::Maybe,
            Step::Does(it) => {
                does = Some(it.clone());
                continue;
            }
        };
        if holds != Holds::Yes {
            return None;
        }
    }
    does
}

/// Says whether a value is in a set, and what that has there.
fn look_up(value: &Value, elements: &[Element]) -> (Holds, Option<Does>) {
    let mut sorted: Vec<(&Vec<u8>, &Element)> =
        elements.iter().filter_map(|it| Some((it.key.as_ref()?, it))).collect();
    sorted.sort_by_key(|(key, _)| *key);
    let has_intervals = elements.iter().any(|element| element.is_end);
    let mut may = false;
    for (at, (key, element)) in sorted.iter().enumerate() {
        let holds = if element.is_end {
            Holds::No
        } else if has_intervals {
            value.is_within(key, sorted.get(at + 1).map(|(end, _)| end.as_slice()))
        } else {
            value.is(key)
        };
        match holds {
            Holds::Yes => return (Holds::Yes, element.does.clone()),
            Holds::Maybe => may = true,
            Holds::No => {}
        }
    }
    let rest = elements.iter().find(|element| element.key.is_none());
    match rest {
        _ if may => (Holds::Maybe, None),
        Some(rest) => (Holds::Yes, rest.does.clone()),
        None => (Holds::No, None),
    }
}
