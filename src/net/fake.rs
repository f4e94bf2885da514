//! Networks that are only remembered, for tests of those who ask for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    path::PathBuf,
};

use super::{
    Activity, Applied, Changed, Count, Counters, Error, Known, Looked, Network, Ready, Reconciled,
    Sampled, Wanted, firewall, linger::Lingering,
};
use crate::{
    sandbox::{
        SandboxId, Timestamp,
        network::{
            GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX, SandboxAddress, WakePorts,
        },
    },
    sync::{Arc, Mutex, MutexGuard, lock},
    sys::netns::Identity,
};

/// The one address that the host has.
pub(crate) const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 5);

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The network cannot be made.
    Ensure,
    /// The policy cannot be changed.
    Policy,
    /// The network cannot be removed.
    Remove,
    /// The host cannot listen for packets to sleepers.
    Listen,
    /// The kernel does not say what has passed.
    Activity,
    /// The host does not forward packets.
    Forwarding,
}

/// What is to happen after so many readings of counters.
#[derive(Default)]
struct AfterReads(Mutex<Option<(usize, Act)>>);

type Act = Box<dyn FnOnce() + Send>;

impl AfterReads {
    fn count(&self) {
        let mut planned = lock(&self.0);
        let due = planned.as_mut().is_some_and(|(left, _)| {
            *left -= 1;
            *left == 0
        });
        let act = due.then(|| planned.take()).flatten();
        drop(planned);
        if let Some((_, act)) = act {
            act();
        }
    }
}

impl fmt::Debug for AfterReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AfterReads").finish_non_exhaustive()
    }
}

/// Networks that are only remembered.
///
/// # Locking
/// Each lock is a leaf.
#[derive(Debug, Default)]
pub(crate) struct FakeNetwork {
    there: Mutex<BTreeMap<SandboxId, (u64, Wanted)>>,
    made: Mutex<u64>,
    fault: Mutex<Option<Fault>>,
    lingering: Lingering,
    sleepers: Mutex<BTreeMap<SandboxAddress, WakePorts>>,
    refused: Mutex<Vec<SandboxAddress>>,
    activity: Mutex<BTreeMap<SandboxId, Activity>>,
    between_reads: Mutex<BTreeMap<SandboxId, Count>>,
    after_reads: AfterReads,
    unreadable: Mutex<BTreeSet<SandboxId>>,
    /// Whoever has it keeps all waiting who ask for counters.
    counting: Mutex<()>,
    asked: Mutex<usize>,
    /// Those that only their VMMs lead to.
    unpinned: Mutex<BTreeMap<SandboxId, u64>>,
}

impl FakeNetwork {
    /// Makes everything of one kind fail from now on, or nothing.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        *lock(&self.fault) = fault;
    }

    /// Keeps all waiting who ask for counters, for as long as this is held.
    pub(crate) fn hold_counters(&self) -> MutexGuard<'_, ()> {
        lock(&self.counting)
    }

    /// Returns how often counters were asked for.
    pub(crate) fn asked(&self) -> usize {
        *lock(&self.asked)
    }

    /// Forgets what is in no kernel but in the memory of a daemon that is gone.
    pub(crate) fn forget_lingering(&self) {
        let lingering: Vec<_> = lock(&self.there).keys().cloned().collect();
        lingering.iter().for_each(|id| self.lingering.forget(id));
    }

    /// Returns what is in force for a sandbox that has a network.
    pub(crate) fn in_force(&self, id: &SandboxId) -> Option<Wanted> {
        lock(&self.there).get(id).map(|(_, wanted)| wanted.clone())
    }

    /// Returns to which ports packets wake the sandbox at `address` now, if they do.
    pub(crate) fn wakes(&self, address: SandboxAddress) -> Option<WakePorts> {
        lock(&self.sleepers).get(&address).cloned()
    }

    /// Returns the sandboxes whose wakes failed or were not to be, in order.
    pub(crate) fn refused(&self) -> Vec<SandboxAddress> {
        lock(&self.refused).clone()
    }

    /// Sets what has passed of a sandbox's network that is a sign of use.
    pub(crate) fn set_activity(&self, id: &SandboxId, activity: Activity) {
        lock(&self.activity).insert(id.clone(), activity);
    }

    /// Has `more` pass to a sandbox after each time that its counters are read.
    pub(crate) fn pass_between_reads(&self, id: &SandboxId, more: Count) {
        lock(&self.between_reads).insert(id.clone(), more);
    }

    /// Has `act` happen just after the counters of any sandbox were read `reads` times more.
    pub(crate) fn act_after_reads(&self, reads: usize, act: impl FnOnce() + Send + 'static) {
        *lock(&self.after_reads.0) = Some((reads, Box::new(act)));
    }

    /// Has nobody know what passes of a sandbox's network, or anybody again.
    pub(crate) fn set_unreadable(&self, id: &SandboxId, unreadable: bool) {
        let mut all = lock(&self.unreadable);
        if unreadable {
            all.insert(id.clone())
        } else {
            all.remove(id)
        };
    }

    fn read_counters(&self, id: &SandboxId) -> Result<Activity, Error> {
        if lock(&self.unreadable).contains(id) {
            return Err(Error::host("reading the counters")(io::Error::other("on purpose")));
        }
        let more = lock(&self.between_reads).get(id).copied().unwrap_or_default();
        let mut activity = lock(&self.activity);
        let counted = activity.entry(id.clone()).or_default();
        let read = *counted;
        counted.inward.packets += more.packets;
        counted.inward.bytes += more.bytes;
        drop(activity);
        self.after_reads.count();
        Ok(read)
    }

    /// Takes the pin of a network away, so that only who is in it leads to it.
    pub(crate) fn unpin(&self, id: &SandboxId) {
        let taken = lock(&self.there).remove(id);
        lock(&self.unpinned).extend(taken.map(|(inode, _)| (id.clone(), inode)));
    }

    fn check(&self, fault: Fault) -> Result<(), Error> {
        if *lock(&self.fault) == Some(fault) {
            return Err(Error::host("doing as told")(io::Error::other("on purpose")));
        }
        Ok(())
    }
}

impl Network for FakeNetwork {
    fn claim(&self) -> Result<(), Error> {
        Ok(())
    }

    fn look(&self, awake: &[Known]) -> Looked {
        let there = lock(&self.there);
        let suspects = awake.iter().filter(|known| !there.contains_key(&known.id));
        let suspects = suspects.map(|known| known.id.clone()).collect();
        Looked { suspects, ..Looked::default() }
    }

    fn put_back(&self, wanted: &Wanted, vmm: Option<u32>) -> Result<Vec<&'static str>, Error> {
        if lock(&self.there).contains_key(&wanted.id) {
            return self.apply_policy(wanted).map(|_| Vec::new());
        }
        let unpinned = lock(&self.unpinned).remove(&wanted.id);
        let inode = unpinned.filter(|_| vmm.is_some()).ok_or(Error::NotThere)?;
        lock(&self.there).insert(wanted.id.clone(), (inode, wanted.clone()));
        Ok(vec!["the pin of its namespace"])
    }

    fn watch(&self, _changed: Arc<Changed>) -> Result<(), Error> {
        Ok(())
    }

    fn ensure(&self, wanted: &Wanted) -> Result<Ready, Error> {
        self.check(Fault::Ensure)?;
        let next = {
            let mut made = lock(&self.made);
            *made += 1;
            *made
        };
        let mut there = lock(&self.there);
        let entry = there.entry(wanted.id.clone()).or_insert((next, wanted.clone()));
        entry.1 = wanted.clone();
        let inode = entry.0;
        drop(there);
        self.lingering.forget(&wanted.id);
        Ok(Ready {
            namespace: PathBuf::from("/fake").join(wanted.id.as_str()),
            identity: Identity { device: 0, inode },
            tap: firewall::TAP,
            mac: GUEST_MAC,
            guest: GUEST_ADDRESS,
            prefix: GUEST_PREFIX,
            gateway: GATEWAY_ADDRESS,
        })
    }

    fn apply_policy(&self, wanted: &Wanted) -> Result<Applied, Error> {
        self.check(Fault::Policy)?;
        match lock(&self.there).get_mut(&wanted.id) {
            None => Ok(Applied::NotThere),
            Some((_, in_force)) => {
                *in_force = wanted.clone();
                Ok(Applied::Now)
            }
        }
    }

    fn namespace(&self, id: &SandboxId) -> Option<PathBuf> {
        self.in_force(id).map(|_| PathBuf::from("/fake").join(id.as_str()))
    }

    fn open_tap(&self, id: &SandboxId) -> Result<OwnedFd, Error> {
        if self.in_force(id).is_none() {
            return Err(Error::NotThere);
        }
        let file = std::fs::File::open("/dev/null").map_err(Error::host("opening the device"))?;
        Ok(file.into())
    }

    fn listen(
        &self,
        _: &SandboxId,
        address: SandboxAddress,
        ports: Option<&WakePorts>,
    ) -> Result<(), Error> {
        self.check(Fault::Listen)?;
        let mut sleepers = lock(&self.sleepers);
        sleepers.remove(&address);
        sleepers.extend(ports.map(|ports| (address, ports.clone())));
        Ok(())
    }

    fn deliver(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error> {
        if self.wakes(address).is_none() {
            return Ok(());
        }
        if !lock(&self.there).contains_key(id) {
            self.refuse(address);
            return Err(Error::NotThere);
        }
        self.stop_listening(address);
        Ok(())
    }

    fn refuse(&self, address: SandboxAddress) {
        lock(&self.refused).push(address);
    }

    fn stop_listening(&self, address: SandboxAddress) {
        lock(&self.sleepers).remove(&address);
    }

    fn linger(&self, id: &SandboxId, until: Timestamp) {
        self.lingering.add(id, until);
    }

    fn lingered(&self, now: Timestamp) -> Vec<SandboxId> {
        self.lingering.due(now)
    }

    fn lingers_until(&self, id: &SandboxId) -> Option<Timestamp> {
        self.lingering.until(id)
    }

    fn next_lingered(&self) -> Option<Timestamp> {
        self.lingering.next()
    }

    fn remove(&self, id: &SandboxId, _address: SandboxAddress) -> Result<(), Error> {
        self.check(Fault::Remove)?;
        lock(&self.there).remove(id);
        self.lingering.forget(id);
        Ok(())
    }

    fn reconcile(&self, known: &[Known]) -> Result<Reconciled, Error> {
        let mut there = lock(&self.there);
        let is_known = |id: &SandboxId| known.iter().any(|known| known.id == *id);
        let removed: Vec<SandboxId> = there.keys().filter(|id| !is_known(id)).cloned().collect();
        there.retain(|id, _| is_known(id));
        Ok(Reconciled {
            removed: removed.iter().map(SandboxId::to_string).collect(),
            there: there.keys().cloned().collect(),
            left: Vec::new(),
        })
    }

    fn activity(&self, of: &[Known]) -> Result<Vec<Sampled>, Error> {
        self.check(Fault::Activity)?;
        let there: Vec<_> =
            of.iter().filter(|known| self.in_force(&known.id).is_some()).cloned().collect();
        Ok(there
            .into_iter()
            .map(|Known { id, .. }| {
                let read = self.read_counters(&id);
                (id, read)
            })
            .collect())
    }

    fn retire(&self) -> Result<(), Error> {
        Ok(())
    }

    fn forwards(&self) -> Result<(), Error> {
        let (lacks, remedy) =
            ("it does not forward IPv4 packets", "set net.ipv4.ip_forward = 1 with sysctl");
        self.check(Fault::Forwarding).map_err(|_| Error::Lacking { lacks, remedy })
    }

    fn host_addresses(&self) -> Result<Vec<Ipv4Addr>, Error> {
        Ok(vec![HOST_ADDRESS])
    }

    fn counters(&self, id: &SandboxId) -> Result<Option<Counters>, Error> {
        *lock(&self.asked) += 1;
        drop(lock(&self.counting));
        if self.in_force(id).is_none() {
            return Ok(None);
        }
        let Activity { inward, outward } = self.read_counters(id)?;
        Ok(Some(Counters { active_in: inward, active_out: outward, ..Counters::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::network::{AddressPlan, Destinations, Nameservers, NetworkPolicy, Reach};

    fn wanted(name: &str, slot: u32, reach: Reach) -> Wanted {
        Wanted {
            id: name.parse().unwrap(),
            address: AddressPlan::default().address(slot).unwrap(),
            tap_owner: 0,
            policy: NetworkPolicy {
                reach,
                nameservers: Nameservers::default(),
                denied: Destinations::default(),
                allowed: Destinations::default(),
            },
        }
    }

    #[test]
    fn a_network_that_is_remembered_goes_the_way_of_a_real_one() {
        let network = FakeNetwork::default();
        let (a, b) = (wanted("a", 0, Reach::Internet), wanted("b", 1, Reach::Internet));
        assert_eq!(network.apply_policy(&a).unwrap(), Applied::NotThere);
        assert!(matches!(network.open_tap(&a.id), Err(Error::NotThere)));
        let first = network.ensure(&a).unwrap();
        assert_eq!(network.ensure(&a).unwrap(), first);
        assert_ne!(network.ensure(&b).unwrap().identity, first.identity);
        drop(network.open_tap(&a.id).unwrap());
        let isolated = wanted("a", 0, Reach::Isolated);
        assert_eq!(network.apply_policy(&isolated).unwrap(), Applied::Now);
        assert_eq!(network.in_force(&a.id), Some(isolated));
        assert_eq!(network.counters(&a.id).unwrap(), Some(Counters::default()));
        network.linger(&a.id, Timestamp::from_millis(5));
        assert_eq!(network.next_lingered(), Some(Timestamp::from_millis(5)));
        assert_eq!(network.lingered(Timestamp::from_millis(5)), std::slice::from_ref(&a.id));
        network.remove(&a.id, a.address).unwrap();
        network.remove(&a.id, a.address).unwrap();
        assert_eq!(network.lingered(Timestamp::from_millis(5)), []);
        let reconciled = network.reconcile(&[]).unwrap();
        assert_eq!(reconciled.removed, ["b"]);
        assert_eq!(network.counters(&b.id).unwrap(), None);
    }

    #[test]
    fn a_fault_fails_what_it_says_and_nothing_else() {
        let network = FakeNetwork::default();
        let a = wanted("a", 0, Reach::Internet);
        network.set_fault(Some(Fault::Ensure));
        assert!(network.ensure(&a).is_err() && network.in_force(&a.id).is_none());
        network.set_fault(Some(Fault::Policy));
        network.ensure(&a).unwrap();
        assert!(network.apply_policy(&wanted("a", 0, Reach::Isolated)).is_err());
        assert_eq!(network.in_force(&a.id), Some(a.clone()));
        network.set_fault(Some(Fault::Remove));
        assert!(network.remove(&a.id, a.address).is_err());
        network.set_fault(None);
        network.remove(&a.id, a.address).unwrap();
    }

    #[test]
    fn a_sleeper_is_heard_for_until_its_wake_has_ended_well() {
        let network = FakeNetwork::default();
        let a = wanted("a", 0, Reach::Isolated);
        let ports = WakePorts::default();
        network.listen(&a.id, a.address, Some(&ports)).unwrap();
        network.deliver(&a.id, a.address).unwrap_err();
        assert_eq!(network.refused(), [a.address]);
        assert_eq!(network.wakes(a.address), Some(ports.clone()));
        network.ensure(&a).unwrap();
        network.deliver(&a.id, a.address).unwrap();
        assert_eq!(network.wakes(a.address), None);
        network.set_fault(Some(Fault::Listen));
        network.listen(&a.id, a.address, Some(&ports)).unwrap_err();
        network.deliver(&a.id, a.address).unwrap();
    }

    #[test]
    fn only_a_network_that_is_there_has_activity() {
        let network = FakeNetwork::default();
        let a = wanted("a", 0, Reach::Isolated);
        let known = [Known { id: a.id.clone(), address: a.address }];
        let inward = Count { packets: 1, bytes: 40 };
        let used = Activity { inward, ..Activity::default() };
        network.set_activity(&a.id, used);
        assert!(network.activity(&known).unwrap().is_empty());
        network.ensure(&a).unwrap();
        let sampled = network.activity(&known).unwrap();
        assert!(matches!(&sampled[..], [(id, Ok(read))] if (id, *read) == (&a.id, used)));
        let counters = network.counters(&a.id).unwrap().unwrap();
        assert_eq!((counters.active_in, counters.active_out), (used.inward, used.outward));
    }
}
