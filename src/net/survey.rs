//! What this host has of all that the networks of sandboxes need. It only looks.
//!
//! Whether the kernel has the parts of the firewall is tried out in a network namespace
//! that nobody else sees and that is gone when this returns.

use std::{fs, io, net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;

use super::{
    Error, condition as when, firewall,
    foreign::{self, Refusing},
    host, link,
    nftables::{self, Mode},
    route::{self, Found},
    ruleset::{At, Chain, Family, Fate, Hook, Kind, Limit, Rule, Ruleset, Set, Table, rule},
};
use crate::{
    sandbox::network::AddressPlan,
    sys::{netns, tun},
};

/// Where the kernel says how many connections it keeps track of.
const CONNTRACK_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Above how many neighbours it forgets some.
const NEIGHBOURS_MAX: &str = "/proc/sys/net/ipv4/neigh/default/gc_thresh3";
/// The lists of the firewall of old, which another program than ours sees through.
const OLD_TABLES: &str = "/proc/net/ip_tables_names";
/// A guest may have 4,096 connections, all of which the host keeps track of too. With less
/// room than for sixteen that have all of theirs, one of them is felt by the others.
const CONNTRACK_WANTED: u64 = 16 * 4096;

/// What was found of one subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A word or two.
    pub subject: &'static str,
    /// Whether nothing is missing.
    pub is_well: bool,
    /// A sentence, and what to do about it where it is not well.
    pub says: String,
}

/// Looks at the host for a daemon whose sandboxes have the addresses of `plan`.
#[must_use]
pub fn survey(plan: &AddressPlan) -> Vec<Finding> {
    vec![
        firewall_parts(),
        forwarding(),
        range(plan),
        made(plan),
        other_firewalls(plan),
        connections(),
        neighbours(),
    ]
}

fn well(subject: &'static str, says: impl Into<String>) -> Finding {
    Finding { subject, is_well: true, says: says.into() }
}

fn lacking(subject: &'static str, says: impl Into<String>) -> Finding {
    Finding { subject, is_well: false, says: says.into() }
}

/// Returns an error with its causes, for the middle of a sentence.
fn told(error: &Error) -> String {
    super::chain(error)
}

/// The parts of nf_tables that our rules are made of: what each is for, the module that it
/// is in, and a rule that needs it.
fn parts() -> [(&'static str, Rule); 7] {
    [
        ("nft_ct", when::state(when::NEW)),
        ("nft_nat", when::as_source(Ipv4Addr::LOCALHOST)),
        ("nft_masq", when::masquerade()),
        ("nft_reject_inet", rule([when::tcp(), when::reset()])),
        ("nft_limit", when::limited("limit")),
        ("nft_connlimit", when::flows_over(1)),
        ("nft_numgen", when::one_in(2)),
    ]
}

fn firewall_parts() -> Finding {
    let subject = "nf_tables";
    match netns::in_a_new_one(|_| missing_parts()) {
        Ok(Ok(missing)) if missing.is_empty() => {
            well(subject, "The kernel has all parts of it that firewalls are made of.")
        }
        Ok(Ok(missing)) => {
            let list = missing.join(" ");
            lacking(
                subject,
                format!(
                    "Sandboxes get no network, as the kernel lacks {list}; `modprobe -a {list}`."
                ),
            )
        }
        Ok(Err(error)) => lacking(
            subject,
            format!("Sandboxes get no network ({}); try `modprobe nf_tables`.", told(&error)),
        ),
        Err(error) => lacking(
            subject,
            format!("What the kernel has of it is not told ({error}); run this as root."),
        ),
    }
}

/// Tries each part in the namespace of this thread, and returns the modules of those that
/// are missing.
fn missing_parts() -> Result<Vec<&'static str>, Error> {
    let wall = nftables::here()?;
    nftables::apply(&wall, &just(Family::Inet, "bare", None), Mode::First)?;
    let mut missing = Vec::new();
    for (module, part) in parts() {
        let kind = if ["nft_nat", "nft_masq"].contains(&module) { Kind::Nat } else { Kind::Filter };
        let at = if kind == Kind::Nat { At::Postrouting } else { At::Prerouting };
        let hook = Hook { kind, at, priority: 100, otherwise: Fate::Accept };
        let try_out = just(Family::Inet, module, Some(Chain::base("try", hook, [part])));
        if nftables::apply(&wall, &try_out, Mode::First).is_err() {
            missing.push(module);
        }
    }
    // The door is at a device.
    let hook = Hook {
        kind: Kind::Filter,
        at: At::Ingress(firewall::TAP),
        priority: 0,
        otherwise: Fate::Drop,
    };
    let made = tun::make(firewall::TAP, tun::Device::Tap, 0);
    if made.is_ok() {
        let door = just(Family::Netdev, "door", Some(Chain::base("try", hook, [])));
        if nftables::apply(&wall, &door, Mode::First).is_err() {
            missing.push("nf_tables_netdev");
        }
    }
    Ok(missing)
}

/// A table with one chain, and one of each thing that a rule may name.
fn just(family: Family, name: &str, chain: Option<Chain>) -> Ruleset {
    let is_limit = name == "nft_limit";
    let limit = Limit { name: "limit", per_second: 1, burst: 1, over: true };
    let table = Table {
        family,
        name: format!("try_{name}"),
        sets: vec![Set { name: "set", spans: vec![Ipv4Addr::LOCALHOST.into()] }],
        counters: vec!["counter"],
        limits: if is_limit { vec![limit] } else { Vec::new() },
        chains: chain.into_iter().collect(),
    };
    Ruleset { tables: vec![table] }
}

fn forwarding() -> Finding {
    let subject = "forwarding";
    match host::forwards() {
        Ok(()) => well(subject, "The host forwards IPv4 packets."),
        Err(Error::Lacking { remedy, .. }) => lacking(
            subject,
            format!("Sandboxes reach neither the internet nor what is `allowed`; {remedy}."),
        ),
        Err(error) => lacking(
            subject,
            format!("It is not told whether the host forwards ({}).", told(&error)),
        ),
    }
}

fn range(plan: &AddressPlan) -> Finding {
    match link::here().and_then(|links| route::list(&links)) {
        Ok(routes) => judge_range(plan, &routes),
        Err(error) => lacking(
            "range",
            format!("Who else has addresses of it is not told ({}).", told(&error)),
        ),
    }
}

/// Looks whether what a daemon has made for all sandboxes is there, if one has.
fn made(plan: &AddressPlan) -> Finding {
    let subject = "host's part";
    match host::missing(plan) {
        Ok(None) => well(subject, "No daemon has made anything for networks here."),
        Ok(Some(missing)) if missing.is_empty() => {
            well(subject, "What the daemon made for networks is there.")
        }
        Ok(Some(missing)) => lacking(
            subject,
            format!(
                "Of what a daemon made for networks is missing: {}; one that runs puts it back at \
                 its next look, and the next start does.",
                missing.join(", ")
            ),
        ),
        Err(error) => {
            lacking(subject, format!("What there is of it is not told ({}).", told(&error)))
        }
    }
}

fn judge_range(plan: &AddressPlan, routes: &[Found]) -> Finding {
    let range = plan.range();
    let device = host::device(plan);
    let of_others = routes.iter().filter(|route| {
        let is_ours = route.is_ours || route.device.as_ref().is_some_and(|name| *name == device);
        // What has no better way goes everywhere.
        !is_ours && route.network.prefix_len() > 0 && overlap(range, route.network)
    });
    let Some(other) = of_others.min_by_key(|route| route.network.prefix_len()) else {
        return well("range", format!("Nobody else has addresses of {range}."));
    };
    let network = other.network;
    let place = other.device.as_ref().map(|name| format!(" by {name}")).unwrap_or_default();
    lacking(
        "range",
        format!(
            "{range} is not only the sandboxes': the host reaches {network}{place}; set `range` of \
             `[network]` to a network that nobody has."
        ),
    )
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}

fn other_firewalls(plan: &AddressPlan) -> Finding {
    let chains = match nftables::here().and_then(|wall| foreign::refusing(&wall)) {
        Ok(chains) => chains,
        Err(error) => {
            return lacking(
                "other firewalls",
                format!("What they forward is not told ({}).", told(&error)),
            );
        }
    };
    judge_firewalls(plan, &chains, &fs::read_to_string(OLD_TABLES).unwrap_or_default())
}

fn judge_firewalls(plan: &AddressPlan, chains: &[Refusing], old: &str) -> Finding {
    let subject = "other firewalls";
    let ours = format!("inet {}", firewall::host_table(plan));
    if let Some(found) = chains.iter().find(|found| found.table != ours) {
        let Refusing { table, chain, by_policy, .. } = found;
        let how = if *by_policy { "drops" } else { "rejects by its last rule" };
        let says = format!(
            "Chain {chain} of table {table} {how} what is forwarded unless another rule accepts \
             it, and so what sandboxes send and what is held for a wake; {}.",
            remedy(found)
        );
        return lacking(subject, says);
    }
    if old.lines().any(|table| table == "filter") {
        let says = "There is one of iptables-legacy, and what it forwards is not seen; look \
                    whether its FORWARD drops what sandboxes send.";
        return lacking(subject, says);
    }
    well(subject, "None drops what is forwarded.")
}

/// Says how whoever has the table lets sandboxes through.
fn remedy(found: &Refusing) -> &'static str {
    let has = |name: &str| found.chains.iter().any(|chain| chain.starts_with(name));
    if found.table.ends_with(" firewalld") {
        "for firewalld: `firewall-cmd --permanent --zone=trusted --add-interface=dz+ \
         --add-interface=dozed+` and `firewall-cmd --reload`"
    } else if has("ufw-") {
        "for ufw: write `-A ufw-before-forward -i dz+ -j ACCEPT` and the same with `-o` before the \
         COMMIT of /etc/ufw/before.rules, and `ufw reload`"
    } else if has("DOCKER") {
        "for Docker: `iptables -I DOCKER-USER -i dz+ -j ACCEPT` and the same with `-o`"
    } else {
        "let it accept what comes in by links whose names begin with `dz`, and what goes out by \
         them, as by `iptables -I FORWARD -i dz+ -j ACCEPT` and the same with `-o`"
    }
}

fn connections() -> Finding {
    judge_connections(&number_in(Path::new(CONNTRACK_MAX)))
}

fn judge_connections(max: &io::Result<u64>) -> Finding {
    let subject = "connections";
    match max {
        Ok(max) if *max < CONNTRACK_WANTED => lacking(
            subject,
            format!(
                "The host keeps track of {max}, and a guest may have 4096; set \
                 net.netfilter.nf_conntrack_max = 262144 with sysctl."
            ),
        ),
        Ok(max) => well(subject, format!("The host keeps track of {max}.")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            well(subject, "The host keeps track of none before the first sandbox has a network.")
        }
        Err(error) => {
            lacking(subject, format!("How many are kept track of is not told ({error})."))
        }
    }
}

fn neighbours() -> Finding {
    let subject = "neighbours";
    // Those of sandboxes are permanent, and permanent ones are not counted (Linux 5.0).
    let kept = "Those of sandboxes are permanent, and do not count";
    match number_in(Path::new(NEIGHBOURS_MAX)) {
        Ok(max) => well(subject, format!("{kept} among the {max} that there may be.")),
        // The limit is that of all namespaces, and only the first one shows it.
        Err(_) => well(subject, format!("{kept}.")),
    }
}

fn number_in(file: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(file)?;
    text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(network: &str, device: &str, is_ours: bool) -> Found {
        Found { network: network.parse().unwrap(), device: Some(device.to_owned()), is_ours }
    }

    #[test]
    fn whoever_has_addresses_of_the_range_is_named() {
        let plan = AddressPlan::default();
        let judge = |routes: &[Found]| judge_range(&plan, routes);
        let ours = [
            found("0.0.0.0/0", "eth0", false),
            found("10.212.0.0/16", "eth0", false),
            found("10.213.0.0/16", "dozed0ad50000", true),
            found("10.213.0.1/32", "dozed0ad50000", false),
        ];
        assert!(judge(&ours).is_well);
        for network in ["10.213.7.0/24", "10.0.0.0/8", "10.213.0.9/32"] {
            let found = judge(&[found(network, "wg0", false)]);
            assert!(!found.is_well);
            let says = format!("the host reaches {network} by wg0; set `range` of `[network]`");
            assert!(found.says.contains(&says), "{}", found.says);
        }
    }

    #[test]
    fn a_firewall_that_refuses_what_is_forwarded_is_named_unless_it_is_ours() {
        let plan = AddressPlan::default();
        let judge = |table: &str, by_policy, chains: &[&str]| {
            let refusing = Refusing {
                table: table.to_owned(),
                chain: "FORWARD".to_owned(),
                by_policy,
                chains: chains.iter().map(|&chain| chain.to_owned()).collect(),
            };
            judge_firewalls(&plan, &[refusing], "nat\n")
        };
        assert!(judge(&format!("inet {}", firewall::host_table(&plan)), true, &[]).is_well);
        for (table, chains, says) in [
            ("ip filter", &["FORWARD"][..], "iptables -I FORWARD -i dz+"),
            ("ip filter", &["DOCKER-USER"], "iptables -I DOCKER-USER -i dz+"),
            ("ip filter", &["ufw-before-forward"], "/etc/ufw/before.rules"),
            ("inet firewalld", &["filter_FORWARD"], "--add-interface=dz+"),
        ] {
            let found = judge(table, true, chains);
            let drops = format!("Chain FORWARD of table {table} drops what is forwarded");
            assert!(!found.is_well && found.says.contains(&drops), "{found:?}");
            assert!(found.says.contains(says), "{found:?}");
        }
        assert!(judge("inet x", false, &[]).says.contains("rejects by its last rule"));
        let old = judge_firewalls(&plan, &[], "nat\nfilter\n");
        assert!(!old.is_well && old.says.contains("iptables-legacy"));
    }

    #[test]
    fn a_short_table_of_connections_is_told() {
        assert!(judge_connections(&Ok(65_536)).is_well);
        assert!(judge_connections(&Err(io::ErrorKind::NotFound.into())).is_well);
        let short = judge_connections(&Ok(16_384));
        assert!(!short.is_well && short.says.contains("nf_conntrack_max = 262144"));
        assert!(!judge_connections(&Err(io::ErrorKind::PermissionDenied.into())).is_well);
    }

    #[test]
    fn this_kernel_has_all_parts_and_one_that_it_has_not_is_told() {
        assert_eq!(netns::in_a_new_one(|_| missing_parts()).unwrap().unwrap(), [""; 0]);
        // What the kernel refuses is what is missing.
        let refused = netns::in_a_new_one(|_| {
            let wall = nftables::here()?;
            let hook = Hook {
                kind: Kind::Filter,
                at: At::Prerouting,
                priority: 100,
                otherwise: Fate::Accept,
            };
            let chain = Chain::base("try", hook, [when::limited("no such limit")]);
            nftables::apply(&wall, &just(Family::Inet, "x", Some(chain)), Mode::First)
        });
        refused.unwrap().unwrap_err();
    }
}
