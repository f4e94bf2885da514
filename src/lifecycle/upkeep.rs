//! Looking over the networks of those that run: what somebody else has changed of them is
//! put back, or told.
//!
//! One thread looks at every tick, and at once where the kernel tells of a change. What it
//! finds of a sandbox it acts on under the sandbox's lock; whose lock is taken is passed over
//! until the next look. A failure is told once, and again only when it is another.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::mpsc,
    time::Duration,
};

use super::{Entry, Error, Held, Lifecycle, Wait, chain, error::net_failed};
use crate::{
    net::{self, Known},
    sandbox::{Cause, RowId, SandboxId, State},
    sync::{Arc, Mutex, lock},
    sys::clock::{Stopwatch, pause_for},
};

/// How long after a change the look begins, so that one look is enough for all that one
/// command changes, as `nft flush ruleset`.
const SETTLE: Duration = Duration::from_millis(20);
/// The shortest time between two looks, whatever changes: each takes a few milliseconds. One
/// that takes longer, as it renews the firewalls of many, is given as long a pause.
const LOOK_MIN: Duration = Duration::from_millis(500);

/// What is wrong with networks and was told. Bounded by the count of those that run.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    /// With the host. A leaf lock.
    host: Mutex<Option<String>>,
    /// With one's own. A leaf lock.
    own: Mutex<HashMap<RowId, String>>,
}

impl Troubles {
    /// Returns a sentence for each that a sandbox which runs has with its network.
    pub(super) fn of(&self, row: RowId) -> impl Iterator<Item = String> {
        let host = lock(&self.host).clone();
        let own = lock(&self.own).get(&row).cloned();
        host.into_iter().chain(own)
    }

    /// Forgets those of a sandbox. Returns what was told.
    pub(super) fn forget(&self, row: RowId) -> Option<String> {
        lock(&self.own).remove(&row)
    }
}

impl Lifecycle {
    /// Starts the thread that looks over the networks of those that run, first of all what
    /// an earlier daemon has left of them.
    ///
    /// # Errors
    /// Where there can be no such thread.
    pub fn attend_networks(self: &Arc<Self>, tick: Duration) -> io::Result<()> {
        let this = Arc::downgrade(self);
        let (tell, told) = mpsc::sync_channel(1);
        // One that is not taken yet is enough.
        let changed = move || {
            tell.try_send(()).ok();
        };
        if let Err(error) = self.network.watch(Arc::new(changed)) {
            tracing::warn!(error = chain(&error), "what others change is seen at ticks only");
        }
        std::thread::Builder::new().name("dozed-networks".to_owned()).spawn(move || {
            if let Some(lifecycle) = this.upgrade() {
                lifecycle.renew_networks();
            }
            let mut again_after = None;
            loop {
                match told.recv_timeout(again_after.map_or(tick, |again| tick.min(again))) {
                    Ok(()) => pause_for(SETTLE),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => pause_for(tick),
                }
                told.try_iter().for_each(drop);
                let Some(lifecycle) = this.upgrade() else { return };
                let look = Stopwatch::start();
                again_after = lifecycle.look_over_networks();
                drop(lifecycle);
                pause_for(LOOK_MIN.max(look.elapsed()));
            }
        })?;
        Ok(())
    }

    /// Looks over the networks of all that run, each as a whole, with today's policy.
    pub fn renew_networks(&self) {
        for entry in self.running_with_address() {
            let Ok(held) = self.lock(&entry, Wait::ForIt, Cause::Reconcile) else { continue };
            self.put_network_back(&held, &entry);
        }
    }

    /// Compares the networks of all that run with what was made, and puts back what is
    /// missing. Returns when to do so again, if that is before the next tick.
    pub fn look_over_networks(&self) -> Option<Duration> {
        let running = self.running_with_address();
        let known: Vec<Known> = running
            .iter()
            .filter_map(|entry| {
                let (id, address) = (entry.id().clone(), self.address(&entry.record())?);
                Some(Known { id, address })
            })
            .collect();
        let rows: HashSet<RowId> = running.iter().map(|entry| entry.row()).collect();
        lock(&self.troubles.own).retain(|row, _| rows.contains(row));
        let looked = self.network.look(&known);
        if !looked.put_back.is_empty() {
            let what = looked.put_back.join(", ");
            tracing::warn!(what, "put back what somebody changed or removed");
        }
        self.tell_host_trouble(looked.failed.as_ref());
        self.look_at_forwarding(&running);
        let suspects: HashSet<SandboxId> = looked.suspects.into_iter().collect();
        // What was wrong may have been mended by somebody else.
        let troubled: HashSet<RowId> = lock(&self.troubles.own).keys().copied().collect();
        let is_suspect =
            |entry: &&Arc<Entry>| suspects.contains(entry.id()) || troubled.contains(&entry.row());
        for entry in running.iter().filter(is_suspect) {
            // Who has the lock is waking it or putting it to sleep.
            if let Ok(held) = self.lock(entry, Wait::Never, Cause::Reconcile) {
                self.put_network_back(&held, entry);
            }
        }
        looked.again_after
    }

    /// Puts back what is missing of the network of a sandbox, if it runs.
    fn put_network_back(&self, held: &Held, entry: &Entry) {
        match self.try_put_network_back(entry) {
            Ok(()) => {
                let told = self.troubles.forget(entry.row());
                if let Some(told) = told
                    && self.last_error(entry).as_deref() == Some(&*told)
                {
                    self.notes.forget(entry.row());
                }
            }
            Err(error) => {
                let text = chain(&error);
                let before = lock(&self.troubles.own).insert(entry.row(), text.clone());
                if before.as_ref() != Some(&text) {
                    tracing::error!(id = %entry.id(), error = text, "looking over networks");
                    self.note(entry, &error);
                    self.publish_failure(held, entry, text.into_boxed_str());
                }
            }
        }
    }

    /// Puts back what is missing of the network of a sandbox, if it runs. Its lock is held.
    pub(super) fn try_put_network_back(&self, entry: &Entry) -> Result<(), Error> {
        let record = entry.record();
        let Some(wanted) = self.wanted(&record).filter(|_| record.state() == State::Running) else {
            return Ok(());
        };
        let vmm = self.machines.get(entry.row()).map(|live| live.process.identity().pid);
        let what = self
            .network
            .put_back(&wanted, vmm)
            .map_err(net_failed(entry, "looking over the network of"))?;
        if !what.is_empty() {
            let what = what.join(", ");
            tracing::warn!(id = %entry.id(), what, "put back what somebody changed or removed");
        }
        Ok(())
    }

    fn tell_host_trouble(&self, error: Option<&net::Error>) {
        let text = error.map(|error| format!("the host's network: {}", chain(error)));
        let before = std::mem::replace(&mut *lock(&self.troubles.host), text.clone());
        match text {
            Some(text) if before.as_ref() != Some(&text) => {
                tracing::error!(error = text, "looking over networks");
            }
            None if before.is_some() => tracing::info!("the host's network is as it is to be"),
            Some(_) | None => {}
        }
    }

    /// Returns all that run and have a network.
    fn running_with_address(&self) -> Vec<Arc<Entry>> {
        let mut rows: Vec<RowId> = self.machines.all().into_iter().map(|(row, _)| row).collect();
        rows.sort_unstable();
        let runs = |entry: &Arc<Entry>| {
            let record = entry.record();
            record.state() == State::Running && self.address(&record).is_some()
        };
        rows.into_iter().filter_map(|row| self.by_row(row)).filter(runs).collect()
    }
}
