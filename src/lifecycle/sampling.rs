//! Looks at how busy each guest is, by what the kernel counts of its VMM. No VMM is asked.

use std::{collections::HashMap, io, time::Duration};

use super::{
    Entry, Error, Lifecycle, Signal, chain,
    error::net_failed,
    usage::{Busyness, Reading, Sample},
};
use crate::{
    machines::Live,
    net::{self, Known, TAP},
    sandbox::{NetMode, Record, RowId, SandboxId, SignalSet, State},
    sync::{Arc, lock},
    vmm::DiskTraffic,
};

/// What a VMM reads and writes before each frame of the guest's device: the header of virtio 1.
const FRAME_HEADER_BYTES: u64 = 12;

impl Lifecycle {
    /// Looks at what every guest that runs has used. Called at each tick.
    pub fn sample_activity(&self) {
        self.sample(self.machines.all());
    }

    /// Looks at what these guests have used, before it is judged whether they are idle.
    pub fn sample_activity_of(&self, rows: &[RowId]) {
        self.sample(rows.iter().filter_map(|row| Some((*row, self.machines.get(*row)?))).collect());
    }

    fn sample(&self, lives: Vec<(RowId, Arc<Live>)>) {
        let is_due = |(row, live): (RowId, Arc<Live>)| {
            let entry = self.by_row(row)?;
            let record = entry.record();
            let (now, sleeps_at) = (self.now(), record.sleep_at(entry.last_activity()));
            let usage = self.usages.get(row).filter(|_| record.state() == State::Running)?;
            let due = lock(&usage).is_due(now, record.idle_after, sleeps_at);
            due.then_some((entry, record, live, usage))
        };
        let due: Vec<_> = lives.into_iter().filter_map(is_due).collect();
        let network = self.network_bytes(due.iter().map(|(_, record, ..)| record.as_ref()));
        for (entry, record, live, usage) in due {
            let at = self.now();
            let cpu = live.process.cpu_time();
            if live.process.exited().is_some() {
                continue;
            }
            let sample = Sample {
                at,
                cpu: Reading::of(cpu.map(Some)),
                disk_bytes: Reading::of(disk_bytes(&record, &live)),
                network_bytes: network.get(&record.id).copied().unwrap_or(Reading::Absent),
            };
            let (before, above, after) = {
                let mut usage = lock(&usage);
                let before = usage.busyness.unknown;
                let above = usage.take(sample, &self.activity_of(&record));
                (before, above, usage.busyness.unknown)
            };
            if after != before && !after.is_empty() {
                let (id, unknown) = (entry.id(), after);
                tracing::warn!(%id, %unknown, "a sample failed; it stays awake until one does not");
            }
            for signal in above {
                self.saw(&entry, signal);
            }
        }
    }

    /// Returns when a guest was last looked at.
    #[cfg(test)]
    pub(crate) fn samples_of(&self, entry: &Entry) -> Option<crate::sandbox::Timestamp> {
        self.usages.get(entry.row()).and_then(|usage| lock(&usage).last)
    }

    /// Returns how busy a guest is; nothing where none runs.
    #[must_use]
    pub fn busyness(&self, row: RowId) -> Busyness {
        self.usages.get(row).map(|usage| lock(&usage).busyness).unwrap_or_default()
    }

    /// Returns the guest's CPU time, of a sandbox that is awake.
    #[must_use]
    pub fn cpu_time(&self, row: RowId) -> Option<Duration> {
        self.machines.get(row).and_then(|live| live.process.cpu_time().ok())
    }

    /// Returns which signals that count for a sandbox the last sample could not read.
    pub(super) fn unknown_signals(&self, entry: &Entry) -> SignalSet {
        self.busyness(entry.row()).unknown.and(self.activity_of(&entry.record()).signals)
    }

    /// Returns what has passed that is a sign of use of those who have a network.
    fn network_bytes<'a>(
        &self,
        records: impl Iterator<Item = &'a Record>,
    ) -> HashMap<SandboxId, Reading<u64>> {
        let known =
            |record: &Record| Some(Known { id: record.id.clone(), address: self.address(record)? });
        let known: Vec<_> = records.filter_map(known).collect();
        let found = if known.is_empty() { Ok(Vec::new()) } else { self.network.activity(&known) };
        let read = |(id, read): net::Sampled| {
            let reading = read.map_or_else(
                |error| {
                    tracing::debug!(%id, error = chain(&error), "looking for its traffic");
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

    /// Returns what has passed of a sandbox's network by now that counts as activity. `None`:
    /// nothing of it does.
    fn network_use(&self, entry: &Entry) -> Result<Option<net::Activity>, Error> {
        let record = entry.record();
        let counts = self.activity_of(&record).signals.contains(Signal::Network);
        if !counts || self.address(&record).is_none() {
            return Ok(None);
        }
        let failed = net_failed(entry, "counting the packets of");
        let counters = self.network.counters(entry.id()).map_err(failed)?;
        let Some(counters) = counters else { return Err(failed(net::Error::NotThere)) };
        Ok(Some(net::Activity { inward: counters.active_in, outward: counters.active_out }))
    }

    /// Returns what was counted of a sandbox's use up to now. What passed its firewall since the
    /// last sample becomes activity first, if it is above the threshold.
    ///
    /// # Errors
    /// Where the kernel does not say what passed.
    pub(super) fn count_use(&self, entry: &Entry) -> Result<Counted, Error> {
        let network = self.network_use(entry)?;
        if let Some(passed) = network {
            let limits = self.activity_of(&entry.record());
            let is_above = self.usages.get(entry.row()).is_some_and(|usage| {
                lock(&usage).is_network_above(self.now(), passed.bytes(), &limits)
            });
            if is_above {
                self.saw(entry, Signal::Network);
            }
        }
        Ok(Counted { activity: entry.activity_count(), network })
    }

    /// As `count_use`, of a sandbox that the reaper is to put to sleep. `None`: a signal that
    /// counts could not be read, so it is not known to be idle.
    pub(super) fn count_known_use(&self, entry: &Entry) -> Option<Counted> {
        let unknown = self.unknown_signals(entry);
        if !unknown.is_empty() {
            tracing::debug!(id = %entry.id(), %unknown, "not known to be idle");
            return None;
        }
        self.count_use(entry)
            .inspect_err(|error| {
                tracing::warn!(id = %entry.id(), error = chain(error), "not known to be idle");
            })
            .ok()
    }

    /// Pauses a guest by `pause`. If it was used since `counted`, it may have taken something
    /// without having answered, and the sleep is not to go on.
    ///
    /// # Errors
    /// `Active` if it was used; and where the guest cannot be paused, or the kernel does not say
    /// what passed.
    pub(super) fn pause_unless_used(
        &self,
        entry: &Entry,
        counted: Counted,
        pause: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        pause()?;
        if self.network_use(entry)? != counted.network {
            self.saw(entry, Signal::Network);
        }
        let count = entry.activity_count();
        if count == counted.activity {
            return Ok(());
        }
        Err(Error::Active { id: entry.id().clone(), count })
    }

    /// What the VMM did for a sleep that came to nothing is not the guest's doing.
    pub(super) fn sample_anew(&self, entry: &Entry) {
        if let Some(usage) = self.usages.get(entry.row()) {
            lock(&usage).begin_anew();
        }
    }
}

/// What was counted of a sandbox's use up to one moment, by which a sleep is decided. It is
/// compared once the guest is paused, so that nothing is missed between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    /// The count of its activity.
    pub(super) activity: u64,
    /// What passed its firewall, if that counts.
    network: Option<net::Activity>,
}

/// Returns what a guest's disks have read and written; `None` where it has none.
fn disk_bytes(record: &Record, live: &Live) -> io::Result<Option<u64>> {
    if record.spec.disks.is_empty() {
        return Ok(None);
    }
    let all = live.process.io()?;
    match live.disk_traffic {
        DiskTraffic::Calls => {
            let has_net = record.spec.net != NetMode::None;
            let frames = if has_net { live.process.frames(TAP)? } else { None };
            let of_frames = frames.map_or(0, |frames| {
                frames.bytes.saturating_add(frames.count.saturating_mul(FRAME_HEADER_BYTES))
            });
            Ok(Some(all.call_bytes.saturating_sub(of_frames)))
        }
        DiskTraffic::Blocks { vcpus: None } => Ok(Some(all.block_bytes)),
        DiskTraffic::Blocks { vcpus: Some(prefix) } => {
            // What they have by now is at least what they had when all was counted, so this
            // may be a little less than it was a moment ago, and never more.
            let of_memory = live.process.io_of_threads(prefix)?;
            Ok(Some(all.block_bytes.saturating_sub(of_memory.block_bytes)))
        }
    }
}
