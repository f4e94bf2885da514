//! What is said of a host that lacks something.

use dozed::net::{Finding, Network as _, survey};

use crate::host::{Host, forwarding, ip, nft, on_a_host};

fn found(host: &Host, subject: &str) -> Finding {
    let findings = survey(&host.plan);
    findings.into_iter().find(|finding| finding.subject == subject).unwrap()
}

#[test]
fn a_host_that_has_all_of_it_is_well_also_when_sandboxes_run() {
    on_a_host(|host| {
        let before = [ip("-o link"), ip("route show table all"), nft("list ruleset")];
        for finding in survey(&host.plan) {
            assert!(finding.is_well, "{finding:?}");
        }
        let after = [ip("-o link"), ip("route show table all"), nft("list ruleset")];
        assert_eq!(before, after, "it only looks");
        drop(host.sandbox("a", 0));
        for finding in survey(&host.plan) {
            assert!(finding.is_well, "{finding:?}");
        }
    });
}

#[test]
fn what_is_missing_is_told_with_what_to_do() {
    on_a_host(|host| {
        let lacks = |subject: &str, says: &str| {
            let finding = found(host, subject);
            assert!(!finding.is_well && finding.says.contains(says), "{finding:?}");
        };
        forwarding(false);
        lacks("forwarding", "set net.ipv4.ip_forward = 1 with sysctl");
        // An address of another link, and a way of others to all of the range and more.
        ip("addr add 10.213.7.1/24 dev up0");
        lacks(
            "range",
            "the host has a route to 10.213.7.0/24 through up0; set `range` of `[network]`",
        );
        ip("route add 10.0.0.0/8 via 93.184.216.2");
        lacks("range", "10.0.0.0/8 through up0");
        nft("add table ip6 filter");
        nft("add chain ip6 filter FORWARD { type filter hook forward priority 0; policy drop; }");
        assert!(found(host, "other firewalls").is_well, "there is no IPv6 in sandboxes");
        nft("delete table ip6 filter");
    });
}

#[test]
fn what_is_missing_of_what_a_daemon_made_is_told() {
    on_a_host(|host| {
        assert!(found(host, "host's part").is_well);
        drop(host.sandbox("a", 0));
        assert!(found(host, "host's part").is_well);
        for (take, says) in [
            (
                "link set dozed0ad50000 down",
                "the host's device, in use and with its address; a running",
            ),
            ("link del dozed0ad50000", "the host's device, in use and with its address; a running"),
        ] {
            ip(take);
            let finding = found(host, "host's part");
            assert!(!finding.is_well && finding.says.contains(says), "{finding:?}");
        }
        nft("flush ruleset");
        let finding = found(host, "host's part");
        assert!(finding.says.contains("address, the host's firewall for sandboxes"), "{finding:?}");
        host.network.look(&[]);
        assert!(found(host, "host's part").is_well);
    });
}

#[test]
fn every_neighbour_of_a_sandbox_is_permanent_so_none_of_them_counts() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let inside = sandbox.namespace().run(|_| ip("-4 neigh show nud all")).unwrap();
        let outer = ip(&format!("-4 neigh show nud all dev {}", sandbox.address().host_link()));
        let lines: Vec<_> = inside.lines().chain(outer.lines()).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines.iter().all(|line| line.contains("PERMANENT")), "{lines:?}");
    });
}
