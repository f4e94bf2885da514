//! A host for one test: a network namespace, an uplink, and a small internet behind it.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver},
    },
    time::Duration,
};

use dozed::{
    net::{LinuxNetwork, Network, Ready, Trigger, Wanted},
    sandbox::{
        SandboxId,
        network::{AddressPlan, Destinations, Ignored, NetworkPolicy, Reach, SandboxAddress},
    },
    sys::{
        clock::{self, Deadline},
        command, mount,
        netns::{self, Namespace},
    },
};
use tempfile::TempDir;

use crate::guest::Guest;

/// No wait of these tests is as long on any machine.
pub(crate) const SOON: Duration = Duration::from_secs(180);
/// How long nothing has to come before nothing is said to come. Everything is on one machine,
/// where what comes takes less than a millisecond.
pub(crate) const SILENCE: Duration = Duration::from_millis(150);

/// The host's address on the way out: a public one, as that of a rented server.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 1);
/// A server of the internet.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// Another one.
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
/// Two nameservers.
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
pub(crate) const RESOLVER_2: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);

/// Addresses that the internet of the test answers on although no internet has them, so
/// that a packet to them which gets out is seen.
pub(crate) const PRIVATE: [Ipv4Addr; 9] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(10, 1, 2, 3),
    Ipv4Addr::new(172, 16, 5, 5),
    Ipv4Addr::new(192, 168, 1, 1),
    Ipv4Addr::new(100, 64, 0, 7),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(203, 0, 113, 9),
    Ipv4Addr::new(198, 18, 0, 1),
];

/// The host of a test. Its namespace is the one that the test's thread is in.
pub(crate) struct Host {
    pub(crate) network: LinuxNetwork,
    pub(crate) plan: AddressPlan,
    internet: Namespace,
    runtime: TempDir,
    triggers: Mutex<Receiver<(SandboxAddress, Trigger)>>,
    told: Arc<Told>,
}

/// What keeps whoever tells of triggers waiting.
#[derive(Default)]
struct Told {
    begun: AtomicUsize,
    gate: Mutex<()>,
}

/// Runs `test` on a new host, and sees to it that nothing is left of it.
pub(crate) fn on_a_host(test: impl FnOnce(&Host) + Send + 'static) {
    on_a_host_that_ignores(&[], test);
}

/// Runs `test` on a new host on which some packets are no activity.
pub(crate) fn on_a_host_that_ignores(
    ignored: &'static [&str],
    test: impl FnOnce(&Host) + Send + 'static,
) {
    netns::in_a_new_one(|_| {
        let host = Host::new(Ignored::new(ignored).unwrap());
        test(&host);
        host.leaves_nothing();
    })
    .unwrap();
}

impl Host {
    fn new(ignored: Ignored) -> Self {
        let runtime = tempfile::tempdir().unwrap();
        let pin = runtime.path().join("internet");
        let internet = {
            let pin = pin.clone();
            netns::in_a_new_one(move |inside| inside.pin(&pin).unwrap()).unwrap()
        };
        // The open file keeps the namespace.
        netns::unpin(&pin).unwrap();
        let plan = AddressPlan::default();
        let (tell, triggers) = mpsc::channel();
        let told = Arc::<Told>::default();
        let telling = Arc::clone(&told);
        let on_trigger = move |address, trigger| {
            telling.begun.fetch_add(1, Ordering::SeqCst);
            drop(telling.gate.lock());
            // Nobody receives it when the test is over.
            tell.send((address, trigger)).ok();
        };
        let network = LinuxNetwork::new(plan, runtime.path())
            .ignoring(ignored)
            .on_trigger(Arc::new(on_trigger));
        let triggers = Mutex::new(triggers);
        let host = Self { network, plan, internet, runtime, triggers, told };
        host.wire();
        host
    }

    /// Connects the host to its internet.
    fn wire(&self) {
        let pid = std::process::id();
        let fd = self.internet.file().unwrap();
        let there = format!("/proc/{pid}/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        ip("link set lo up");
        ip(&format!("link add up0 type veth peer name net0 netns {there}"));
        ip(&format!("addr add {HOST}/24 dev up0"));
        ip("link set up0 up");
        self.internet(move || {
            ip("link set lo up");
            ip("link set net0 up");
            ip("addr add 93.184.216.2/24 dev net0");
            for address in [SERVER, OTHER, RESOLVER, RESOLVER_2].into_iter().chain(PRIVATE) {
                ip(&format!("addr add {address}/32 dev lo"));
            }
            // Nothing but the host's own address is known there, as in the real one.
            fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
        });
        ip("route add default via 93.184.216.2");
        forwarding(true);
    }

    /// Does something in the internet.
    pub(crate) fn internet<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.internet.run(|_| job()).unwrap()
    }

    /// Listens for datagrams at `address` in the internet.
    pub(crate) fn udp_server(&self, address: Ipv4Addr, port: u16) -> UdpSocket {
        let socket = self.internet(move || bound(|| UdpSocket::bind((address, port))));
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    }

    /// Listens for connections at `address` in the internet.
    pub(crate) fn tcp_server(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        let listener = self.internet(move || bound(|| TcpListener::bind((address, port))));
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Returns what the sandbox `name`, number `slot`, is to have.
    pub(crate) fn wanted(&self, name: &str, slot: u32) -> Wanted {
        Wanted {
            id: id(name),
            address: self.plan.address(slot).unwrap(),
            tap_owner: 65_534,
            policy: NetworkPolicy {
                reach: Reach::Internet,
                nameservers: RESOLVER.to_string().parse().unwrap(),
                denied: Destinations::default(),
                allowed: Destinations::default(),
            },
        }
    }

    /// Makes the network of a sandbox, with a guest behind it.
    pub(crate) fn sandbox(&self, name: &str, slot: u32) -> Sandbox {
        let wanted = self.wanted(name, slot);
        self.sandbox_with(wanted)
    }

    pub(crate) fn sandbox_with(&self, wanted: Wanted) -> Sandbox {
        let ready = self.network.ensure(&wanted).unwrap();
        let guest = Guest::new(self.network.open_tap(&wanted.id).unwrap());
        let sandbox = Sandbox { wanted, ready, guest };
        sandbox.wait_until_up();
        sandbox
    }

    /// Waits for a packet that triggers a wake.
    pub(crate) fn triggered(&self) -> (SandboxAddress, Trigger) {
        self.triggers.lock().unwrap().recv_timeout(SOON).expect("no packet triggers a wake")
    }

    /// Blocks the thread that listens for sleepers, from the next trigger on, which `packet`
    /// causes, until the returned guard is dropped.
    pub(crate) fn block_at_trigger(&self, packet: impl FnOnce()) -> MutexGuard<'_, ()> {
        let gate = self.told.gate.lock().unwrap();
        let before = self.told.begun.load(Ordering::SeqCst);
        packet();
        eventually("the trigger", || {
            (self.told.begun.load(Ordering::SeqCst) > before).then_some(())
        });
        gate
    }

    /// Returns the triggers that were not waited for, once none comes for a while.
    pub(crate) fn triggers(&self) -> Vec<(SandboxAddress, Trigger)> {
        let triggers = self.triggers.lock().unwrap();
        std::iter::from_fn(|| triggers.recv_timeout(SILENCE).ok()).collect()
    }

    pub(crate) fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// Removes all that is ours and holds what is left against a host that never had any.
    fn leaves_nothing(&self) {
        self.network.dismantle().unwrap();
        let links = ip("-o link");
        let names: Vec<_> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
        assert_eq!(names.len(), 2, "{links}");
        assert_eq!(ip("route show proto 213"), "");
        assert_eq!(nft("list ruleset"), "");
        assert_eq!(fs::read_dir(self.runtime.path()).unwrap().count(), 0);
        let runtime = self.runtime.path().to_path_buf();
        let mounts = mount::mounts_of_type("nsfs").unwrap();
        assert!(!mounts.iter().any(|mounted| mounted.starts_with(&runtime)), "{mounts:?}");
    }
}

impl Drop for Host {
    /// Of a test that failed nothing is to stay either: what is pinned would.
    fn drop(&mut self) {
        // The failure of the test is what matters then, and a panic in here would hide it.
        self.network.dismantle().ok();
    }
}

/// A sandbox with a guest behind its tap.
pub(crate) struct Sandbox {
    pub(crate) wanted: Wanted,
    pub(crate) ready: Ready,
    pub(crate) guest: Guest,
}

impl Sandbox {
    pub(crate) fn id(&self) -> &SandboxId {
        &self.wanted.id
    }

    pub(crate) fn address(&self) -> SandboxAddress {
        self.wanted.address
    }

    /// Waits until the links know that somebody is at their other ends: the kernel tells them
    /// so some time after, and until then they drop what they are to send.
    pub(crate) fn wait_until_up(&self) {
        let namespace = self.namespace();
        eventually("the guest's link", || {
            let links = namespace.run(|_| ip("-o link")).unwrap();
            (links.matches("state UP").count() == 2).then_some(())
        });
        let outer = format!("-o link show {}", self.address().host_link());
        eventually("the host's link", || ip(&outer).contains("state UP").then_some(()));
    }

    /// Returns the namespace as it is pinned now.
    pub(crate) fn namespace(&self) -> Namespace {
        Namespace::open(&self.ready.namespace).unwrap().unwrap()
    }
}

/// Binds a socket. One that was closed lives on in children of other tests until these have
/// become their programs.
fn bound<T>(bind: impl Fn() -> io::Result<T>) -> T {
    eventually("the port", || match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        bound => Some(bound.unwrap()),
    })
}

/// Waits for a datagram and returns what it says and who sent it.
pub(crate) fn heard(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut text = [0; 2048];
    let (length, from) = socket.recv_from(&mut text).expect("nothing comes");
    (String::from_utf8(text[..length].to_vec()).unwrap(), from)
}

/// Fails if a datagram comes, or came.
pub(crate) fn assert_silent(socket: &UdpSocket) {
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let mut text = [0; 2048];
    if let Ok((length, from)) = socket.recv_from(&mut text) {
        panic!("{from} said {:?}", String::from_utf8_lossy(&text[..length]));
    }
    socket.set_read_timeout(Some(SOON)).unwrap();
}

pub(crate) fn id(name: &str) -> SandboxId {
    name.parse().unwrap()
}

/// Sets whether the host of this thread forwards.
pub(crate) fn forwarding(on: bool) {
    fs::write("/proc/sys/net/ipv4/ip_forward", if on { "1" } else { "0" }).unwrap();
}

/// Runs `ip` in the namespace of this thread.
pub(crate) fn ip(args: &str) -> String {
    run("ip", &args.split(' ').collect::<Vec<_>>())
}

/// Runs `nft` in the namespace of this thread.
pub(crate) fn nft(args: &str) -> String {
    run("nft", &args.split(' ').collect::<Vec<_>>())
}

/// Runs a program in the namespace of this thread.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let path = command::find(program).unwrap_or_else(|| panic!("there is no {program}"));
    let output = command::output(&path, args, SOON).unwrap();
    assert!(output.status.success(), "{program} {args:?}");
    output.stdout
}

/// Waits for `found`, which looks at the world again each time.
pub(crate) fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(SOON);
    loop {
        if let Some(it) = found() {
            return it;
        }
        assert!(!deadline.passed(), "{what} does not come");
        clock::pause_for(Duration::from_millis(1));
    }
}
