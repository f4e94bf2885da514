//! A host with a network of its own, and a small internet behind it, for one test: nothing
//! of it is the machine's that runs the test.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd as _,
};

use dozed::sys::{
    command,
    netns::{self, Namespace},
};

use super::wait::PATIENCE;

/// The internet that the host is connected to.
#[derive(Debug)]
pub(crate) struct World {
    internet: Namespace,
}

impl World {
    /// The host's address on the way out.
    pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 1);
    /// A server of the internet.
    pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
    /// Who answers questions for names.
    pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
    /// Addresses that are answered on although no internet has them, so that what gets out
    /// to them is seen.
    pub(crate) const PRIVATE: [Ipv4Addr; 5] = [
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(10, 1, 2, 3),
        Ipv4Addr::new(172, 16, 5, 5),
        Ipv4Addr::new(192, 168, 1, 1),
        Ipv4Addr::new(100, 64, 0, 7),
    ];

    fn new() -> Self {
        let world =
            Self { internet: netns::in_a_new_one(|_| Namespace::current()).unwrap().unwrap() };
        let file = world.internet.file().unwrap();
        let there = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let host = Self::HOST;
        ip("link set lo up");
        ip(&format!("link add up0 type veth peer name net0 netns {there}"));
        ip(&format!("addr add {host}/24 dev up0"));
        ip("link set up0 up");
        world.internet(|| {
            ip("link set lo up");
            ip("link set net0 up");
            ip("addr add 93.184.216.2/24 dev net0");
            for address in [Self::SERVER, Self::RESOLVER].into_iter().chain(Self::PRIVATE) {
                ip(&format!("addr add {address}/32 dev lo"));
            }
            fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
        });
        ip("route add default via 93.184.216.2");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        world
    }

    /// Does something in the internet.
    pub(crate) fn internet<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.internet.run(|_| job()).unwrap()
    }

    /// Listens for connections in the internet, and never waits for one.
    pub(crate) fn tcp_server(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        let at = SocketAddr::from((address, port));
        let listener = self.internet(move || TcpListener::bind(at)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Listens for datagrams in the internet, and never waits for one.
    pub(crate) fn udp_server(&self, address: Ipv4Addr, port: u16) -> UdpSocket {
        let at = SocketAddr::from((address, port));
        let socket = self.internet(move || UdpSocket::bind(at)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }
}

/// Runs `test` on a new host. What it starts is on that host too.
pub(crate) fn in_a_world(test: impl FnOnce(&World) + Send + 'static) {
    // A guest that is not built yet takes packages, which no new host can fetch.
    super::guest::linux_dir();
    netns::in_a_new_one(|_| test(&World::new())).unwrap();
}

/// Runs `ip` in the namespace of this thread.
fn ip(args: &str) {
    let path = command::find("ip").expect("there is an `ip`");
    let words: Vec<_> = args.split(' ').collect();
    let output = command::output(&path, &words, PATIENCE).unwrap();
    assert!(output.status.success(), "ip {args}");
}
