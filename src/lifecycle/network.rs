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
    collections::HashSet,
    io,
    path::PathBuf,
    sync::{atomic::Ordering, mpsc},
    time::Duration,
};

use super::{Entry, Error, Held, Lifecycle, Wait, chain, error::net_failed, undo::Undo};
use crate::{
    net::{self, Applied, Counters, Known, Ready, Reconciled, Ring, Wanted},
    sandbox::{
        Cause, NetMode, Period, Record, RowId, SandboxId, State, Timestamp,
        network::{GUEST_MAC, Mac, SandboxAddress, WakeOn},
    },
    sync::Arc,
    sys::host::own_ids,
    vmm::PlannedNic,
};

/// What is said of a sandbox whose host had forwarding switched off under it.
const FORWARDING_IS_OFF: &str = "the host does not forward IPv4 packets any more, so its guest \
                                 reaches nothing; set net.ipv4.ip_forward = 1 with sysctl";
/// When to try again to remove a network of which something stayed.
const REMOVE_AGAIN: Duration = Duration::from_secs(60);

impl Lifecycle {
    /// Returns the address of a sandbox; `None` where it has no network.
    #[must_use]
    pub fn address(&self, record: &Record) -> Option<SandboxAddress> {
        let slot = record.slot.filter(|_| record.spec.net != NetMode::None)?;
        self.settings.addresses.address(slot)
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
        self.network.namespace(&record.id)
    }

    /// Returns what passed the firewall of a sandbox and what did not. `None`: it has no
    /// network now.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn network_counters(&self, entry: &Entry) -> Result<Option<Counters>, Error> {
        if self.address(&entry.record()).is_none() {
            return Ok(None);
        }
        self.network.counters(entry.id()).map_err(net_failed(entry, "counting the packets of"))
    }

    /// Gives a sandbox that is to have a network an address, if it has none yet. It keeps it
    /// until it is deleted.
    pub(super) fn give_address(&self, held: &Held, entry: &Entry) -> Result<(), Error> {
        if entry.record().spec.net == NetMode::None {
            return Ok(());
        }
        let plan = self.settings.addresses;
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
    pub(super) fn connect<'a>(
        &'a self,
        held: &Held,
        entry: &'a Entry,
        undo: &mut Undo<'a>,
    ) -> Result<Option<PlannedNic>, Error> {
        self.give_address(held, entry)?;
        let Some(wanted) = self.wanted(&entry.record()) else {
            return Ok(None);
        };
        if entry.record().snapshot().is_none() {
            // That of a sleeper stays with it, see `end_failed`.
            undo.push("removing its network", move || Ok(self.disconnect(entry)?));
        }
        let ready = self.network.ensure(&wanted);
        let Ready { namespace, tap, mac, .. } =
            ready.map_err(net_failed(entry, "making the network of"))?;
        Ok(Some(PlannedNic { namespace, tap: tap.to_owned(), mac }))
    }

    /// Has packets wake a sandbox that fell asleep, if they are to, and lets its network stay
    /// for a while.
    pub(super) fn leave_asleep(&self, entry: &Entry) {
        if entry.record().state() != State::Snapshotted {
            return;
        }
        self.let_linger(entry);
        if let Err(error) = self.hear_for(entry) {
            // It sleeps, and a write wakes it.
            tracing::error!(id = %entry.id(), error = chain(&error), "after a sleep");
        }
    }

    /// Has packets wake a sandbox that sleeps, or be refused, as its `config` says.
    pub(super) fn hear_for(&self, entry: &Entry) -> Result<(), Error> {
        let record = entry.record();
        let Some(address) = self.address(&record) else { return Ok(()) };
        if record.state() != State::Snapshotted {
            self.network.deafen(address);
            return Ok(());
        }
        let ports = (record.spec.wake_on == WakeOn::Packet).then_some(&record.spec.wake_ports);
        let failed = net_failed(entry, "listening for packets to");
        match self.network.listen(entry.id(), address, ports).map_err(failed) {
            Err(error) if ports.is_none() => {
                // Nothing was to wake it; who speaks to it waits instead of being told.
                tracing::warn!(id = %entry.id(), error = chain(&error), "refusing its packets");
                self.network.deafen(address);
                Ok(())
            }
            done => done,
        }
    }

    /// Passes on what was sent to a sandbox while it slept. Its guest is about to run.
    pub(super) fn deliver<'a>(&'a self, entry: &'a Entry) -> Result<(), Error> {
        let record = entry.record();
        let Some(address) = self.address(&record) else { return Ok(()) };
        let failed = net_failed(entry, "passing on what was sent to");
        self.network.deliver(entry.id(), address).map_err(failed)
    }

    /// Tells whoever sent something to a sandbox that it is not going to have it.
    pub(super) fn refuse_packets(&self, entry: &Entry) {
        if let Some(address) = self.address(&entry.record()) {
            self.network.refuse(address);
        }
    }

    /// Starts the thread that hears of packets to sleepers. Each wake is then done on a
    /// thread of its own.
    ///
    /// # Errors
    /// Where there can be no such thread.
    pub fn attend_rings(
        self: &Arc<Self>,
        rings: mpsc::Receiver<(SandboxAddress, Ring)>,
    ) -> io::Result<()> {
        let this = Arc::downgrade(self);
        std::thread::Builder::new().name("dozed-rings".to_owned()).spawn(move || {
            while let Ok((address, ring)) = rings.recv() {
                let Some(lifecycle) = this.upgrade() else { break };
                let answering = Arc::clone(&lifecycle);
                if lifecycle.pool.run(move || answering.answer(address, ring)).is_err() {
                    tracing::warn!(%address, "all threads are busy; a packet wakes nobody");
                    lifecycle.network.refuse(address);
                }
            }
        })?;
        Ok(())
    }

    /// Wakes a sandbox for a packet.
    pub(super) fn answer(&self, address: SandboxAddress, ring: Ring) {
        let slot = self.settings.addresses.slot(address);
        let entry = slot.and_then(|slot| self.index.by_slot(slot));
        let Some(entry) = entry.and_then(|entry| self.by_row(entry.row())) else {
            self.network.deafen(address);
            return;
        };
        let cause = Cause::Packet(ring.to_string().into());
        let woken = self.lock(&entry, Wait::ForIt, cause).and_then(|held| {
            let record = entry.record();
            let is_wanted =
                record.spec.wake_on == WakeOn::Packet && record.state() == State::Snapshotted;
            if is_wanted {
                self.wake(&held, &entry)?;
            }
            // Somebody may put it to sleep as soon as the lock is free.
            Ok(entry.record().state() == State::Running)
        });
        if let Err(error) = &woken {
            let error = chain(error);
            tracing::error!(id = %entry.id(), error, "waking for a packet to {ring}");
        }
        if !woken.unwrap_or(false) {
            self.network.refuse(address);
        }
    }

    /// Lets the network of a sandbox that fell asleep stay for a while.
    fn let_linger(&self, entry: &Entry) {
        let record = entry.record();
        if let (Some(_), Period::After(time)) = (self.address(&record), self.settings.linger) {
            let since = record.snapshot().map_or_else(|| self.now(), |snapshot| snapshot.at);
            self.network.linger(entry.id(), since.after(time));
            self.reaper_wakeup.notify();
        }
    }

    /// Removes the network of a sandbox whose guest is no more.
    pub(super) fn disconnect(&self, entry: &Entry) -> Result<(), Error> {
        let record = entry.record();
        let address = record.slot.and_then(|slot| self.settings.addresses.address(slot));
        let Some(address) = address else { return Ok(()) };
        if record.state() != State::Snapshotted {
            self.network.deafen(address);
        }
        let failed = net_failed(entry, "removing the network of");
        self.network.remove(entry.id(), address).map_err(failed)
    }

    /// Removes the network of a sandbox whose guest is lost. What stays is removed by the next
    /// start-up, or used again by the next boot.
    pub(super) fn abandon_network(&self, entry: &Entry) {
        if let Err(error) = self.disconnect(entry) {
            tracing::error!(id = %entry.id(), error = chain(&error), "after the end of a guest");
        }
    }

    /// Puts what the guest of a sandbox may reach in force, if it has a network now. One that
    /// runs has one: where nothing leads to it any more, it is not in force.
    pub(super) fn apply_network(&self, entry: &Entry) -> Result<(), Error> {
        let Some(wanted) = self.wanted(&entry.record()) else { return Ok(()) };
        let failed = net_failed(entry, "applying the network policy of");
        let applied = self.network.apply_policy(&wanted).map_err(failed)?;
        if applied == Applied::NotThere && entry.record().state() == State::Running {
            return self.try_put_network_back(entry);
        }
        Ok(())
    }

    /// Returns when the first network of a sleeper has lingered for long enough.
    #[must_use]
    pub fn next_lingered(&self) -> Option<Timestamp> {
        self.network.next_lingered()
    }

    /// Returns the sleepers whose networks have lingered for long enough.
    #[must_use]
    pub fn lingered(&self) -> Vec<RowId> {
        let due = self.network.lingered(self.now());
        due.iter().filter_map(|id| Some(self.by_id(id)?.row())).collect()
    }

    /// Removes the network of a sleeper that has lingered for long enough, if it still sleeps.
    ///
    /// # Errors
    /// Where something of it stays. It is due again then.
    pub fn remove_lingered(&self, _: &Held, entry: &Entry) -> Result<super::Outcome, Error> {
        let until = self.network.lingers_until(entry.id());
        let is_due = until.is_some_and(|until| until <= self.now());
        if !is_due || entry.record().state() != State::Snapshotted {
            return Ok(super::Outcome::Spared);
        }
        self.disconnect(entry).inspect_err(|_| {
            self.network.linger(entry.id(), self.now().after(REMOVE_AGAIN));
        })?;
        Ok(super::Outcome::Done)
    }

    /// Takes the range of addresses for this daemon, if it may have use for it: if a sandbox
    /// has a network, or a new one will. One that needs none may run beside another daemon
    /// with the same range.
    ///
    /// # Errors
    /// Where another daemon on this host has it, or a part of it.
    pub fn claim_addresses(&self) -> Result<(), net::Error> {
        let has_address = |entry: &Arc<Entry>| self.address(&entry.record()).is_some();
        let is_used = self.settings.template.net != NetMode::None
            || self.index.entries_after(RowId(0)).any(|entry| has_address(&entry));
        if is_used { self.network.claim() } else { Ok(()) }
    }

    /// Removes the networks that are of no sandbox, has those of sleepers linger, and
    /// removes those of what is stopped. Called once, before anybody else asks for any.
    ///
    /// Those of sandboxes that run are in force as they are, and are looked over by
    /// [`Lifecycle::renew_networks`].
    pub(super) fn reconcile_networks(&self) {
        let entries = self.with_addresses();
        let seen = entries.iter().filter_map(|entry| {
            let (id, address) = (entry.id().clone(), self.address(&entry.record())?);
            Some(Known { id, address })
        });
        // The guest of a row that makes no sense may run.
        let left_out = self.index.malformed().iter().filter_map(|row| {
            let address = self.settings.addresses.address(row.slot?)?;
            Some(Known { id: row.id.clone()?, address })
        });
        let known: Vec<_> = seen.chain(left_out).collect();
        // What stays is nobody's, and the next start looks again.
        let found = self.network.reconcile(&known).unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "looking for networks of nobody");
            Reconciled::default()
        });
        for name in found.removed {
            tracing::info!(name, "removed what is of no sandbox");
        }
        for error in found.left {
            tracing::error!(error, "removing what is of no sandbox");
        }
        let there: HashSet<&SandboxId> = found.there.iter().collect();
        let mut any_heard = false;
        for entry in &entries {
            let record = entry.record();
            // Where neither packets wake it nor its network lingers there is nothing to note
            // of it but that somebody sleeps.
            let is_noted = record.spec.wake_on == WakeOn::Packet || there.contains(&record.id);
            if record.state() != State::Snapshotted || (any_heard && !is_noted) {
                continue;
            }
            any_heard = true;
            if let Err(error) = self.hear_for(entry) {
                tracing::error!(id = %entry.id(), error = chain(&error), "reconciling");
                self.note(entry, &error);
            }
        }
        for id in found.there {
            let Some(entry) = self.index.by_id(&id) else { continue };
            match entry.record().state() {
                State::Snapshotted => self.let_linger(&entry),
                State::Stopped => self.abandon_network(&entry),
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
            && matches!(self.network.forwards(), Err(net::Error::Lacking { .. }));
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
    pub fn retire_networks(&self) {
        if let Err(error) = self.network.retire() {
            tracing::warn!(error = chain(&error), "removing what the host had for networks");
        }
    }

    /// Returns all sandboxes that have an address.
    fn with_addresses(&self) -> Vec<Arc<Entry>> {
        let all = self.index.entries_after(RowId(0));
        all.filter(|entry| self.address(&entry.record()).is_some()).collect()
    }
}

/// Says whether a sandbox runs that reaches anything beyond the host.
fn needs_forwarding(record: &Record) -> bool {
    let policy = record.spec.network_policy();
    record.state() == State::Running && policy.is_some_and(|policy| policy.needs_forwarding())
}
