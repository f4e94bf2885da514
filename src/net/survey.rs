//! What this host has of all that the networks of sandboxes need. It only looks.
//!
//! Whether the kernel has the parts of the firewall is tried out in a network namespace
//! that nobody else sees and that is gone when this returns.

use std::{fs, io, net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;

use super::{
    Error, firewall,
    foreign::{self, Refusing, Traffic},
    host, link,
    nft::{
        self, At, Chain, Family, Fate, Hook, Kind, Limit, Mode, Rule, Ruleset, Set, Table,
        matcher as when, rule,
    },
    route::{self, Found},
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
fn told(error: &dyn std::error::Error) -> String {
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
            well(subject, "The kernel has everything that the firewalls of sandboxes use.")
        }
        Ok(Ok(missing)) => {
            let list = missing.join(" ");
            lacking(
                subject,
                format!(
                    "Sandboxes get no network: the kernel lacks {list}; run `modprobe -a {list}`."
                ),
            )
        }
        Ok(Err(error)) => lacking(
            subject,
            format!("Sandboxes get no network ({}); try `modprobe nf_tables`.", told(&error)),
        ),
        Err(error) => lacking(
            subject,
            format!("The kernel's support could not be checked ({error}); run this as root."),
        ),
    }
}

/// Tries each part in the namespace of this thread, and returns the modules of those that
/// are missing.
fn missing_parts() -> Result<Vec<&'static str>, Error> {
    let netfilter = nft::here()?;
    nft::apply(&netfilter, &just(Family::Inet, "bare", None), Mode::First)?;
    let mut missing = Vec::new();
    for (module, part) in parts() {
        let kind = if ["nft_nat", "nft_masq"].contains(&module) { Kind::Nat } else { Kind::Filter };
        let at = if kind == Kind::Nat { At::Postrouting } else { At::Prerouting };
        let hook = Hook { kind, at, priority: 100, otherwise: Fate::Accept };
        let try_out = just(Family::Inet, module, Some(Chain::base("try", hook, [part])));
        if nft::apply(&netfilter, &try_out, Mode::First).is_err() {
            missing.push(module);
        }
    }
    // The source check is at a device.
    let hook = Hook {
        kind: Kind::Filter,
        at: At::Ingress(firewall::TAP),
        priority: 0,
        otherwise: Fate::Drop,
    };
    let made = tun::make(firewall::TAP, tun::Device::Tap, 0);
    if made.is_ok() {
        let ingress = just(Family::Netdev, "ingress", Some(Chain::base("try", hook, [])));
        if nft::apply(&netfilter, &ingress, Mode::First).is_err() {
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
        sets: vec![Set { name: "set", ranges: vec![Ipv4Addr::LOCALHOST..=Ipv4Addr::LOCALHOST] }],
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
            format!(
                "The host does not forward IPv4 packets, so sandboxes reach neither the internet \
                 nor `allowed` networks; {remedy}."
            ),
        ),
        Err(error) => lacking(
            subject,
            format!("Whether the host forwards packets could not be checked ({}).", told(&error)),
        ),
    }
}

fn range(plan: &AddressPlan) -> Finding {
    match link::here().and_then(|links| route::list(&links)) {
        Ok(routes) => judge_range(plan, &routes),
        Err(error) => lacking(
            "range",
            format!("Other uses of the range could not be checked ({}).", told(&error)),
        ),
    }
}

/// Looks whether what a daemon has made for all sandboxes is there, if one has.
fn made(plan: &AddressPlan) -> Finding {
    let subject = "host's part";
    match host::missing(plan) {
        Ok(None) => well(subject, "No daemon has set up networks on this host yet."),
        Ok(Some(missing)) if missing.is_empty() => {
            well(subject, "Everything that the daemon set up for networks is in place.")
        }
        Ok(Some(missing)) => lacking(
            subject,
            format!(
                "Missing from what a daemon set up for networks: {}; a running daemon restores it \
                 at its next check, otherwise start dozed.",
                missing.join(", ")
            ),
        ),
        Err(error) => lacking(subject, format!("It could not be checked ({}).", told(&error))),
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
        return well("range", format!("Nothing else uses addresses of {range}."));
    };
    let network = other.network;
    let place = other.device.as_ref().map(|name| format!(" through {name}")).unwrap_or_default();
    lacking(
        "range",
        format!(
            "Something else uses {range}: the host has a route to {network}{place}; set `range` of \
             `[network]` to an unused network."
        ),
    )
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}

fn other_firewalls(plan: &AddressPlan) -> Finding {
    let chains = match nft::here()
        .map_err(Error::from)
        .and_then(|netfilter| foreign::refusing(&netfilter, plan))
    {
        Ok(chains) => chains,
        Err(error) => {
            return lacking(
                "other firewalls",
                format!("They could not be checked ({}).", told(&error)),
            );
        }
    };
    judge_firewalls(plan, &chains, &fs::read_to_string(OLD_TABLES).unwrap_or_default())
}

fn judge_firewalls(plan: &AddressPlan, chains: &[Refusing], old: &str) -> Finding {
    let subject = "other firewalls";
    let ours = format!("inet {}", firewall::host_table(plan));
    let told: Vec<_> = chains.iter().filter(|found| found.table != ours).map(refusal).collect();
    if !told.is_empty() {
        return lacking(subject, told.join(" "));
    }
    if old.lines().any(|table| table == "filter") {
        let says = "There is one of iptables-legacy, which this does not check; look whether its \
                    chain FORWARD drops packets of sandboxes.";
        return lacking(subject, says);
    }
    well(subject, "None drops forwarded packets.")
}

/// Says what a chain refuses, and how it is told to let that pass.
fn refusal(found: &Refusing) -> String {
    let Refusing { table, chain, what, by_policy, .. } = found;
    let how = if *by_policy { "drops by its policy" } else { "refuses by a rule" };
    let words: Vec<_> = what
        .iter()
        .map(|traffic| match traffic {
            Traffic::Sent => "packets from sandboxes",
            Traffic::Answers => "answers to sandboxes",
            Traffic::Held => "packets queued for a wake",
        })
        .collect();
    let what = match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => words.concat(),
    };
    format!("Chain {chain} of table {table} {how} {what}; {}.", remedy(found))
}

/// Says how a firewall is told to let the packets of sandboxes through: commands, each in
/// backticks.
fn remedy(found: &Refusing) -> String {
    let Refusing { table, chain, chains, .. } = found;
    let has = |name: &str| chains.iter().any(|chain| chain.starts_with(name));
    // The second chain is that of firewalld with `FirewallBackend=iptables`.
    if table.ends_with(" firewalld") || has("FORWARD_direct") {
        "for firewalld: `firewall-cmd --permanent --zone=trusted --add-interface=dz+ \
         --add-interface=dozed+` and `firewall-cmd --reload`"
            .to_owned()
    } else if has("ufw-") {
        "for ufw: `ufw route allow in on dz+` and `ufw route allow out on dz+`".to_owned()
    } else if table == "ip filter" && chain == "FORWARD" {
        let (whose, chain) =
            if has("DOCKER-USER") { ("for Docker: ", "DOCKER-USER") } else { ("", "FORWARD") };
        let rule = |links: &str| format!("`iptables -I {chain} {links} dz+ -j ACCEPT`");
        format!("{whose}{} and {}, after each boot", rule("-i"), rule("-o"))
    } else {
        let rule = |links: &str| format!("`nft insert rule {table} {chain} {links} 'dz*' accept`");
        let (inward, outward) = (rule("iifname"), rule("oifname"));
        format!("{inward} and {outward}, and add both to the file that the table is loaded from")
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
                "The host tracks at most {max}, and each guest may have 4096; set \
                 net.netfilter.nf_conntrack_max = 262144 with sysctl."
            ),
        ),
        Ok(max) => well(subject, format!("The host tracks up to {max}.")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            well(subject, "The host tracks none before the first sandbox has a network.")
        }
        Err(error) => lacking(subject, format!("The limit could not be read ({error}).")),
    }
}

fn neighbours() -> Finding {
    let subject = "neighbours";
    // Linux does not count permanent entries since 5.0.
    let kept = "Entries of sandboxes are permanent, so they do not count";
    match number_in(Path::new(NEIGHBOURS_MAX)) {
        Ok(max) => well(subject, format!("{kept} towards the limit of {max}.")),
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
            let says = format!(
                "the host has a route to {network} through wg0; set `range` of `[network]`"
            );
            assert!(found.says.contains(&says), "{}", found.says);
        }
    }

    #[test]
    fn a_firewall_that_refuses_what_is_forwarded_is_named_unless_it_is_ours() {
        let plan = AddressPlan::default();
        let refusing = |table: &str, chain: &str, others: &[&str]| Refusing {
            table: table.to_owned(),
            chain: chain.to_owned(),
            what: Traffic::ALL.into(),
            by_policy: true,
            chains: others.iter().map(|&chain| chain.to_owned()).collect(),
        };
        let judge = |chains: &[Refusing]| judge_firewalls(&plan, chains, "nat\n");
        let ours = refusing(&format!("inet {}", firewall::host_table(&plan)), "forward", &[]);
        assert!(judge(&[ours]).is_well);
        for (table, chain, others, says) in [
            ("ip filter", "FORWARD", &[][..], "iptables -I FORWARD -i dz+"),
            ("ip filter", "FORWARD", &["DOCKER-USER"], "iptables -I DOCKER-USER -i dz+"),
            ("ip filter", "FORWARD", &["ufw-before-forward"], "ufw route allow in on dz+"),
            ("ip filter", "FORWARD", &["FORWARD_direct"], "--add-interface=dz+"),
            ("inet firewalld", "filter_FORWARD", &[], "--add-interface=dz+"),
            ("inet filter", "forward", &[], "nft insert rule inet filter forward iifname 'dz*'"),
        ] {
            let found = judge(&[refusing(table, chain, others)]);
            let drops = format!(
                "Chain {chain} of table {table} drops by its policy packets from sandboxes, \
                 answers to sandboxes and packets queued for a wake; "
            );
            assert!(!found.is_well && found.says.contains(&drops), "{found:?}");
            assert!(found.says.contains(says), "{found:?}");
        }
        // Each that is in the way is told of, and what it is in the way of.
        let mut one = refusing("ip filter", "FORWARD", &[]);
        one.what = vec![Traffic::Held];
        one.by_policy = false;
        let found = judge(&[one, refusing("inet x", "y", &[])]);
        assert!(
            found.says.contains("refuses by a rule packets queued for a wake; `ipt"),
            "{found:?}"
        );
        assert!(found.says.contains(". Chain y of table inet x"), "{found:?}");
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
            let netfilter = nft::here()?;
            let hook = Hook {
                kind: Kind::Filter,
                at: At::Prerouting,
                priority: 100,
                otherwise: Fate::Accept,
            };
            let chain = Chain::base("try", hook, [when::limited("no such limit")]);
            nft::apply(&netfilter, &just(Family::Inet, "x", Some(chain)), Mode::First)
        });
        refused.unwrap().unwrap_err();
    }
}
