//! The network of a sandbox: in place before its guest's first instruction, with the policy
//! of that moment, and gone some time after its last.
//!
//! ```text
//!   boot, wake:  made or looked over, policy applied ─▶ VMM starts inside it ─▶ guest runs
//!   sleep:       it lingers, so that connections outlive a short sleep ─▶ the reaper removes it
//!   end, delete: removed
//! ```
//!
//! A network outlives the daemon. Start-up removes those of nobody, has those of sleepers
//! linger for what is left to them, and looks those of the running over.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::{
    Entry, Error, Held, Outcome, chain, error::net_failed, operation::Op, trouble::Troubles,
};
use crate::{
    activity::Reading,
    events::Wakeup,
    index::Index,
    machines::Vmms,
    net::{self, Applied, Counters, Known, Network, Ready, Reconciled, Wanted},
    sandbox::{
        NetMode, Period, Record, RowId, SandboxId, Spec, State, Timestamp,
        network::{AddressPlan, GUEST_MAC, Mac, SandboxAddress, WakeOn},
    },
    sync::Arc,
    sys::{clock::Clock, host::own_ids},
    vmm::PlannedNic,
};

/// What is said of a sandbox whose host had forwarding switched off under it.
const FORWARDING_IS_OFF: &str = "the host does not forward IPv4 packets any more, so its guest \
                                 reaches nothing; set net.ipv4.ip_forward = 1 with sysctl";
/// When to try again to remove a network of which something stayed.
const REMOVE_AGAIN: Duration = Duration::from_secs(60);

/// The networks of all sandboxes.
pub struct Networks {
    host: Arc<dyn Network>,
    index: Arc<Index>,
    vmms: Arc<Vmms>,
    clock: Arc<dyn Clock>,
    addresses: AddressPlan,
    /// How long the network of a sandbox stays after that fell asleep.
    linger: Period,
    /// Notified when a network may have to be removed earlier than the reaper thinks.
    reaper_wakeup: Arc<Wakeup>,
    troubles: Troubles,
    /// Whether the host was seen not to forward packets by the last look.
    lacks_forwarding: AtomicBool,
}

/// What the networks are made of.
pub(super) struct NetworkParts {
    pub(super) host: Arc<dyn Network>,
    pub(super) index: Arc<Index>,
    pub(super) vmms: Arc<Vmms>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) addresses: AddressPlan,
    pub(super) linger: Period,
    pub(super) reaper_wakeup: Arc<Wakeup>,
}

impl Networks {
    pub(super) fn new(parts: NetworkParts) -> Self {
        let NetworkParts { host, index, vmms, clock, addresses, linger, reaper_wakeup } = parts;
        let (troubles, lacks_forwarding) = Default::default();
        Self {
            host,
            index,
            vmms,
            clock,
            addresses,
            linger,
            reaper_wakeup,
            troubles,
            lacks_forwarding,
        }
    }

    /// Returns the networks of the host.
    pub(super) fn host(&self) -> &dyn Network {
        self.host.as_ref()
    }

    /// Returns what is wrong with networks and was logged.
    pub(super) fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    /// Returns the address of a sandbox; `None` where it has no network.
    #[must_use]
    pub fn address(&self, record: &Record) -> Option<SandboxAddress> {
        let slot = record.slot.filter(|_| record.spec.net != NetMode::None)?;
        self.addresses.address(slot)
    }

    /// Returns the MAC of a sandbox's guest; `None` where it has no network.
    #[must_use]
    pub fn mac(&self, record: &Record) -> Option<Mac> {
        self.address(record).map(|_| GUEST_MAC)
    }

    /// Returns the file that the namespace of a sandbox is pinned to, if it is there now.
    #[must_use]
    pub fn namespace(&self, record: &Record) -> Option<PathBuf> {
        self.address(record)?;
        self.host.namespace(&record.id)
    }

    /// Returns what passed the firewall of a sandbox and what did not. `None`: it has no
    /// network now.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn counters(&self, entry: &Entry) -> Result<Option<Counters>, Error> {
        if self.address(&entry.record()).is_none() {
            return Ok(None);
        }
        self.host.counters(entry.id()).map_err(net_failed(entry, "counting the packets of"))
    }

    /// Gives a sandbox that is to have a network an address, if it has none yet. It keeps it
    /// until it is deleted.
    pub(super) fn give_address(&self, held: &Held, entry: &Entry) -> Result<(), Error> {
        if entry.record().spec.net == NetMode::None {
            return Ok(());
        }
        let plan = self.addresses;
        let given = self
            .index
            .give_slot(held, entry, plan.capacity())
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        given.map(drop).ok_or_else(|| Error::NoAddress { id: entry.id().clone(), range: plan })
    }

    /// Says what network a sandbox is to have.
    pub(super) fn wanted(&self, record: &Record) -> Option<Wanted> {
        Some(Wanted {
            id: record.id.clone(),
            address: self.address(record)?,
            tap_owner: self.vmms.user_of(record).unwrap_or_else(|| own_ids().0),
            policy: record.spec.network_policy()?,
        })
    }

    /// Sees to it that the network of a sandbox is there, with today's policy, and returns the
    /// guest's device. `None` where it is to have none.
    pub(super) fn connect<'a>(&'a self, op: &mut Op<'a>) -> Result<Option<PlannedNic>, Error> {
        let entry = op.entry;
        self.give_address(op.held, entry)?;
        let Some(wanted) = self.wanted(&entry.record()) else {
            return Ok(None);
        };
        if entry.record().snapshot().is_none() {
            // That of a sleeper stays with it, see `end_failed_start`.
            op.undo.push("removing its network", move || Ok(self.disconnect(entry)?));
        }
        let ready = self.host.ensure(&wanted);
        let Ready { namespace, tap, mac, .. } =
            ready.map_err(net_failed(entry, "making the network of"))?;
        Ok(Some(PlannedNic { namespace, tap: tap.to_owned(), mac }))
    }

    /// Has packets wake a sandbox that fell asleep, if they are to, and lets its network stay
    /// for a while.
    pub(super) fn after_sleep(&self, entry: &Entry) {
        if entry.record().state() != State::Snapshotted {
            return;
        }
        self.let_linger(entry);
        if let Err(error) = self.listen_for(entry) {
            // It sleeps, and a write wakes it.
            tracing::error!(id = %entry.id(), error = chain(&error), "after a sleep");
        }
    }

    /// Has packets wake a sandbox that sleeps, or be refused, as its `config` says.
    pub(super) fn listen_for(&self, entry: &Entry) -> Result<(), Error> {
        let record = entry.record();
        let Some(address) = self.address(&record) else { return Ok(()) };
        if record.state() != State::Snapshotted {
            self.host.stop_listening(address);
            return Ok(());
        }
        let ports = (record.spec.wake_on == WakeOn::Packet).then_some(&record.spec.wake_ports);
        let failed = net_failed(entry, "listening for packets to");
        match self.host.listen(entry.id(), address, ports).map_err(failed) {
            Err(error) if ports.is_none() => {
                // Nothing was to wake it; who speaks to it waits instead of being told.
                tracing::warn!(id = %entry.id(), error = chain(&error), "refusing its packets");
                self.host.stop_listening(address);
                Ok(())
            }
            done => done,
        }
    }

    /// Passes on what was sent to a sandbox while it slept. Its guest is about to run.
    pub(super) fn deliver<'a>(&'a self, entry: &'a Entry) -> Result<(), Error> {
        let record = entry.record();
        let Some(address) = self.address(&record) else { return Ok(()) };
        let failed = net_failed(entry, "delivering queued packets to");
        self.host.deliver(entry.id(), address).map_err(failed)
    }

    /// Tells whoever sent something to a sandbox that it is not going to have it.
    pub(super) fn refuse_packets(&self, entry: &Entry) {
        if let Some(address) = self.address(&entry.record()) {
            self.host.refuse(address);
        }
    }

    /// Lets the network of a sandbox that fell asleep stay for a while.
    fn let_linger(&self, entry: &Entry) {
        let record = entry.record();
        if let (Some(_), Period::After(time)) = (self.address(&record), self.linger) {
            let since = record.snapshot().map_or_else(|| self.clock.now(), |snapshot| snapshot.at);
            self.host.linger(entry.id(), since.after(time));
            self.reaper_wakeup.notify();
        }
    }

    /// Removes the network of a sandbox whose guest is no more.
    pub(super) fn disconnect(&self, entry: &Entry) -> Result<(), Error> {
        let record = entry.record();
        let address = record.slot.and_then(|slot| self.addresses.address(slot));
        let Some(address) = address else { return Ok(()) };
        if record.state() != State::Snapshotted {
            self.host.stop_listening(address);
        }
        let failed = net_failed(entry, "removing the network of");
        self.host.remove(entry.id(), address).map_err(failed)
    }

    /// Removes the network of a sandbox whose guest is lost. What stays is removed by the next
    /// start-up, or used again by the next boot.
    pub(super) fn abandon(&self, entry: &Entry) {
        if let Err(error) = self.disconnect(entry) {
            tracing::error!(id = %entry.id(), error = chain(&error), "after the end of a guest");
        }
    }

    /// Puts the policy of a sandbox in force, if it has a network now. The one of a sandbox that
    /// runs, by the process `vmm`, is put back first where somebody removed it.
    pub(super) fn apply(&self, entry: &Entry, vmm: Option<u32>) -> Result<(), Error> {
        let Some(wanted) = self.wanted(&entry.record()) else { return Ok(()) };
        let failed = net_failed(entry, "applying the network policy of");
        let applied = self.host.apply_policy(&wanted).map_err(failed)?;
        if applied == Applied::NotThere && entry.record().state() == State::Running {
            return self.put_back(entry, vmm);
        }
        Ok(())
    }

    /// Puts back what is missing of the network of a sandbox, if it runs, by the process `vmm`.
    /// Its lock is held.
    pub(super) fn put_back(&self, entry: &Entry, vmm: Option<u32>) -> Result<(), Error> {
        let record = entry.record();
        let Some(wanted) = self.wanted(&record).filter(|_| record.state() == State::Running) else {
            return Ok(());
        };
        let what = self
            .host
            .put_back(&wanted, vmm)
            .map_err(net_failed(entry, "checking the network of"))?;
        if !what.is_empty() {
            let what = what.join(", ");
            tracing::warn!(id = %entry.id(), what, "restored what another program changed or \
                                                    removed");
        }
        Ok(())
    }

    /// Returns when the first network of a sleeper has lingered for long enough.
    #[must_use]
    pub fn next_lingered(&self) -> Option<Timestamp> {
        self.host.next_lingered()
    }

    /// Returns the sleepers whose networks have lingered for long enough.
    #[must_use]
    pub fn lingered(&self) -> Vec<RowId> {
        let due = self.host.lingered(self.clock.now());
        due.iter().filter_map(|id| Some(self.index.by_id(id)?.row())).collect()
    }

    /// Removes the network of a sleeper that has lingered for long enough, if it still sleeps.
    ///
    /// # Errors
    /// Where something of it stays. It is due again then.
    pub fn remove_lingered(&self, _: &Held, entry: &Entry) -> Result<Outcome, Error> {
        let until = self.host.lingers_until(entry.id());
        let is_due = until.is_some_and(|until| until <= self.clock.now());
        if !is_due || entry.record().state() != State::Snapshotted {
            return Ok(Outcome::Skipped);
        }
        self.disconnect(entry).inspect_err(|_| {
            self.host.linger(entry.id(), self.clock.now().after(REMOVE_AGAIN));
        })?;
        Ok(Outcome::Done)
    }

    /// Takes the range of addresses for this daemon, if it may have use for it: if a sandbox
    /// has a network, or a new one, by `template`, will. One that needs none may run beside
    /// another daemon with the same range.
    ///
    /// # Errors
    /// Where another daemon on this host has it, or a part of it.
    pub fn claim(&self, template: &Spec) -> Result<(), net::Error> {
        let has_address = |entry: &Arc<Entry>| self.address(&entry.record()).is_some();
        let is_used = template.net != NetMode::None
            || self.index.entries_after(RowId(0)).any(|entry| has_address(&entry));
        if is_used { self.host.claim() } else { Ok(()) }
    }

    /// Removes the networks that are of no sandbox, has those of sleepers linger, and
    /// removes those of what is stopped. Called once, before anybody else asks for any.
    ///
    /// Those of sandboxes that run are in force as they are, and are looked over by
    /// [`super::upkeep`]. `note` is told of what failed.
    pub(super) fn reconcile(&self, note: impl Fn(&Entry, &Error)) {
        let entries = self.with_addresses();
        let seen = entries.iter().filter_map(|entry| {
            let (id, address) = (entry.id().clone(), self.address(&entry.record())?);
            Some(Known { id, address })
        });
        // The guest of a row that makes no sense may run.
        let left_out = self.index.malformed().iter().filter_map(|row| {
            let address = self.addresses.address(row.slot?)?;
            Some(Known { id: row.id.clone()?, address })
        });
        let known: Vec<_> = seen.chain(left_out).collect();
        // What stays is nobody's, and the next start looks again.
        let found = self.host.reconcile(&known).unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "looking for networks without a sandbox");
            Reconciled::default()
        });
        for name in found.removed {
            tracing::info!(name, "removed parts of networks without a sandbox");
        }
        for error in found.left {
            tracing::error!(error, "removing parts of networks without a sandbox");
        }
        let there: HashSet<&SandboxId> = found.there.iter().collect();
        let mut any_listened_for = false;
        for entry in &entries {
            let record = entry.record();
            // Where neither packets wake it nor its network lingers there is nothing to note
            // of it but that somebody sleeps.
            let is_noted = record.spec.wake_on == WakeOn::Packet || there.contains(&record.id);
            if record.state() != State::Snapshotted || (any_listened_for && !is_noted) {
                continue;
            }
            any_listened_for = true;
            if let Err(error) = self.listen_for(entry) {
                tracing::error!(id = %entry.id(), error = chain(&error), "reconciling");
                note(entry, &error);
            }
        }
        for id in found.there {
            let Some(entry) = self.index.by_id(&id) else { continue };
            match entry.record().state() {
                State::Snapshotted => self.let_linger(&entry),
                State::Stopped => self.abandon(&entry),
                State::Booting
                | State::Running
                | State::Snapshotting
                | State::Restoring
                | State::Deleting => {}
            }
        }
    }

    /// Looks whether the host forwards, if a sandbox that runs depends on it. Called at each
    /// look over the networks.
    pub(super) fn look_at_forwarding(&self, running: &[Arc<Entry>]) {
        let lacks = running.iter().any(|entry| needs_forwarding(&entry.record()))
            && matches!(self.host.forwards(), Err(net::Error::Lacking { .. }));
        if lacks != self.lacks_forwarding.swap(lacks, Ordering::Relaxed) && lacks {
            tracing::error!("{FORWARDING_IS_OFF}");
        }
    }

    /// Says what a sandbox lacks if the host was seen not to forward.
    pub(super) fn lacks_forwarding(&self, record: &Record) -> Option<Cow<'static, str>> {
        let lacks = self.lacks_forwarding.load(Ordering::Relaxed) && needs_forwarding(record);
        lacks.then_some(Cow::Borrowed(FORWARDING_IS_OFF))
    }

    /// Removes what is the host's of networks, if nobody has one. Called when all else is over.
    pub fn retire(&self) {
        if let Err(error) = self.host.retire() {
            tracing::warn!(error = chain(&error), "removing the host's part of networks");
        }
    }

    /// Returns what passed the firewalls of these sandboxes and is a sign of use, for those that
    /// have a network.
    pub(super) fn active_bytes(
        &self,
        records: impl Iterator<Item = Arc<Record>>,
    ) -> HashMap<SandboxId, Reading<u64>> {
        let known = |record: Arc<Record>| {
            Some(Known { id: record.id.clone(), address: self.address(&record)? })
        };
        let known: Vec<_> = records.filter_map(known).collect();
        let found = if known.is_empty() { Ok(Vec::new()) } else { self.host.activity(&known) };
        let read = |(id, read): net::Sampled| {
            let reading = read.map_or_else(
                |error| {
                    tracing::debug!(%id, error = chain(&error), "reading its traffic");
                    Reading::Failed
                },
                |activity| Reading::Is(activity.bytes()),
            );
            (id, reading)
        };
        match found {
            Ok(found) => found.into_iter().map(read).collect(),
            Err(error) => {
                // Nobody asked, and the next look tries again.
                tracing::warn!(error = chain(&error), "looking for traffic of networks");
                known.into_iter().map(|known| (known.id, Reading::Failed)).collect()
            }
        }
    }

    /// Returns what has passed the firewall of a sandbox by now and is a sign of use. `None`: it
    /// is to have no network.
    pub(super) fn active(&self, entry: &Entry) -> Result<Option<net::Activity>, Error> {
        if self.address(&entry.record()).is_none() {
            return Ok(None);
        }
        let failed = net_failed(entry, "counting the packets of");
        let counters = self.host.counters(entry.id()).map_err(failed)?;
        let Some(counters) = counters else { return Err(failed(net::Error::NotThere)) };
        Ok(Some(net::Activity { inward: counters.active_in, outward: counters.active_out }))
    }

    /// Returns a sentence for each trouble that a sandbox has with its network while it runs.
    pub(super) fn lacks(&self, record: &Record) -> impl Iterator<Item = Cow<'static, str>> {
        let has = record.state() == State::Running && self.address(record).is_some();
        let own = has.then(|| self.troubles.of(record.row)).into_iter().flatten();
        own.map(Cow::Owned).chain(self.lacks_forwarding(record))
    }

    /// Returns all sandboxes that have an address.
    fn with_addresses(&self) -> Vec<Arc<Entry>> {
        let all = self.index.entries_after(RowId(0));
        all.filter(|entry| self.address(&entry.record()).is_some()).collect()
    }
}

impl fmt::Debug for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Networks").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// Says whether a sandbox runs that reaches anything beyond the host.
fn needs_forwarding(record: &Record) -> bool {
    let policy = record.spec.network_policy();
    record.state() == State::Running && policy.is_some_and(|policy| policy.needs_forwarding())
}
