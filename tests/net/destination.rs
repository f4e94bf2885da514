//! Where a guest may send to, and where not.

use std::{net::Ipv4Addr, time::Duration};

use dozed::{
    net::Network,
    sandbox::network::{Destinations, GATEWAY_ADDRESS, Reach},
    sys::clock::Stopwatch,
};

use crate::{
    guest::{Packet, RST, Refusal, SYN, TCP, UDP},
    host::{
        HOST, OTHER, PRIVATE, RESOLVER, RESOLVER_2, SERVER, SILENCE, Sandbox, assert_silent,
        eventually, heard, nft, on_a_host,
    },
};

/// Sends a segment and a datagram to `to`, and says how each is refused. Of datagrams the
/// kernel refuses six at once and then one a second, and drops the others.
fn tried(sandbox: &Sandbox, to: Ipv4Addr, port: u16) -> (Refusal, Refusal) {
    sandbox.guest.drain();
    sandbox.guest.tcp(6000, (to, port), SYN, (1, 0));
    let tcp = sandbox.guest.refusal(to);
    sandbox.guest.udp(6001, (to, port), b"?");
    (tcp, sandbox.guest.refusal(to))
}

/// A program that hears nothing tries for two minutes.
const AT_ONCE: Duration = Duration::from_secs(60);
const REFUSED: (Refusal, Refusal) = (Refusal::Reset, Refusal::Prohibited);

#[test]
fn what_is_not_public_is_refused_at_once() {
    on_a_host(|host| {
        let servers: Vec<_> = PRIVATE.map(|address| host.udp_server(address, 80)).into();
        let sandbox = host.sandbox("a", 0);
        let sibling = host.sandbox("b", 1);
        let own = [
            GATEWAY_ADDRESS,
            HOST,
            host.plan.host_address(),
            sandbox.address().ip(),
            sibling.address().ip(),
            Ipv4Addr::new(169, 254, 0, 1),
            Ipv4Addr::new(127, 0, 0, 1),
            Ipv4Addr::new(0, 0, 0, 0),
            Ipv4Addr::BROADCAST,
            Ipv4Addr::new(224, 0, 0, 251),
        ];
        for address in PRIVATE.into_iter().chain(own.into_iter().take(6)) {
            let watch = Stopwatch::start();
            sandbox.guest.drain();
            sandbox.guest.udp(6001, (address, 80), b"?");
            sandbox.guest.tcp(6000, (address, 80), SYN, (1, 0));
            let is_reset = |p: &Packet| p.protocol == TCP && p.source == address;
            let reset = sandbox.guest.expect("a reset", is_reset);
            assert_eq!(reset.tcp_flags() & RST, RST, "{address}");
            assert!(watch.elapsed() < AT_ONCE, "{address}: {:?}", watch.elapsed());
        }
        // Of these the kernel thinks so little that it does not even answer.
        for address in own.into_iter().skip(6) {
            sandbox.guest.udp(6001, (address, 80), b"?");
        }
        for server in &servers {
            assert_silent(server);
        }
        assert_eq!(sibling.guest.packet(SILENCE, |packet| packet.protocol == UDP), None);
    });
}

#[test]
fn names_are_asked_of_the_nameservers_only() {
    on_a_host(|host| {
        let [server, other] = [RESOLVER, RESOLVER_2].map(|address| host.udp_server(address, 53));
        let sandbox = host.sandbox("a", 0);
        sandbox.guest.udp(7000, (RESOLVER, 53), b"directly");
        sandbox.guest.udp(7001, (GATEWAY_ADDRESS, 53), b"by the gateway");
        for _ in 0..2 {
            let (_, from) = heard(&server);
            server.send_to(b"it is", from).unwrap();
        }
        let direct =
            sandbox.guest.expect("the answer", |p| p.protocol == UDP && p.port_to() == 7000);
        assert_eq!((direct.source, direct.text()), (RESOLVER, &b"it is"[..]));
        sandbox.guest.udp(7001, (GATEWAY_ADDRESS, 53), b"again");
        let (_, from) = heard(&server);
        server.send_to(b"it was", from).unwrap();
        let by_gateway =
            sandbox.guest.expect("the answer", |p| p.protocol == UDP && p.port_to() == 7001);
        assert_eq!(by_gateway.source, GATEWAY_ADDRESS);
        for (to, port) in [
            (RESOLVER_2, 53),
            (Ipv4Addr::new(10, 1, 2, 3), 53),
            (RESOLVER, 853),
            (GATEWAY_ADDRESS, 853),
            (GATEWAY_ADDRESS, 80),
            (SERVER, 853),
        ] {
            assert_eq!(tried(&sandbox, to, port), REFUSED, "{to}:{port}");
        }
        assert_silent(&other);
    });
}

#[test]
fn questions_take_turns_among_the_nameservers() {
    on_a_host(|host| {
        let servers = [RESOLVER, RESOLVER_2].map(|address| host.udp_server(address, 53));
        let mut wanted = host.wanted("a", 0);
        wanted.policy.nameservers = format!("{RESOLVER}\n{RESOLVER_2}").parse().unwrap();
        let sandbox = host.sandbox_with(wanted);
        for port in 0..10 {
            sandbox.guest.udp(7100 + port, (GATEWAY_ADDRESS, 53), b"?");
        }
        for server in &servers {
            for _ in 0..5 {
                heard(server);
            }
        }
    });
}

#[test]
fn an_isolated_sandbox_reaches_what_is_allowed_and_nothing_else() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let private = host.udp_server(Ipv4Addr::new(10, 1, 2, 3), 4000);
        let resolver = host.udp_server(RESOLVER, 53);
        let mut wanted = host.wanted("a", 0);
        wanted.policy.reach = Reach::Isolated;
        let sandbox = host.sandbox_with(wanted.clone());
        for (to, port) in [(SERVER, 4000), (RESOLVER, 53), (GATEWAY_ADDRESS, 53), (OTHER, 443)] {
            assert_eq!(tried(&sandbox, to, port), REFUSED, "{to}:{port}");
        }
        wanted.policy.allowed =
            Destinations::allowed(format!("{SERVER}\n{RESOLVER}\n10.1.0.0/16").lines()).unwrap();
        host.network.apply_policy(&wanted).unwrap();
        sandbox.guest.udp(6100, (SERVER, 4000), b"!");
        heard(&server);
        sandbox.guest.udp(6100, (Ipv4Addr::new(10, 1, 2, 3), 4000), b"!");
        heard(&private);
        sandbox.guest.udp(6101, (GATEWAY_ADDRESS, 53), b"!");
        heard(&resolver);
        assert_eq!(tried(&sandbox, OTHER, 443), REFUSED);
        assert_eq!(tried(&sandbox, Ipv4Addr::new(10, 2, 0, 1), 4000), REFUSED);
    });
}

#[test]
fn what_is_denied_is_refused_also_where_it_is_allowed() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let mut wanted = host.wanted("a", 0);
        wanted.policy.allowed = Destinations::allowed("0.0.0.0/0".lines()).unwrap();
        wanted.policy.denied =
            Destinations::denied(format!("{SERVER}\n{RESOLVER}").lines()).unwrap();
        let sandbox = host.sandbox_with(wanted);
        assert_eq!(tried(&sandbox, SERVER, 4000), REFUSED);
        assert_eq!(tried(&sandbox, RESOLVER, 53), REFUSED);
        assert_eq!(tried(&sandbox, GATEWAY_ADDRESS, 53), REFUSED);
        assert_eq!(tried(&sandbox, HOST, 22), REFUSED);
        assert_silent(&server);
    });
}

#[test]
fn a_guest_that_opens_too_many_connections_is_held_back() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let sandbox = host.sandbox("a", 0);
        // The burst is 400, and while this is sent 200 more are let through in each second.
        let watch = Stopwatch::start();
        for port in 0..1000 {
            sandbox.guest.udp(10_000 + port, (SERVER, 4000), b"!");
        }
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        let passed = counters.guest_out.packets;
        let more = 200 * (watch.elapsed().as_secs() + 1);
        assert!((400..=400 + more).contains(&passed), "{passed}");
        assert_eq!(passed + counters.excess.packets, 1000);
        assert!(counters.excess.packets > 0 || watch.elapsed().as_secs() > 2, "{counters:?}");
        // The queue of the server is shorter than that.
        server.set_nonblocking(true).unwrap();
        while server.recv_from(&mut [0; 8]).is_ok() {}
        server.set_nonblocking(false).unwrap();
        // One that is open already is none of the new ones.
        for _ in 0..300 {
            sandbox.guest.udp(10_000, (SERVER, 4000), b"!");
            heard(&server);
        }
    });
}

#[test]
fn what_is_refused_takes_nothing_from_the_connections_that_may_be_opened() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        for port in 0..1000 {
            sandbox.guest.udp(10_000 + port, (Ipv4Addr::new(10, 1, 2, 3), 4000), b"!");
            sandbox.guest.udp(10_000 + port, (OTHER, 53), b"!");
        }
        for port in 0..300 {
            sandbox.guest.udp(20_000 + port, (SERVER, 4000), b"!");
        }
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert_eq!((counters.guest_out.packets, counters.excess.packets), (300, 0));
        assert_eq!(counters.refused.packets, 2000);
    });
}

#[test]
fn a_broadcast_to_a_network_of_the_hosts_is_refused_by_the_sandboxs_own_firewall() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        // A service of the host that listens everywhere, without the host's guard before it.
        let service = std::net::UdpSocket::bind("0.0.0.0:4000").unwrap();
        nft("delete table inet dozed_0ad50000");
        let refused = || host.network.counters(sandbox.id()).unwrap().unwrap().refused.packets;
        let before = refused();
        for (number, last) in [255, 0].into_iter().enumerate() {
            let broadcast = Ipv4Addr::new(93, 184, 216, last);
            sandbox.guest.udp(5000, (broadcast, 4000), b"is anybody there?");
            let sent = u64::try_from(number).unwrap() + 1;
            eventually("its refusal", || (refused() == before + sent).then_some(()));
        }
        assert_silent(&service);
    });
}
