//! Networks that come and go, and what others leave in their place.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::fs::MetadataExt as _,
};

use dozed::{
    net::{Error, Known, LinuxNetwork, Network, Wanted},
    sandbox::network::{Destinations, Reach},
};

use crate::{
    guest::{Arp, Guest, Refusal, SYN, UDP},
    host::{
        HOST, Host, OTHER, SERVER, SOON, Sandbox, assert_silent, eventually, forwarding, heard, id,
        ip, nft, on_a_host, run,
    },
};

#[test]
fn a_guest_reaches_the_internet_and_is_answered() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let sandbox = host.sandbox("a", 0);
        assert!(sandbox.guest.arp(SOON, &Arp::GOOD.frame(Arp::GOOD.mac)));
        sandbox.guest.udp(5000, (SERVER, 4000), b"hello");
        let (text, from) = heard(&server);
        assert_eq!(text, "hello");
        // The internet sees the host, and no address of the range.
        assert_eq!(from.ip(), HOST);
        server.send_to(b"welcome", from).unwrap();
        let answer = sandbox.guest.expect("the answer", |packet| packet.source == SERVER);
        assert_eq!(answer.text(), b"welcome");
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert_eq!((counters.guest_out.packets, counters.guest_out.bytes), (1, 33));
        assert_eq!((counters.guest_in.packets, counters.guest_in.bytes), (1, 35));
    });
}

#[test]
fn the_rules_in_the_kernel_are_those_of_the_page() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let inside = sandbox.namespace().run(|_| nft("-s list ruleset")).unwrap();
        let listed = chains(&inside) + &chains(&nft("-s list ruleset"));
        assert_eq!(listed, include_str!("rules.nft"));
    });
}

/// Returns the chains of a listing, without the sets, whose layout is not the point.
fn chains(listing: &str) -> String {
    let blocks = listing.split("\n\tchain ").skip(1);
    let chain = |block: &str| format!("chain {}\n}}\n", block.split("\n\t}").next().unwrap());
    blocks.map(chain).collect::<String>().replace("\n\t\t", "\n\t")
}

#[test]
fn to_ensure_what_is_there_interrupts_nothing() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let sandbox = host.sandbox("a", 0);
        let to = (SERVER, 443);
        let numbers = sandbox.guest.connect(6000, to);
        let again = host.network.ensure(&sandbox.wanted).unwrap();
        assert_eq!(again, sandbox.ready);
        let mut stream =
            eventually("the connection", || listener.accept().ok().map(|(stream, _)| stream));
        stream.set_nonblocking(false).unwrap();
        sandbox.guest.say(6000, to, numbers, b"still here");
        let mut text = [0; 10];
        stream.read_exact(&mut text).unwrap();
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert!(counters.guest_out.packets >= 3, "the counters began anew: {counters:?}");
    });
}

#[test]
fn what_somebody_took_away_is_put_back() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let mut sandbox = host.sandbox("a", 0);
        let link = sandbox.address().host_link();
        let works = |sandbox: &Sandbox| {
            sandbox.wait_until_up();
            sandbox.guest.udp(5000, (SERVER, 4000), b"!");
            assert_eq!(heard(&server).0, "!");
        };
        works(&sandbox);
        // What is kept in order without making it anew.
        ip(&format!("route del {}", sandbox.address()));
        ip(&format!("link set {link} down"));
        sandbox.namespace().run(|_| ip("route del default")).unwrap();
        sandbox.namespace().run(|_| ip("link set dztap down")).unwrap();
        sandbox.namespace().run(|_| nft("flush table inet dozed")).unwrap();
        let again = host.network.ensure(&sandbox.wanted).unwrap();
        assert_eq!(again.identity, sandbox.ready.identity);
        works(&sandbox);
        // What is made anew: a namespace whose firewall, tap or link is gone.
        for how in ["table", "tap", "link", "mark"] {
            let namespace = sandbox.namespace();
            match how {
                "table" => drop(namespace.run(|_| nft("delete table netdev dozed")).unwrap()),
                "tap" => drop(namespace.run(|_| ip("link del dztap")).unwrap()),
                "link" => drop(ip(&format!("link del {link}"))),
                _ => drop(namespace.run(|_| ip("link set eth0 alias other")).unwrap()),
            }
            let Sandbox { wanted, ready, guest } = sandbox;
            drop((guest, namespace));
            sandbox = host.sandbox_with(wanted);
            assert_ne!(sandbox.ready.identity, ready.identity, "{how}");
            works(&sandbox);
        }
    });
}

#[test]
fn a_short_sleep_keeps_a_connection_and_after_a_long_one_it_is_reset() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let Sandbox { wanted, ready, guest } = host.sandbox("a", 0);
        let to = (SERVER, 443);
        let numbers = guest.connect(6000, to);
        let mut stream =
            eventually("the connection", || listener.accept().ok().map(|(stream, _)| stream));
        stream.set_nonblocking(false).unwrap();
        // Nobody is behind the tap for a while, and the server says something.
        drop(guest);
        stream.write_all(b"are you there?").unwrap();
        assert_eq!(host.network.ensure(&wanted).unwrap(), ready);
        let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
        guest.expect("what was said", |p| p.source == SERVER && p.text() == b"are you there?");
        guest.say(6000, to, (numbers.0, numbers.1 + 14), b"yes");
        let mut text = [0; 3];
        stream.read_exact(&mut text).unwrap();
        // The namespace goes, and another one comes.
        drop(guest);
        host.network.remove(&wanted.id, wanted.address).unwrap();
        assert!(!ready.namespace.exists());
        let sandbox = host.sandbox_with(wanted);
        sandbox.guest.say(6000, to, (numbers.0 + 3, numbers.1 + 14), b"still there?");
        assert_eq!(sandbox.guest.refusal(SERVER), Refusal::Reset);
    });
}

#[test]
fn a_server_that_speaks_or_ends_after_a_long_sleep_is_reset() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let Sandbox { wanted, guest, .. } = host.sandbox("a", 0);
        let mut streams = [6000, 6001].map(|port| {
            guest.connect(port, (SERVER, 443));
            let stream =
                eventually("the connection", || listener.accept().ok().map(|(stream, _)| stream));
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream
        });
        // Its network goes, and it wakes in another.
        drop(guest);
        host.network.remove(&wanted.id, wanted.address).unwrap();
        let _awake = host.sandbox_with(wanted);
        streams[0].write_all(b"are you there?").unwrap();
        streams[1].shutdown(std::net::Shutdown::Write).unwrap();
        for stream in &mut streams {
            let error = stream.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn the_first_packet_after_a_wake_meets_the_policy_of_the_day() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let Sandbox { mut wanted, guest, .. } = host.sandbox("a", 0);
        guest.udp(5000, (SERVER, 4000), b"before");
        heard(&server);
        wanted.policy.denied = Destinations::denied(SERVER.to_string().lines()).unwrap();
        // Asleep for a short time: the connection is there still.
        drop(guest);
        host.network.ensure(&wanted).unwrap();
        let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
        guest.udp(5000, (SERVER, 4000), b"after");
        assert_silent(&server);
        assert_eq!(host.network.counters(&wanted.id).unwrap().unwrap().refused.packets, 1);
        // Asleep for a long time.
        drop(guest);
        host.network.remove(&wanted.id, wanted.address).unwrap();
        host.network.ensure(&wanted).unwrap();
        let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
        guest.udp(5000, (SERVER, 4000), b"after");
        assert_silent(&server);
        assert_eq!(host.network.counters(&wanted.id).unwrap().unwrap().refused.packets, 1);
    });
}

#[test]
fn what_is_not_ours_is_never_touched() {
    on_a_host(|host| {
        let wanted = host.wanted("a", 0);
        let link = wanted.address.host_link();
        // A link of our name that is not of our group.
        ip(&format!("link add {link} type veth peer name other0"));
        let error = host.network.ensure(&wanted).unwrap_err();
        assert!(matches!(&error, Error::NotOurs { name } if name.contains(&link)), "{error}");
        host.network.remove(&wanted.id, wanted.address).unwrap();
        host.network.reconcile(&[]).unwrap();
        assert!(ip("-o link").contains(&format!(" {link}@")));
        ip(&format!("link del {link}"));
        host.network.ensure(&wanted).unwrap();
        // Another daemon's sandboxes, and another's firewall.
        let plan = "10.214.0.0/16".parse().unwrap();
        let there = tempfile::tempdir().unwrap();
        let other = LinuxNetwork::new(plan, there.path());
        let mut theirs = host.wanted("a", 0);
        theirs.address = plan.address(0).unwrap();
        let ready = other.ensure(&theirs).unwrap();
        nft("add table inet somebody");
        let reconciled = host.network.reconcile(&[]).unwrap();
        assert!(reconciled.removed.contains(&"a".to_owned()), "{reconciled:?}");
        assert_eq!(other.ensure(&theirs).unwrap(), ready);
        assert!(nft("list tables").contains("somebody"));
        other.dismantle().unwrap();
        nft("delete table inet somebody");
    });
}

#[test]
fn what_the_host_has_for_networks_goes_with_the_last_of_them_and_comes_back_with_the_next() {
    on_a_host(|host| {
        let wanted = host.wanted("a", 0);
        let has_table = || nft("list tables").contains("dozed");
        host.network.retire().unwrap();
        host.network.ensure(&wanted).unwrap();
        host.network.retire().unwrap();
        assert!(has_table(), "a sandbox has a network");
        host.network.remove(&wanted.id, wanted.address).unwrap();
        host.network.retire().unwrap();
        // The daemon that ends need not be the one that made it.
        let daemon = || LinuxNetwork::new(host.plan, host.runtime());
        daemon().ensure(&wanted).unwrap();
        let next = daemon();
        next.remove(&wanted.id, wanted.address).unwrap();
        next.retire().unwrap();
        assert!(!has_table());
        assert!(!host.runtime().join("netns").exists());
        daemon().ensure(&wanted).unwrap();
        assert!(has_table());
    });
}

#[test]
fn what_a_crash_left_is_removed_and_what_is_known_stays() {
    on_a_host(|host| {
        let kept = host.sandbox("kept", 0);
        let gone = host.sandbox("gone", 1);
        drop(gone.guest);
        // A namespace without its link, a link without its namespace, and a file that never
        // became a pin.
        ip(&format!("link del {}", gone.wanted.address.host_link()));
        let orphan = host.plan.address(9).unwrap().host_link();
        add_link(host, &orphan, "orphan0", &mark(host));
        let file = host.runtime().join("netns/half");
        fs::write(&file, "").unwrap();
        let known = known(&kept.wanted);
        let asleep = Known { id: id("asleep"), address: host.plan.address(2).unwrap() };
        let found = host.network.reconcile(&[known.clone(), asleep]).unwrap();
        let mut removed = found.removed;
        removed.sort();
        assert_eq!(removed, [orphan.as_str(), "gone", "half"]);
        assert_eq!(found.there, std::slice::from_ref(&known.id));
        assert!(host.network.counters(&id("gone")).unwrap().is_none());
        assert_eq!(host.network.ensure(&kept.wanted).unwrap(), kept.ready);
        // A second look finds nothing to do. A peer that is not a sandbox's name stays ours
        // to see and nobody's to remove, but it went with its other end.
        assert_eq!(host.network.reconcile(&[known]).unwrap().removed, [""; 0]);
    });
}

fn known(wanted: &Wanted) -> Known {
    Known { id: wanted.id.clone(), address: wanted.address }
}

/// Returns what this host's daemon writes on what it makes.
fn mark(host: &Host) -> String {
    let found = fs::metadata(host.runtime()).unwrap();
    format!("dozed store {:x}:{}", found.dev(), found.ino())
}

/// Makes a link in the group of this host's range.
fn add_link(host: &Host, name: &str, peer: &str, mark: &str) {
    let group = host.plan.link_group();
    ip(&format!("link add {name} group {group} type veth peer name {peer} group {group}"));
    if !mark.is_empty() {
        run("ip", &["link", "set", name, "alias", mark]);
    }
}

#[test]
fn what_another_daemon_made_for_the_same_range_is_left_alone() {
    on_a_host(|host| {
        let theirs = tempfile::tempdir().unwrap();
        let other = LinuxNetwork::new(host.plan, theirs.path());
        let wanted = host.wanted("a", 0);
        let link = wanted.address.host_link();
        let ready = other.ensure(&wanted).unwrap();
        // It runs: nothing of it is touched, and what a crash left is not looked for.
        for error in [
            host.network.claim().unwrap_err(),
            host.network.ensure(&wanted).unwrap_err(),
            host.network.reconcile(&[known(&wanted)]).unwrap_err(),
        ] {
            assert!(matches!(error, Error::RangeInUse { .. }), "{error}");
        }
        assert_eq!(host.network.reconcile(&[]).unwrap().removed, [""; 0]);
        // It is gone, and its guest runs on.
        drop(other);
        let error = host.network.ensure(&wanted).unwrap_err();
        assert!(matches!(&error, Error::NotOurs { name } if name.contains("store")), "{error}");
        assert_eq!(host.network.reconcile(&[known(&wanted)]).unwrap().removed, [""; 0]);
        host.network.remove(&wanted.id, wanted.address).unwrap();
        assert!(ip("-o link").contains(&format!(" {link}@")));
        assert!(ip("route show proto 213").contains(&format!("{} dev {link}", wanted.address)));
        host.network.dismantle().unwrap_err();
        assert!(nft("list tables").contains("dozed"));
        // Its successor finds all of it.
        let next = LinuxNetwork::new(host.plan, theirs.path());
        assert_eq!(next.ensure(&wanted).unwrap(), ready);
        next.dismantle().unwrap();
    });
}

#[test]
fn a_link_that_does_not_say_whose_it_is_is_told_of_and_stays() {
    on_a_host(|host| {
        drop(host.sandbox("a", 0));
        let orphan = host.plan.address(9).unwrap().host_link();
        add_link(host, &orphan, "orphan0", "");
        let found = host.network.reconcile(&[]).unwrap();
        assert_eq!(found.left, [format!("the link {orphan} has no mark of an owner")]);
        ip(&format!("link del {orphan}"));
    });
}

#[test]
fn a_route_of_an_administrators_is_refused_and_stays() {
    on_a_host(|host| {
        let wanted = host.wanted("a", 0);
        let refused = |network: &str| {
            let error = host.network.ensure(&wanted).unwrap_err();
            let name = format!("the route to {network}");
            assert!(matches!(&error, Error::NotOurs { name: it } if *it == name), "{error}");
        };
        let route = format!("{} via 93.184.216.2", host.plan.range());
        ip(&format!("route add {route}"));
        refused("10.213.0.0/16");
        assert!(ip("route show").contains(&route));
        assert_eq!(nft("list ruleset"), "", "nothing was made");
        ip(&format!("route del {route}"));
        let route = format!("{} via 93.184.216.2", wanted.address);
        ip(&format!("route add {route}"));
        refused("10.213.0.2/32");
        // One that comes later, while the sandbox sleeps.
        ip(&format!("route del {route}"));
        drop(host.sandbox_with(wanted.clone()));
        ip(&format!("route replace {route}"));
        refused("10.213.0.2/32");
        host.network.remove(&wanted.id, wanted.address).unwrap();
        assert!(ip("route show").contains(&route));
        ip(&format!("route del {route}"));
        host.network.ensure(&wanted).unwrap();
    });
}

#[test]
fn a_file_where_the_namespace_is_to_be_pinned_is_replaced() {
    on_a_host(|host| {
        drop(host.sandbox("first", 5));
        let wanted = host.wanted("a", 0);
        fs::write(host.runtime().join("netns/a"), "").unwrap();
        let ready = host.network.ensure(&wanted).unwrap();
        assert!(ready.namespace.ends_with("netns/a"));
    });
}

#[test]
fn a_host_that_does_not_forward_is_told_how_to() {
    on_a_host(|host| {
        forwarding(false);
        let mut wanted = host.wanted("a", 0);
        let error = host.network.ensure(&wanted).unwrap_err().to_string();
        assert!(error.contains("set net.ipv4.ip_forward = 1"), "{error}");
        assert!(!host.runtime().join("netns/a").exists());
        // An isolated one needs none, and the host reaches it.
        wanted.policy.reach = Reach::Isolated;
        let sandbox = host.sandbox_with(wanted.clone());
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"hello", (sandbox.address().ip(), 80)).unwrap();
        sandbox.guest.expect("what the host says", |p| p.protocol == UDP);
        // Nor can it become one that reaches something, as the internet or what is allowed.
        let mut reaching = wanted.clone();
        reaching.policy.allowed = Destinations::allowed("10.0.0.0/8".lines()).unwrap();
        host.network.apply_policy(&reaching).unwrap_err();
        let other =
            dozed::net::Wanted { id: id("b"), address: host.plan.address(1).unwrap(), ..reaching };
        let error = host.network.ensure(&other).unwrap_err().to_string();
        assert!(error.contains("set net.ipv4.ip_forward = 1"), "{error}");
        wanted.policy.reach = Reach::Internet;
        host.network.apply_policy(&wanted).unwrap_err();
        sandbox.guest.tcp(5000, (OTHER, 80), SYN, (1, 0));
        assert_eq!(sandbox.guest.refusal(OTHER), Refusal::Reset);
    });
}

#[test]
fn a_device_is_one_vmms_at_a_time_and_of_a_sandbox_that_has_one() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let error = host.network.open_tap(sandbox.id()).unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(matches!(host.network.open_tap(&id("b")), Err(Error::NotThere)));
        drop(sandbox.guest);
        drop(host.network.open_tap(&sandbox.wanted.id).unwrap());
    });
}

#[test]
fn addresses_that_nobody_has_are_told_to_be_unreachable() {
    on_a_host(|host| {
        drop(host.sandbox("a", 0));
        let nobody = host.plan.address(77).unwrap();
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let error = socket.send_to(b"hello", (nobody.ip(), 80)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
    });
}

#[test]
fn a_network_that_is_made_again_at_once_does_not_wait_for_the_end_of_the_last_one() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let mut wanted = host.wanted("a", 0);
        for round in 0..20 {
            let sandbox = host.sandbox_with(wanted);
            sandbox.guest.udp(5000, (SERVER, 4000), format!("{round}").as_bytes());
            assert_eq!(heard(&server).0, round.to_string());
            wanted = sandbox.wanted;
            drop(sandbox.guest);
            host.network.remove(&wanted.id, wanted.address).unwrap();
        }
        eventually("the end of all links", || {
            let links = ip("-o link");
            (!links.contains(": dz0") && !links.contains(": dx")).then_some(())
        });
        // What a daemon that was killed did not get to is removed by the next, and what only
        // looks like it is not.
        add_link(host, "dx00001234", "peer0", &mark(host));
        ip("link add dx00005678 type veth peer name peer1");
        assert_eq!(host.network.reconcile(&[]).unwrap().removed, ["dx00001234"]);
        ip("link del dx00005678");
    });
}

#[test]
fn whoever_is_left_in_a_network_that_was_replaced_is_cut_off() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let old = host.sandbox("a", 0);
        old.guest.udp(5000, (SERVER, 4000), b"before");
        heard(&server);
        // As if a VMM still had it, so that the kernel does not take it away.
        let namespace = old.namespace();
        namespace.run(|_| ip("link set eth0 alias other")).unwrap();
        let new = host.sandbox_with(old.wanted.clone());
        assert_ne!(new.namespace().identity(), namespace.identity());
        old.guest.udp(5000, (SERVER, 4000), b"from the old one");
        new.guest.udp(5001, (SERVER, 4000), b"from the new one");
        assert_eq!(heard(&server).0, "from the new one");
        assert_silent(&server);
        eventually("the end of the old link", || {
            namespace.run(|_| !ip("-o link").contains("eth0")).unwrap().then_some(())
        });
    });
}
