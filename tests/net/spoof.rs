//! Frames that are not exactly the guest's.

use std::net::Ipv4Addr;

use dozed::{
    net::{Counters, Network},
    sandbox::network::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC},
};

use crate::{
    guest::{Arp, Packet, ethernet},
    host::{Host, SERVER, SILENCE, SOON, Sandbox, assert_silent, heard, ip, on_a_host},
};

const OTHER_MAC: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 7];
const BROADCAST: [u8; 6] = [0xff; 6];
const IPV4: u16 = 0x0800;

/// Returns a datagram to the server that says `text`, from whomever.
fn datagram(from: Ipv4Addr, text: &str) -> Vec<u8> {
    Packet::udp((from, 5000), (SERVER, 4000), text.as_bytes()).bytes()
}

/// Returns a frame as a guest sends it, but for what it has in it.
fn framed(kind: u16, payload: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC.0, GUEST_MAC.0, kind, payload)
}

/// Puts a VLAN's tag around what is in a frame.
fn tagged(tag: u16, vlan: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let inner = [&vlan.to_be_bytes()[..], &kind.to_be_bytes()[..], payload].concat();
    framed(tag, &inner)
}

/// Splits a datagram into two fragments, the first of them of 8 bytes.
fn fragments(bytes: &[u8]) -> [Vec<u8>; 2] {
    let fragment = |offset: u16, more: bool, payload: &[u8]| {
        let mut header = bytes[..20].to_vec();
        let length = u16::try_from(20 + payload.len()).unwrap();
        header[2..4].copy_from_slice(&length.to_be_bytes());
        let field = offset | if more { 0x2000 } else { 0 };
        header[6..8].copy_from_slice(&field.to_be_bytes());
        header[10..12].copy_from_slice(&[0, 0]);
        let sum: u32 = header.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        [header, payload.to_vec()].concat()
    };
    [fragment(0, true, &bytes[20..28]), fragment(1, false, &bytes[28..])]
}

fn spoofed(host: &Host, sandbox: &Sandbox) -> u64 {
    let counters: Counters = host.network.counters(sandbox.id()).unwrap().unwrap();
    counters.spoofed.packets
}

#[test]
fn of_all_the_frames_that_a_guest_may_make_up_only_its_own_gets_out() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let sandbox = host.sandbox("a", 0);
        let good = || datagram(GUEST_ADDRESS, "good");
        let mut ipv6 = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
        ipv6.resize(48, 1);
        let forged = [
            ("another MAC", ethernet(GATEWAY_MAC.0, OTHER_MAC, IPV4, &good())),
            ("the gateway's MAC", ethernet(GATEWAY_MAC.0, GATEWAY_MAC.0, IPV4, &good())),
            ("another address", framed(IPV4, &datagram(Ipv4Addr::new(169, 254, 0, 20), "bad"))),
            ("the gateway's address", framed(IPV4, &datagram(GATEWAY_ADDRESS, "bad"))),
            ("a sibling's address", framed(IPV4, &datagram(Ipv4Addr::new(10, 213, 0, 3), "bad"))),
            ("a public address", framed(IPV4, &datagram(Ipv4Addr::new(8, 8, 8, 8), "bad"))),
            ("no address", framed(IPV4, &datagram(Ipv4Addr::UNSPECIFIED, "bad"))),
            ("to everybody", ethernet(BROADCAST, GUEST_MAC.0, IPV4, &good())),
            ("to another MAC", ethernet(OTHER_MAC, GUEST_MAC.0, IPV4, &good())),
            ("in a VLAN", tagged(0x8100, 5, IPV4, &good())),
            ("in VLAN 0", tagged(0x8100, 0, IPV4, &good())),
            ("in a VLAN, spoofed", tagged(0x8100, 0, IPV4, &datagram(SERVER, "bad"))),
            ("in a provider's VLAN", tagged(0x88a8, 5, IPV4, &good())),
            ("in two VLANs", tagged(0x88a8, 5, 0x8100, &[&[0, 7, 8, 0], &good()[..]].concat())),
            ("IPv6 of another MAC", ethernet(GATEWAY_MAC.0, OTHER_MAC, 0x86dd, &ipv6)),
            ("LLC", framed(0x0040, &[0xaa; 64])),
            ("IPv4 that says it is IPv6", framed(IPV4, &ipv6)),
            ("nothing", framed(IPV4, &[])),
        ];
        let before = spoofed(host, &sandbox);
        // What honest guests send too.
        for frame in [
            framed(0x86dd, &ipv6),
            ethernet([0x33, 0x33, 0, 0, 0, 1], GUEST_MAC.0, 0x86dd, &ipv6),
            ethernet(BROADCAST, GUEST_MAC.0, 0x8035, &[0; 28]),
        ] {
            sandbox.guest.send(&frame);
        }
        for (_, frame) in &forged {
            sandbox.guest.send(frame);
        }
        sandbox.guest.send(&framed(IPV4, &good()));
        let (text, from) = heard(&server);
        assert_eq!((text.as_str(), from.port()), ("good", 5000));
        assert_silent(&server);
        // All but the empty one, which the kernel does not take for IPv4 at all.
        let counted = spoofed(host, &sandbox) - before;
        let forged = u64::try_from(forged.len()).unwrap();
        assert!((forged - 1..=forged).contains(&counted), "{counted} of {forged}");
    });
}

#[test]
fn fragments_are_put_together_before_they_are_judged() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let sandbox = host.sandbox("a", 0);
        for fragment in fragments(&datagram(GUEST_ADDRESS, "in two parts")) {
            sandbox.guest.send(&framed(IPV4, &fragment));
        }
        assert_eq!(heard(&server).0, "in two parts");
        // A tail alone is of no connection, and has no port to be judged by.
        let [_, tail] = fragments(&datagram(GUEST_ADDRESS, "without a head"));
        sandbox.guest.send(&framed(IPV4, &tail));
        assert_silent(&server);
    });
}

#[test]
fn of_all_questions_for_a_mac_only_the_one_for_the_gateway_is_answered() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let good = Arp::GOOD;
        let other = Ipv4Addr::new(169, 254, 0, 20);
        assert!(sandbox.guest.arp(SOON, &good.frame(GUEST_MAC.0)));
        for (what, arp, from) in [
            ("from another MAC", good, OTHER_MAC),
            ("of another MAC", Arp { mac: OTHER_MAC, ..good }, GUEST_MAC.0),
            ("of another address", Arp { address: other, ..good }, GUEST_MAC.0),
            ("as the gateway", Arp { address: GATEWAY_ADDRESS, ..good }, GUEST_MAC.0),
            ("for another", Arp { wanted: other, ..good }, GUEST_MAC.0),
            ("for itself", Arp { wanted: GUEST_ADDRESS, ..good }, GUEST_MAC.0),
            ("an answer", Arp { operation: 2, ..good }, GUEST_MAC.0),
            ("an unknown one", Arp { operation: 3, ..good }, GUEST_MAC.0),
        ] {
            assert!(!sandbox.guest.arp(SILENCE, &arp.frame(from)), "{what}");
        }
        let neighbours = sandbox.namespace().run(|_| ip("neigh show dev dztap")).unwrap();
        let known = format!("{GUEST_ADDRESS} lladdr {GUEST_MAC} PERMANENT");
        assert_eq!(neighbours.trim(), known);
        assert!(sandbox.guest.arp(SOON, &good.frame(GUEST_MAC.0)));
    });
}

#[test]
fn nothing_that_is_not_for_it_comes_to_a_guest() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        // The kernel has something to say to every new link, if it is let.
        while let Some(frame) = sandbox.guest.next(SILENCE) {
            assert_ne!(frame.ether_type(), 0x86dd, "{frame:?}");
        }
    });
}
