//! A change of policy, and what becomes of connections that are open.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
};

use dozed::{
    net::{Applied, Network},
    sandbox::network::{Destinations, GATEWAY_ADDRESS},
};

use crate::{
    guest::{Refusal, TCP, UDP},
    host::{
        OTHER, RESOLVER, RESOLVER_2, SERVER, SILENCE, SOON, assert_silent, eventually, heard,
        on_a_host,
    },
};

fn accepted(listener: &TcpListener) -> TcpStream {
    let stream = eventually("the connection", || match listener.accept() {
        Ok((stream, _)) => Some(stream),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    });
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

#[test]
fn an_open_connection_to_what_is_now_denied_is_reset_and_nothing_comes_back_on_it() {
    on_a_host(|host| {
        let (to, other) = ((SERVER, 443), (OTHER, 443));
        let [denied, kept] = [to, other].map(|(address, port)| host.tcp_server(address, port));
        let sandbox = host.sandbox("a", 0);
        let numbers = sandbox.guest.connect(6000, to);
        let mut stream = accepted(&denied);
        let numbers_kept = sandbox.guest.connect(6001, other);
        let mut stream_kept = accepted(&kept);
        sandbox.guest.say(6000, to, numbers, b"before");
        let mut text = [0; 6];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"before");

        let mut wanted = sandbox.wanted.clone();
        wanted.policy.denied = Destinations::denied(SERVER.to_string().lines()).unwrap();
        assert_eq!(host.network.apply_policy(&wanted).unwrap(), Applied::Now);

        sandbox.guest.drain();
        sandbox.guest.say(6000, to, (numbers.0 + 6, numbers.1), b"after");
        assert_eq!(sandbox.guest.refusal(SERVER), Refusal::Reset);
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let read = stream.read(&mut text);
        assert!(read.is_err() || read.unwrap() == 0, "the server heard {text:?}");
        stream.write_all(b"push").ok();
        let came = sandbox.guest.packet(SILENCE, |p| p.source == SERVER);
        assert_eq!(came, None);
        // The other one goes on as if nothing had been.
        sandbox.guest.say(6001, other, numbers_kept, b"on and on");
        let mut text = [0; 9];
        stream_kept.read_exact(&mut text).unwrap();
        stream_kept.write_all(b"yes").unwrap();
        sandbox
            .guest
            .expect("the answer", |p| p.protocol == TCP && p.source == OTHER && p.text() == b"yes");
    });
}

#[test]
fn datagrams_of_an_open_flow_stop_both_ways() {
    on_a_host(|host| {
        let server = host.udp_server(SERVER, 4000);
        let sandbox = host.sandbox("a", 0);
        sandbox.guest.udp(6000, (SERVER, 4000), b"one");
        let (_, from) = heard(&server);
        server.send_to(b"two", from).unwrap();
        sandbox.guest.expect("the answer", |p| p.source == SERVER);

        let mut wanted = sandbox.wanted.clone();
        wanted.policy.denied = Destinations::denied("93.184.216.0/24".lines()).unwrap();
        host.network.apply_policy(&wanted).unwrap();

        server.send_to(b"three", from).unwrap();
        assert_eq!(sandbox.guest.packet(SILENCE, |p| p.protocol == UDP), None);
        sandbox.guest.udp(6000, (SERVER, 4000), b"four");
        assert_eq!(sandbox.guest.refusal(SERVER), Refusal::Prohibited);
        assert_silent(&server);

        host.network.apply_policy(&sandbox.wanted).unwrap();
        sandbox.guest.udp(6000, (SERVER, 4000), b"five");
        heard(&server);
    });
}

#[test]
fn a_resolver_that_always_asks_from_one_port_gets_the_new_nameserver() {
    on_a_host(|host| {
        let [old, new] = [RESOLVER, RESOLVER_2].map(|address| host.udp_server(address, 53));
        let sandbox = host.sandbox("a", 0);
        let ask = |text: &[u8]| sandbox.guest.udp(5353, (GATEWAY_ADDRESS, 53), text);
        ask(b"one");
        let (_, from) = heard(&old);
        old.send_to(b"two", from).unwrap();
        sandbox.guest.expect("the answer", |p| p.source == GATEWAY_ADDRESS && p.protocol == UDP);

        let mut wanted = sandbox.wanted.clone();
        wanted.policy.nameservers = RESOLVER_2.to_string().parse().unwrap();
        host.network.apply_policy(&wanted).unwrap();

        // The old one has no way in any more, and the question goes to the new one.
        old.send_to(b"three", from).unwrap();
        assert_eq!(sandbox.guest.packet(SILENCE, |p| p.protocol == UDP), None);
        ask(b"four");
        let (_, from) = heard(&new);
        new.send_to(b"five", from).unwrap();
        let answer = sandbox.guest.expect("the answer", |p| p.protocol == UDP);
        assert_eq!((answer.source, answer.text()), (GATEWAY_ADDRESS, &b"five"[..]));
        assert_silent(&old);
    });
}

#[test]
fn a_policy_is_kept_for_a_sandbox_that_has_no_network() {
    on_a_host(|host| {
        let wanted = host.wanted("a", 0);
        assert_eq!(host.network.apply_policy(&wanted).unwrap(), Applied::NotThere);
    });
}

#[test]
fn a_change_leaves_no_gap_in_a_flood() {
    on_a_host(|host| {
        const ROUNDS: u32 = 1500;
        let denied = host.udp_server(SERVER, 4000);
        let allowed = host.udp_server(OTHER, 4000);
        let mut wanted = host.wanted("a", 0);
        wanted.policy.denied = Destinations::denied(SERVER.to_string().lines()).unwrap();
        let sandbox = host.sandbox_with(wanted.clone());
        // The flows are open, so that only the destination decides.
        sandbox.guest.udp(6000, (OTHER, 4000), b"open");
        heard(&allowed);

        let stop = std::sync::atomic::AtomicBool::new(false);
        let passed = std::sync::atomic::AtomicU64::new(0);
        let (sent, refused) = std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let (mut sent, mut refused) = (0_u64, 0_u64);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for _ in 0..8 {
                        sandbox.guest.udp(6000, (SERVER, 4000), b"bad");
                        refused += 1;
                    }
                    sandbox.guest.udp(6000, (OTHER, 4000), b"good");
                    sent += 1;
                    passed.store(sent, std::sync::atomic::Ordering::Relaxed);
                    // One at a time, so that the server's queue never overflows.
                    if allowed.recv_from(&mut [0; 8]).is_err() {
                        return (sent, u64::MAX);
                    }
                    sandbox.guest.drain();
                }
                (sent, refused)
            });
            for round in 0..ROUNDS {
                let more = Ipv4Addr::from(0x0800_0000 + round);
                let text = format!("{SERVER}\n{more}\n");
                wanted.policy.denied = Destinations::denied(text.lines()).unwrap();
                host.network.apply_policy(&wanted).unwrap();
                // Something is sent after each change, however busy the machine is.
                let now = || passed.load(std::sync::atomic::Ordering::Relaxed);
                let before = now();
                eventually("a packet", || (now() > before || flood.is_finished()).then_some(()));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            flood.join().unwrap()
        });
        assert_ne!(refused, u64::MAX, "a packet that is allowed was lost after {sent}");
        assert!(sent > u64::from(ROUNDS), "only {sent} packets for {ROUNDS} changes");
        assert!(denied.recv_from(&mut [0; 8]).is_err(), "one in {refused} leaked");
    });
}
