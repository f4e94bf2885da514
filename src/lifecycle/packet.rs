//! Waking a sandbox because a packet was sent to it.

use std::{io, sync::mpsc};

use super::{Lifecycle, Wait, chain};
use crate::{
    net::Trigger,
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
    pub fn wake_on_packets(
        self: &Arc<Self>,
        triggers: mpsc::Receiver<(SandboxAddress, Trigger)>,
    ) -> io::Result<()> {
        let this = Arc::downgrade(self);
        std::thread::Builder::new().name("dozed-triggers".to_owned()).spawn(move || {
            while let Ok((address, trigger)) = triggers.recv() {
                let Some(lifecycle) = this.upgrade() else { break };
                let waking = Arc::clone(&lifecycle);
                if lifecycle.pool.run(move || wake_for_packet(&waking, address, trigger)).is_err() {
                    tracing::warn!(%address, "all threads are busy; a packet did not wake its \
                                              sandbox");
                    lifecycle.networks.host().refuse(address);
                }
            }
        })?;
        Ok(())
    }
}

/// Wakes a sandbox for a packet.
pub(super) fn wake_for_packet(lifecycle: &Lifecycle, address: SandboxAddress, trigger: Trigger) {
    let slot = lifecycle.settings.addresses.slot(address);
    let entry = slot.and_then(|slot| lifecycle.index.by_slot(slot));
    let Some(entry) = entry.and_then(|entry| lifecycle.by_row(entry.row())) else {
        lifecycle.networks.host().stop_listening(address);
        return;
    };
    let cause = Cause::Packet(trigger.to_string().into());
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
        tracing::error!(id = %entry.id(), error, "waking for a packet to {trigger}");
    }
    if !woken.unwrap_or(false) {
        lifecycle.networks.host().refuse(address);
    }
}
