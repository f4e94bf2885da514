//! The addresses of the host, which no guest reaches, change while guests run.
//!
//! A host that publishes a service at an address of its own, as Docker does, translates the
//! destination before its firewall for sandboxes sees the packet. So what a guest sends there
//! is refused by the guest's own firewall, or not at all.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use dozed::{
    net::{Known, Network},
    sys::clock::Stopwatch,
};

use crate::host::{Host, SERVER, Sandbox, eventually, ip, nft, on_a_host};

/// An address that the host gets, and the addresses that its network has besides.
const LATER: Ipv4Addr = Ipv4Addr::new(93, 184, 217, 9);
const NETWORK: Ipv4Addr = Ipv4Addr::new(93, 184, 217, 0);
const BROADCAST: Ipv4Addr = Ipv4Addr::new(93, 184, 217, 255);
/// A broadcast that is set by hand.
const OTHER_BROADCAST: Ipv4Addr = Ipv4Addr::new(93, 184, 219, 255);
const PORT: u16 = 4000;

/// Runs `test` on a host that publishes a service of the internet at all of these addresses,
/// which are not its own yet, and that has a link for them.
fn where_services_are_published(test: impl FnOnce(&Host, &UdpSocket) + Send + 'static) {
    on_a_host(|host| {
        ip("link add later0 type veth peer name later1");
        ip("link set later0 up");
        nft("add table ip own");
        nft("add chain ip own published { type nat hook prerouting priority -100; }");
        for address in [LATER, NETWORK, BROADCAST, OTHER_BROADCAST] {
            let rule = format!("ip daddr {address} udp dport {PORT} dnat to {SERVER}");
            nft(&format!("add rule ip own published {rule}"));
        }
        let server = host.udp_server(SERVER, PORT);
        server.set_nonblocking(true).unwrap();
        test(host, &server);
        nft("delete table ip own");
        ip("link del later0");
    });
}

fn known(sandbox: &Sandbox) -> Known {
    Known { id: sandbox.id().clone(), address: sandbox.address() }
}

/// Looks over the host and the sandboxes as the daemon does. Returns when it is to look again.
fn look_over(host: &Host, sandboxes: &[&Sandbox]) -> Option<Duration> {
    let awake: Vec<_> = sandboxes.iter().map(|sandbox| known(sandbox)).collect();
    let looked = host.network.look(&awake);
    assert!(looked.failed.is_none(), "{:?}", looked.failed);
    for sandbox in sandboxes.iter().filter(|it| looked.suspects.contains(it.id())) {
        let put_back = host.network.put_back(&sandbox.wanted, None).unwrap();
        assert_eq!(put_back, [""; 0], "nobody changed anything of the sandbox");
    }
    looked.again_after
}

fn refused(host: &Host, sandbox: &Sandbox) -> u64 {
    host.network.counters(sandbox.id()).unwrap().unwrap().refused.packets
}

/// Sends a datagram to `to`, and says whether the server has it or the firewall refused it.
fn reaches(host: &Host, sandbox: &Sandbox, server: &UdpSocket, to: Ipv4Addr) -> bool {
    let before = refused(host, sandbox);
    sandbox.guest.udp(5000, (to, PORT), b"?");
    eventually("the datagram", || {
        let has_come = server.recv(&mut [0; 8]).is_ok();
        (has_come || refused(host, sandbox) > before).then_some(has_come)
    })
}

/// Returns the numbers of the sandbox's rules, which are others whenever they are replaced.
fn numbers(sandbox: &Sandbox) -> String {
    sandbox.namespace().run(|_| nft("-a list chain inet dozed from_guest")).unwrap()
}

#[test]
fn an_address_that_the_host_gets_is_refused_to_guests_that_run_and_allowed_again_when_it_goes() {
    where_services_are_published(|host, server| {
        let sandboxes = [host.sandbox("a", 0), host.sandbox("b", 1)];
        let all = [&sandboxes[0], &sandboxes[1]];
        let reach = |to| all.map(|sandbox| reaches(host, sandbox, server, to));
        let settle = |to, wanted| {
            eventually("the protected set", || {
                look_over(host, &all);
                (reach(to) == [wanted; 2]).then_some(())
            });
        };
        for to in [LATER, NETWORK, BROADCAST, OTHER_BROADCAST] {
            assert_eq!(reach(to), [true; 2], "{to}");
        }
        ip(&format!("addr add {LATER}/24 brd {OTHER_BROADCAST} dev later0"));
        look_over(host, &all);
        for to in [LATER, NETWORK, BROADCAST, OTHER_BROADCAST] {
            // Open flows too: each has the ports of the one before.
            assert_eq!(reach(to), [false; 2], "{to}");
        }
        assert!(reaches(host, all[0], server, SERVER), "others are reached as before");
        ip(&format!("addr del {LATER}/24 dev later0"));
        settle(LATER, true);
        for to in [NETWORK, BROADCAST, OTHER_BROADCAST] {
            assert_eq!(reach(to), [true; 2], "{to}");
        }
    });
}

#[test]
fn a_guest_that_is_woken_while_the_host_gets_an_address_does_not_reach_it() {
    where_services_are_published(|host, server| {
        let sandbox = host.sandbox("a", 0);
        // As one that is being woken, it is nobody that runs, for the look that comes first.
        ip(&format!("addr add {LATER}/24 dev later0"));
        let again = look_over(host, &[]);
        assert!(again.is_some(), "what is out of date is looked at again soon");
        assert_eq!(look_over(host, &[&sandbox]), again, "the look does not renew by itself");
        assert!(!reaches(host, &sandbox, server, LATER));
        assert_eq!(look_over(host, &[&sandbox]), None);
        // One that sleeps has nothing to be renewed.
        host.network.linger(sandbox.id(), dozed::sandbox::Timestamp::from_millis(1));
        ip(&format!("addr add {OTHER_BROADCAST}/32 dev later0"));
        assert_eq!(look_over(host, &[]), None);
    });
}

#[test]
fn an_address_that_comes_and_goes_all_the_time_does_not_have_rules_replaced_each_time() {
    where_services_are_published(|host, server| {
        let sandbox = host.sandbox("a", 0);
        look_over(host, &[&sandbox]);
        let since = Stopwatch::start();
        let mut all = BTreeSet::new();
        for round in 0..30 {
            let change = if round % 2 == 0 { "add" } else { "del" };
            ip(&format!("addr {change} {LATER}/24 dev later0"));
            let again = look_over(host, &[&sandbox]);
            all.insert(numbers(&sandbox));
            if round % 2 == 0 {
                assert!(!reaches(host, &sandbox, server, LATER));
            } else if !reaches(host, &sandbox, server, LATER) {
                assert!(again.is_some(), "it is let go later");
            }
        }
        // Once at the beginning, and twice in 5 seconds.
        let most = 3 + 2 * since.elapsed().as_secs() / 5;
        assert!(all.len() as u64 <= most, "replaced {} times", all.len());
        eventually("the end of the protection", || {
            look_over(host, &[&sandbox]);
            reaches(host, &sandbox, server, LATER).then_some(())
        });
    });
}
