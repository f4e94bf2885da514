//! Which packets trigger a wake, which are queued, and which are refused. Pure: the time is an
//! argument.
//!
//! A packet triggers a wake if it opens a connection or carries data of one, goes to a port
//! that wakes its sandbox, and comes from the host's own address: only the host may connect to
//! a running sandbox either. There is one trigger for each wake; later packets are queued
//! until the wake has ended. Everything that a sender can make us keep or do is bounded.
//!
//! Data that wakes no sandbox is reset, so that its sender does not wait. So is every segment
//! from elsewhere, unless the sandbox's network lingers: then its connection may live on.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{
    Trigger,
    packet::{Carries, Refusal, Seen, What},
};
use crate::sandbox::network::{AddressPlan, SandboxAddress, Transport, WakePorts};

/// So many packets are queued for one sandbox: as many clients as a service has at once
/// that slept a moment ago. Others send theirs again.
const QUEUED_MAX: usize = 64;
/// So many are queued in all, which at 1,500 bytes each are 6 MiB.
const QUEUED_MAX_IN_ALL: usize = 4096;
/// How long a packet is queued. A resolver has given up by then, and whoever connects has
/// sent its segment again after 1, 3 and 7 seconds, the last of which is queued too.
const QUEUED_FOR: Duration = Duration::from_secs(10);
/// So many sandboxes are woken a second, and so many at once after a pause. More than
/// that is somebody who tries all addresses; a sender that is not one of them tries again.
const TRIGGERS_PER_SECOND: u32 = 16;
const TRIGGERS_BURST: u32 = 64;
/// So many senders are told no in a second, and so many at once, as the firewall lets a
/// guest open. The kernel's own limit is 1,000.
const REFUSALS_PER_SECOND: u32 = 200;
const REFUSALS_BURST: u32 = 400;
/// After a wake that failed packets do not try again for so long, and twice as long each
/// time, up to the limit: a wake that fails takes the host as much as one that does not.
const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(60);
/// A wake of which nobody has said for so long how it ended is forgotten, and the next
/// packet triggers a wake again. No wake takes as long.
const WAKE_FORGOTTEN_AFTER: Duration = Duration::from_secs(120);

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is queued, and its sandbox is to be woken.
    Trigger(SandboxAddress, Trigger),
    /// It is queued for a wake that was triggered.
    Queue,
    /// It is refused.
    Refuse(Refusal),
    /// Nothing.
    Ignore,
}

/// What is known of sleepers and of the packets that were sent to them.
#[derive(Debug)]
pub(super) struct WakePolicy {
    plan: AddressPlan,
    sleepers: BTreeMap<SandboxAddress, Sleeper>,
    waking: BTreeMap<SandboxAddress, Waking>,
    failed: BTreeMap<SandboxAddress, Failed>,
    queued: usize,
    triggers: Bucket,
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

/// A sleeper whose wake was triggered.
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

impl WakePolicy {
    pub(super) fn new(plan: AddressPlan) -> Self {
        Self {
            plan,
            sleepers: BTreeMap::new(),
            waking: BTreeMap::new(),
            failed: BTreeMap::new(),
            queued: 0,
            triggers: Bucket::new(TRIGGERS_PER_SECOND, TRIGGERS_BURST),
            refusals: Bucket::new(REFUSALS_PER_SECOND, REFUSALS_BURST),
            resets: Bucket::new(REFUSALS_PER_SECOND, REFUSALS_BURST),
        }
    }

    /// Decides on packets to a sleeper from now on.
    pub(super) fn listen(&mut self, address: SandboxAddress, sleeper: Sleeper) {
        self.sleepers.insert(address, sleeper);
    }

    /// Says whether packets to `address` may trigger a wake.
    pub(super) fn may_wake(&self, address: SandboxAddress) -> bool {
        self.sleepers.get(&address).is_some_and(|sleeper| sleeper.wakes_on.is_some())
    }

    /// Notes that a sleeper has no network any more.
    pub(super) fn end_linger(&mut self, address: SandboxAddress) {
        if self.may_wake(address) {
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

    /// Returns how many packets are queued.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Decides on a packet, and keeps it if it is to be queued.
    pub(super) fn decide(&mut self, now: Duration, bytes: &[u8]) -> Decision {
        let Some(seen) = Seen::of(bytes) else { return Decision::Ignore };
        if seen.from != self.plan.host_address() {
            return self.decide_on_foreign(now, seen);
        }
        let address = self.plan.sandbox(seen.to);
        let wakes_on = address.and_then(|it| self.sleepers.get(&it)?.wakes_on.as_ref());
        let opened = match seen.what {
            // An error is never answered. What says nothing is no reason to wake, nor to end a
            // connection that may go on when its other end is awake.
            What::Other | What::Segment(_, Carries::Nothing) => return Decision::Ignore,
            What::Opening(transport, port) => Some((transport, port)),
            What::Segment(port, Carries::Data) => Some((Transport::Tcp, port)),
            What::Ping => None,
        };
        let (Some(address), Some(ports)) = (address, wakes_on) else {
            return self.refuse_one(now, Refusal::Unreachable);
        };
        let Some((transport, port)) = opened.filter(|it| ports.contain(it.0, it.1)) else {
            return self.refuse_one(now, Refusal::Refused);
        };
        let trigger = Trigger { from: seen.from, transport, port };
        self.expire(now, address);
        if self.waking.contains_key(&address) {
            return if self.enqueue(now, address, bytes) {
                Decision::Queue
            } else {
                Decision::Ignore
            };
        }
        if self.failed.get(&address).is_some_and(|failed| now < failed.until) {
            return self.refuse_one(now, Refusal::Refused);
        }
        // Whoever is left out sends again soon, and is not told no: nothing has failed.
        if self.queued >= QUEUED_MAX_IN_ALL || !self.triggers.take(now) {
            return Decision::Ignore;
        }
        self.waking.insert(address, Waking { since: now, packets: VecDeque::new() });
        self.enqueue(now, address, bytes);
        Decision::Trigger(address, trigger)
    }

    /// Ends a wake that went well, and returns what was queued, in order. The sandbox is no
    /// sleeper any more.
    pub(super) fn deliver(&mut self, now: Duration, address: SandboxAddress) -> Vec<Box<[u8]>> {
        self.expire(now, address);
        self.sleepers.remove(&address);
        self.failed.remove(&address);
        self.end_wake(address)
    }

    /// Ends a wake that failed, and returns what was queued, whose senders are to be told. One
    /// that was not triggered, or has ended, changes nothing.
    pub(super) fn refuse(&mut self, now: Duration, address: SandboxAddress) -> Vec<Box<[u8]>> {
        if self.waking.contains_key(&address) {
            let pause = self.failed.get(&address).map_or(BACK_OFF_FIRST, |failed| failed.pause * 2);
            let pause = pause.min(BACK_OFF_LIMIT);
            self.failed.insert(address, Failed { pause, until: now + pause });
        }
        self.end_wake(address)
    }

    /// Forgets a sandbox, and returns what was queued, whose senders are to be told.
    pub(super) fn stop_listening(&mut self, address: SandboxAddress) -> Vec<Box<[u8]>> {
        self.sleepers.remove(&address);
        self.failed.remove(&address);
        self.end_wake(address)
    }

    /// Drops what has been queued for too long.
    pub(super) fn sweep(&mut self, now: Duration) {
        let waking: Vec<SandboxAddress> = self.waking.keys().copied().collect();
        waking.into_iter().for_each(|address| self.expire(now, address));
    }

    fn end_wake(&mut self, address: SandboxAddress) -> Vec<Box<[u8]>> {
        let packets = self.waking.remove(&address).map(|waking| waking.packets).unwrap_or_default();
        self.queued -= packets.len();
        packets.into_iter().map(|(_, bytes)| bytes).collect()
    }

    fn enqueue(&mut self, now: Duration, address: SandboxAddress, bytes: &[u8]) -> bool {
        let Some(waking) = self.waking.get_mut(&address) else { return false };
        if waking.packets.len() >= QUEUED_MAX || self.queued >= QUEUED_MAX_IN_ALL {
            return false;
        }
        waking.packets.push_back((now, bytes.into()));
        self.queued += 1;
        true
    }

    fn expire(&mut self, now: Duration, address: SandboxAddress) {
        let Some(waking) = self.waking.get_mut(&address) else { return };
        let is_old = |at: Duration| now.saturating_sub(at) >= QUEUED_FOR;
        while waking.packets.front().is_some_and(|(at, _)| is_old(*at)) {
            waking.packets.pop_front();
            self.queued -= 1;
        }
        if now.saturating_sub(waking.since) >= WAKE_FORGOTTEN_AFTER {
            self.end_wake(address);
        }
    }

    /// Decides on a packet that is not the host's, such as of a server that the guest has a
    /// connection to.
    fn decide_on_foreign(&mut self, now: Duration, seen: Seen) -> Decision {
        let is_segment = matches!(seen.what, What::Segment(..));
        let sleeper = self.plan.sandbox(seen.to).and_then(|it| self.sleepers.get(&it));
        let lives_on = sleeper.is_some_and(|sleeper| sleeper.lingers);
        if is_segment && !lives_on && self.resets.take(now) {
            Decision::Refuse(Refusal::Refused)
        } else {
            Decision::Ignore
        }
    }

    fn refuse_one(&mut self, now: Duration, refusal: Refusal) -> Decision {
        if self.refusals.take(now) { Decision::Refuse(refusal) } else { Decision::Ignore }
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
