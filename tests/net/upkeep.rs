//! What others change or remove under sandboxes that run, and how it comes back.

use std::{
    io::{Read as _, Write as _},
    net::UdpSocket,
    process::{Child, Command, Stdio},
    sync::mpsc,
};

use dozed::{
    net::{Error, Known, Network},
    sandbox::network::WakePorts,
    sys::netns::{self, Namespace},
};

use crate::{
    guest::UDP,
    host::{
        HOST, Host, SERVER, SOON, Sandbox, assert_silent, eventually, heard, id, ip, nft, on_a_host,
    },
};

const DEVICE: &str = "dozed0ad50000";

fn known(sandbox: &Sandbox) -> Known {
    Known { id: sandbox.id().clone(), address: sandbox.address() }
}

/// Looks over the host and one sandbox, and returns what was put back of both.
fn look_over(host: &Host, sandbox: &Sandbox) -> Vec<&'static str> {
    let looked = host.network.look(&[known(sandbox)]);
    assert!(looked.failed.is_none(), "{:?}", looked.failed);
    assert_eq!(looked.suspects, std::slice::from_ref(sandbox.id()));
    let mut what = looked.put_back;
    what.extend(host.network.put_back(&sandbox.wanted, None).unwrap());
    what
}

/// Sends something each way, from the guest to the internet and from the host to the guest.
fn assert_works(host: &Host, sandbox: &Sandbox) {
    let server = host.udp_server(SERVER, 4000);
    sandbox.wait_until_up();
    sandbox.guest.udp(5000, (SERVER, 4000), b"out");
    let (text, from) = heard(&server);
    assert_eq!((&*text, from.ip()), ("out", HOST.into()));
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.send_to(b"in", (sandbox.address().ip(), 80)).unwrap();
    sandbox.guest.expect("what the host says", |p| p.protocol == UDP && p.text() == b"in");
}

/// A process that is in the namespace of a sandbox, as a VMM is.
struct Inmate(Child);

impl Inmate {
    #[allow(clippy::disallowed_methods, reason = "a test waits for what it starts")]
    fn of(sandbox: &Sandbox) -> Self {
        let start = |_: &netns::Inside| {
            Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap()
        };
        Self(sandbox.namespace().run(start).unwrap())
    }

    fn pid(&self) -> Option<u32> {
        Some(self.0.id())
    }
}

impl Drop for Inmate {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn where_nothing_was_changed_nothing_is_put_back() {
    on_a_host(|host| {
        let sandboxes: Vec<_> =
            (0..10).map(|slot| host.sandbox(&format!("a{slot}"), slot)).collect();
        let all: Vec<_> = sandboxes.iter().map(known).collect();
        let mut looked_into = std::collections::BTreeMap::new();
        for _ in 0..5 {
            // The firewall of a host changes all the time.
            nft("add table inet somebody");
            nft("delete table inet somebody");
            let looked = host.network.look(&all);
            assert!(looked.failed.is_none() && looked.put_back.is_empty(), "{looked:?}");
            assert_eq!(looked.suspects.len(), 8, "the inside of some, by turns");
            for id in looked.suspects {
                *looked_into.entry(id).or_insert(0) += 1;
            }
        }
        assert!(looked_into.values().all(|count| *count == 4), "{looked_into:?}");
        for sandbox in &sandboxes {
            assert_eq!(host.network.put_back(&sandbox.wanted, None).unwrap(), [""; 0]);
        }
    });
}

#[test]
fn a_flushed_firewall_comes_back_and_no_connection_ends() {
    on_a_host(|host| {
        let listener = host.tcp_server(SERVER, 443);
        let sandbox = host.sandbox("a", 0);
        let to = (SERVER, 443);
        let numbers = sandbox.guest.connect(6000, to);
        let mut stream =
            eventually("the connection", || listener.accept().ok().map(|(stream, _)| stream));
        stream.set_nonblocking(false).unwrap();
        look_over(host, &sandbox);
        let before = nft("-s list ruleset");
        // As every nftables.conf of Debian begins.
        nft("flush ruleset");
        assert_eq!(look_over(host, &sandbox), ["the host's firewall for sandboxes"]);
        assert_eq!(nft("-s list ruleset"), before);
        assert_eq!(look_over(host, &sandbox), [""; 0]);
        sandbox.guest.say(6000, to, numbers, b"still here");
        let mut text = [0; 10];
        stream.read_exact(&mut text).unwrap();
        stream.write_all(b"and so am I").unwrap();
        sandbox.guest.expect("the answer", |p| p.source == SERVER && p.text() == b"and so am I");
        // Parts of it, too.
        let table = "inet dozed_0ad50000";
        for part in [
            "flush chain TABLE input",
            "insert rule TABLE forward accept",
            "chain TABLE forward { policy drop; }",
            "add table TABLE { flags dormant; }",
        ] {
            nft(&part.replace("TABLE", table));
            assert_eq!(look_over(host, &sandbox), ["the host's firewall for sandboxes"], "{part}");
            assert_eq!(nft("-s list ruleset"), before);
        }
        assert_works(host, &sandbox);
    });
}

#[test]
fn what_was_opened_without_the_firewall_is_masqueraded_when_it_is_back() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let server = host.udp_server(SERVER, 4000);
        let source = || {
            sandbox.guest.udp(5000, (SERVER, 4000), b"from one port");
            heard(&server).1.ip()
        };
        // As an nftables.conf does it. Without a rule that asks for it nothing is tracked.
        let own =
            "table inet own { chain c { type filter hook input priority 0; ct state new; }; }";
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("flush ruleset\n{own}")).unwrap();
        let load = || nft(&format!("-f {}", file.path().display()));
        load();
        assert_eq!(source(), sandbox.address().ip(), "nobody translates it");
        look_over(host, &sandbox);
        assert_eq!(source(), HOST);
        // One that is masqueraded stays.
        let port = || {
            sandbox.guest.udp(5001, (SERVER, 4000), b"from another");
            heard(&server).1
        };
        let before = port();
        load();
        look_over(host, &sandbox);
        assert_eq!(port(), before);
        nft("delete table inet own");
    });
}

#[test]
fn a_flush_in_the_middle_of_a_look_is_seen_by_the_next_one() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let before = nft("-s list ruleset");
        for _ in 0..40 {
            nft("flush ruleset");
            let flush = || drop(nft("flush ruleset"));
            let other = std::thread::Builder::new().spawn(flush).unwrap();
            while !other.is_finished() {
                host.network.look(&[known(&sandbox)]);
            }
            other.join().unwrap();
            host.network.look(&[known(&sandbox)]);
            assert_eq!(nft("-s list ruleset"), before);
        }
    });
}

#[test]
fn a_ruleset_that_was_saved_whole_can_be_loaded_again() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let before = nft("-s list ruleset");
        let saved = tempfile::NamedTempFile::new().unwrap();
        let load = format!("-f {}", saved.path().display());
        for flush in ["", "flush ruleset\n"] {
            std::fs::write(saved.path(), format!("{flush}{}", nft("list ruleset"))).unwrap();
            // It fails as a whole where a table of it may not be changed.
            nft(&load);
            assert_eq!(look_over(host, &sandbox), ["the host's firewall for sandboxes"]);
            assert_eq!(nft("-s list ruleset"), before);
        }
        assert_works(host, &sandbox);
    });
}

#[test]
fn a_wake_and_a_change_of_policy_put_the_hosts_part_back_before_they_are_done() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let before = nft("-s list ruleset");
        nft("flush ruleset");
        host.network.apply_policy(&sandbox.wanted).unwrap();
        assert_eq!(nft("-s list ruleset"), before);
        nft("flush ruleset");
        assert_eq!(host.network.ensure(&sandbox.wanted).unwrap(), sandbox.ready);
        assert_eq!(nft("-s list ruleset"), before);
    });
}

#[test]
fn the_listener_for_sleepers_comes_back_with_its_device() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let asleep = host.plan.address(7).unwrap();
        let ports = WakePorts::new(&["udp/53"]).unwrap();
        let listen = || host.network.listen(&id("asleep"), asleep, Some(&ports)).unwrap();
        listen();
        let triggers = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"?", (asleep.ip(), 53)).unwrap();
            let triggered = host.triggered().0;
            host.network.refuse(asleep);
            host.network.stop_listening(asleep);
            listen();
            triggered == asleep
        };
        assert!(triggers());
        for how in ["down", "up-again", "gone", "routes"] {
            match how {
                "down" => drop(ip(&format!("link set {DEVICE} down"))),
                "up-again" => {
                    ip(&format!("link set {DEVICE} down"));
                    ip(&format!("link set {DEVICE} up"));
                }
                "gone" => drop(ip(&format!("link del {DEVICE}"))),
                _ => drop(ip("route flush proto 213")),
            }
            let what = look_over(host, &sandbox);
            assert!(!what.is_empty(), "{how}");
            assert!(triggers(), "{how}: {what:?}");
            assert_works(host, &sandbox);
            assert_eq!(look_over(host, &sandbox), [""; 0], "{how}");
        }
    });
}

#[test]
fn a_link_of_a_guest_that_runs_comes_back_in_place() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let link = sandbox.address().host_link();
        let inside = |job: fn() -> String| drop(sandbox.namespace().run(move |_| job()).unwrap());
        look_over(host, &sandbox);
        let away = dozed::sys::netns::in_a_new_one(|_| Namespace::current()).unwrap().unwrap();
        let away = away.file().unwrap();
        let pid = std::process::id();
        let away = format!("/proc/{pid}/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&away));
        let changes: [(&str, &dyn Fn()); 16] = [
            ("down and up", &|| {
                ip(&format!("link set {link} down"));
                ip(&format!("link set {link} up"));
            }),
            ("down", &|| drop(ip(&format!("link set {link} down")))),
            ("unrouted", &|| drop(ip(&format!("route del {}", sandbox.address())))),
            ("gone", &|| drop(ip(&format!("link del {link}")))),
            ("unmarked", &|| drop(crate::host::run("ip", &["link", "set", &link, "alias", ""]))),
            ("another MAC", &|| drop(ip(&format!("link set {link} address 02:11:22:33:44:55")))),
            ("in a bridge", &|| {
                ip("link add br0 type bridge");
                ip("link set br0 up");
                ip(&format!("link set {link} master br0"));
            }),
            ("another name", &|| {
                ip("link del br0");
                ip(&format!("link set {link} down"));
                ip(&format!("link set {link} name other0"));
                ip("link set other0 up");
            }),
            ("elsewhere", &|| drop(ip(&format!("link set {link} netns {away}")))),
            ("no neighbour", &|| drop(ip(&format!("neigh flush nud permanent dev {link}")))),
            ("no door", &|| inside(|| nft("delete table netdev dozed"))),
            ("no rules", &|| inside(|| nft("flush ruleset"))),
            ("no way out", &|| inside(|| ip("route del default"))),
            ("no addresses", &|| inside(|| ip("addr flush dev eth0"))),
            ("inner down", &|| inside(|| ip("link set eth0 down"))),
            ("tap down", &|| inside(|| ip("link set dztap down"))),
        ];
        for (how, change) in changes {
            change();
            assert_ne!(look_over(host, &sandbox), [""; 0], "{how}");
            assert_eq!(sandbox.namespace().identity(), sandbox.ready.identity, "{how}");
            assert_works(host, &sandbox);
            assert_eq!(look_over(host, &sandbox), [""; 0], "{how}");
        }
    });
}

#[test]
fn a_firewall_that_comes_back_is_todays() {
    on_a_host(|host| {
        let mut sandbox = host.sandbox("a", 0);
        sandbox.wanted.policy.denied =
            dozed::sandbox::network::Destinations::denied(SERVER.to_string().lines()).unwrap();
        sandbox.namespace().run(|_| nft("flush ruleset")).unwrap();
        assert_eq!(look_over(host, &sandbox), ["the firewall"]);
        let server = host.udp_server(SERVER, 4000);
        sandbox.guest.udp(5000, (SERVER, 4000), b"!");
        assert_silent(&server);
    });
}

#[test]
fn a_namespace_that_only_its_vmm_leads_to_is_pinned_again() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let vmm = Inmate::of(&sandbox);
        let pin = sandbox.ready.namespace.clone();
        let lost = || {
            netns::unpin(&pin).unwrap();
            assert_eq!(
                host.network.look(&[known(&sandbox)]).suspects,
                std::slice::from_ref(sandbox.id())
            );
        };
        lost();
        assert!(matches!(host.network.put_back(&sandbox.wanted, None), Err(Error::NotThere)));
        // This program is no VMM of the sandbox.
        let stranger = Some(std::process::id());
        let error = host.network.put_back(&sandbox.wanted, stranger).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. } | Error::NoDevice), "{error}");
        let what = host.network.put_back(&sandbox.wanted, vmm.pid()).unwrap();
        assert_eq!(what, ["the pin of its namespace"]);
        let pinned = || Namespace::open(&pin).unwrap().unwrap().identity();
        assert_eq!(pinned(), sandbox.ready.identity);
        // The whole directory of pins, and the mark.
        sandbox.namespace().run(|_| ip("link set eth0 alias other")).unwrap();
        let error = host.network.put_back(&sandbox.wanted, None).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. }), "{error}");
        let what = host.network.put_back(&sandbox.wanted, vmm.pid()).unwrap();
        assert_eq!(what, ["the links' settings"]);
        let dir = pin.parent().unwrap().to_owned();
        rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH).unwrap();
        lost();
        host.network.put_back(&sandbox.wanted, vmm.pid()).unwrap();
        assert_eq!(pinned(), sandbox.ready.identity);
        assert_works(host, &sandbox);
    });
}

#[test]
fn what_cannot_be_put_back_under_a_guest_is_an_error_that_says_why() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let put_back = || host.network.put_back(&sandbox.wanted, None);
        // A route of somebody else's in the place of ours.
        ip(&format!("route replace {} via 93.184.216.2", sandbox.address()));
        let error = put_back().unwrap_err();
        assert!(error.to_string().contains("the route to 10.213.0.2/32 exists already"), "{error}");
        ip(&format!("route del {}", sandbox.address()));
        assert_eq!(put_back().unwrap(), ["the route"]);
        let namespace = sandbox.namespace().identity();
        sandbox.namespace().run(|_| ip("link del dztap")).unwrap();
        let error = put_back().unwrap_err();
        assert!(error.to_string().contains("when the sandbox sleeps and wakes"), "{error}");
        assert_eq!(sandbox.namespace().identity(), namespace, "its VMM is in it");
    });
}

#[test]
fn the_kernel_tells_of_changes_of_what_is_ours() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        let (tell, told) = mpsc::channel();
        let changed = move || {
            tell.send(()).ok();
        };
        host.network.watch(std::sync::Arc::new(changed)).unwrap();
        let link = sandbox.address().host_link();
        let changes = [
            "link set LINK down",
            "link set LINK up",
            "route flush proto 213",
            "addr flush dev DEVICE",
            "link set DEVICE down",
            "link del DEVICE",
        ];
        for change in changes {
            ip(&change.replace("LINK", &link).replace("DEVICE", DEVICE));
            told.recv_timeout(SOON).expect(change);
            while told.recv_timeout(crate::host::SILENCE).is_ok() {}
        }
        nft("flush ruleset");
        told.recv_timeout(SOON).expect("flush ruleset");
        // What it tells late of these is not to be taken for what comes next.
        while told.recv_timeout(10 * crate::host::SILENCE).is_ok() {}
        // What is not ours is none of our business.
        nft("add table inet somebody");
        nft("delete table inet somebody");
        ip("link add other0 type veth peer name other1");
        ip("link set other0 up");
        ip("link del other0");
        assert!(told.recv_timeout(crate::host::SILENCE).is_err());
    });
}

#[test]
fn the_kernel_tells_of_every_address_of_the_host_and_of_its_forwarding() {
    on_a_host(|host| {
        let sandbox = host.sandbox("a", 0);
        ip("link add other0 type veth peer name other1");
        let (tell, told) = mpsc::channel();
        let changed = move || {
            tell.send(()).ok();
        };
        host.network.watch(std::sync::Arc::new(changed)).unwrap();
        let link = sandbox.address().host_link();
        let sysctl = |name: &str, value: &str| {
            std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
        };
        let own = format!("conf/{link}/forwarding");
        let changes: [(&str, &dyn Fn()); 6] = [
            ("an address", &|| drop(ip("addr add 192.0.2.1/24 brd 192.0.2.77 dev other0"))),
            ("no address", &|| drop(ip("addr del 192.0.2.1/24 dev other0"))),
            ("no forwarding", &|| sysctl("ip_forward", "0")),
            ("forwarding", &|| sysctl("conf/all/forwarding", "1")),
            ("no forwarding of a link", &|| sysctl(&own, "0")),
            ("forwarding of a link", &|| sysctl(&own, "1")),
        ];
        for (what, change) in changes {
            // What it tells late of the one before is not to be taken for this one.
            while told.recv_timeout(crate::host::SILENCE).is_ok() {}
            change();
            told.recv_timeout(SOON).expect(what);
        }
        while told.recv_timeout(crate::host::SILENCE).is_ok() {}
        sysctl("conf/other0/rp_filter", "1");
        assert!(told.recv_timeout(crate::host::SILENCE).is_err());
        ip("link del other0");
    });
}
