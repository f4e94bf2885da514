//! What a sandbox's network lets through, as a function of its policy. Pure.
//!
//! A packet of the guest passes, in this order: the source check at its tap, where a frame
//! that is not exactly the guest's is dropped; then the connection's state, which only tells
//! whether the packet belongs to something that the host opened; then its destination, each
//! time, also on a connection that was fine a moment ago. So a change of policy holds for
//! every packet after it, and no connection need be cut for that. An answer comes in only
//! where the guest may still send what it answers.
//!
//! Being on the list of public addresses lets a packet through; being on no list refuses
//! it. So the moment in which a list is replaced can lose a packet and never leak one.

use std::net::Ipv4Addr;

use super::nft::{
    At, Chain, Direction, Family, Fate, Field, Hook, Kind, Limit, Rule, Ruleset, Set, Table,
    matcher::{
        CONFIRMED, DNAT, ESTABLISHED_OR_RELATED, INVALID, NEW, NEW_OR_KNOWN, Protocol, accept,
        after_ethernet, answered_by_any_of, as_destination, as_source, begins_or_ends, count,
        direction, drop_it, ether_type, flows_over, from_address, from_device, from_group,
        from_network, from_port, goto, limited, masquerade, no_status, no_syn, not_from_mac,
        not_from_network, not_ipv4, not_to_group, one_in, opened_to, opened_to_any_of, prohibit,
        reset, state, tcp, to_address, to_any_of, to_device, to_group, to_mac, to_port,
    },
    rule,
};
use crate::sandbox::network::{
    AddressPlan, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, Ignored, NetworkPolicy,
    Reach, SandboxAddress, Span, Transport, merged, never_reachable, public_spans, without,
};

mod activity;

/// The name of our tables in the namespace of a sandbox.
pub(super) const TABLE: &str = "dozed";
/// The guest's device in every namespace. A VMM sees the host's devices in /sys, and takes
/// one of this name for its own: Cloud Hypervisor then asks for what it may not read. So no
/// host is to have one, as many have a `tap0`.
pub const TAP: &str = "dztap";
/// The way out of every namespace.
pub(super) const UPLINK: &str = "eth0";

/// So many connections a second may a guest open; more than a browser or a package manager
/// does, and too few to scan a network with.
const NEW_FLOWS_PER_SECOND: u64 = 200;
/// And so many at once, after a pause.
const NEW_FLOWS_BURST: u32 = 400;
/// So many may be open. The kernel's table for all of the host has 65,536 or more.
const FLOWS_MAX: u32 = 4096;
/// A guest asks for its gateway's MAC once a minute.
const ARP_PER_SECOND: u64 = 50;
const ARP_BURST: u32 = 100;

const PORT_DNS: u16 = 53;
const PORT_DNS_OVER_TLS: u16 = 853;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_RARP: u16 = 0x8035;
const TYPE_IPV6: u16 = 0x86dd;

/// Packets that a guest's connections sent, and that came back to them.
pub(super) const GUEST_OUT: &str = "guest_out";
pub(super) const GUEST_IN: &str = "guest_in";
/// Packets that the host's connections sent to the guest, and that came back.
pub(super) const HOST_IN: &str = "host_in";
pub(super) const HOST_OUT: &str = "host_out";
/// Of the former and of the latter those that are activity.
pub(super) const ACTIVE_OUT: &str = "active_out";
pub(super) const ACTIVE_IN: &str = "active_in";
/// Frames that are not exactly the guest's.
pub(super) const SPOOFED: &str = "spoofed";
/// Packets to where the guest may not send.
pub(super) const REFUSED: &str = "refused";
/// Packets of no connection, or of one that is gone.
pub(super) const INVALID_STATE: &str = "invalid";
/// Connections that were too many.
pub(super) const EXCESS: &str = "excess";
/// Packets from outside that nobody here asked for.
pub(super) const UNASKED: &str = "unasked";

/// All counters of the table of this name and family `inet`.
pub(super) const COUNTERS: [&str; 10] = [
    GUEST_OUT,
    GUEST_IN,
    HOST_IN,
    HOST_OUT,
    ACTIVE_OUT,
    ACTIVE_IN,
    REFUSED,
    INVALID_STATE,
    EXCESS,
    UNASKED,
];

const PUBLIC: &str = "public4";
/// The set of the nameservers that may be asked.
pub(super) const NAMESERVERS: &str = "dns4";
const DENIED: &str = "deny4";
const ALLOWED: &str = "allow4";
const NEW_FLOWS: &str = "new_flows";
const ARP: &str = "arp";

const REFUSE: &str = "refuse";
const FROM_GUEST: &str = "from_guest";
const FROM_UPLINK: &str = "from_uplink";
const BY_DESTINATION: &str = "by_destination";
const TO_RESOLVER: &str = "to_resolver";
const OPEN_OUT: &str = "open_out";
const PASS_OUT: &str = "pass_out";
const PASS_IN: &str = "pass_in";
const PASS_HOST_IN: &str = "pass_host_in";
const PASS_HOST_OUT: &str = "pass_host_out";

/// Before everything else of the kernel's.
const FIRST: i32 = -500;
/// After the connection is looked up (-200) and before it is translated (-100).
const MANGLE: i32 = -150;
const TRANSLATE_DESTINATION: i32 = -100;
const FILTER: i32 = 0;
const TRANSLATE_SOURCE: i32 = 100;

/// What is in force in the namespace of the sandbox at `address`, while the host has
/// `host_addresses`, and what is `ignored` is no activity.
pub(super) fn of_sandbox(
    plan: &AddressPlan,
    address: SandboxAddress,
    host_addresses: &[Ipv4Addr],
    policy: &NetworkPolicy,
    ignored: &Ignored,
) -> Ruleset {
    let lists = Lists::of(plan, host_addresses, policy);
    let nameservers = lists.nameservers.clone();
    let inside = Table {
        family: Family::Inet,
        name: TABLE.to_owned(),
        sets: vec![
            set(PUBLIC, lists.public),
            set(NAMESERVERS, nameservers.iter().copied().map(Span::from)),
            set(DENIED, lists.denied),
            set(ALLOWED, lists.allowed),
            set(activity::IGNORED, ignored.spans()),
        ],
        counters: COUNTERS.into(),
        limits: vec![Limit {
            name: NEW_FLOWS,
            per_second: NEW_FLOWS_PER_SECOND,
            burst: NEW_FLOWS_BURST,
            over: true,
        }],
        chains: [refuse(Some(REFUSED))]
            .into_iter()
            .chain(activity::chains(ignored))
            .chain([
                open_out(),
                to_resolver(),
                by_destination(!nameservers.is_empty()),
                from_guest(),
                from_uplink(plan.host_address(), address.ip()),
                before_routing(),
                destinations(address.ip(), &nameservers),
                sources(address.ip()),
            ])
            .collect(),
    };
    Ruleset { tables: vec![source_check(), inside] }
}

fn set(name: &'static str, spans: impl IntoIterator<Item = Span>) -> Set {
    let ranges = spans.into_iter().map(|span| span.first..=span.last);
    Set { name, ranges: ranges.collect() }
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
        }
    }
}

/// The addresses that a policy comes down to.
struct Lists {
    public: Vec<Span>,
    denied: Vec<Span>,
    allowed: Vec<Span>,
    nameservers: Vec<Ipv4Addr>,
}

impl Lists {
    fn of(plan: &AddressPlan, host_addresses: &[Ipv4Addr], policy: &NetworkPolicy) -> Self {
        // Other sandboxes and the host are nobody's to allow.
        let protected = never_reachable()
            .into_iter()
            .chain([Span::from(plan.range())])
            .chain(host_addresses.iter().copied().map(Span::from));
        let denied = merged(protected.chain(policy.denied.spans()));
        // What is denied is in no list that lets through, so that it does not matter which
        // of the lists is looked at while they are replaced.
        let allowed = without(policy.allowed.spans(), denied.iter().copied());
        let public = match policy.reach {
            Reach::Internet => without(public_spans(), denied.iter().copied()),
            Reach::Isolated => Vec::new(),
        };
        let is_in = |spans: &[Span], address| spans.iter().any(|span| span.contains(address));
        let reachable =
            |address: &&Ipv4Addr| is_in(&public, **address) || is_in(&allowed, **address);
        let nameservers = policy.nameservers.addresses().iter().filter(reachable).copied();
        Self { nameservers: nameservers.collect(), public, denied, allowed }
    }
}

/// Lets in what is exactly the guest's, and nothing else. There is no IPv6, and no tag of
/// a VLAN, as neither has this type. What every guest with IPv6 sends, and a VMM after a
/// wake to tell switches where the guest is, is not held against the guest.
fn source_check() -> Table {
    let field = |offset, length| Field { offset, length };
    let asks_for_its_gateway = rule([
        ether_type(TYPE_ARP),
        after_ethernet(field(0, 2), &1_u16.to_be_bytes()),
        after_ethernet(field(2, 2), &TYPE_IPV4.to_be_bytes()),
        after_ethernet(field(4, 2), &[6, 4]),
        after_ethernet(field(6, 2), &1_u16.to_be_bytes()),
        after_ethernet(field(8, 6), &GUEST_MAC.0),
        after_ethernet(field(14, 4), &GUEST_ADDRESS.octets()),
        after_ethernet(field(24, 4), &GATEWAY_ADDRESS.octets()),
        limited(ARP),
        accept(),
    ]);
    let sends_ipv4 = rule([
        to_mac(GATEWAY_MAC.0),
        ether_type(TYPE_IPV4),
        after_ethernet(field(12, 4), &GUEST_ADDRESS.octets()),
        accept(),
    ]);
    let hook =
        Hook { kind: Kind::Filter, at: At::Ingress(TAP), priority: FIRST, otherwise: Fate::Drop };
    Table {
        family: Family::Netdev,
        name: TABLE.to_owned(),
        sets: Vec::new(),
        counters: vec![SPOOFED],
        limits: vec![Limit {
            name: ARP,
            per_second: ARP_PER_SECOND,
            burst: ARP_BURST,
            over: false,
        }],
        chains: vec![Chain::base(
            FROM_GUEST,
            hook,
            [
                rule([not_from_mac(GUEST_MAC.0), count(SPOOFED), drop_it()]),
                asks_for_its_gateway,
                sends_ipv4,
                rule([ether_type(TYPE_IPV6), drop_it()]),
                rule([ether_type(TYPE_RARP), drop_it()]),
                rule([count(SPOOFED), drop_it()]),
            ],
        )],
    }
}

/// Tells the sender at once, as a time-out would keep a program waiting for minutes.
fn refuse(counter: Option<&'static str>) -> Chain {
    let counted = counter.map_or_else(Vec::new, count);
    Chain::inner(REFUSE, [rule([tcp(), counted.clone(), reset()]), rule([counted, prohibit()])])
}

/// Where every packet of a connection that the guest opened is checked, by destination.
fn by_destination(has_nameservers: bool) -> Chain {
    let transports = [Transport::Udp, Transport::Tcp];
    let mut rules: Vec<Rule> = Vec::new();
    for transport in transports {
        let dns = || to_port(transport, PORT_DNS);
        rules.push(rule([to_any_of(NAMESERVERS), dns(), goto(OPEN_OUT)]));
        if has_nameservers {
            rules.push(rule([to_address(GATEWAY_ADDRESS), dns(), goto(TO_RESOLVER)]));
        }
    }
    for port in [PORT_DNS, PORT_DNS_OVER_TLS] {
        for transport in transports {
            rules.push(rule([to_port(transport, port), goto(REFUSE)]));
        }
    }
    rules.push(rule([to_any_of(DENIED), goto(REFUSE)]));
    rules.push(rule([to_any_of(ALLOWED), goto(OPEN_OUT)]));
    rules.push(rule([to_any_of(PUBLIC), goto(OPEN_OUT)]));
    rules.push(rule([goto(REFUSE)]));
    Chain { name: BY_DESTINATION, hook: None, rules }
}

/// The gateway stands for whichever nameserver there is today, so that a guest need not
/// know. A question that still goes to one of yesterday's is refused.
fn to_resolver() -> Chain {
    Chain::inner(
        TO_RESOLVER,
        [
            rule([no_status(DNAT), goto(OPEN_OUT)]),
            rule([answered_by_any_of(NAMESERVERS), goto(OPEN_OUT)]),
            rule([goto(REFUSE)]),
        ],
    )
}

/// Limits the connections that a guest opens. Only those count whose destination is allowed:
/// what is refused takes nothing from what is not.
fn open_out() -> Chain {
    // A connection is new until it is answered, and only its first packet opens it.
    let opens = || [state(NEW), no_status(CONFIRMED)].concat();
    Chain::inner(
        OPEN_OUT,
        [
            rule([opens(), limited(NEW_FLOWS), count(EXCESS), drop_it()]),
            rule([opens(), flows_over(FLOWS_MAX), count(EXCESS), goto(REFUSE)]),
            rule([goto(PASS_OUT)]),
        ],
    )
}

fn from_guest() -> Chain {
    Chain::inner(
        FROM_GUEST,
        [
            rule([not_ipv4(), count(INVALID_STATE), drop_it()]),
            rule([state(INVALID), tcp(), count(INVALID_STATE), reset()]),
            rule([state(INVALID), count(INVALID_STATE), drop_it()]),
            // After a long sleep the connection is known to nobody here: to be told so at once
            // is better than to repeat the segment for a quarter of an hour.
            rule([state(NEW), no_syn(), count(INVALID_STATE), reset()]),
            rule([direction(Direction::Reply), state(ESTABLISHED_OR_RELATED), goto(PASS_HOST_OUT)]),
            rule([goto(BY_DESTINATION)]),
        ],
    )
}

/// Lets in what the host opens from its own address, and answers to what the guest may
/// still send. A segment of a connection that is not known here, as after a long sleep, is
/// reset, so that its sender does not wait for an answer.
fn from_uplink(host: Ipv4Addr, own: Ipv4Addr) -> Chain {
    let mut rules = vec![
        rule([not_ipv4(), count(UNASKED), drop_it()]),
        // Without its connection the kernel calls the end of one invalid, and the answer to
        // its beginning. Others may be late segments of a connection that goes on.
        rule([state(INVALID), begins_or_ends(), count(UNASKED), reset()]),
        rule([state(INVALID), count(UNASKED), drop_it()]),
        rule([
            direction(Direction::Original),
            from_address(host),
            to_address(own),
            goto(PASS_HOST_IN),
        ]),
        rule([state(NEW), no_syn(), count(UNASKED), reset()]),
        rule([direction(Direction::Original), count(UNASKED), drop_it()]),
    ];
    for transport in [Transport::Udp, Transport::Tcp] {
        let dns = || from_port(transport, PORT_DNS);
        rules.push(rule([opened_to_any_of(NAMESERVERS), dns(), goto(PASS_IN)]));
        rules.push(rule([
            opened_to(GATEWAY_ADDRESS),
            answered_by_any_of(NAMESERVERS),
            dns(),
            goto(PASS_IN),
        ]));
    }
    rules.push(rule([opened_to_any_of(DENIED), count(UNASKED), drop_it()]));
    rules.push(rule([opened_to_any_of(ALLOWED), goto(PASS_IN)]));
    rules.push(rule([opened_to_any_of(PUBLIC), goto(PASS_IN)]));
    rules.push(rule([count(UNASKED), drop_it()]));
    Chain { name: FROM_UPLINK, hook: None, rules }
}

fn before_routing() -> Chain {
    let hook =
        Hook { kind: Kind::Filter, at: At::Prerouting, priority: MANGLE, otherwise: Fate::Drop };
    Chain::base(
        "before_routing",
        hook,
        [
            rule([from_device(TAP), goto(FROM_GUEST)]),
            rule([from_device(UPLINK), goto(FROM_UPLINK)]),
        ],
    )
}

/// Turns the sandbox's own address into its guest's, and the gateway into a nameserver:
/// the connections take turns, so that one that is down is not asked every time.
fn destinations(own: Ipv4Addr, nameservers: &[Ipv4Addr]) -> Chain {
    let mut rules =
        vec![rule([from_device(UPLINK), to_address(own), as_destination(GUEST_ADDRESS)])];
    for transport in [Transport::Udp, Transport::Tcp] {
        for (turns, nameserver) in (1..=nameservers.len()).rev().zip(nameservers) {
            let turns = u32::try_from(turns).expect("there are at most three nameservers");
            rules.push(rule([
                from_device(TAP),
                to_address(GATEWAY_ADDRESS),
                to_port(transport, PORT_DNS),
                if turns > 1 { one_in(turns) } else { Vec::new() },
                as_destination(*nameserver),
            ]));
        }
    }
    let hook = Hook {
        kind: Kind::Nat,
        at: At::Prerouting,
        priority: TRANSLATE_DESTINATION,
        otherwise: Fate::Accept,
    };
    Chain { name: "destinations", hook: Some(hook), rules }
}

fn sources(own: Ipv4Addr) -> Chain {
    let hook = Hook {
        kind: Kind::Nat,
        at: At::Postrouting,
        priority: TRANSLATE_SOURCE,
        otherwise: Fate::Accept,
    };
    let translate = rule([to_device(UPLINK), from_address(GUEST_ADDRESS), as_source(own)]);
    Chain::base("sources", hook, [translate])
}

/// Returns the name of the table of `plan` on the host.
pub(super) fn host_table(plan: &AddressPlan) -> String {
    format!("{TABLE}_{:08x}", plan.link_group())
}

/// What is in force on the host for all sandboxes of `plan`, whose sleepers' packets come to
/// and from the device `tun`; it is the same however many there are. A second check,
/// should the first have a hole: nothing opens a connection to the host, no sandbox reaches
/// another, and nothing but the host reaches a sandbox. It names what passes, so that packets
/// of which the kernel keeps no connection (`notrack`) do not.
pub(super) fn of_host(plan: &AddressPlan, tun: &str) -> Ruleset {
    let group = plan.link_group();
    let hook = |kind, at, priority| Hook { kind, at, priority, otherwise: Fate::Accept };
    let sandboxes = || from_group(group);
    let is_reply = || [direction(Direction::Reply), state(ESTABLISHED_OR_RELATED)].concat();
    let chains = vec![
        refuse(None),
        Chain::base(
            "input",
            hook(Kind::Filter, At::Input, FILTER),
            [
                rule([sandboxes(), state(INVALID), drop_it()]),
                rule([sandboxes(), is_reply(), accept()]),
                rule([sandboxes(), goto(REFUSE)]),
            ],
        ),
        Chain::base(
            "forward",
            hook(Kind::Filter, At::Forward, FILTER),
            [
                // What was held for a sandbox while it woke; only the daemon writes there.
                rule([from_device(tun), to_group(group), accept()]),
                rule([sandboxes(), to_group(group), goto(REFUSE)]),
                rule([sandboxes(), not_ipv4(), drop_it()]),
                rule([sandboxes(), not_from_network(plan.range()), drop_it()]),
                // Only what is tracked is masqueraded.
                rule([sandboxes(), state(INVALID), drop_it()]),
                rule([sandboxes(), state(NEW_OR_KNOWN), accept()]),
                rule([sandboxes(), goto(REFUSE)]),
                rule([to_group(group), is_reply(), accept()]),
                rule([to_group(group), drop_it()]),
            ],
        ),
        Chain::base(
            "sources",
            hook(Kind::Nat, At::Postrouting, TRANSLATE_SOURCE),
            [rule([from_network(plan.range()), not_to_group(group), masquerade()])],
        ),
    ];
    Ruleset {
        tables: vec![Table {
            family: Family::Inet,
            name: host_table(plan),
            sets: Vec::new(),
            counters: Vec::new(),
            limits: Vec::new(),
            chains,
        }],
    }
}

#[cfg(test)]
mod tests;
