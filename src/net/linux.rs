//! The networks of this host.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{OnceLock, atomic::AtomicUsize},
};

use super::{
    Activity, Applied, Changed, Count, Counters, Error, Known, Looked, Network, OnTrigger, Ready,
    Reconciled, Sampled, Wanted, chain, firewall,
    host::{self, HostFirewall},
    linger::Lingering,
    link,
    namespace::{self, Design, Usability},
    protected::{InForce, Protected},
    range::{self, Owner, Range, Whose},
    route,
    wake_on_packet::WakeOnPacket,
    watch::Watch,
};
use crate::{
    sandbox::{
        SandboxId, Timestamp,
        network::{
            AddressPlan, GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX, Ignored,
            SandboxAddress, WakePorts,
        },
    },
    sync::{Arc, Mutex, lock},
    sys::{
        clock::Stopwatch,
        mount,
        netlink::{Answers, Kernel},
        netns::{self, Namespace},
        netns_lock::NetnsLock,
    },
};

/// Where namespaces are pinned, in the daemon's runtime directory.
const PINS: &str = "netns";

/// What a network's activity was when it was last looked at.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The host's end of its link. The kernel gives a number to no other link after it.
    link: u32,
    /// How many packets had passed it.
    packets: u64,
    activity: Activity,
}

/// The networks of this host, as the kernel has them.
///
/// # Locking
/// `prepared` is held while the host is prepared, so that whoever comes second waits for
/// it, and then `claim` may be locked. `wake_on_packet` is held while the
/// listener is started, and then `prepared` may be locked; its users hold neither.
pub struct LinuxNetwork {
    pub(super) plan: AddressPlan,
    store: PathBuf,
    owner: OnceLock<Owner>,
    claim: Mutex<Option<NetnsLock>>,
    pub(super) pins: PathBuf,
    pub(super) ignored: Ignored,
    lingering: Lingering,
    seen: Mutex<BTreeMap<SandboxId, Seen>>,
    /// What is in force for all; `None` before the first network is wanted.
    pub(super) prepared: Mutex<Option<HostFirewall>>,
    /// The host's addresses that no guest reaches. `in_force` may be locked after it.
    pub(super) protected: Mutex<Protected>,
    pub(super) since: Stopwatch,
    /// The firewalls of those that have a network and do not sleep. A leaf lock.
    pub(super) in_force: Mutex<BTreeMap<SandboxId, InForce>>,
    /// Whose namespace is to be looked into next.
    pub(super) turn: AtomicUsize,
    watch: Mutex<Option<Watch>>,
    pub(super) on_trigger: Option<Arc<OnTrigger>>,
    wake_on_packet: Mutex<Option<Arc<WakeOnPacket>>>,
}

impl LinuxNetwork {
    /// Makes networks with the addresses of `plan`, pinned in the directory `runtime`, which
    /// also tells whose they are unless [`Self::of_store`] says it. Nothing of the host is
    /// touched before the first one is wanted, so that a host without nftables still has
    /// sandboxes without a network.
    #[must_use]
    pub fn new(plan: AddressPlan, runtime: &Path) -> Self {
        Self {
            plan,
            store: runtime.to_owned(),
            owner: OnceLock::new(),
            claim: Mutex::default(),
            pins: runtime.join(PINS),
            ignored: Ignored::default(),
            lingering: Lingering::default(),
            seen: Mutex::default(),
            prepared: Mutex::default(),
            protected: Mutex::default(),
            since: Stopwatch::start(),
            in_force: Mutex::default(),
            turn: AtomicUsize::new(0),
            watch: Mutex::default(),
            on_trigger: None,
            wake_on_packet: Mutex::new(None),
        }
    }

    /// Calls `on_trigger` for packets to sleeping sandboxes, for it to wake them. It is called
    /// by the listening thread, and only passes the trigger on. Without it only a write wakes
    /// a sandbox.
    #[must_use]
    pub fn on_trigger(self, on_trigger: Arc<OnTrigger>) -> Self {
        Self { on_trigger: Some(on_trigger), ..self }
    }

    /// Has the networks be those of the store in `dir`, as is written on them.
    #[must_use]
    pub fn of_store(self, dir: &Path) -> Self {
        Self { store: dir.to_owned(), ..self }
    }

    /// Has packets that are `ignored` pass without being activity.
    #[must_use]
    pub fn ignoring(self, ignored: Ignored) -> Self {
        Self { ignored, ..self }
    }

    /// Removes everything that is ours, of every sandbox and of the host.
    ///
    /// # Errors
    /// Where something stays; the rest was removed all the same.
    pub fn dismantle(&self) -> Result<(), Error> {
        // Its thread has ended when nobody has it.
        drop(lock(&self.wake_on_packet).take());
        let mut prepared = lock(&self.prepared);
        let mut errors: Vec<String> = Vec::new();
        match self.reconcile(&[]) {
            Ok(found) => errors.extend(found.left),
            Err(error) => errors.push(chain(&error)),
        }
        let dismantled = self.range().and_then(|range| host::dismantle(&range));
        errors.extend(dismantled.err().map(|error| chain(&error)));
        match mount::detach(&self.pins) {
            Err(error) if !is_absent(&error) => errors.push(format!("unmounting: {error}")),
            Ok(()) | Err(_) => {}
        }
        match fs::remove_dir(&self.pins) {
            Err(error) if !is_absent(&error) => {
                errors.push(format!("removing {}: {error}", self.pins.display()));
            }
            Ok(()) | Err(_) => {}
        }
        *prepared = None;
        drop(lock(&self.claim).take());
        if errors.is_empty() { Ok(()) } else { Err(Error::Several(errors)) }
    }

    pub(super) fn pin(&self, id: &SandboxId) -> PathBuf {
        self.pins.join(id.as_str())
    }

    pub(super) fn open(&self, id: &SandboxId) -> Result<Option<Namespace>, Error> {
        Namespace::open(&self.pin(id)).map_err(Error::host("opening the namespace"))
    }

    /// Returns the range, with whose it is.
    pub(super) fn range(&self) -> Result<Range, Error> {
        let owner = match self.owner.get() {
            Some(owner) => owner,
            None => {
                let found = Owner::of(&self.store)
                    .map_err(Error::host(format!("looking at {}", self.store.display())))?;
                self.owner.get_or_init(|| found)
            }
        };
        Ok(Range::new(self.plan, owner.clone()))
    }

    pub(super) fn prepare(&self) -> Result<(), Error> {
        let mut prepared = lock(&self.prepared);
        if prepared.is_none() {
            // Who is forbidden to make networks takes nothing for them.
            link::here()?;
            self.claim()?;
            *prepared = Some(host::prepare(&self.range()?, &self.pins)?);
        }
        Ok(())
    }

    /// Returns the listener for packets, which exists once a sandbox sleeps.
    pub(super) fn wake_on_packet(&self) -> Option<Arc<WakeOnPacket>> {
        lock(&self.wake_on_packet).clone()
    }

    /// Returns the listener for packets, and starts it if there is none or it does not work.
    pub(super) fn ensure_listener(
        &self,
        on_trigger: &Arc<OnTrigger>,
    ) -> Result<Arc<WakeOnPacket>, Error> {
        let mut wake_on_packet = lock(&self.wake_on_packet);
        let mut sleepers = Vec::new();
        if let Some(there) = wake_on_packet.as_ref() {
            if there.works() {
                return Ok(Arc::clone(there));
            }
            // Somebody took its device away.
            sleepers = there.sleepers();
            *lock(&self.prepared) = None;
        }
        self.prepare()?;
        let new = Arc::new(WakeOnPacket::start(self.plan, Arc::clone(on_trigger), sleepers)?);
        *wake_on_packet = Some(Arc::clone(&new));
        Ok(new)
    }

    /// Says whether packets to the sandbox are queued for now.
    pub(super) fn is_queueing(&self, address: SandboxAddress) -> bool {
        self.wake_on_packet().is_some_and(|wake_on_packet| wake_on_packet.may_wake(address))
    }

    /// Takes the host's end of a sandbox's link into use. Its route comes last, and for one
    /// whose packets are still queued, not yet.
    fn connect(&self, address: SandboxAddress) -> Result<(), Error> {
        let links = link::here()?;
        namespace::connect(&links, &self.range()?, address)?;
        if self.is_queueing(address) {
            return Ok(());
        }
        namespace::route(&links, &self.plan, address)?;
        // Until now what came from elsewhere was for a sleeper, and not to be reset.
        if let Some(wake_on_packet) = self.wake_on_packet() {
            wake_on_packet.deliver(address);
        }
        Ok(())
    }

    /// Sees to it that a sandbox has its own part, with the host's in place.
    fn ensure_own(&self, wanted: &Wanted) -> Result<Ready, Error> {
        let design = self.design(wanted)?;
        let usable = match self.open(&wanted.id)? {
            None => None,
            Some(namespace) => match namespace::renew(&namespace, design.clone())? {
                Usability::Whole => Some(namespace),
                Usability::Unusable => None,
            },
        };
        let links = link::here()?;
        let namespace = match usable {
            Some(namespace) if link::find(&links, &wanted.address.host_link())?.is_some() => {
                self.connect(wanted.address)?;
                namespace
            }
            Some(_) | None => {
                self.take_away(&wanted.id, wanted.address)?;
                self.make(design)?
            }
        };
        self.lingering.forget(&wanted.id);
        Ok(self.ready(&wanted.id, &namespace))
    }

    /// Makes the network of a sandbox that has none.
    fn make(&self, design: Design) -> Result<Namespace, Error> {
        let Wanted { id, address, .. } = design.wanted.clone();
        // The kernel takes links away some time after their namespace.
        host::set_aside(&self.range()?, &address.host_link())?;
        let made = namespace::make(&self.pin(&id), design)?;
        match self.connect(address) {
            Ok(()) => Ok(made),
            Err(error) => match self.take_away(&id, address) {
                Ok(()) => Err(error),
                Err(also) => Err(Error::Several(vec![chain(&error), chain(&also)])),
            },
        }
    }

    /// Takes away the route and the pin, after which nothing comes and nothing goes. The
    /// kernel takes the links away with the namespace, in its own time: to wait for it
    /// would take ten times as long as all the rest.
    fn take_away(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error> {
        let unrouted = match link::here() {
            Ok(links) => self.unroute(&links, address),
            // Deleting has to work where networks are forbidden too. The route goes with the
            // link, and that with the namespace.
            Err(error) => {
                tracing::warn!(%id, error = chain(&error), "its route is not removed by itself");
                Ok(())
            }
        };
        let unpinned = netns::unpin(&self.pin(id)).map_err(Error::host("removing the namespace"));
        if let Some(wake_on_packet) = self.wake_on_packet().filter(|_| unpinned.is_ok()) {
            wake_on_packet.end_linger(address);
        }
        unrouted.and(unpinned)
    }

    /// Removes the route to a sandbox. The route to somebody else's link is theirs too.
    fn unroute(&self, links: &Kernel, address: SandboxAddress) -> Result<(), Error> {
        match host::own_link(links, &self.range()?, &address.host_link()) {
            Ok(_) => Ok(links.apply(vec![route::remove(address.ip())], Answers::Each)?),
            Err(Error::NotOurs { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn ready(&self, id: &SandboxId, namespace: &Namespace) -> Ready {
        Ready {
            namespace: self.pin(id),
            identity: namespace.identity(),
            tap: firewall::TAP,
            mac: GUEST_MAC,
            guest: GUEST_ADDRESS,
            prefix: GUEST_PREFIX,
            gateway: GATEWAY_ADDRESS,
        }
    }

    /// Returns the names of all pins.
    fn pinned(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.pins) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::host("listing the namespaces")(source)),
        };
        entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>()
            .map_err(Error::host("listing the namespaces"))
    }
}

impl Network for LinuxNetwork {
    fn claim(&self) -> Result<(), Error> {
        let mut claim = lock(&self.claim);
        if claim.is_none() {
            *claim = Some(range::claim(&self.plan)?);
        }
        Ok(())
    }

    fn look(&self, awake: &[Known]) -> Looked {
        self.look_at(awake)
    }

    fn put_back(&self, wanted: &Wanted, vmm: Option<u32>) -> Result<Vec<&'static str>, Error> {
        self.put_back_of(wanted, vmm)
    }

    fn watch(&self, changed: Arc<Changed>) -> Result<(), Error> {
        *lock(&self.watch) = Some(Watch::start(self.plan, changed)?);
        Ok(())
    }

    fn ensure(&self, wanted: &Wanted) -> Result<Ready, Error> {
        self.prepare()?;
        Self::tell_host_put_back(&self.put_host_back()?);
        if wanted.policy.needs_forwarding() {
            host::forwards()?;
        }
        route::is_free(&link::here()?, wanted.address.ip())?;
        let ready = self.ensure_own(wanted);
        if ready.is_err() {
            self.forget_in_force(&wanted.id);
        }
        ready
    }

    fn apply_policy(&self, wanted: &Wanted) -> Result<Applied, Error> {
        // What is in force is not what is to be, until it was looked at.
        self.forget_in_force(&wanted.id);
        let Some(namespace) = self.open(&wanted.id)? else { return Ok(Applied::NotThere) };
        if wanted.policy.needs_forwarding() {
            host::forwards()?;
        }
        Self::tell_host_put_back(&self.put_host_back()?);
        namespace::apply_policy(&namespace, self.design(wanted)?)
            .inspect_err(|_| self.forget_in_force(&wanted.id))?;
        Ok(Applied::Now)
    }

    fn namespace(&self, id: &SandboxId) -> Option<PathBuf> {
        // One that cannot be opened is none.
        let there = self.open(id).ok().flatten();
        there.map(|_| self.pin(id))
    }

    fn open_tap(&self, id: &SandboxId) -> Result<OwnedFd, Error> {
        let namespace = self.open(id)?.ok_or(Error::NotThere)?;
        namespace::open_tap(&namespace)
    }

    fn listen(
        &self,
        id: &SandboxId,
        address: SandboxAddress,
        ports: Option<&WakePorts>,
    ) -> Result<(), Error> {
        let Some(on_trigger) = &self.on_trigger else { return Ok(()) };
        let lingers = self.open(id)?.is_some();
        self.ensure_listener(on_trigger)?.listen(address, ports, lingers)
    }

    fn deliver(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error> {
        let Some(wake_on_packet) =
            self.wake_on_packet().filter(|wake_on_packet| wake_on_packet.may_wake(address))
        else {
            return Ok(());
        };
        let routed = self.open(id).and_then(|namespace| {
            let links = link::here()?;
            let is_up = namespace::wait_until_up(&namespace.ok_or(Error::NotThere)?)?
                && link::wait_until_up(&links, &address.host_link())?;
            if !is_up {
                tracing::warn!(%id, "no VMM has the guest's device open; packets to it are lost");
            }
            namespace::route(&links, &self.plan, address).map(drop)
        });
        match routed {
            Ok(()) => wake_on_packet.deliver(address),
            Err(_) => wake_on_packet.refuse(address),
        }
        routed
    }

    fn refuse(&self, address: SandboxAddress) {
        if let Some(wake_on_packet) = self.wake_on_packet() {
            wake_on_packet.refuse(address);
        }
    }

    fn stop_listening(&self, address: SandboxAddress) {
        if let Some(wake_on_packet) = self.wake_on_packet() {
            wake_on_packet.stop_listening(address);
        }
    }

    fn linger(&self, id: &SandboxId, until: Timestamp) {
        // Its wake applies the policy again.
        self.forget_in_force(id);
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

    fn remove(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error> {
        self.take_away(id, address)?;
        self.lingering.forget(id);
        self.forget_in_force(id);
        lock(&self.seen).remove(id);
        Ok(())
    }

    fn reconcile(&self, known: &[Known]) -> Result<Reconciled, Error> {
        if known.is_empty() && !self.has_left_something()? {
            return Ok(Reconciled::default());
        }
        self.claim()?;
        let ids: BTreeSet<&str> = known.iter().map(|known| known.id.as_str()).collect();
        let mut found = Reconciled::default();
        let pinned = self.pinned()?;
        for name in &pinned {
            if ids.contains(name.as_str()) {
                continue;
            }
            match netns::unpin(&self.pins.join(name)) {
                Ok(()) => found.removed.push(name.clone()),
                Err(error) => found.left.push(format!("removing the namespace {name}: {error}")),
            }
        }
        // Most that sleep have none, and are not looked for one by one.
        let pinned: BTreeSet<&str> = pinned.iter().map(String::as_str).collect();
        let mut kept = BTreeSet::new();
        for Known { id, address } in known.iter().filter(|it| pinned.contains(it.id.as_str())) {
            if self.open(id)?.is_some() {
                kept.insert(address.host_link());
                found.there.push(id.clone());
            }
        }
        let links = link::here()?;
        let range = self.range()?;
        if let Err(error) = host::own_device(&links, &range) {
            // Nor are the links and routes ours, then.
            found.left.push(chain(&error));
            return Ok(found);
        }
        // A daemon that was killed has left the route to its device. Callers are not to wait
        // for a daemon that does not listen.
        if lock(&self.wake_on_packet).is_none() {
            links.apply(vec![route::remove(self.plan.range())], Answers::Each)?;
        }
        for link in link::list(&links)? {
            if !host::is_of_a_sandbox(&range, &link) || kept.contains(&link.name) {
                continue;
            }
            if range.whose(&link) == Whose::Unmarked {
                found.left.push(format!("the link {} has no mark of an owner", link.name));
                continue;
            }
            match host::remove_link(&links, &range, &link.name) {
                Ok(()) => found.removed.push(link.name),
                Err(error) => found.left.push(chain(&error)),
            }
        }
        Ok(found)
    }

    fn activity(&self, of: &[Known]) -> Result<Vec<Sampled>, Error> {
        let range = self.range()?;
        let links: BTreeMap<String, (u32, u64)> = link::list(&link::here()?)?
            .into_iter()
            .filter(|link| host::is_of_a_sandbox(&range, link))
            .map(|link| (link.name, (link.index, link.packets)))
            .collect();
        let there = of.iter().filter_map(|known| {
            let (link, packets) = links.get(&known.address.host_link())?;
            Some((&known.id, *link, *packets))
        });
        let sampled = |(id, link, packets): (&SandboxId, u32, u64)| {
            (id.clone(), self.activity_of(id, link, packets))
        };
        Ok(there.map(sampled).collect())
    }

    fn retire(&self) -> Result<(), Error> {
        // The directory is there since a network was, perhaps an earlier daemon's.
        let is_there = self.pins.exists();
        if is_there && self.pinned()?.is_empty() { self.dismantle() } else { Ok(()) }
    }

    fn forwards(&self) -> Result<(), Error> {
        host::forwards()
    }

    fn host_addresses(&self) -> Result<Vec<Ipv4Addr>, Error> {
        link::addresses(&link::here()?)
    }

    fn counters(&self, id: &SandboxId) -> Result<Option<Counters>, Error> {
        let Some(namespace) = self.open(id)? else { return Ok(None) };
        let counted = namespace::counters(&namespace)?;
        let count = |wanted: &str| {
            let found = counted.iter().find(|(name, ..)| name == wanted);
            found.map_or_else(Count::default, |(_, packets, bytes)| Count {
                packets: *packets,
                bytes: *bytes,
            })
        };
        Ok(Some(Counters {
            guest_out: count(firewall::GUEST_OUT),
            guest_in: count(firewall::GUEST_IN),
            host_in: count(firewall::HOST_IN),
            host_out: count(firewall::HOST_OUT),
            active_in: count(firewall::ACTIVE_IN),
            active_out: count(firewall::ACTIVE_OUT),
            spoofed: count(firewall::SPOOFED),
            refused: count(firewall::REFUSED),
            invalid: count(firewall::INVALID_STATE),
            excess: count(firewall::EXCESS),
            unasked: count(firewall::UNASKED),
        }))
    }
}

impl LinuxNetwork {
    /// Says whether an earlier daemon of this store has left anything on this host.
    fn has_left_something(&self) -> Result<bool, Error> {
        if self.pins.exists() {
            return Ok(true);
        }
        match host::own_device(&link::here()?, &self.range()?) {
            Ok(device) => Ok(device.is_some()),
            // What is somebody else's is none of our business.
            Err(Error::NotOurs { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the activity of a network whose link has passed `packets` by now.
    fn activity_of(&self, id: &SandboxId, link: u32, packets: u64) -> Result<Activity, Error> {
        let before = lock(&self.seen).get(id).copied();
        if let Some(before) = before.filter(|seen| (seen.link, seen.packets) == (link, packets)) {
            return Ok(before.activity);
        }
        // Its link is there, so one whose namespace is not found has traffic that nobody sees.
        let counters = self.counters(id)?.ok_or(Error::NotThere)?;
        let activity = Activity { inward: counters.active_in, outward: counters.active_out };
        lock(&self.seen).insert(id.clone(), Seen { link, packets, activity });
        Ok(activity)
    }
}

impl fmt::Debug for LinuxNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinuxNetwork")
            .field("plan", &self.plan)
            .field("pins", &self.pins)
            .field("wake_on_packet", &self.wake_on_packet())
            .finish_non_exhaustive()
    }
}

/// Says whether there was nothing to remove, or to unmount.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
}
