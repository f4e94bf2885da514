//! The doorbell: a packet to a sandbox that sleeps wakes it, or is refused.
//!
//! ```text
//!   a program ──▶ 10.213.0.7 ──┬─ 10.213.0.7/32 ──▶ dz0ad50007 ══▶ guest     it is awake
//!     of the host              │                        ▲
//!                              └─ 10.213.0.0/16 ──▶ dozed0ad50000            it sleeps
//!                                                    │      │ what was held
//!                                                    ▼      │
//!                                       ring ◀── the one thread
//! ```
//!
//! The host's own device carries a route for the whole range, and the route of a sandbox
//! that is awake goes before it. So one descriptor and one thread hear for all sleepers,
//! each of which costs an entry in a table. What is written back into the device comes out
//! of it as if it had just arrived, and goes the way that routes then say.
//!
//! What rings is for `judge` to say, and what packets are for `packet.rs`. Nothing in here
//! wakes anybody: who does is told, once for each wake, and says how that ended. The
//! route of a sandbox that is being waked comes with what was held for it, when a VMM has
//! the guest's device open: whatever was sent to it before would have been lost.
//!
//! A daemon that ends takes the route with it, and who calls a sleeper is told at once
//! that nobody is there. After one that was killed the route stays, so that what is sent
//! meanwhile is lost and sent again, to the next daemon.

use std::{
    fmt,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use self::{
    judge::{Judge, Sleeper, Verdict},
    packet::{Refusal, answer},
};
use super::{
    Error, host, link,
    netlink::{Answers, Kernel},
    route::{self, Ensured},
};
use crate::{
    sandbox::network::{AddressPlan, SandboxAddress, Transport, WakePorts},
    sync::{Arc, Mutex, lock},
    sys::{
        clock::Stopwatch,
        tun::{Awaited, Device, Packets},
    },
};

mod judge;
mod packet;

/// More than any packet of a device whose packets have at most 1,500 bytes.
const PACKET_MAX_BYTES: usize = 2048;
/// So many packets are looked at before anybody else may have a say.
const BATCH: usize = 64;
/// As many as the queue of the device has, and then some.
const QUEUE: usize = 512;
/// How often what is held is looked through for what has been held for too long.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What woke a sandbox: a packet that opens something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// Who sent it.
    pub from: Ipv4Addr,
    /// What it opens.
    pub transport: Transport,
    /// To which port.
    pub port: u16,
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} from {}", self.transport, self.port, self.from)
    }
}

/// Whoever is told of rings. It is called by the one thread that hears for all sleepers, so
/// it passes the news on and does nothing else.
pub type Listener = dyn Fn(SandboxAddress, Ring) + Send + Sync;

/// Hears for all sandboxes of a range that sleep.
///
/// # Locking
/// The lock of the judge is a leaf. It is held while the device is read, so that of two who
/// read the one who takes a packet is also the one who decides on it.
pub(super) struct Doorbell {
    ear: Arc<Ear>,
    plan: AddressPlan,
    links: Mutex<Kernel>,
    thread: Option<JoinHandle<()>>,
}

struct Ear {
    device: Packets,
    judge: Mutex<Judge>,
    listener: Arc<Listener>,
    since: Stopwatch,
    is_deaf: AtomicBool,
}

impl Doorbell {
    /// Opens the host's device, which is there, and has everything that is for nobody who
    /// is awake come by it. It hears for `sleepers` from the start.
    ///
    /// # Errors
    /// Where another has it open, or there can be no thread, or no route.
    pub(super) fn start(
        plan: AddressPlan,
        listener: Arc<Listener>,
        sleepers: Vec<(SandboxAddress, Sleeper)>,
    ) -> Result<Self, Error> {
        let name = host::device(&plan);
        let device =
            Packets::open(&name, Device::Tun).map_err(Error::host("opening the doorbell"))?;
        let mut judge = Judge::new(plan);
        for (address, sleeper) in sleepers {
            judge.listen(address, sleeper);
        }
        let ear = Arc::new(Ear {
            device,
            judge: Mutex::new(judge),
            listener,
            since: Stopwatch::start(),
            is_deaf: AtomicBool::new(false),
        });
        let hearing = Arc::clone(&ear);
        let thread = thread::Builder::new()
            .name("dozed-doorbell".to_owned())
            .spawn(move || hearing.run())
            .map_err(Error::host("starting the thread of the doorbell"))?;
        let links = link::here()?;
        let doorbell = Self { ear, plan, links: Mutex::new(links), thread: Some(thread) };
        doorbell.route_again()?;
        Ok(doorbell)
    }

    /// Has everything that is for nobody who is awake come by the device, if it does not.
    ///
    /// # Errors
    /// Where the device is gone, or somebody else has a route to the range.
    pub(super) fn route_again(&self) -> Result<Ensured, Error> {
        let name = &host::device(&self.plan);
        let links = lock(&self.links);
        let index = link::find(&links, name)?.ok_or(Error::NotThere)?.index;
        // A device without a reader drops what it is to send for a moment longer.
        if !link::wait_until_up(&links, name)? {
            tracing::warn!("the doorbell may not hear the first packets");
        }
        route::ensure(&links, index, self.plan.range(), self.plan.host_address())
    }

    /// Has it leave the route alone when it ends, as its device is gone and another is there.
    pub(super) fn give_up(&self) {
        self.ear.is_deaf.store(true, Ordering::Release);
    }

    /// Says whether it hears at all: it does not when somebody has removed its device.
    pub(super) fn works(&self) -> bool {
        !self.ear.is_deaf.load(Ordering::Acquire)
    }

    /// Returns for whom it hears, for the one that takes its place.
    pub(super) fn sleepers(&self) -> Vec<(SandboxAddress, Sleeper)> {
        lock(&self.ear.judge).list()
    }

    /// Takes packets to a sandbox that just fell asleep, so that none go to its network, should
    /// that still be there (`lingers`). Those to `ports` ring.
    ///
    /// # Errors
    /// Where its route stays. It does not ring then.
    pub(super) fn listen(
        &self,
        address: SandboxAddress,
        ports: Option<&WakePorts>,
        lingers: bool,
    ) -> Result<(), Error> {
        let held = {
            let mut judge = lock(&self.ear.judge);
            let held = if ports.is_none() { judge.deafen(address) } else { Vec::new() };
            if ports.is_some() || lingers {
                judge.listen(address, Sleeper { wakes_on: ports.cloned(), lingers });
            }
            held
        };
        self.ear.tell_no(&held, Refusal::Unreachable);
        if ports.is_none() && !lingers {
            return Ok(());
        }
        let unrouted = lock(&self.links).apply(vec![route::remove(address.ip())], Answers::Each);
        unrouted.inspect_err(|_| self.deafen(address))
    }

    /// Notes that a sleeper has no network any more, and with it no connections.
    pub(super) fn end_linger(&self, address: SandboxAddress) {
        lock(&self.ear.judge).end_linger(address);
    }

    /// Says whether packets to the sandbox may ring.
    pub(super) fn hears(&self, address: SandboxAddress) -> bool {
        lock(&self.ear.judge).hears(address)
    }

    /// Forgets a sandbox. Whose packets were held is told no.
    pub(super) fn deafen(&self, address: SandboxAddress) {
        let held = lock(&self.ear.judge).deafen(address);
        self.ear.tell_no(&held, Refusal::Unreachable);
    }

    /// Passes on what was held for a sandbox that is awake, in order. Its own route is
    /// there, so all that comes after it goes there.
    pub(super) fn deliver(&self, address: SandboxAddress) {
        // What is in the device's queue was sent before the route was there.
        let mut rings = Vec::new();
        let held = {
            let mut judge = lock(&self.ear.judge);
            let heard = self.ear.hear(&mut judge, &mut rings, QUEUE);
            self.ear.complain(heard.map(drop));
            judge.deliver(self.ear.since.elapsed(), address)
        };
        for packet in held {
            if let Err(error) = self.ear.device.write(&packet) {
                tracing::warn!(%address, %error, "a packet that was held is lost");
            }
        }
        self.ear.tell(&rings);
    }

    /// Tells those whose packets were held for a sandbox that nobody will have them.
    pub(super) fn refuse(&self, address: SandboxAddress) {
        self.ear.refuse(address);
    }
}

impl Ear {
    fn run(&self) {
        loop {
            let limit = (lock(&self.judge).held() > 0).then_some(SWEEP_EVERY);
            match self.device.wait(limit) {
                Ok(Awaited::Stop) => return,
                Ok(Awaited::Packets) => {}
                Ok(Awaited::Nothing) => lock(&self.judge).sweep(self.since.elapsed()),
                Err(error) => return self.complain(Err(error)),
            }
            let mut rings = Vec::new();
            let heard = self.hear(&mut lock(&self.judge), &mut rings, BATCH);
            self.tell(&rings);
            if heard.is_err() {
                return self.complain(heard);
            }
        }
    }

    /// Reads what there is, and decides on each packet.
    fn hear(
        &self,
        judge: &mut Judge,
        rings: &mut Vec<(SandboxAddress, Ring)>,
        max: usize,
    ) -> std::io::Result<()> {
        let mut buffer = [0; PACKET_MAX_BYTES];
        for _ in 0..max {
            let Some(bytes) = self.device.read(&mut buffer)? else { return Ok(()) };
            match judge.hear(self.since.elapsed(), bytes) {
                Verdict::Ring(address, ring) => rings.push((address, ring)),
                Verdict::Refuse(refusal) => self.tell_no(&[bytes], refusal),
                Verdict::Hold | Verdict::Ignore => {}
            }
        }
        Ok(())
    }

    fn tell(&self, rings: &[(SandboxAddress, Ring)]) {
        for (address, ring) in rings {
            tracing::debug!(%address, %ring, "a packet to a sandbox that sleeps");
            (self.listener)(*address, *ring);
        }
    }

    fn refuse(&self, address: SandboxAddress) {
        let held = lock(&self.judge).refuse(self.since.elapsed(), address);
        self.tell_no(&held, Refusal::Refused);
    }

    fn tell_no(&self, packets: &[impl AsRef<[u8]>], refusal: Refusal) {
        for told in packets.iter().filter_map(|packet| answer(packet.as_ref(), refusal)) {
            if let Err(error) = self.device.write(&told) {
                tracing::debug!(%error, "a sender is not told that it is refused");
            }
        }
    }

    fn complain(&self, heard: std::io::Result<()>) {
        if let Err(error) = heard
            && !self.is_deaf.swap(true, Ordering::AcqRel)
        {
            tracing::error!(%error, "packets no longer wake sandboxes");
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        // Who calls now is told that nobody is there, by the route of second choice. Where
        // the device is gone its route is too, and one that is there is the successor's.
        let route = route::remove(self.plan.range());
        if self.works()
            && let Err(error) = lock(&self.links).apply(vec![route], Answers::Each)
        {
            tracing::warn!(%error, "the route of the doorbell stays");
        }
        self.ear.device.stop();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the listener was reported where it happened.
            let _ended = thread.join();
        }
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let judge = lock(&self.ear.judge);
        f.debug_struct("Doorbell")
            .field("sleepers", &judge.sleepers())
            .field("held", &judge.held())
            .finish_non_exhaustive()
    }
}
