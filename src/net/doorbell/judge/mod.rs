//! Which packets ring, which are held, and which are refused. Pure: the time is given.
//!
//! A packet rings if it opens something or carries data of a connection, is for a port that
//! its sandbox is woken by, and comes from the host's own address, from which alone
//! something may be opened to a sandbox that is awake. One ring is told for each wake; what
//! else comes until the wake has ended is held with it. All that a sender can make us keep
//! or do is bounded.
//!
//! Data that wakes nobody is reset, so that its sender does not wait. So is every segment
//! from elsewhere, unless the sandbox's network lingers: then its connection may live on.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{
    Ring,
    packet::{Carries, Refusal, Seen, What},
};
use crate::sandbox::network::{AddressPlan, SandboxAddress, Transport, WakePorts};

/// So many packets are held for one sandbox: as many clients as a service has at once
/// that slept a moment ago. Others send theirs again.
const HELD_MAX: usize = 64;
/// So many are held in all, which at 1,500 bytes each are 6 MiB.
const HELD_MAX_IN_ALL: usize = 4096;
/// How long a packet is held. A resolver has given up by then, and whoever connects has
/// sent its segment again after 1, 3 and 7 seconds, the last of which is held too.
const HELD_FOR: Duration = Duration::from_secs(10);
/// So many sandboxes are woken a second, and so many at once after a pause. More than
/// that is somebody who tries all addresses; a sender that is not one of them tries again.
const RINGS_PER_SECOND: u32 = 16;
const RINGS_BURST: u32 = 64;
/// So many senders are told no in a second, and so many at once, as the firewall lets a
/// guest open. The kernel's own limit is 1,000.
const REFUSALS_PER_SECOND: u32 = 200;
const REFUSALS_BURST: u32 = 400;
/// After a wake that failed packets do not try again for so long, and twice as long each
/// time, up to the limit: a wake that fails takes the host as much as one that does not.
const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(60);
/// A wake of which nobody has said for so long how it ended is forgotten, and the next
/// packet rings again. No wake takes as long.
const WAKE_FORGOTTEN_AFTER: Duration = Duration::from_secs(120);

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is held, and its sandbox is to be woken.
    Ring(SandboxAddress, Ring),
    /// It is held for a wake that was rung for.
    Hold,
    /// Its sender is told no.
    Refuse(Refusal),
    /// Nothing.
    Ignore,
}

/// Everything that is known of sleepers and of those who want something from them.
#[derive(Debug)]
pub(super) struct Judge {
    plan: AddressPlan,
    sleepers: BTreeMap<SandboxAddress, Sleeper>,
    waking: BTreeMap<SandboxAddress, Waking>,
    failed: BTreeMap<SandboxAddress, Failed>,
    held: usize,
    rings: Bucket,
    refusals: Bucket,
    /// Of those from elsewhere, so that they take none from those of the host.
    resets: Bucket,
}

/// A sandbox that sleeps, and is woken by packets or has a network that lingers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::net) struct Sleeper {
    /// Which packets wake it, if any do.
    pub(super) wakes_on: Option<WakePorts>,
    /// Whether it has its network still, and with it the connections that its guest opened.
    pub(super) lingers: bool,
}

/// A sleeper that was rung for.
#[derive(Debug)]
struct Waking {
    since: Duration,
    packets: VecDeque<(Duration, Box<[u8]>)>,
}

/// A sleeper whose last wake failed.
#[derive(Debug, Clone, Copy)]
struct Failed {
    pause: Duration,
    until: Duration,
}

impl Judge {
    pub(super) fn new(plan: AddressPlan) -> Self {
        Self {
            plan,
            sleepers: BTreeMap::new(),
            waking: BTreeMap::new(),
            failed: BTreeMap::new(),
            held: 0,
            rings: Bucket::new(RINGS_PER_SECOND, RINGS_BURST),
            refusals: Bucket::new(REFUSALS_PER_SECOND, REFUSALS_BURST),
            resets: Bucket::new(REFUSALS_PER_SECOND, REFUSALS_BURST),
        }
    }

    /// Decides on packets to a sleeper from now on.
    pub(super) fn listen(&mut self, address: SandboxAddress, sleeper: Sleeper) {
        self.sleepers.insert(address, sleeper);
    }

    /// Says whether packets to `address` may ring.
    pub(super) fn hears(&self, address: SandboxAddress) -> bool {
        self.sleepers.get(&address).is_some_and(|sleeper| sleeper.wakes_on.is_some())
    }

    /// Notes that a sleeper has no network any more.
    pub(super) fn end_linger(&mut self, address: SandboxAddress) {
        if self.hears(address) {
            self.sleepers.entry(address).and_modify(|sleeper| sleeper.lingers = false);
        } else {
            self.sleepers.remove(&address);
        }
    }

    /// Returns all sleepers.
    pub(super) fn list(&self) -> Vec<(SandboxAddress, Sleeper)> {
        self.sleepers.iter().map(|(address, sleeper)| (*address, sleeper.clone())).collect()
    }

    /// Returns how many sleepers there are.
    pub(super) fn sleepers(&self) -> usize {
        self.sleepers.len()
    }

    /// Returns how many packets are held.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Decides on a packet, and keeps it if it is to be held.
    pub(super) fn hear(&mut self, now: Duration, bytes: &[u8]) -> Verdict {
        let Some(seen) = Seen::of(bytes) else { return Verdict::Ignore };
        if seen.from != self.plan.host_address() {
            return self.hear_from_elsewhere(now, seen);
        }
        let address = self.plan.sandbox(seen.to);
        let wakes_on = address.and_then(|it| self.sleepers.get(&it)?.wakes_on.as_ref());
        let rung = match seen.what {
            // An error is never answered. What says nothing is no reason to wake, nor to end a
            // connection that may go on when its other end is awake.
            What::Other | What::Segment(_, Carries::Nothing) => return Verdict::Ignore,
            What::Opening(transport, port) => Some((transport, port)),
            What::Segment(port, Carries::Data) => Some((Transport::Tcp, port)),
            What::Ping => None,
        };
        let (Some(address), Some(ports)) = (address, wakes_on) else {
            return self.refuse_one(now, Refusal::Unreachable);
        };
        let Some((transport, port)) = rung.filter(|rung| ports.contain(rung.0, rung.1)) else {
            return self.refuse_one(now, Refusal::Refused);
        };
        let ring = Ring { from: seen.from, transport, port };
        self.expire(now, address);
        if self.waking.contains_key(&address) {
            return if self.hold(now, address, bytes) { Verdict::Hold } else { Verdict::Ignore };
        }
        if self.failed.get(&address).is_some_and(|failed| now < failed.until) {
            return self.refuse_one(now, Refusal::Refused);
        }
        // Whoever is left out sends again soon, and is not told no: nothing has failed.
        if self.held >= HELD_MAX_IN_ALL || !self.rings.take(now) {
            return Verdict::Ignore;
        }
        self.waking.insert(address, Waking { since: now, packets: VecDeque::new() });
        self.hold(now, address, bytes);
        Verdict::Ring(address, ring)
    }

    /// Ends a wake that went well, and returns what was held, in order. The sandbox is no
    /// sleeper any more.
    pub(super) fn deliver(&mut self, now: Duration, address: SandboxAddress) -> Vec<Box<[u8]>> {
        self.expire(now, address);
        self.sleepers.remove(&address);
        self.failed.remove(&address);
        self.end_wake(address)
    }

    /// Ends a wake that failed, and returns what was held, whose senders are to be told. One
    /// that was not rung for, or has ended, changes nothing.
    pub(super) fn refuse(&mut self, now: Duration, address: SandboxAddress) -> Vec<Box<[u8]>> {
        if self.waking.contains_key(&address) {
            let pause = self.failed.get(&address).map_or(BACK_OFF_FIRST, |failed| failed.pause * 2);
            let pause = pause.min(BACK_OFF_LIMIT);
            self.failed.insert(address, Failed { pause, until: now + pause });
        }
        self.end_wake(address)
    }

    /// Forgets a sandbox, and returns what was held, whose senders are to be told.
    pub(super) fn deafen(&mut self, address: SandboxAddress) -> Vec<Box<[u8]>> {
        self.sleepers.remove(&address);
        self.failed.remove(&address);
        self.end_wake(address)
    }

    /// Drops what has been held for too long.
    pub(super) fn sweep(&mut self, now: Duration) {
        let waking: Vec<SandboxAddress> = self.waking.keys().copied().collect();
        waking.into_iter().for_each(|address| self.expire(now, address));
    }

    fn end_wake(&mut self, address: SandboxAddress) -> Vec<Box<[u8]>> {
        let packets = self.waking.remove(&address).map(|waking| waking.packets).unwrap_or_default();
        self.held -= packets.len();
        packets.into_iter().map(|(_, bytes)| bytes).collect()
    }

    fn hold(&mut self, now: Duration, address: SandboxAddress, bytes: &[u8]) -> bool {
        let Some(waking) = self.waking.get_mut(&address) else { return false };
        if waking.packets.len() >= HELD_MAX || self.held >= HELD_MAX_IN_ALL {
            return false;
        }
        waking.packets.push_back((now, bytes.into()));
        self.held += 1;
        true
    }

    fn expire(&mut self, now: Duration, address: SandboxAddress) {
        let Some(waking) = self.waking.get_mut(&address) else { return };
        let is_old = |at: Duration| now.saturating_sub(at) >= HELD_FOR;
        while waking.packets.front().is_some_and(|(at, _)| is_old(*at)) {
            waking.packets.pop_front();
            self.held -= 1;
        }
        if now.saturating_sub(waking.since) >= WAKE_FORGOTTEN_AFTER {
            self.end_wake(address);
        }
    }

    /// Decides on a packet that is not the host's, such as of a server that the guest has a
    /// connection to.
    fn hear_from_elsewhere(&mut self, now: Duration, seen: Seen) -> Verdict {
        let is_segment = matches!(seen.what, What::Segment(..));
        let sleeper = self.plan.sandbox(seen.to).and_then(|it| self.sleepers.get(&it));
        let lives_on = sleeper.is_some_and(|sleeper| sleeper.lingers);
        if is_segment && !lives_on && self.resets.take(now) {
            Verdict::Refuse(Refusal::Refused)
        } else {
            Verdict::Ignore
        }
    }

    fn refuse_one(&mut self, now: Duration, refusal: Refusal) -> Verdict {
        if self.refusals.take(now) { Verdict::Refuse(refusal) } else { Verdict::Ignore }
    }
}

/// So much a second of something, and so much at once.
#[derive(Debug)]
struct Bucket {
    per_second: u32,
    burst: u32,
    /// What is left, in parts of which one second brings `per_second` thousands.
    left_thousandths: u64,
    at: Duration,
}

impl Bucket {
    fn new(per_second: u32, burst: u32) -> Self {
        let left_thousandths = u64::from(burst) * 1000;
        Self { per_second, burst, left_thousandths, at: Duration::ZERO }
    }

    fn take(&mut self, now: Duration) -> bool {
        // What is less than a millisecond is left for the next time.
        let millis = u64::try_from(now.saturating_sub(self.at).as_millis()).unwrap_or(u64::MAX);
        let more = millis.saturating_mul(self.per_second.into());
        if more > 0 {
            self.at += Duration::from_millis(millis);
        }
        let full = u64::from(self.burst) * 1000;
        self.left_thousandths = self.left_thousandths.saturating_add(more).min(full);
        match self.left_thousandths.checked_sub(1000) {
            None => false,
            Some(left) => {
                self.left_thousandths = left;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests;
