//! What the rules come down to, address by address.

use proptest::prelude::*;

use super::*;
use crate::{
    net::nft::{Load, Step},
    sandbox::network::{Destinations, is_public},
};

fn policy(reach: Reach, nameservers: &str, denied: &str, allowed: &str) -> NetworkPolicy {
    NetworkPolicy {
        reach,
        nameservers: nameservers.parse().unwrap(),
        denied: Destinations::denied(denied.lines()).unwrap(),
        allowed: Destinations::allowed(allowed.lines()).unwrap(),
    }
}

const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 1);

fn rules(policy: &NetworkPolicy) -> Table {
    let plan = AddressPlan::default();
    let mut ruleset =
        of_sandbox(&plan, plan.address(0).unwrap(), &[HOST], policy, &Ignored::default());
    ruleset.tables.pop().unwrap()
}

fn is_in(table: &Table, set: &str, address: Ipv4Addr) -> bool {
    let set = table.sets.iter().find(|it| it.name == set).unwrap();
    set.ranges.iter().any(|range| range.contains(&address))
}

/// Says whether a packet to `address`, at a port that has nothing to do with names, passes:
/// the order of the three lists in `by_destination`.
fn passes(table: &Table, address: Ipv4Addr) -> bool {
    !is_in(table, DENIED, address)
        && (is_in(table, ALLOWED, address) || is_in(table, PUBLIC, address))
}

#[test]
fn the_lists_are_looked_at_in_the_order_denied_allowed_public_and_no_list_is_refused() {
    let table = rules(&policy(Reach::Internet, "9.9.9.9", "", ""));
    let chain = table.chains.iter().find(|chain| chain.name == BY_DESTINATION).unwrap();
    let lists: Vec<_> = chain
        .rules
        .iter()
        .filter_map(|rule| {
            let set = rule.iter().find_map(|step| {
                if let Step::In(set) = step {
                    return Some(*set);
                }
                None
            })?;
            (!rule.iter().any(|step| matches!(step, Step::Load(Load::Transport(_)))))
                .then_some((set, rule.last().unwrap().clone()))
        })
        .collect();
    assert_eq!(
        lists,
        [
            (DENIED, Step::Goto(REFUSE)),
            (ALLOWED, Step::Goto(OPEN_OUT)),
            (PUBLIC, Step::Goto(OPEN_OUT)),
        ]
    );
    assert_eq!(chain.rules.last().unwrap(), &[Step::Goto(REFUSE)]);
}

#[test]
fn every_chain_that_is_gone_to_is_there() {
    let plan = AddressPlan::default();
    let full = policy(Reach::Internet, "9.9.9.9\n1.1.1.1", "8.8.8.8", "10.0.0.0/8");
    let ignored = Ignored::new(&["192.0.2.1", "tcp/9100"]).unwrap();
    let of_sandbox = of_sandbox(&plan, plan.address(0).unwrap(), &[], &full, &ignored);
    for table in of_sandbox.tables.iter().chain(&of_host(&plan, "tun").tables) {
        for step in table.chains.iter().flat_map(|chain| chain.rules.iter().flatten()) {
            let there = if let Step::Goto(name) = step {
                table.chains.iter().any(|chain| chain.name == *name)
            } else if let Step::In(name) = step {
                table.sets.iter().any(|set| set.name == *name)
            } else if let Step::Count(name) = step {
                table.counters.contains(name)
            } else if let Step::Limited(name) = step {
                table.limits.iter().any(|limit| limit.name == *name)
            } else {
                true
            };
            assert!(there, "{}: {step:?}", table.name);
        }
    }
}

#[test]
fn the_gateway_is_no_resolver_for_a_sandbox_without_nameservers() {
    let goes_to_resolver = |policy: &NetworkPolicy| {
        let table = rules(policy);
        let goes = table.chains.iter().flat_map(|chain| chain.rules.iter().flatten());
        goes.into_iter().any(|step| *step == Step::Goto(TO_RESOLVER))
    };
    assert!(goes_to_resolver(&policy(Reach::Internet, "9.9.9.9", "", "")));
    assert!(!goes_to_resolver(&policy(Reach::Internet, "", "", "")));
    assert!(!goes_to_resolver(&policy(Reach::Internet, "9.9.9.9", "9.9.9.0/24", "")));
    assert!(!goes_to_resolver(&policy(Reach::Isolated, "9.9.9.9", "", "")));
    assert!(goes_to_resolver(&policy(Reach::Isolated, "9.9.9.9", "", "9.9.9.9")));
}

#[test]
fn the_host_and_the_siblings_are_never_reached_whatever_is_allowed() {
    let all = policy(Reach::Internet, "", "", "0.0.0.0/0");
    let table = rules(&all);
    for address in [HOST, AddressPlan::default().host_address(), GATEWAY_ADDRESS] {
        assert!(!passes(&table, address), "{address}");
    }
    assert!(!passes(&table, AddressPlan::default().address(1).unwrap().ip()));
    assert!(passes(&table, Ipv4Addr::new(10, 0, 0, 1)));
}

fn networks() -> impl Strategy<Value = String> {
    let network = (any::<u32>(), 0_u8..=32).prop_map(|(bits, prefix)| {
        let network = ipnet::Ipv4Net::new(bits.into(), prefix).unwrap().trunc();
        // What may not be allowed stands for nothing here.
        let text = network.to_string();
        if Destinations::allowed(text.lines()).is_ok() { text } else { String::new() }
    });
    prop::collection::vec(network, 0..5).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn a_packet_passes_if_it_is_public_or_allowed_and_neither_denied_nor_protected(
        isolated: bool,
        denied in networks(),
        allowed in networks(),
        bits: u32,
    ) {
        let reach = if isolated { Reach::Isolated } else { Reach::Internet };
        let policy = policy(reach, "9.9.9.9", &denied, &allowed);
        let table = rules(&policy);
        let in_any = |list: &Destinations, address| {
            list.networks().iter().any(|network| network.contains(&address))
        };
        let edges = policy.denied.networks().iter().chain(policy.allowed.networks());
        let probes = edges.flat_map(|net| [net.network(), net.broadcast()]).chain([bits.into()]);
        for address in probes {
            let protected = never_reachable().iter().any(|span| span.contains(address))
                || AddressPlan::default().range().contains(&address)
                || address == HOST;
            let wanted = !protected
                && !in_any(&policy.denied, address)
                && (in_any(&policy.allowed, address) || (!isolated && is_public(address)));
            prop_assert_eq!(passes(&table, address), wanted, "{}", address);
            // Also where the list of what is denied is not looked at.
            let listed = is_in(&table, ALLOWED, address) || is_in(&table, PUBLIC, address);
            prop_assert_eq!(listed, wanted, "{}", address);
        }
    }
}
