//! Looking over the networks of those that run: what somebody else has changed of them is
//! put back, or told.
//!
//! One thread looks at every tick, and at once where the kernel tells of a change. What it
//! finds of a sandbox it acts on under the sandbox's lock; whose lock is taken is passed over
//! until the next look. A failure is told once, and again only when it is another.

use std::{collections::HashSet, io, sync::mpsc, time::Duration};

use super::{Entry, Held, Lifecycle, Wait, chain};
use crate::{
    net::Known,
    sandbox::{Cause, RowId, SandboxId, State},
    sync::Arc,
    sys::clock::{Stopwatch, pause_for},
};

/// How long after a change the look begins, so that one look is enough for all that one
/// command changes, as `nft flush ruleset`.
const SETTLE: Duration = Duration::from_millis(20);
/// The shortest time between two looks, whatever changes: each takes a few milliseconds. One
/// that takes longer, as it renews the firewalls of many, is given as long a pause.
const LOOK_MIN: Duration = Duration::from_millis(500);

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
        if let Err(error) = self.networks.host().watch(Arc::new(changed)) {
            tracing::warn!(
                error = chain(&error),
                "changes by other programs are noticed only at \
                                                   ticks"
            );
        }
        std::thread::Builder::new().name("dozed-networks".to_owned()).spawn(move || {
            if let Some(lifecycle) = this.upgrade() {
                renew_networks(&lifecycle);
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
                again_after = look_over_networks(&lifecycle);
                drop(lifecycle);
                pause_for(LOOK_MIN.max(look.elapsed()));
            }
        })?;
        Ok(())
    }
}

/// Looks over the networks of all that run, each as a whole, with today's policy.
pub(super) fn renew_networks(lifecycle: &Lifecycle) {
    for entry in running_with_address(lifecycle) {
        let Ok(held) = lifecycle.lock(&entry, Wait::ForIt, Cause::Reconcile) else { continue };
        put_network_back(lifecycle, &held, &entry);
    }
}

/// Compares the networks of all that run with what was made, and puts back what is
/// missing. Returns when to do so again, if that is before the next tick.
pub(super) fn look_over_networks(lifecycle: &Lifecycle) -> Option<Duration> {
    let running = running_with_address(lifecycle);
    let known: Vec<Known> = running
        .iter()
        .filter_map(|entry| {
            let (id, address) = (entry.id().clone(), lifecycle.networks.address(&entry.record())?);
            Some(Known { id, address })
        })
        .collect();
    let rows: HashSet<RowId> = running.iter().map(|entry| entry.row()).collect();
    let looked = lifecycle.networks.host().look(&known);
    if !looked.put_back.is_empty() {
        let what = looked.put_back.join(", ");
        tracing::warn!(what, "restored what another program changed or removed");
    }
    let troubles = lifecycle.networks.troubles();
    troubles.log_host(looked.failed.as_ref());
    lifecycle.networks.look_at_forwarding(&running);
    let suspects: HashSet<SandboxId> = looked.suspects.into_iter().collect();
    // What was wrong may have been mended by somebody else.
    let troubled = troubles.keep(&rows);
    let is_suspect =
        |entry: &&Arc<Entry>| suspects.contains(entry.id()) || troubled.contains(&entry.row());
    for entry in running.iter().filter(is_suspect) {
        // Who has the lock is waking it or putting it to sleep.
        if let Ok(held) = lifecycle.lock(entry, Wait::Never, Cause::Reconcile) {
            put_network_back(lifecycle, &held, entry);
        }
    }
    looked.again_after
}

/// Puts back what is missing of the network of a sandbox, if it runs.
fn put_network_back(lifecycle: &Lifecycle, held: &Held, entry: &Entry) {
    match lifecycle.networks.put_back(entry, lifecycle.machines.pid(entry.row())) {
        Ok(()) => {
            let told = lifecycle.networks.troubles().forget(entry.row());
            if let Some(told) = told
                && lifecycle.notes.last_error(entry).as_deref() == Some(&*told)
            {
                lifecycle.notes.forget(entry.row());
            }
        }
        Err(error) => {
            let text = chain(&error);
            if lifecycle.networks.troubles().record(entry.row(), &text) {
                tracing::error!(id = %entry.id(), error = text, "checking networks");
                lifecycle.notes.note(entry, &error);
                lifecycle.records.publish_failure(held, entry, text.into_boxed_str());
            }
        }
    }
}

/// Returns all that run and have a network.
fn running_with_address(lifecycle: &Lifecycle) -> Vec<Arc<Entry>> {
    let mut rows: Vec<RowId> = lifecycle.machines.all().into_iter().map(|(row, _)| row).collect();
    rows.sort_unstable();
    let runs = |entry: &Arc<Entry>| {
        let record = entry.record();
        record.state() == State::Running && lifecycle.networks.address(&record).is_some()
    };
    rows.into_iter().filter_map(|row| lifecycle.by_row(row)).filter(runs).collect()
}
