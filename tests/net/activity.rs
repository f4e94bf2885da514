//! Which of the packets that pass are a sign that somebody uses a sandbox.

use std::net::{SocketAddr, UdpSocket};

use dozed::{
    net::{Activity, Error, Known, Network},
    sandbox::network::{Destinations, GUEST_ADDRESS},
    sys::netns,
};

use crate::{
    guest::{ACK, Guest, Packet, TCP, UDP},
    host::{Host, OTHER, SERVER, Sandbox, eventually, heard, on_a_host, on_a_host_that_ignores},
};

/// Returns the packets that are activity, of what the host opened and of what the guest did.
fn active(host: &Host, sandbox: &Sandbox) -> (u64, u64) {
    let known = Known { id: sandbox.id().clone(), address: sandbox.address() };
    let all = host.network.activity(&[known]).unwrap();
    let [(id, Ok(Activity { inward, outward }))] = &all[..] else { panic!("{all:?}") };
    assert_eq!(id, sandbox.id());
    let counters = host.network.counters(id).unwrap().unwrap();
    assert_eq!((counters.active_in, counters.active_out), (*inward, *outward));
    (inward.packets, outward.packets)
}

/// Says something from the host to a port of the guest, and has the guest answer.
fn ask(sandbox: &Sandbox, port: u16) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.send_to(b"?", SocketAddr::from((sandbox.address().ip(), port))).unwrap();
    let question = sandbox.guest.expect("the question", |p| p.protocol == UDP);
    let back = (question.source, question.port_from());
    sandbox.guest.send_packet(&Packet::udp((GUEST_ADDRESS, port), back, b"!"));
    heard(&socket);
}

#[test]
fn what_is_said_either_way_is_activity_and_what_keeps_a_connection_open_is_not() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let sandbox = host.sandbox("a", 0);
        assert_eq!(active(host, &sandbox), (0, 0));
        let to = (SERVER, 443);
        let numbers = sandbox.guest.connect(6000, to);
        let stream = eventually("the connection", || listener.accept().ok().map(|(it, _)| it));
        // The two SYNs. The third segment of the handshake says nothing.
        assert_eq!(active(host, &sandbox), (0, 2));
        sandbox.guest.say(6000, to, numbers, b"hello");
        let answer = |guest: &Guest| {
            guest.expect("an ACK", |p| p.protocol == TCP && p.text().is_empty());
        };
        answer(&sandbox.guest);
        assert_eq!(active(host, &sandbox), (0, 3));
        // A probe, with and without time stamps, and the server's answer to each.
        let probe = (numbers.0 + 4, numbers.1);
        sandbox.guest.tcp(6000, to, ACK, probe);
        answer(&sandbox.guest);
        const STAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
        let from = (GUEST_ADDRESS, 6000);
        let stamped = Packet::tcp_with_options(from, to, (ACK, &STAMPS), probe, b"");
        sandbox.guest.send_packet(&stamped);
        eventually("the probes", || {
            let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
            (counters.guest_out.packets == 5).then_some(())
        });
        assert_eq!(active(host, &sandbox), (0, 3));
        // The end of a connection is a sign that somebody ends it.
        drop(stream);
        sandbox.guest.expect("the end", |p| p.protocol == TCP && p.text().is_empty());
        // The server says it again for as long as no answer comes.
        let ends = |(inward, outward)| (inward, outward >= 4);
        assert_eq!(ends(active(host, &sandbox)), (0, true));
        ask(&sandbox, 53);
        assert_eq!(ends(active(host, &sandbox)), (2, true));
    });
}

#[test]
fn what_is_ignored_passes_and_is_no_activity() {
    on_a_host_that_ignores(&["93.184.216.34", "udp/9100", "udp/200-300"], |host| {
        let ignored = host.udp_server(SERVER, 4000);
        let other = host.udp_server(OTHER, 4000);
        let sandbox = host.sandbox("a", 0);
        let there_and_back = |server: &UdpSocket, address| {
            sandbox.guest.udp(5000, (address, 4000), b"?");
            let (_, from) = heard(server);
            server.send_to(b"!", from).unwrap();
            sandbox.guest.expect("the answer", |p| p.source == address);
        };
        there_and_back(&ignored, SERVER);
        [9100, 200, 250, 300].iter().for_each(|port| ask(&sandbox, *port));
        assert_eq!(active(host, &sandbox), (0, 0));
        there_and_back(&other, OTHER);
        [9101, 199, 301].iter().for_each(|port| ask(&sandbox, *port));
        assert_eq!(active(host, &sandbox), (6, 2));
        let counters = host.network.counters(sandbox.id()).unwrap().unwrap();
        assert_eq!((counters.host_in.packets, counters.guest_in.packets), (7, 2));
    });
}

#[test]
fn the_host_itself_can_be_ignored() {
    on_a_host_that_ignores(&["10.213.0.1"], |host| {
        let sandbox = host.sandbox("a", 0);
        ask(&sandbox, 53);
        assert_eq!(active(host, &sandbox), (0, 0));
    });
}

#[test]
fn a_change_of_policy_forgets_no_activity_and_a_network_that_is_made_begins_anew() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        ask(&sandbox, 53);
        let mut wanted = sandbox.wanted.clone();
        wanted.policy.denied = Destinations::denied("8.8.8.8".lines()).unwrap();
        host.network.apply_policy(&wanted).unwrap();
        assert_eq!(active(host, &sandbox), (2, 0));
        ask(&sandbox, 53);
        assert_eq!(active(host, &sandbox), (4, 0));
        let known = Known { id: sandbox.id().clone(), address: sandbox.address() };
        let Sandbox { wanted, guest, .. } = sandbox;
        drop(guest);
        host.network.remove(&wanted.id, wanted.address).unwrap();
        eventually("the end of the link", || {
            host.network.activity(std::slice::from_ref(&known)).unwrap().is_empty().then_some(())
        });
        let sandbox = host.sandbox_with(wanted);
        assert_eq!(active(host, &sandbox), (0, 0));
        ask(&sandbox, 53);
        assert_eq!(active(host, &sandbox), (2, 0));
    });
}

#[test]
fn a_network_that_cannot_be_looked_into_hides_no_other() {
    on_a_host(|host| {
        let (lost, other) = (host.sandbox("a", 0), host.sandbox("b", 1));
        let known = [&lost, &other]
            .map(|sandbox| Known { id: sandbox.id().clone(), address: sandbox.address() });
        host.network.activity(&known).unwrap();
        // Its guest and its link are there still.
        netns::unpin(&lost.ready.namespace).unwrap();
        [&lost, &other].iter().for_each(|sandbox| ask(sandbox, 53));
        let sampled = host.network.activity(&known).unwrap();
        let [(_, Err(Error::NotThere)), (id, Ok(activity))] = &sampled[..] else {
            panic!("{sampled:?}")
        };
        assert_eq!((id, activity.inward.packets), (other.id(), 2));
    });
}
