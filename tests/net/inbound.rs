//! Who may open something to a guest.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
};

use dozed::{
    net::Network,
    sandbox::network::{GATEWAY_ADDRESS, GUEST_ADDRESS},
};

use crate::{
    guest::{ACK, Guest, ICMP, Packet, SYN, SYN_ACK, TCP, UDP},
    host::{
        HOST, Host, OTHER, SERVER, SILENCE, SOON, Sandbox, assert_silent, heard, ip, nft, on_a_host,
    },
};

/// Binds a socket on the host; nought is any address.
fn bound(address: Ipv4Addr) -> UdpSocket {
    let socket = UdpSocket::bind(SocketAddr::from((address, 0))).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

fn expect(guest: &Guest, text: &[u8]) -> Packet {
    guest.expect("the datagram", |packet| packet.protocol == UDP && packet.text() == text)
}

fn assert_nothing_comes(guest: &Guest) {
    assert_eq!(guest.packet(SILENCE, |packet| packet.protocol == UDP), None);
}

fn unasked(host: &Host, sandbox: &Sandbox) -> u64 {
    host.network.counters(sandbox.id()).unwrap().unwrap().unasked.packets
}

#[test]
fn the_host_reaches_a_guest_from_its_own_address_in_the_range_and_is_answered() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let to = (sandbox.address().ip(), 8080);
        let socket = bound(Ipv4Addr::UNSPECIFIED);
        socket.send_to(b"knock", SocketAddr::from(to)).unwrap();
        let packet = expect(&sandbox.guest, b"knock");
        assert_eq!(packet.source, host.plan.host_address());
        assert_eq!(packet.destination, GUEST_ADDRESS);
        let back = (packet.source, packet.port_from());
        sandbox.guest.send_packet(&Packet::udp((GUEST_ADDRESS, 8080), back, b"come in"));
        assert_eq!(heard(&socket), ("come in".to_owned(), SocketAddr::from(to)));
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert_eq!((counters.host_in.packets, counters.host_out.packets), (1, 1));
    });
}

#[test]
fn a_connection_that_the_host_opens_works_both_ways() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let to = SocketAddr::from((sandbox.address().ip(), 8080));
        let client = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
            let mut stream = TcpStream::connect_timeout(&to, SOON).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(b"hello").unwrap();
            let mut text = [0; 7];
            stream.read_exact(&mut text).unwrap();
            text
        });
        let client = client.unwrap();
        let guest = &sandbox.guest;
        let syn = guest.expect("a SYN", |p| p.protocol == TCP && p.tcp_flags() == SYN);
        let back = (syn.source, syn.port_from());
        let segment = |flags, numbers, text: &[u8]| {
            guest.send_packet(&Packet::tcp((GUEST_ADDRESS, 8080), back, flags, numbers, text));
        };
        let next = syn.tcp_sequence() + 1;
        segment(SYN_ACK, (500, next), b"");
        guest.expect("the text", |p| p.protocol == TCP && p.text() == b"hello");
        segment(ACK, (501, next + 5), b"welcome");
        assert_eq!(&client.join().unwrap(), b"welcome");
    });
}

#[test]
fn nobody_else_reaches_a_guest() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let sibling = host.sandbox("b", 1);
        let to = SocketAddr::from((sandbox.address().ip(), 8080));
        // From another address of the host: the namespace drops it.
        bound(HOST).send_to(b"other", to).unwrap();
        assert_nothing_comes(&sandbox.guest);
        assert_eq!(unasked(host, &sandbox), 1);
        // From the internet, by way of the host: the host drops it.
        let range = host.plan.range();
        host.internet(move || ip(&format!("route add {range} via {HOST}")));
        let outside = host.udp_server(SERVER, 4000);
        outside.send_to(b"outside", to).unwrap();
        assert_nothing_comes(&sandbox.guest);
        assert_eq!(unasked(host, &sandbox), 1);
        // And without the host's rule the namespace does.
        nft("flush ruleset");
        outside.send_to(b"again", to).unwrap();
        assert_nothing_comes(&sandbox.guest);
        assert_eq!(unasked(host, &sandbox), 2);
        // A sibling is refused at its own door, by the rules of its own namespace.
        sibling.guest.udp(5000, (sandbox.address().ip(), 8080), b"sibling");
        assert_nothing_comes(&sandbox.guest);
        assert_eq!(unasked(host, &sandbox), 2);
    });
}

#[test]
fn the_host_refuses_what_gets_out_of_a_namespace_to_it_or_to_a_sibling() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let sibling = host.sandbox("b", 1);
        let service = bound(HOST);
        let service_at = service.local_addr().unwrap().port();
        // As if the rules of the namespace had a hole of that size.
        sandbox.namespace().run(|_| nft("flush ruleset")).unwrap();
        let own = sandbox.address();
        let hole = [
            "add table ip hole".to_owned(),
            "add chain ip hole out { type nat hook postrouting priority 100; }".to_owned(),
            format!("add rule ip hole out oifname eth0 snat to {own}"),
        ];
        sandbox.namespace().run(move |_| hole.map(|line| nft(&line))).unwrap();
        sandbox.guest.udp(5000, (HOST, service_at), b"hello host");
        assert_silent(&service);
        sandbox.guest.udp(5001, (sibling.address().ip(), 8080), b"hello you");
        assert_nothing_comes(&sibling.guest);
        assert_eq!(unasked(host, &sibling), 0, "the host let it through");
        // The hole is there: to the internet it gets.
        let server = host.udp_server(SERVER, 4000);
        sandbox.guest.udp(5002, (SERVER, 4000), b"hello");
        heard(&server);
    });
}

#[test]
fn the_host_lets_nothing_pass_of_which_it_keeps_no_connection() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let sibling = host.sandbox("b", 1);
        let service = bound(HOST);
        let service_at = service.local_addr().unwrap().port();
        let server = host.udp_server(SERVER, 4000);
        // As if the rules of the namespaces had holes, on a host that tracks nothing.
        for of in [&sandbox, &sibling] {
            let hole = [
                "flush ruleset".to_owned(),
                "add table ip hole".to_owned(),
                "add chain ip hole out { type nat hook postrouting priority 100; }".to_owned(),
                format!("add rule ip hole out oifname eth0 snat to {}", of.address()),
                "add chain ip hole in { type nat hook prerouting priority -100; }".to_owned(),
                format!("add rule ip hole in iifname eth0 dnat to {GUEST_ADDRESS}"),
            ];
            of.namespace().run(move |_| hole.map(|line| nft(&line))).unwrap();
        }
        nft("add table ip untracked");
        nft("add chain ip untracked first { type filter hook prerouting priority -300; }");
        nft("add rule ip untracked first notrack");
        sandbox.guest.udp(5000, (HOST, service_at), b"hello host");
        assert_silent(&service);
        sandbox.guest.udp(5001, (sibling.address().ip(), 8080), b"hello you");
        sandbox.guest.udp(5002, (SERVER, 4000), b"hello");
        let range = host.plan.range();
        host.internet(move || ip(&format!("route add {range} via {HOST}")));
        server.send_to(b"outside", (sibling.address().ip(), 8080)).unwrap();
        assert_silent(&server);
        assert_nothing_comes(&sibling.guest);
        // The holes are there: with a connection it gets to the internet, and is answered.
        nft("delete table ip untracked");
        sandbox.guest.udp(5003, (SERVER, 4000), b"hello");
        let (_, from) = heard(&server);
        server.send_to(b"welcome", from).unwrap();
        expect(&sandbox.guest, b"welcome");
    });
}

#[test]
fn an_error_passes_if_it_is_about_what_the_host_opened_and_is_dropped_if_it_is_made_up() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let to = SocketAddr::from((sandbox.address().ip(), 8080));
        let socket = bound(Ipv4Addr::UNSPECIFIED);
        socket.connect(to).unwrap();
        socket.send(b"knock").unwrap();
        let packet = expect(&sandbox.guest, b"knock");
        let unreachable = |destination, about: &Packet| {
            let rest = [&[0; 4][..], &about.bytes()].concat();
            Packet::icmp(GUEST_ADDRESS, destination, 3, 3, &rest)
        };
        // To a third party, and about a flow that nobody has.
        let server = host.udp_server(OTHER, 4000);
        sandbox.guest.send_packet(&unreachable(OTHER, &packet));
        let made_up = Packet::udp((OTHER, 4000), (GUEST_ADDRESS, 1), b"never");
        sandbox.guest.send_packet(&unreachable(OTHER, &made_up));
        assert_silent(&server);
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert_eq!(counters.invalid.packets, 2);
        // An answer to no question.
        sandbox.guest.send_packet(&Packet::icmp(GUEST_ADDRESS, SERVER, 0, 0, &[0; 8]));
        sandbox.guest.tcp(5000, (SERVER, 80), SYN_ACK, (1, 1));
        sandbox.guest.expect("a reset of what is no connection", |p| p.protocol == TCP);
        // The true one, and to the one whom it concerns.
        sandbox.guest.send_packet(&unreachable(packet.source, &packet));
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    });
}

#[test]
fn nothing_answers_for_the_gateway() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let ping = Packet::icmp(GUEST_ADDRESS, GATEWAY_ADDRESS, 8, 0, &[0; 8]);
        sandbox.guest.send_packet(&ping);
        let answer = sandbox.guest.expect("a refusal", |p| p.protocol == ICMP);
        assert_eq!(answer.payload[..2], [3, 13], "it is told that this is prohibited");
    });
}
