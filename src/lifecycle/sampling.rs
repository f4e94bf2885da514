//! Looks at how busy each guest is, by what the kernel counts of its VMM. No VMM is asked.

use super::{Entry, Error, Lifecycle, Signal, chain};
use crate::{
    activity::{Reading, Sample},
    machines::Live,
    net::{self, TAP},
    sandbox::RowId,
    sync::Arc,
};

/// Whose use is sampled.
#[derive(Debug, Clone, Copy)]
pub enum Guests<'a> {
    /// All that run.
    All,
    /// Those of these rows.
    Of(&'a [RowId]),
}

impl Lifecycle {
    /// Samples what guests have used of the host since the last time.
    pub fn sample_activity(&self, guests: Guests<'_>) {
        let lives = match guests {
            Guests::All => self.machines.all(),
            Guests::Of(rows) => {
                rows.iter().filter_map(|row| Some((*row, self.machines.get(*row)?))).collect()
            }
        };
        sample(self, lives);
    }
}

fn sample(lifecycle: &Lifecycle, lives: Vec<(RowId, Arc<Live>)>) {
    let is_due = |(row, live): (RowId, Arc<Live>)| {
        let entry = lifecycle.by_row(row)?;
        lifecycle.activity.is_sample_due(&entry).then_some((entry, live))
    };
    let due: Vec<_> = lives.into_iter().filter_map(is_due).collect();
    let network = lifecycle.networks.active_bytes(due.iter().map(|(entry, _)| entry.record()));
    for (entry, live) in due {
        let at = lifecycle.clock.now();
        let cpu = live.process.cpu_time();
        if live.process.exited().is_some() {
            continue;
        }
        let disk_bytes = live.disk_bytes(&entry.record().spec, TAP);
        let network_bytes = network.get(entry.id()).copied().unwrap_or(Reading::Absent);
        let sample = Sample {
            at,
            cpu: Reading::of(cpu.map(Some)),
            disk_bytes: Reading::of(disk_bytes),
            network_bytes,
        };
        lifecycle.activity.take_sample(&entry, sample);
    }
}

/// Returns what has passed of a sandbox's network by now that counts as activity. `None`:
/// nothing of it does.
fn network_use(lifecycle: &Lifecycle, entry: &Entry) -> Result<Option<net::Activity>, Error> {
    let record = entry.record();
    let counts = lifecycle.activity.limits(&record).signals.contains(Signal::Network);
    if counts { lifecycle.networks.active(entry) } else { Ok(None) }
}

/// Returns what was counted of a sandbox's use up to now. What passed its firewall since the
/// last sample becomes activity first, if it is above the threshold.
///
/// # Errors
/// Where the kernel does not say what passed.
pub(super) fn count_use(lifecycle: &Lifecycle, entry: &Entry) -> Result<Counted, Error> {
    let network = network_use(lifecycle, entry)?;
    if let Some(passed) = network {
        lifecycle.activity.take_network_bytes(entry, passed.bytes());
    }
    Ok(Counted { activity: entry.activity_count(), network })
}

/// As `count_use`, of a sandbox that the reaper is to put to sleep. `None`: a signal that
/// counts could not be read, so it is not known to be idle.
pub(super) fn count_known_use(lifecycle: &Lifecycle, entry: &Entry) -> Option<Counted> {
    let unknown = lifecycle.activity.unknown(entry);
    if !unknown.is_empty() {
        tracing::debug!(id = %entry.id(), %unknown, "not known to be idle");
        return None;
    }
    count_use(lifecycle, entry)
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
    lifecycle: &Lifecycle,
    entry: &Entry,
    counted: Counted,
    pause: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    pause()?;
    if network_use(lifecycle, entry)? != counted.network {
        lifecycle.activity.saw(entry, Signal::Network);
    }
    let count = entry.activity_count();
    if count == counted.activity {
        return Ok(());
    }
    Err(Error::Active { id: entry.id().clone(), count })
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
