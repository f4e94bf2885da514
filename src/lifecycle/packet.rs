//! Waking a sandbox because a packet was sent to it.

use std::{io, sync::mpsc};

use super::{Lifecycle, Wait, chain};
use crate::{
    net::Ring,
    sandbox::{
        Cause, State,
        network::{SandboxAddress, WakeOn},
    },
    sync::Arc,
};

impl Lifecycle {
    /// Starts the thread that is told of packets to sleepers. Each wake is then done on a
    /// thread of its own.
    ///
    /// # Errors
    /// Where there can be no such thread.
    pub fn attend_packets(
        self: &Arc<Self>,
        rings: mpsc::Receiver<(SandboxAddress, Ring)>,
    ) -> io::Result<()> {
        let this = Arc::downgrade(self);
        std::thread::Builder::new().name("dozed-rings".to_owned()).spawn(move || {
            while let Ok((address, ring)) = rings.recv() {
                let Some(lifecycle) = this.upgrade() else { break };
                let answering = Arc::clone(&lifecycle);
                if lifecycle.pool.run(move || answer(&answering, address, ring)).is_err() {
                    tracing::warn!(%address, "all threads are busy; a packet wakes nobody");
                    lifecycle.networks.host().refuse(address);
                }
            }
        })?;
        Ok(())
    }
}

/// Wakes a sandbox for a packet.
pub(super) fn answer(lifecycle: &Lifecycle, address: SandboxAddress, ring: Ring) {
    let slot = lifecycle.settings.addresses.slot(address);
    let entry = slot.and_then(|slot| lifecycle.index.by_slot(slot));
    let Some(entry) = entry.and_then(|entry| lifecycle.by_row(entry.row())) else {
        lifecycle.networks.host().deafen(address);
        return;
    };
    let cause = Cause::Packet(ring.to_string().into());
    let woken = lifecycle.lock(&entry, Wait::ForIt, cause).and_then(|held| {
        let record = entry.record();
        let is_wanted =
            record.spec.wake_on == WakeOn::Packet && record.state() == State::Snapshotted;
        if is_wanted {
            lifecycle.wake(&held, &entry)?;
        }
        // Somebody may put it to sleep as soon as the lock is free.
        Ok(entry.record().state() == State::Running)
    });
    if let Err(error) = &woken {
        let error = chain(error);
        tracing::error!(id = %entry.id(), error, "waking for a packet to {ring}");
    }
    if !woken.unwrap_or(false) {
        lifecycle.networks.host().refuse(address);
    }
}
