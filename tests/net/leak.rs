//! What is left when a thousand sandboxes have come, slept, woken and gone.

use std::{fs, net::UdpSocket};

use dozed::{
    net::{Network, Wanted},
    sandbox::{Timestamp, network::WakePorts},
    sys::{
        clock::{Deadline, pause_for},
        command, mount,
    },
};

use crate::{
    guest::{Guest, UDP},
    host::{Host, SOON, eventually, ip, nft, on_a_host},
};

/// A round is a sandbox that is made, sleeps, outlives its network, wakes and is deleted.
const BATCHES: u32 = 50;
const SANDBOXES: u32 = 20;
/// As long as the rounds take on a machine that has much else to do.
const ROUNDS_LIMIT: std::time::Duration = std::time::Duration::from_secs(900);

#[test]
fn a_thousand_rounds_leave_nothing_behind() {
    // In a process of its own, as descriptors and threads are those of the process.
    let program = std::env::current_exe().unwrap();
    let words = ["--exact", "leak::rounds", "--ignored", "--nocapture"];
    let output = command::output(&program, &words, ROUNDS_LIMIT).unwrap();
    assert!(output.status.success() && output.stdout.contains("1 passed"), "{}", output.stdout);
}

#[test]
#[ignore = "it wants a process of its own, in which the test above runs it"]
fn rounds() {
    on_a_host(|host| {
        // What is made once and for all is there after the first.
        batch(host);
        let before = eventually("an end of the first", || settled(host));
        (0..BATCHES).for_each(|_| batch(host));
        // What ends by itself may take a moment longer than the links do.
        let mut after = None;
        let deadline = Deadline::after(SOON);
        while after.as_ref() != Some(&before) && !deadline.passed() {
            after = settled(host);
            pause_for(std::time::Duration::from_millis(20));
        }
        assert_eq!(after, Some(before));
    });
}

/// Takes some sandboxes through their lives, in step, so that the kernel has the time that it
/// takes to close a namespace before its address is used again.
fn batch(host: &Host) {
    let all: Vec<Wanted> =
        (0..SANDBOXES).map(|slot| host.wanted(&format!("s{slot}"), slot)).collect();
    let now = Timestamp::from_millis(0);
    let ports = WakePorts::new(&["udp/53"]).unwrap();
    for wanted in &all {
        host.network.ensure(wanted).unwrap();
        drop(host.network.open_tap(&wanted.id).unwrap());
        host.network.listen(&wanted.id, wanted.address, Some(&ports)).unwrap();
        host.network.linger(&wanted.id, now);
    }
    assert_eq!(host.network.lingered(now).len(), all.len());
    for wanted in &all {
        host.network.remove(&wanted.id, wanted.address).unwrap();
    }
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    for (number, wanted) in all.iter().enumerate() {
        // Some are waked by a packet, and one of these in vain.
        let is_called = number % 5 == 0;
        if is_called {
            socket.send_to(b"?", (wanted.address.ip(), 53)).unwrap();
            assert_eq!(host.triggered().0, wanted.address);
        }
        if number == 0 {
            host.network.refuse(wanted.address);
        }
        host.network.ensure(wanted).unwrap();
        let guest = Guest::new(host.network.open_tap(&wanted.id).unwrap());
        host.network.deliver(&wanted.id, wanted.address).unwrap();
        if is_called && number > 0 {
            guest.expect("what was held", |packet| packet.protocol == UDP);
        }
        drop(guest);
        host.network.stop_listening(wanted.address);
        host.network.remove(&wanted.id, wanted.address).unwrap();
    }
}

/// What there is of each kind.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    links: Vec<String>,
    routes: String,
    rules: String,
    pins: usize,
    mounts: usize,
    descriptors: usize,
    threads: usize,
}

/// Returns what there is when the last link has gone with its namespace, and each thread that
/// was in one has ended.
fn settled(host: &Host) -> Option<Left> {
    let count = |dir: &str| fs::read_dir(dir).unwrap().count();
    let names = ip("-o link");
    let links: Vec<_> =
        names.lines().filter_map(|line| Some(line.split(": ").nth(1)?.to_owned())).collect();
    let in_namespaces = fs::read_dir("/proc/self/task").unwrap().filter(|task| {
        let name = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
        name.is_ok_and(|name| ["dozed-netns", "dozed-unlink"].contains(&name.trim()))
    });
    // One is that of the test itself.
    let is_busy = in_namespaces.count() > 1;
    let has_sandboxes = links.iter().any(|name| name.starts_with("dz0") || name.starts_with("dx"));
    if has_sandboxes || is_busy {
        return None;
    }
    let pinned = mount::mounts_of_type("nsfs").unwrap().into_iter();
    Some(Left {
        links,
        routes: ip("-4 route show table all"),
        rules: nft("list ruleset"),
        pins: count(host.runtime().join("netns").to_str().unwrap()),
        mounts: pinned.filter(|place| place.starts_with(host.runtime())).count(),
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
    })
}
