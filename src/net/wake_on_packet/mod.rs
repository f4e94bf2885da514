//! Wake on packet: a packet to a sleeping sandbox wakes it, or is refused.
//!
//! ```text
//!   a program ──▶ 10.213.0.7 ──┬─ 10.213.0.7/32 ──▶ dz0ad50007 ══▶ guest     it runs
//!     of the host              │                        ▲
//!                              └─ 10.213.0.0/16 ──▶ dozed0ad50000            it sleeps
//!                                                    │      │ queued packets
//!                                                    ▼      │
//!                                       trigger ◀── one thread
//! ```
//!
//! The host's TUN device has a route for the whole range; a running sandbox has a more
//! specific route. So one descriptor and one thread serve all sleepers, and each sleeper
//! costs one entry in a table. The kernel routes a packet that is written back into the
//! device as if it had just arrived.
//!
//! `policy` decides which packets trigger a wake, and `packet.rs` parses them. This module
//! wakes no sandbox: it reports one trigger for each wake, and is told how the wake ended.
//! A sandbox gets its route together with its queued packets, when a VMM has the guest's
//! device open: a packet that was sent there earlier would be lost.
//!
//! A daemon that ends removes the route, so that senders are refused at once. After a daemon
//! that was killed the route stays: packets are lost, and sent again to the next daemon.

use std::{
    fmt,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use self::{
    packet::{Refusal, answer},
    policy::{Decision, Sleeper, WakePolicy},
};
use super::{
    Error, host, link,
    route::{self, Ensured},
};
use crate::{
    sandbox::network::{AddressPlan, SandboxAddress, Transport, WakePorts},
    sync::{Arc, Mutex, lock},
    sys::{
        clock::Stopwatch,
        netlink::{Answers, Kernel},
        tun::{Awaited, Device, Packets},
    },
};

mod packet;
mod policy;

/// More than any packet of a device whose packets have at most 1,500 bytes.
const PACKET_MAX_BYTES: usize = 2048;
/// How many packets are read before the lock is released.
const BATCH: usize = 64;
/// As many as the queue of the device has, and then some.
const QUEUE: usize = 512;
/// How often packets that were queued for too long are dropped.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What woke a sandbox: a packet that opens something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trigger {
    /// Who sent it.
    pub from: Ipv4Addr,
    /// What it opens.
    pub transport: Transport,
    /// To which port.
    pub port: u16,
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} from {}", self.transport, self.port, self.from)
    }
}

/// Is called for each trigger, by the one thread that listens for all sleepers. So it only
/// passes the trigger on.
pub type OnTrigger = dyn Fn(SandboxAddress, Trigger) + Send + Sync;

/// Listens for packets to all sleeping sandboxes of a range.
///
/// # Locking
/// The lock of the policy is a leaf. It is locked while the device is read, so that of two
/// readers the one that takes a packet also decides on it.
pub(super) struct WakeOnPacket {
    listener: Arc<Listener>,
    plan: AddressPlan,
    links: Mutex<Kernel>,
    thread: Option<JoinHandle<()>>,
}

struct Listener {
    device: Packets,
    policy: Mutex<WakePolicy>,
    on_trigger: Arc<OnTrigger>,
    since: Stopwatch,
    is_broken: AtomicBool,
}

impl WakeOnPacket {
    /// Opens the host's device, which exists, and routes all packets for sleeping sandboxes
    /// to it. It listens for `sleepers` from the start.
    ///
    /// # Errors
    /// Where another has it open, or there can be no thread, or no route.
    pub(super) fn start(
        plan: AddressPlan,
        on_trigger: Arc<OnTrigger>,
        sleepers: Vec<(SandboxAddress, Sleeper)>,
    ) -> Result<Self, Error> {
        let name = host::device(&plan);
        let device = Packets::open(&name, Device::Tun)
            .map_err(Error::host("opening the device for packets to sleepers"))?;
        let mut policy = WakePolicy::new(plan);
        for (address, sleeper) in sleepers {
            policy.listen(address, sleeper);
        }
        let listener = Arc::new(Listener {
            device,
            policy: Mutex::new(policy),
            on_trigger,
            since: Stopwatch::start(),
            is_broken: AtomicBool::new(false),
        });
        let listening = Arc::clone(&listener);
        let thread = thread::Builder::new()
            .name("dozed-packets".to_owned())
            .spawn(move || listening.run())
            .map_err(Error::host("starting the thread for packets to sleepers"))?;
        let links = link::here()?;
        let wake_on_packet =
            Self { listener, plan, links: Mutex::new(links), thread: Some(thread) };
        wake_on_packet.route_again()?;
        Ok(wake_on_packet)
    }

    /// Routes all packets for sleeping sandboxes to the device, if they are not.
    ///
    /// # Errors
    /// Where the device is gone, or somebody else has a route to the range.
    pub(super) fn route_again(&self) -> Result<Ensured, Error> {
        let name = &host::device(&self.plan);
        let links = lock(&self.links);
        let index = link::find(&links, name)?.ok_or(Error::NotThere)?.index;
        // A device without a reader drops what it is to send for a moment longer.
        if !link::wait_until_up(&links, name)? {
            tracing::warn!("the first packets to sleepers may be lost");
        }
        route::ensure(&links, index, self.plan.range(), self.plan.host_address())
    }

    /// Keeps it from removing the route when it ends: its device is gone and has a successor.
    pub(super) fn abandon(&self) {
        self.listener.is_broken.store(true, Ordering::Release);
    }

    /// Says whether it receives packets: it does not after somebody removed its device.
    pub(super) fn works(&self) -> bool {
        !self.listener.is_broken.load(Ordering::Acquire)
    }

    /// Returns the sleepers that it listens for, for its successor.
    pub(super) fn sleepers(&self) -> Vec<(SandboxAddress, Sleeper)> {
        lock(&self.listener.policy).list()
    }

    /// Takes packets to a sandbox that just fell asleep, so that none go to its network, should
    /// that still be there (`lingers`). Those to `ports` trigger a wake.
    ///
    /// # Errors
    /// Where its route stays. Nothing triggers a wake then.
    pub(super) fn listen(
        &self,
        address: SandboxAddress,
        ports: Option<&WakePorts>,
        lingers: bool,
    ) -> Result<(), Error> {
        let queued = {
            let mut policy = lock(&self.listener.policy);
            let queued = if ports.is_none() { policy.stop_listening(address) } else { Vec::new() };
            if ports.is_some() || lingers {
                policy.listen(address, Sleeper { wakes_on: ports.cloned(), lingers });
            }
            queued
        };
        self.listener.send_refusals(&queued, Refusal::Unreachable);
        if ports.is_none() && !lingers {
            return Ok(());
        }
        let unrouted = lock(&self.links).apply(vec![route::remove(address.ip())], Answers::Each);
        Ok(unrouted.inspect_err(|_| self.stop_listening(address))?)
    }

    /// Notes that a sleeper has no network any more, and with it no connections.
    pub(super) fn end_linger(&self, address: SandboxAddress) {
        lock(&self.listener.policy).end_linger(address);
    }

    /// Says whether packets to the sandbox may trigger a wake.
    pub(super) fn may_wake(&self, address: SandboxAddress) -> bool {
        lock(&self.listener.policy).may_wake(address)
    }

    /// Forgets a sandbox, and refuses its queued packets.
    pub(super) fn stop_listening(&self, address: SandboxAddress) {
        let queued = lock(&self.listener.policy).stop_listening(address);
        self.listener.send_refusals(&queued, Refusal::Unreachable);
    }

    /// Passes on the packets that were queued for a running sandbox, in order. Its own route
    /// exists, so later packets take that.
    pub(super) fn deliver(&self, address: SandboxAddress) {
        // What is in the device's queue was sent before the route was there.
        let mut triggers = Vec::new();
        let queued = {
            let mut policy = lock(&self.listener.policy);
            let read = self.listener.read_packets(&mut policy, &mut triggers, QUEUE);
            self.listener.report_failure(read.map(drop));
            policy.deliver(self.listener.since.elapsed(), address)
        };
        for packet in queued {
            if let Err(error) = self.listener.device.write(&packet) {
                tracing::warn!(%address, %error, "a packet that was queued is lost");
            }
        }
        self.listener.report(&triggers);
    }

    /// Refuses the packets that were queued for a sandbox.
    pub(super) fn refuse(&self, address: SandboxAddress) {
        self.listener.refuse(address);
    }
}

impl Listener {
    fn run(&self) {
        loop {
            let limit = (lock(&self.policy).queued() > 0).then_some(SWEEP_EVERY);
            match self.device.wait(limit) {
                Ok(Awaited::Stop) => return,
                Ok(Awaited::Packets) => {}
                Ok(Awaited::Nothing) => lock(&self.policy).sweep(self.since.elapsed()),
                Err(error) => return self.report_failure(Err(error)),
            }
            let mut triggers = Vec::new();
            let read = self.read_packets(&mut lock(&self.policy), &mut triggers, BATCH);
            self.report(&triggers);
            if read.is_err() {
                return self.report_failure(read);
            }
        }
    }

    /// Reads what there is, and decides on each packet.
    fn read_packets(
        &self,
        policy: &mut WakePolicy,
        triggers: &mut Vec<(SandboxAddress, Trigger)>,
        max: usize,
    ) -> std::io::Result<()> {
        let mut buffer = [0; PACKET_MAX_BYTES];
        for _ in 0..max {
            let Some(bytes) = self.device.read(&mut buffer)? else { return Ok(()) };
            match policy.decide(self.since.elapsed(), bytes) {
                Decision::Trigger(address, trigger) => triggers.push((address, trigger)),
                Decision::Refuse(refusal) => self.send_refusals(&[bytes], refusal),
                Decision::Queue | Decision::Ignore => {}
            }
        }
        Ok(())
    }

    fn report(&self, triggers: &[(SandboxAddress, Trigger)]) {
        for (address, trigger) in triggers {
            tracing::debug!(%address, %trigger, "a packet to a sleeping sandbox");
            (self.on_trigger)(*address, *trigger);
        }
    }

    fn refuse(&self, address: SandboxAddress) {
        let queued = lock(&self.policy).refuse(self.since.elapsed(), address);
        self.send_refusals(&queued, Refusal::Refused);
    }

    fn send_refusals(&self, packets: &[impl AsRef<[u8]>], refusal: Refusal) {
        for told in packets.iter().filter_map(|packet| answer(packet.as_ref(), refusal)) {
            if let Err(error) = self.device.write(&told) {
                tracing::debug!(%error, "answering a refused packet failed");
            }
        }
    }

    fn report_failure(&self, read: std::io::Result<()>) {
        if let Err(error) = read
            && !self.is_broken.swap(true, Ordering::AcqRel)
        {
            tracing::error!(%error, "packets no longer wake sandboxes");
        }
    }
}

impl Drop for WakeOnPacket {
    fn drop(&mut self) {
        // The unreachable route answers senders now. Where the device is gone its route is
        // too, and one that exists is the successor's.
        let route = route::remove(self.plan.range());
        if self.works()
            && let Err(error) = lock(&self.links).apply(vec![route], Answers::Each)
        {
            tracing::warn!(%error, "the route of the range stays");
        }
        self.listener.device.stop();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the callback was reported where it happened.
            let _ended = thread.join();
        }
    }
}

impl fmt::Debug for WakeOnPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = lock(&self.listener.policy);
        f.debug_struct("WakeOnPacket")
            .field("sleepers", &policy.sleepers())
            .field("queued", &policy.queued())
            .finish_non_exhaustive()
    }
}
