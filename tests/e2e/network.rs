//! Linux guests on a network: whom they reach, who reaches them, and what a sleep does to
//! their connections.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use dozed::sys::{
    clock::{Stopwatch, pause_for},
    command,
    netns::{self, Namespace},
};
use rustix::process::Signal;

use crate::support::{Host, Setup, World, in_a_world, wait_for, wait_until};

/// What the guest is told: the address that every guest has, and to say what it hears.
const OPTIONS: &str = "dozed.quiet dozed.net=169.254.0.21/30,169.254.0.22 dozed.serve=7";
/// No answer takes as long on any machine.
const SOON: Duration = Duration::from_secs(180);
/// Nothing that was sent before is under way any more when so long nothing came.
const QUIET: Duration = Duration::from_millis(500);

/// Boots a sandbox with a Linux guest, and waits until it has a shell.
#[track_caller]
fn boot(host: &Host, id: &str) {
    host.boot(id);
    wait_until("the guest is up", || host.read(&format!("{id}/console")).contains("guest# "));
}

fn address(host: &Host, id: &str) -> Ipv4Addr {
    host.read(&format!("{id}/net/address")).trim().parse().unwrap()
}

/// Waits until the guest has printed `text` since its console had `before` bytes.
#[track_caller]
fn prints(host: &Host, id: &str, before: usize, text: &str) {
    let console = || host.read(&format!("{id}/console"))[before..].to_owned();
    wait_until(&format!("the guest prints `{text}`"), || console().contains(text));
}

fn printed(host: &Host, id: &str) -> usize {
    host.read(&format!("{id}/console")).len()
}

/// Connects to the guest's server, which may not be listening yet.
#[track_caller]
fn connect(host: &Host, id: &str) -> TcpStream {
    let to = SocketAddr::from((address(host, id), 7));
    let stream = wait_for("the guest listens", || TcpStream::connect_timeout(&to, SOON).ok());
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// Says something on a connection, and waits until the guest has said it too.
#[track_caller]
fn echo(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8(heard).unwrap(), text);
}

/// Waits for a connection.
#[track_caller]
fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, from) = wait_for("the guest connects", || listener.accept().ok());
    assert_eq!(from.ip(), World::HOST, "the internet sees the host, and no sandbox");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// Waits until a guest that a packet has woken is told to be awake: it may answer before.
#[track_caller]
fn is_awake(host: &Host, id: &str) {
    wait_until("its wake is told", || host.state(id) == "running");
}

/// Has the guest hold a connection to the internet: it prints what it hears and says what is
/// written to `/run/say`, and prints `ended` at its end.
fn hold_connection(host: &Host, id: &str, listener: &TcpListener) -> TcpStream {
    let port = listener.local_addr().unwrap().port();
    let server = World::SERVER;
    let line = format!(
        "mkfifo /run/say; exec 4<>/run/say; (nc {server} {port} </run/say; echo 'en''ded') &"
    );
    host.types(id, &line);
    accept(listener)
}

#[test]
fn a_guest_reaches_the_internet_and_nobody_else_and_the_host_reaches_it() {
    in_a_world(|world| {
        let host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        boot(&host, "web-2");
        echo(&mut connect(&host, "web-1"), "hello from the host");
        let listener = world.tcp_server(World::SERVER, 80);
        let before = printed(&host, "web-1");
        let mut stream = hold_connection(&host, "web-1", &listener);
        host.types("web-1", "echo from the guest >&4");
        let mut heard = [0; 14];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"from the guest");
        stream.write_all(b"wel-come\n").unwrap();
        prints(&host, "web-1", before, "wel-come");

        // Its resolver is its gateway, and who that is the policy says.
        let resolver = world.udp_server(World::RESOLVER, 53);
        host.write("web-1/net/nameservers", World::RESOLVER.to_string()).unwrap();
        host.types("web-1", "nslookup a.example >/dev/null 2>&1 &");
        let mut question = [0; 512];
        let length = wait_for("a question for a name", || resolver.recv(&mut question).ok());
        assert!(question[..length].windows(7).any(|name| name == b"example"));

        // Everybody else is refused at once, so that nothing in the guest waits in vain.
        let listeners = World::PRIVATE.map(|address| world.tcp_server(address, 80));
        let dns = world.tcp_server(World::SERVER, 53);
        let sibling = (address(&host, "web-2"), 7);
        let others = [(World::HOST, 80), (World::SERVER, 53), (World::SERVER, 853), sibling];
        let refused = World::PRIVATE.map(|address| (address, 80)).into_iter().chain(others);
        for (address, port) in refused {
            let before = printed(&host, "web-1");
            host.types("web-1", &format!("nc {address} {port}"));
            let said = format!("can't connect to remote host ({address}): Connection refused");
            prints(&host, "web-1", before, &said);
        }
        for listener in listeners.iter().chain([&dns]) {
            assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        }
    });
}

#[test]
fn connections_outlive_a_short_sleep() {
    in_a_world(|world| {
        let host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        echo(&mut inbound, "before the sleep");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        let before = printed(&host, "web-1");
        for cycle in 0..2 {
            host.sleep("web-1");
            // Its kernel says it again until the guest is there.
            outbound.write_all(format!("said while it sl-ept {cycle}\n").as_bytes()).unwrap();
            host.wake("web-1");
            echo(&mut inbound, &format!("after sleep {cycle}"));
            prints(&host, "web-1", before, &format!("said while it sl-ept {cycle}"));
            host.types("web-1", &format!("echo awake {cycle} >&4"));
            let mut heard = [0; 8];
            outbound.read_exact(&mut heard).unwrap();
            assert_eq!(String::from_utf8_lossy(&heard), format!("awake {cycle}\n"));
        }
        echo(&mut connect(&host, "web-1"), "and new ones too");
    });
}

#[test]
fn a_change_of_policy_ends_a_connection_that_is_open_and_no_other() {
    in_a_world(|world| {
        let host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        host.types("web-1", "echo open >&4");
        let mut heard = [0; 5];
        outbound.read_exact(&mut heard).unwrap();
        let before = printed(&host, "web-1");
        host.write("web-1/net/denied", format!("{}\n", World::SERVER)).unwrap();
        host.types("web-1", "echo closed >&4");
        prints(&host, "web-1", before, "ended");
        outbound.set_nonblocking(true).unwrap();
        let passed = outbound.read(&mut heard).map_err(|error| error.kind());
        assert_eq!(passed, Err(ErrorKind::WouldBlock), "not one byte passed");
        echo(&mut inbound, "this is another matter");
    });
}

#[test]
fn much_passes_in_both_directions_whole_also_after_a_wake() {
    const BYTES: usize = 8 << 20;
    in_a_world(|world| {
        let host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let server = World::SERVER;
        let whole: Vec<u8> = b"0123456789abcde\n".repeat(BYTES / 16);
        // By segments that are larger than any frame: the tap takes them from the guest, and
        // gives them to it, as they are.
        for _ in 0..2 {
            let line = format!("yes 0123456789abcde | head -c {BYTES} | nc {server} 80 &");
            host.types("web-1", &line);
            let mut heard = Vec::new();
            accept(&listener).take(BYTES as u64).read_to_end(&mut heard).unwrap();
            assert!(heard == whole, "{} bytes came", heard.len());

            let before = printed(&host, "web-1");
            let count = "grep -c '^0123456789abcde$'";
            host.types("web-1", &format!("echo lines-$(nc {server} 80 </dev/null | {count}) &"));
            let mut stream = accept(&listener);
            stream.write_all(&whole).unwrap();
            drop(stream);
            prints(&host, "web-1", before, &format!("lines-{}", BYTES / 16));
            host.sleep("web-1");
            host.wake("web-1");
        }
    });
}

#[test]
fn a_connection_to_a_guest_that_sleeps_wakes_it_and_is_answered() {
    in_a_world(|_| {
        let setup = Setup::linux(OPTIONS).net("isolated").woken_by_packets();
        let host = setup.config("[network]\nlinger = \"1s\"").start();
        boot(&host, "web-1");
        let mut before = connect(&host, "web-1");
        echo(&mut before, "before the sleep");
        for cycle in 0..4 {
            host.sleep("web-1");
            if cycle % 2 == 1 {
                let namespace = || host.read("web-1/net/namespace");
                wait_until("the network is gone", || namespace().trim().is_empty());
            }
            assert_eq!(host.state("web-1"), "snapshotted");
            let mut stream = connect(&host, "web-1");
            echo(&mut stream, "is somebody there?");
            is_awake(&host, "web-1");
            assert_eq!(host.error("web-1"), "ok");
            echo(&mut before, "and those of before");
        }
    });
}

#[test]
fn what_is_said_on_an_open_connection_wakes_the_guest_and_is_answered() {
    in_a_world(|_| {
        let setup = Setup::linux(OPTIONS).net("isolated").woken_by_packets();
        let host = setup.config("[network]\nlinger = \"1s\"").start();
        boot(&host, "web-1");
        let mut stream = connect(&host, "web-1");
        echo(&mut stream, "before the sleep");
        for cycle in 0..2 {
            host.sleep("web-1");
            if cycle == 1 {
                let namespace = || host.read("web-1/net/namespace");
                wait_until("the network is gone", || namespace().trim().is_empty());
            }
            echo(&mut stream, "is somebody there?");
            is_awake(&host, "web-1");
            let woken_by = host.value("web-1/idle", "last_wake_cause");
            assert!(woken_by.contains("tcp/7 from 10.213.0.1"), "{woken_by}");
        }
    });
}

#[test]
fn what_is_said_to_a_guest_that_nothing_wakes_is_reset_at_once() {
    in_a_world(|world| {
        let host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        echo(&mut inbound, "before the sleep");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        host.sleep("web-1");
        // It would last until its kernel gives up, which is a quarter of an hour.
        inbound.write_all(b"is somebody there?").unwrap();
        let error = inbound.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let to = SocketAddr::from((address(&host, "web-1"), 7));
        let error = TcpStream::connect_timeout(&to, SOON).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        // What the guest opened outlives the sleep, as its network lingers.
        let before = printed(&host, "web-1");
        outbound.write_all(b"said while it sl-ept\n").unwrap();
        host.wake("web-1");
        prints(&host, "web-1", before, "said while it sl-ept");
    });
}

#[test]
fn a_call_that_is_made_while_the_reaper_puts_its_guest_to_sleep_is_answered() {
    in_a_world(|_| {
        let setup = Setup::linux(OPTIONS).net("isolated").woken_by_packets();
        let host = setup.config("[reaper]\ntick = \"1s\"").start();
        host.mkdir("web-1").unwrap();
        host.write("web-1/config", "[activity]\nsignals = [\"network\"]\nawake_min = \"off\"\n")
            .unwrap();
        host.write("web-1/idle_after", "never").unwrap();
        host.wake("web-1");
        echo(&mut connect(&host, "web-1"), "the guest listens");
        host.write("web-1/idle_after", "1s").unwrap();
        for _ in 0..6 {
            wait_until("it is being put to sleep", || host.state("web-1") != "running");
            std::thread::scope(|scope| {
                let call = scope.spawn(|| echo(&mut connect(&host, "web-1"), "and is answered"));
                // A guest without CPU may need longer for its answer than it may be idle.
                host.write("web-1/idle_after", "never").unwrap();
                call.join().unwrap();
            });
            host.write("web-1/idle_after", "1s").unwrap();
        }
        // Of the sleeps some were called off, as the call came just before the pause.
        assert_eq!(host.error("web-1"), "ok");
    });
}

#[test]
fn a_call_to_a_sleeper_waits_for_the_next_daemon_only_where_the_last_one_was_killed() {
    in_a_world(|_| {
        let mut host = Setup::linux(OPTIONS).net("isolated").woken_by_packets().start();
        boot(&host, "web-1");
        echo(&mut connect(&host, "web-1"), "before the sleep");
        let to = SocketAddr::from((address(&host, "web-1"), 7));
        host.sleep("web-1");
        host.terminate();
        let error = TcpStream::connect_timeout(&to, SOON).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        host.restart();
        assert_eq!(host.state("web-1"), "snapshotted");
        echo(&mut connect(&host, "web-1"), "after an end");
        host.sleep("web-1");
        host.kill_daemon();
        let call = move || TcpStream::connect_timeout(&to, SOON);
        let caller = std::thread::Builder::new().name("caller".to_owned()).spawn(call).unwrap();
        host.restart();
        let mut stream = caller.join().unwrap().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        echo(&mut stream, "after a death");
        is_awake(&host, "web-1");
    });
}

#[test]
fn a_daemon_that_dies_interrupts_no_connection() {
    in_a_world(|world| {
        let mut host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        let namespace = host.read("web-1/net/namespace");
        host.kill_daemon();
        echo(&mut inbound, "nobody is there");
        host.restart();
        assert_eq!(host.read("web-1/net/namespace"), namespace);
        echo(&mut inbound, "somebody is there");
        host.sleep("web-1");
        host.wake("web-1");
        echo(&mut inbound, "and still is");
        host.types("web-1", "echo me too >&4");
        let mut heard = [0; 7];
        outbound.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"me too\n");
    });
}

#[test]
fn a_second_daemon_with_the_same_addresses_is_refused_and_cuts_nobody_off() {
    in_a_world(|world| {
        let mut host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        let dir = tempfile::tempdir().unwrap();
        let [mount, store, runtime] = ["m", "s", "r"].map(|name| dir.path().join(name));
        let setup = Setup::linux(OPTIONS).net("internet");
        let overlapping =
            Setup::linux(OPTIONS).net("internet").config("[network]\nrange = \"10.208.0.0/12\"");
        for (setup, range) in [(&setup, "10.213.0.0/16"), (&overlapping, "10.208.0.0/12")] {
            let output = host.start_another(setup, &mount, &store, &runtime);
            let said = String::from_utf8(output.stderr).unwrap();
            let pid = host.daemon_pid();
            let want = format!(
                "dozed: reserving the addresses of sandboxes: {range} is in use by another dozed \
                 (process {pid}, range 10.213.0.0/16); each needs a `range` of its own in \
                 `[network]`\n"
            );
            assert_eq!((output.status.code(), said), (Some(1), want));
        }
        echo(&mut inbound, "it was refused");
        // With the first one gone it starts, and leaves what that has made alone.
        host.kill_daemon();
        let mut beside = setup.start();
        beside.mkdir("web-1").unwrap();
        beside.write("web-1/state", "wake").unwrap_err();
        let error = beside.error("web-1");
        assert!(error.contains("exists already and was not made by this daemon"), "{error}");
        echo(&mut inbound, "its successor is another's");
        beside.terminate();
        drop(beside);
        host.restart();
        echo(&mut inbound, "and so is its end");
        host.types("web-1", "echo and both ways >&4");
        let mut heard = [0; 14];
        outbound.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"and both ways\n");
    });
}

/// Runs `program` on the host of this test.
#[track_caller]
fn on_the_host(program: &str, args: &str) -> String {
    let path = command::find(program).unwrap_or_else(|| panic!("there is no {program}"));
    let words: Vec<_> = args.split(' ').collect();
    let output = command::output(&path, &words, SOON).unwrap();
    assert!(output.status.success(), "{program} {args}");
    output.stdout
}

#[test]
fn what_an_administrator_flushes_comes_back_at_once_under_a_guest_that_runs() {
    in_a_world(|world| {
        let setup = Setup::linux(OPTIONS).net("internet").woken_by_packets();
        // Only the kernel's news can be the reason for a look.
        let host = setup.config("[reaper]\ntick = \"1h\"").start();
        boot(&host, "web-1");
        boot(&host, "web-2");
        host.sleep("web-2");
        let mut inbound = connect(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        let namespace = host.read("web-1/net/namespace");
        let link = format!("dz{:08x}", address(&host, "web-1").to_bits());
        let device = "dozed0ad50000";
        let rules = || on_the_host("nft", "-s list ruleset");
        let routes = || on_the_host("ip", "route show proto 213");
        let before = (rules(), routes());
        let changes = [
            ("nft", "flush ruleset".to_owned()),
            ("ip", "route flush proto 213".to_owned()),
            ("ip", format!("link set {device} down")),
            ("ip", format!("link del {device}")),
            ("ip", format!("link set {link} down")),
            ("ip", format!("link del {link}")),
        ];
        for (number, (program, change)) in changes.into_iter().enumerate() {
            on_the_host(program, &change);
            wait_until(&format!("what `{program} {change}` took is back"), || {
                (rules(), routes()) == before
            });
            echo(&mut inbound, &format!("from the host after {change}"));
            host.types("web-1", &format!("echo change {number} >&4"));
            let mut heard = [0; 9];
            outbound.read_exact(&mut heard).unwrap();
            assert_eq!(String::from_utf8_lossy(&heard), format!("change {number}\n"));
            assert_eq!(host.read("web-1/net/namespace"), namespace);
            assert_eq!(host.error("web-1"), "ok");
        }
        // And who sleeps is heard for still.
        assert_eq!(host.state("web-2"), "snapshotted");
        echo(&mut connect(&host, "web-2"), "good morning");
    });
}

#[test]
fn what_changes_of_the_hosts_addresses_and_forwarding_is_known_at_once() {
    in_a_world(|_| {
        let setup = Setup::linux(OPTIONS).net("internet");
        // Only the kernel's notification can be the reason for a look.
        let host = setup.config("[reaper]\ntick = \"1h\"").start();
        boot(&host, "web-1");
        let namespace = host.read("web-1/net/namespace").trim().to_owned();
        let namespace = Namespace::open(Path::new(&namespace)).unwrap().unwrap();
        let refuses = |address: &str| {
            let set = namespace.run(|_| on_the_host("nft", "list set inet dozed deny4")).unwrap();
            set.contains(address)
        };
        let address = "93.184.217.9";
        on_the_host("ip", &format!("addr add {address}/32 dev lo"));
        wait_until("the host's new address is refused", || refuses(address));
        on_the_host("ip", &format!("addr del {address}/32 dev lo"));
        wait_until("it is not refused when it is gone", || !refuses(address));
        let lacks = || host.read("web-1/status").contains("does not forward IPv4 packets");
        assert!(!lacks());
        let forward = |value: &str| std::fs::write("/proc/sys/net/ipv4/ip_forward", value).unwrap();
        forward("0");
        wait_until("it is told that the host does not forward", lacks);
        forward("1");
        wait_until("it is not told any more", || !lacks());
        assert_eq!(host.error("web-1"), "ok");
    });
}

#[test]
fn a_start_puts_back_what_is_missing_under_a_guest_that_runs() {
    in_a_world(|world| {
        let mut host = Setup::linux(OPTIONS).net("internet").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        let listener = world.tcp_server(World::SERVER, 80);
        let mut outbound = hold_connection(&host, "web-1", &listener);
        let pin = host.read("web-1/net/namespace").trim().to_owned();
        host.kill_daemon();
        let namespace = Namespace::open(Path::new(&pin)).unwrap().unwrap();
        let identity = namespace.identity();
        namespace.run(|_| on_the_host("nft", "delete table netdev dozed")).unwrap();
        namespace.run(|_| on_the_host("ip", "link set eth0 alias other")).unwrap();
        netns::unpin(Path::new(&pin)).unwrap();
        on_the_host("nft", "flush ruleset");
        host.restart();
        wait_until("it is pinned again", || {
            Namespace::open(Path::new(&pin)).unwrap().is_some_and(|it| it.identity() == identity)
        });
        wait_until("the door is there", || {
            namespace.run(|_| on_the_host("nft", "list tables")).unwrap().contains("netdev dozed")
        });
        echo(&mut inbound, "one life");
        host.types("web-1", "echo one connection >&4");
        let mut heard = [0; 15];
        outbound.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"one connection\n");
        // A change of policy is in force when it returns, also where the pin goes again.
        netns::unpin(Path::new(&pin)).unwrap();
        host.write("web-1/net/denied", format!("{}\n", World::SERVER)).unwrap();
        let before = printed(&host, "web-1");
        host.types("web-1", "echo closed >&4");
        prints(&host, "web-1", before, "ended");
        assert_eq!(host.error("web-1"), "ok");
    });
}

#[test]
fn after_a_sleep_that_was_too_long_no_connection_hangs() {
    in_a_world(|world| {
        let setup = Setup::linux(OPTIONS).net("internet");
        let host = setup.config("[network]\nlinger = \"1s\"").start();
        boot(&host, "web-1");
        let mut inbound = connect(&host, "web-1");
        echo(&mut inbound, "before the sleep");
        let listener = world.tcp_server(World::SERVER, 80);
        let _outbound = hold_connection(&host, "web-1", &listener);
        host.sleep("web-1");
        wait_until("the network is gone", || host.read("web-1/net/namespace").trim().is_empty());
        host.wake("web-1");
        // The host is let in anyhow, so its connections go on when it speaks.
        echo(&mut inbound, "are you there?");
        // Nobody knows any more who a connection of the guest's was translated to.
        let before = printed(&host, "web-1");
        host.types("web-1", "echo are you there >&4");
        prints(&host, "web-1", before, "ended");
        echo(&mut connect(&host, "web-1"), "new ones are as ever");
    });
}

/// A guest that sends a datagram to the internet's server at each turn, with nothing between
/// two of them, and says in it how many it has sent and how many came back.
fn sender() -> Setup {
    let to = World::SERVER.to_bits();
    Setup::counter(&format!("poll=2000 send={to}")).net("internet")
}

/// Waits for a datagram, and returns what the guest says in it.
#[track_caller]
fn datagram(server: &UdpSocket) -> (u32, u32, SocketAddr) {
    let mut bytes = [0; 16];
    let (length, from) = wait_for("a datagram", || server.recv_from(&mut bytes).ok());
    assert_eq!((length, from.ip()), (8, World::HOST.into()));
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    (number(0), number(4), from)
}

/// Drops what has come, and what a busy kernel still brings of what was sent before.
fn drain(server: &UdpSocket) {
    let mut quiet = Stopwatch::start();
    while quiet.elapsed() < QUIET {
        if server.recv(&mut [0; 16]).is_ok() {
            quiet = Stopwatch::start();
        } else {
            pause_for(QUIET / 20);
        }
    }
}

#[test]
fn a_guest_that_never_stops_sending_goes_on_after_a_sleep_in_both_directions() {
    in_a_world(|world| {
        let server = world.udp_server(World::SERVER, 4000);
        let host = sender().config("[network]\nlinger = \"1s\"").start();
        host.boot("web-1");
        let mut last = 0;
        for cycle in 1..=4 {
            let (first, _, from) = datagram(&server);
            assert!(first > last, "{first} after {last}");
            // What it hears it counts, and says so.
            server.send_to(b"go on", from).unwrap();
            wait_until("the guest has heard it", || {
                let (number, heard, _) = datagram(&server);
                last = number;
                heard == cycle
            });
            host.sleep("web-1");
            // Also in a network that was made anew.
            if cycle % 2 == 0 {
                let namespace = || host.read("web-1/net/namespace");
                wait_until("the network is gone", || namespace().trim().is_empty());
            }
            drain(&server);
            host.wake("web-1");
        }
        host.counts_on("web-1");
    });
}

#[test]
fn not_one_frame_passes_a_policy_that_was_changed_while_the_guest_slept() {
    in_a_world(|world| {
        let server = world.udp_server(World::SERVER, 4000);
        let host = sender().config("[network]\nlinger = \"1s\"").start();
        host.boot("web-1");
        for cycle in 0..4 {
            let (before, ..) = datagram(&server);
            host.sleep("web-1");
            if cycle % 2 == 1 {
                let namespace = || host.read("web-1/net/namespace");
                wait_until("the network is gone", || namespace().trim().is_empty());
            }
            host.write("web-1/net/denied", format!("{}\n", World::SERVER)).unwrap();
            drain(&server);
            host.wake("web-1");
            let refused = || host.number("web-1/net/counters", "refused_packets");
            let at_first = refused();
            // It sends all the while, and all of it is refused.
            wait_until("many are refused", || refused() > at_first + 500);
            host.counts_on("web-1");
            let passed = server.recv(&mut [0; 16]).map_err(|error| error.kind());
            assert_eq!(passed, Err(ErrorKind::WouldBlock), "cycle {cycle}");
            // The policy kept them, and nothing else.
            host.write("web-1/net/denied", "\n").unwrap();
            let (after, ..) = datagram(&server);
            assert!(after > before + 500, "{after} after {before}");
        }
    });
}

#[test]
fn a_vmm_that_died_leaves_its_device_to_the_next() {
    in_a_world(|_| {
        let host = Setup::linux(OPTIONS).net("isolated").start();
        boot(&host, "web-1");
        let namespace = host.read("web-1/net/namespace");
        for _ in 0..2 {
            echo(&mut connect(&host, "web-1"), "hello");
            host.signal_vmm(host.vmm("web-1"), Signal::KILL);
            wait_until("it is told", || host.state("web-1") == "stopped");
            host.wake("web-1");
        }
        assert_eq!(host.read("web-1/net/namespace"), namespace);
        echo(&mut connect(&host, "web-1"), "hello again");
    });
}

#[test]
fn traffic_keeps_a_guest_awake_and_a_connection_that_is_only_open_does_not() {
    in_a_world(|_| {
        let idle_after = Duration::from_secs(10);
        let host = Setup::linux(OPTIONS).net("internet").config("[reaper]\ntick = \"1s\"").start();
        host.mkdir("web-1").unwrap();
        host.write("web-1/idle_after", "never").unwrap();
        host.write("web-1/config", "[activity]\nsignals = [\"network\"]\n").unwrap();
        host.wake("web-1");
        let mut stream = connect(&host, "web-1");
        let text = "x".repeat(500);
        let activity = |key| host.value("web-1/activity", key);
        wait_until("its traffic counts", || {
            echo(&mut stream, &text);
            activity("network_age_seconds") != "none"
        });
        host.write("web-1/idle_after", "10s").unwrap();
        let since = Stopwatch::start();
        wait_until("it is awake for longer than it may be idle", || {
            echo(&mut stream, &text);
            since.elapsed() > 2 * idle_after
        });
        assert_eq!(host.state("web-1"), "running");
        assert_eq!(host.number("web-1/status", "sleeps"), 0);
        let because = host.value("web-1/idle", "because");
        assert!(because.starts_with("the last activity was network traffic of "), "{because}");
        assert_eq!(activity("disk_age_seconds"), "none", "its disk has nothing to do with it");
        wait_until("it sleeps", || host.state("web-1") == "snapshotted");
    });
}
