//! Packets to sandboxes that sleep. A wake is pretended: it makes the network, and a guest
//! behind it that the test speaks for.

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    thread::{Builder, JoinHandle},
};

use dozed::{
    net::{Error, LinuxNetwork, Network, Trigger, Wanted},
    sandbox::network::{GUEST_ADDRESS, Reach, Transport, WakePorts},
    sys::clock::Stopwatch,
};

use crate::{
    guest::{ACK, Guest, Packet, SYN, SYN_ACK, TCP, UDP},
    host::{
        HOST, Host, SERVER, SILENCE, SOON, Sandbox, assert_silent, eventually, forwarding, ip,
        on_a_host,
    },
};

/// Puts a sandbox to sleep that never had a network. Every port of TCP wakes it, and udp/53.
fn sleeper(host: &Host, name: &str, slot: u32) -> Wanted {
    let wanted = host.wanted(name, slot);
    listen(host, &wanted);
    wanted
}

fn listen(host: &Host, wanted: &Wanted) {
    let ports = WakePorts::new(&["tcp", "udp/53"]).unwrap();
    host.network.listen(&wanted.id, wanted.address, Some(&ports)).unwrap();
}

/// Wakes a sandbox: when this returns its guest is about to run.
fn wake(host: &Host, wanted: &Wanted) -> Guest {
    host.network.ensure(wanted).unwrap();
    let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
    host.network.deliver(&wanted.id, wanted.address).unwrap();
    guest
}

/// Connects to a sandbox and returns what it says first.
fn call(wanted: &Wanted, port: u16) -> JoinHandle<io::Result<Vec<u8>>> {
    let to = SocketAddr::from((wanted.address.ip(), port));
    let call = move || {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"hello")?;
        let mut text = vec![0; 7];
        stream.read_exact(&mut text)?;
        Ok(text)
    };
    Builder::new().name("caller".to_owned()).spawn(call).unwrap()
}

/// Answers a call to `port` as a guest does.
fn answer(guest: &Guest, port: u16) {
    let is_syn = |p: &Packet| p.protocol == TCP && p.port_to() == port && p.tcp_flags() == SYN;
    let syn = guest.expect("a SYN", is_syn);
    let back = (syn.source, syn.port_from());
    let next = syn.tcp_sequence() + 1;
    let segment = |flags, numbers, text: &[u8]| {
        let from = (GUEST_ADDRESS, port);
        guest.send_packet(&Packet::tcp(from, back, flags, numbers, text));
    };
    segment(SYN_ACK, (500, next), b"");
    guest.expect("the text", |p| p.protocol == TCP && !is_syn(p) && p.text() == b"hello");
    segment(ACK, (501, next + 5), b"welcome");
}

/// A socket of the host that speaks to udp/53 of a sandbox.
fn asks(wanted: &Wanted) -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.connect(SocketAddr::from((wanted.address.ip(), 53))).unwrap();
    socket
}

fn next_text(guest: &Guest) -> String {
    let packet = guest.expect("a datagram", |packet| packet.protocol == UDP);
    String::from_utf8(packet.text().to_vec()).unwrap()
}

/// How often a SYN was sent again in the namespace of this thread.
fn syns_again() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "TCPSynRetrans").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Calls a sleeper and wakes it, until the call was not sent again before it was delivered:
/// it is sent again after a second, which a busy machine may need for a wake.
fn first_syn_comes(host: &Host, wanted: &Wanted, triggered: impl Fn(&Trigger)) -> Guest {
    for _ in 0..20 {
        let before = syns_again();
        let caller = call(wanted, 22);
        let (address, trigger) = host.triggered();
        assert_eq!(address, wanted.address);
        triggered(&trigger);
        let guest = wake(host, wanted);
        answer(&guest, 22);
        let is_first = syns_again() == before;
        assert_eq!(caller.join().unwrap().unwrap(), b"welcome");
        assert!(host.triggers().is_empty());
        if is_first {
            return guest;
        }
        drop(guest);
        listen(host, wanted);
    }
    panic!("no call came before it was sent again");
}

#[test]
fn a_connection_to_a_sleeper_triggers_and_is_made_when_it_has_woken() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        let guest = first_syn_comes(host, &wanted, |trigger| {
            assert_eq!((trigger.transport, trigger.port), (Transport::Tcp, 22));
            assert_eq!(trigger.from, host.plan.host_address());
        });
        // It is awake, and has nothing to do with the wake_on_packet any more.
        let caller = call(&wanted, 23);
        answer(&guest, 23);
        caller.join().unwrap().unwrap();
        assert!(host.triggers().is_empty());
    });
}

#[test]
fn a_burst_of_datagrams_triggers_once_and_arrives_in_order() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        let socket = asks(&wanted);
        for number in 0..40 {
            socket.send(format!("{number}").as_bytes()).unwrap();
        }
        host.triggered();
        host.network.ensure(&wanted).unwrap();
        let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
        // What is sent while it wakes comes after the rest, and before what is sent later.
        for number in 40..50 {
            socket.send(format!("{number}").as_bytes()).unwrap();
        }
        host.network.deliver(&wanted.id, wanted.address).unwrap();
        socket.send(b"50").unwrap();
        for number in 0..=50 {
            assert_eq!(next_text(&guest), number.to_string());
        }
        assert!(host.triggers().is_empty());
        // The guest's answer gets to who asked.
        let from = socket.local_addr().unwrap();
        let to = (host.plan.host_address(), from.port());
        guest.send_packet(&Packet::udp((GUEST_ADDRESS, 53), to, b"answer"));
        let mut text = [0; 6];
        socket.recv(&mut text).unwrap();
        assert_eq!(&text, b"answer");
    });
}

#[test]
fn many_who_call_many_sleepers_at_once_all_get_through() {
    const SLEEPERS: u32 = 8;
    const PORTS: [u16; 3] = [22, 80, 443];
    on_a_host(|host| {
        let sleepers: Vec<_> =
            (0..SLEEPERS).map(|slot| sleeper(host, &format!("s{slot}"), slot)).collect();
        let callers: Vec<_> =
            sleepers.iter().flat_map(|wanted| PORTS.map(|port| call(wanted, port))).collect();
        let mut awake = Vec::new();
        for _ in 0..SLEEPERS {
            let (address, _) = host.triggered();
            let wanted = sleepers.iter().find(|wanted| wanted.address == address).unwrap();
            assert!(!awake.contains(&address), "{address} tell twice");
            awake.push(address);
            let guest = wake(host, wanted);
            let answers = move || guest_of_three(&guest, PORTS);
            Builder::new().name("guest".to_owned()).spawn(answers).unwrap();
        }
        for caller in callers {
            assert_eq!(caller.join().unwrap().unwrap(), b"welcome");
        }
        assert!(host.triggers().is_empty());
    });
}

/// Answers one call to each of the ports, in whichever order what they say comes.
fn guest_of_three(guest: &Guest, ports: [u16; 3]) {
    let mut done = 0;
    while done < ports.len() {
        let packet = guest.expect("a segment", |packet| packet.protocol == TCP);
        let back = (packet.source, packet.port_from());
        let from = (GUEST_ADDRESS, packet.port_to());
        let said = u32::try_from(packet.text().len()).unwrap();
        let next = packet.tcp_sequence() + said;
        if packet.tcp_flags() == SYN {
            guest.send_packet(&Packet::tcp(from, back, SYN_ACK, (500, next + 1), b""));
        } else if said > 0 {
            guest.send_packet(&Packet::tcp(from, back, ACK, (501, next), b"welcome"));
            done += 1;
        }
    }
}

#[test]
fn a_wake_that_fails_is_told_to_those_who_wait_and_for_a_while_to_all() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        let caller = call(&wanted, 22);
        host.triggered();
        let socket = asks(&wanted);
        // It is held with the other one, unless it comes after the refusal, which it does
        // not wait for either.
        socket.send(b"?").unwrap();
        host.network.refuse(wanted.address);
        let error = caller.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        // Packets trigger again when the pause is over.
        let caller = eventually("another trigger", || {
            let caller = call(&wanted, 22);
            if host.triggers().is_empty() {
                caller.join().unwrap().unwrap_err();
                return None;
            }
            Some(caller)
        });
        let guest = wake(host, &wanted);
        answer(&guest, 22);
        assert_eq!(caller.join().unwrap().unwrap(), b"welcome");
    });
}

#[test]
fn what_does_not_wake_is_told_so_at_once() {
    on_a_host(|host| {
        let wanted = host.wanted("a", 0);
        host.network
            .listen(&wanted.id, wanted.address, Some(&WakePorts::new(&["tcp/22"]).unwrap()))
            .unwrap();
        let refused = |port| call(&wanted, port).join().unwrap().unwrap_err().kind();
        assert_eq!(refused(80), ErrorKind::ConnectionRefused);
        let socket = asks(&wanted);
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        // An address that is not listened for, or not any more, is unreachable.
        let other = host.wanted("b", 1);
        let error = call(&other, 22).join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        host.network.stop_listening(wanted.address);
        assert_eq!(refused(22), ErrorKind::HostUnreachable);
        assert!(host.triggers().is_empty());
    });
}

#[test]
fn no_sender_triggers_that_could_not_reach_a_running_sandbox() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        let to = SocketAddr::from((wanted.address.ip(), 53));
        // From another address of the host, and from the internet by way of the host.
        let other = UdpSocket::bind((HOST, 0)).unwrap();
        other.send_to(b"other", to).unwrap();
        let range = host.plan.range();
        host.internet(move || ip(&format!("route add {range} via {HOST}")));
        let outside = host.udp_server(SERVER, 4000);
        outside.send_to(b"outside", to).unwrap();
        assert!(host.triggers().is_empty());
        // Nor does another sandbox.
        let sibling = host.sandbox("b", 1);
        sibling.guest.udp(5000, (wanted.address.ip(), 53), b"sibling");
        assert!(host.triggers().is_empty());
        // And the host itself does.
        asks(&wanted).send(b"host").unwrap();
        host.triggered();
        let guest = wake(host, &wanted);
        assert_eq!(next_text(&guest), "host");
        assert_eq!(guest.packet(SILENCE, |packet| packet.protocol == UDP), None);
        assert_silent(&outside);
    });
}

/// Connects from the host to port 8080 of a guest, which answers. Returns the stream, the other
/// end as the guest knows it, and the numbers that the guest goes on with.
fn connected(sandbox: &Sandbox) -> (TcpStream, (Ipv4Addr, u16), (u32, u32)) {
    let to = SocketAddr::from((sandbox.address().ip(), 8080));
    let caller = Builder::new()
        .name("caller".to_owned())
        .spawn(move || TcpStream::connect_timeout(&to, SOON).unwrap());
    let syn = sandbox.guest.expect("a SYN", |p| p.protocol == TCP && p.tcp_flags() == SYN);
    let back = (syn.source, syn.port_from());
    let next = syn.tcp_sequence() + 1;
    let from = (GUEST_ADDRESS, 8080);
    sandbox.guest.send_packet(&Packet::tcp(from, back, SYN_ACK, (500, next), b""));
    let stream = caller.unwrap().join().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    (stream, back, (501, next))
}

#[test]
fn data_on_an_open_connection_wakes_its_sandbox_and_is_delivered() {
    for lingers in [true, false] {
        on_a_host(move |host| {
            let sandbox = host.sandbox("a", 0);
            let (mut stream, back, (own, next)) = connected(&sandbox);
            let Sandbox { wanted, guest, .. } = sandbox;
            drop(guest);
            listen(host, &wanted);
            if !lingers {
                host.network.remove(&wanted.id, wanted.address).unwrap();
            }
            stream.write_all(b"are you there?").unwrap();
            let (address, trigger) = host.triggered();
            assert_eq!(
                (address, trigger.transport, trigger.port),
                (wanted.address, Transport::Tcp, 8080)
            );
            let guest = wake(host, &wanted);
            guest.expect("what was said", |p| p.protocol == TCP && p.text() == b"are you there?");
            let from = (GUEST_ADDRESS, 8080);
            guest.send_packet(&Packet::tcp(from, back, ACK, (own, next + 14), b"yes"));
            let mut text = [0; 3];
            stream.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"yes");
            assert!(host.triggers().is_empty());
        });
    }
}

#[test]
fn data_that_wakes_nobody_is_reset_at_once_and_a_call_is_told_that_nobody_is_there() {
    on_a_host(|host| {
        let ports = WakePorts::new(&["tcp/22"]).unwrap();
        for (slot, wakes_on) in (0..).zip([None, Some(&ports)]) {
            let sandbox = host.sandbox(&format!("s{slot}"), slot);
            let (mut stream, ..) = connected(&sandbox);
            let Sandbox { wanted, guest, .. } = sandbox;
            drop(guest);
            host.network.listen(&wanted.id, wanted.address, wakes_on).unwrap();
            stream.write_all(b"are you there?").unwrap();
            let error = stream.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            let kind = call(&wanted, 8080).join().unwrap().unwrap_err().kind();
            let told = match wakes_on {
                None => ErrorKind::HostUnreachable,
                Some(_) => ErrorKind::ConnectionRefused,
            };
            assert_eq!(kind, told);
        }
        assert!(host.triggers().is_empty());
    });
}

#[test]
fn a_server_that_speaks_to_a_sleeper_is_held_off_while_its_network_lingers_and_then_reset() {
    on_a_host(|host| {
        let ports = WakePorts::default();
        let listener = host.tcp_server(SERVER, 443);
        for (slot, wakes_on) in (0..).zip([None, Some(&ports)]) {
            let Sandbox { wanted, guest, .. } = host.sandbox(&format!("s{slot}"), slot);
            let mut streams = [6000, 6001].map(|port| {
                guest.connect(port, (SERVER, 443));
                let stream = eventually("the call", || listener.accept().ok().map(|(it, _)| it));
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(SOON)).unwrap();
                stream
            });
            drop(guest);
            host.network.listen(&wanted.id, wanted.address, wakes_on).unwrap();
            streams[0].write_all(b"are you there?").unwrap();
            let guest = wake(host, &wanted);
            guest.expect("what was said", |p| p.source == SERVER && p.text() == b"are you there?");
            drop(guest);
            host.network.listen(&wanted.id, wanted.address, wakes_on).unwrap();
            host.network.remove(&wanted.id, wanted.address).unwrap();
            streams[1].write_all(b"and now?").unwrap();
            let error = streams[1].read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        assert!(host.triggers().is_empty());
    });
}

#[test]
fn what_a_server_said_before_a_wake_and_is_looked_at_after_it_resets_no_connection() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let Sandbox { wanted, guest, .. } = host.sandbox("a", 0);
        guest.connect(6000, (SERVER, 443));
        let mut stream = eventually("the call", || listener.accept().ok().map(|(it, _)| it));
        drop(guest);
        host.network.listen(&wanted.id, wanted.address, None).unwrap();
        let other = sleeper(host, "b", 1);
        let held_up = host.block_at_trigger(|| {
            asks(&other).send(b"are you there?").unwrap();
        });
        stream.write_all(b"said while it slept").unwrap();
        let guest = wake(host, &wanted);
        drop(held_up);
        guest.expect("what was said", |p| p.source == SERVER && p.text() == b"said while it slept");
        assert_eq!(host.triggered().0, other.address);
    });
}

#[test]
fn it_works_on_a_host_that_is_strict_and_does_not_forward() {
    on_a_host(|host| {
        forwarding(false);
        for of in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv4/conf/{of}/rp_filter"), "1").unwrap();
        }
        let mut wanted = sleeper(host, "a", 0);
        wanted.policy.reach = Reach::Isolated;
        let caller = call(&wanted, 22);
        host.triggered();
        let guest = wake(host, &wanted);
        answer(&guest, 22);
        assert_eq!(caller.join().unwrap().unwrap(), b"welcome");
    });
}

#[test]
fn a_call_is_delivered_at_once_where_forwarding_was_switched_off_meanwhile() {
    on_a_host(|host| {
        let mut wanted = sleeper(host, "a", 0);
        wanted.policy.reach = Reach::Isolated;
        first_syn_comes(host, &wanted, |_| forwarding(false));
    });
}

#[test]
fn a_scan_of_the_range_wakes_a_few_and_no_more() {
    on_a_host(|host| {
        let sleepers: Vec<_> =
            (0..400).map(|slot| sleeper(host, &format!("s{slot}"), slot)).collect();
        let watch = Stopwatch::start();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for wanted in &sleepers {
            socket.send_to(b"?", (wanted.address.ip(), 53)).unwrap();
        }
        // However late they come, so many are told of.
        for _ in 0..32 {
            host.triggered();
        }
        let triggers = 32 + host.triggers().len();
        let seconds = usize::try_from(watch.elapsed().as_secs()).unwrap() + 1;
        assert!(triggers <= 64 + 16 * seconds, "{triggers}");
    });
}

#[test]
fn a_sandbox_that_cannot_be_passed_anything_refuses_it() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        let caller = call(&wanted, 22);
        host.triggered();
        // Nobody has made its network.
        host.network.deliver(&wanted.id, wanted.address).unwrap_err();
        let error = caller.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn the_next_daemon_takes_over_what_a_killed_one_left() {
    on_a_host(|host| {
        let wanted = sleeper(host, "a", 0);
        // One daemon for each range.
        let second = LinuxNetwork::new(host.plan, host.runtime())
            .on_trigger(std::sync::Arc::new(|_, _| panic!("this one receives nothing")));
        let error =
            second.listen(&wanted.id, wanted.address, Some(&WakePorts::default())).unwrap_err();
        assert!(matches!(error, Error::RangeInUse { .. }), "{error}");
        // A daemon that ends has nobody wait.
        host.network.dismantle().unwrap();
        // One that was killed leaves its route, and a device that nobody has open. The next one
        // takes it away, whether it listens or not.
        let device = "dozed0ad50000";
        ip(&format!("tuntap add {device} mode tun"));
        ip(&format!("link set {device} up"));
        let left = format!("route add {} dev {device} proto 213", host.plan.range());
        ip(&left);
        host.network.reconcile(&[]).unwrap();
        assert_eq!(ip("route show proto 213"), "");
        ip(&left);
        listen(host, &wanted);
        host.network.reconcile(&[]).unwrap();
        asks(&wanted).send(b"hello").unwrap();
        host.triggered();
        let guest = wake(host, &wanted);
        assert_eq!(next_text(&guest), "hello");
    });
}

#[test]
fn a_device_that_somebody_removes_is_made_again_when_the_next_one_falls_asleep() {
    on_a_host(|host| {
        let first = sleeper(host, "a", 0);
        ip("link del dozed0ad50000");
        let nobody = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"?", (first.address.ip(), 53)).unwrap_err().kind()
        };
        assert_eq!(nobody(), ErrorKind::HostUnreachable);
        let second = host.wanted("b", 1);
        eventually("a wake_on_packet that works", || {
            listen(host, &second);
            ip("-o link").contains("dozed0ad50000").then_some(())
        });
        asks(&first).send(b"hello").unwrap();
        assert_eq!(host.triggered().0, first.address);
        let guest = wake(host, &first);
        assert_eq!(next_text(&guest), "hello");
    });
}

#[test]
fn without_anybody_who_is_told_nothing_is_waited_for() {
    on_a_host(|host| {
        let silent = LinuxNetwork::new(host.plan, host.runtime());
        let wanted = host.wanted("a", 0);
        silent.listen(&wanted.id, wanted.address, Some(&WakePorts::default())).unwrap();
        drop(host.sandbox("b", 1));
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let error = socket.send_to(b"?", (wanted.address.ip(), 53)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
    });
}
