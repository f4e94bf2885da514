//! What the kernel has: tables, sets, counters, and the number of the firewall.

use std::{io, net::Ipv4Addr};

use netlink_packet_core::{DefaultNla, NLA_TYPE_MASK, Nla as _};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, GenAttribute, GenMessage, ListAttribute,
        NfTablesMessage, RuleAttribute, RuleMessage, SetElementAttribute, SetElementFlags,
        SetElementList, SetElementMessage, TableAttribute, TableMessage,
    },
};

use super::{
    message::{
        COUNTER_BYTES, COUNTER_PACKETS, OBJECT_DATA, OBJECT_IS_COUNTER, OBJECT_NAME, OBJECT_TABLE,
        OBJECT_TYPE, netfilter, number, text,
    },
    ruleset::Family,
};
use crate::sys::netlink::{self, Kernel, RequestError};

/// Opens a socket for the firewall of the namespace that this thread is in.
///
/// # Errors
/// Where the kernel has no netfilter.
pub(crate) fn here() -> Result<Kernel, RequestError> {
    Kernel::here(netlink::Family::Netfilter)
}

/// Says whether the namespace of `kernel` has the table.
///
/// # Errors
/// Where the kernel does not say, as where it has no nf_tables.
pub(crate) fn has_table(kernel: &Kernel, family: Family, name: &str) -> Result<bool, RequestError> {
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
pub(crate) fn generation(kernel: &Kernel) -> Result<u32, RequestError> {
    let message = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let found = kernel.get("looking at the firewall", netfilter(Family::Inet, message))?;
    let Some(NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(message))) =
        found.map(|message| message.inner)
    else {
        return Err(not_told());
    };
    let id = message
        .attributes
        .iter()
        .find_map(|attribute| if let GenAttribute::Id(id) = attribute { Some(*id) } else { None });
    id.ok_or_else(not_told)
}

/// Returns a table with all its chains and rules and their numbers, which are others for a
/// rule that takes the place of one. No two tables have the same.
///
/// # Errors
/// Where the kernel does not say.
pub(crate) fn contents(
    kernel: &Kernel,
    family: Family,
    table: &str,
) -> Result<Vec<NetfilterMessage>, RequestError> {
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
pub(crate) fn counters(
    kernel: &Kernel,
    family: Family,
    table: &str,
) -> Result<Vec<(String, u64, u64)>, RequestError> {
    let attributes = vec![text(OBJECT_TABLE, table), number(OBJECT_TYPE, OBJECT_IS_COUNTER)];
    let message = NfTablesMessage::GetObject(attributes);
    let found = kernel.list("reading the counters", netfilter(family, message))?;
    Ok(found.into_iter().filter_map(counted).collect())
}

/// Returns where the spans of a set begin, in order.
///
/// # Errors
/// Where the kernel does not say.
pub(crate) fn starts(
    kernel: &Kernel,
    family: Family,
    table: &str,
    set: &str,
) -> Result<Vec<Ipv4Addr>, RequestError> {
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
const KIND_MASK: u16 = NLA_TYPE_MASK;

fn bytes_of(nla: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}

fn not_told() -> RequestError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "its answer has no number");
    RequestError { doing: "looking at the firewall".into(), source }
}
