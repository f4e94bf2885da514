//! How busy each guest is, by what the kernel counts of its VMM. No VMM is asked.

use std::{collections::HashMap, time::Duration};

use super::{Activity, Entry, Lifecycle, Signal, chain, machines::Live};
use crate::{
    net::{self, Known, TAP},
    sandbox::{NetMode, Period, Record, RowId, SandboxId, State, Timestamp},
    sync::{Arc, lock},
    vmm::DiskTraffic,
};

/// Two samples closer than this say nothing: CPU time is counted in steps of 10 ms.
const WINDOW_MIN: Duration = Duration::from_millis(500);
/// Over this long a guest that does nothing is even: the kernel's flusher, and with it a file
/// system's journal, comes every five seconds. Looks that are closer are no new samples.
const WINDOW_MAX: Duration = Duration::from_secs(5);

/// What a VMM reads and writes before each frame of the guest's device: the header of virtio 1.
const FRAME_HEADER_BYTES: u64 = 12;

/// What was counted of a guest up to one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Timestamp,
    cpu: Duration,
    disk_bytes: Option<u64>,
    network_bytes: Option<u64>,
}

/// How fast a guest uses what is counted of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Its CPU time, in percent of one host CPU.
    pub cpu_percent: Option<f64>,
    /// What it reads from its disks and writes to them.
    pub disk_bytes_per_second: Option<u64>,
    /// What passes its firewall, from it and to it, that is a sign of use.
    pub network_bytes_per_second: Option<u64>,
}

/// How busy a guest is, and was when that last counted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Busyness {
    /// By the last two samples.
    pub now: Rates,
    /// Each by the last two samples of which it was above its threshold.
    pub counted: Rates,
}

/// What is known of a guest's use of the host while it lives.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    last: Option<Sample>,
    busyness: Busyness,
}

impl Gauge {
    /// Says whether the last sample is so old that another one makes sense. Of a sandbox that
    /// is about to be put to sleep the newest that there can be is wanted.
    fn is_due(&self, now: Timestamp, idle_after: Period, sleeps_at: Option<Timestamp>) -> bool {
        let is_idle = sleeps_at.is_some_and(|at| at <= now);
        let window = if is_idle { WINDOW_MIN } else { window(idle_after) };
        self.last.is_none_or(|last| now.since(last.at) >= window)
    }

    /// Takes a sample, and returns what it shows to be above its threshold.
    fn take(&mut self, sample: Sample, limits: &Activity) -> Vec<Signal> {
        let Some(last) = self.last.replace(sample) else {
            return Vec::new();
        };
        let now = rates(&last, &sample);
        let mut above = Vec::new();
        if now.cpu_percent.is_some_and(|percent| percent > f64::from(limits.cpu_percent)) {
            self.busyness.counted.cpu_percent = now.cpu_percent;
            above.push(Signal::Cpu);
        }
        if now.disk_bytes_per_second.is_some_and(|rate| rate > limits.disk_bytes_per_second) {
            self.busyness.counted.disk_bytes_per_second = now.disk_bytes_per_second;
            above.push(Signal::Disk);
        }
        if now.network_bytes_per_second.is_some_and(|rate| rate > limits.network_bytes_per_second) {
            self.busyness.counted.network_bytes_per_second = now.network_bytes_per_second;
            above.push(Signal::Network);
        }
        self.busyness.now = now;
        above
    }

    /// Forgets the last sample: what was used since was not the guest's doing.
    pub(super) fn begin_anew(&mut self) {
        self.last = None;
    }
}

/// How long a sample has to be. A guest is seen to be active before its idle time is over.
fn window(idle_after: Period) -> Duration {
    let quarter = idle_after.duration().map_or(WINDOW_MAX, |idle_after| idle_after / 4);
    quarter.clamp(WINDOW_MIN, WINDOW_MAX)
}

fn rates(before: &Sample, after: &Sample) -> Rates {
    let elapsed = after.at.since(before.at).max(Duration::from_millis(1));
    let cpu = after.cpu.saturating_sub(before.cpu);
    let rate = |before: Option<u64>, after: Option<u64>| {
        let bytes = u128::from(after?.saturating_sub(before?));
        Some(u64::try_from(bytes * 1000 / elapsed.as_millis()).unwrap_or(u64::MAX))
    };
    Rates {
        cpu_percent: Some(100.0 * cpu.as_secs_f64() / elapsed.as_secs_f64()),
        disk_bytes_per_second: rate(before.disk_bytes, after.disk_bytes),
        network_bytes_per_second: rate(before.network_bytes, after.network_bytes),
    }
}

impl Lifecycle {
    /// Looks at what every guest that runs has used. Called at each tick.
    pub fn sample_activity(&self) {
        let is_due = |(row, live): (RowId, Arc<Live>)| {
            let entry = self.by_row(row)?;
            let record = entry.record();
            let (now, sleeps_at) = (self.now(), record.sleep_at(entry.last_activity()));
            let running = record.state == State::Running;
            let due = running && lock(&live.gauge).is_due(now, record.idle_after, sleeps_at);
            due.then_some((entry, record, live))
        };
        let due: Vec<_> = self.machines.all().into_iter().filter_map(is_due).collect();
        let network = self.network_bytes(due.iter().map(|(_, record, _)| record.as_ref()));
        for (entry, record, live) in due {
            let at = self.now();
            // Its VMM may have ended.
            let Ok(cpu) = live.process.cpu_time() else { continue };
            let disk_bytes = disk_bytes(&record, &live);
            let network_bytes = network.get(&record.id).copied();
            let sample = Sample { at, cpu, disk_bytes, network_bytes };
            let above = lock(&live.gauge).take(sample, &self.activity_of(&record));
            for signal in above {
                self.saw(&entry, signal);
            }
        }
    }

    /// Returns how busy a guest is; nothing where none runs.
    #[must_use]
    pub fn busyness(&self, row: RowId) -> Busyness {
        self.machines.get(row).map(|live| lock(&live.gauge).busyness).unwrap_or_default()
    }

    /// Returns the guest's CPU time, of a sandbox that is awake.
    #[must_use]
    pub fn cpu_time(&self, row: RowId) -> Option<Duration> {
        self.machines.get(row).and_then(|live| live.process.cpu_time().ok())
    }

    /// Returns what has passed that is a sign of use of those who have a network.
    fn network_bytes<'a>(
        &self,
        records: impl Iterator<Item = &'a Record>,
    ) -> HashMap<SandboxId, u64> {
        let known =
            |record: &Record| Some(Known { id: record.id.clone(), address: self.address(record)? });
        let known: Vec<_> = records.filter_map(known).collect();
        if known.is_empty() {
            return HashMap::new();
        }
        let found = self.network.activity(&known).unwrap_or_else(|error| {
            // Nobody asked, and the next look tries again.
            tracing::warn!(error = chain(&error), "looking for traffic of networks");
            Vec::new()
        });
        let bytes =
            |activity: net::Activity| activity.inward.bytes.saturating_add(activity.outward.bytes);
        found.into_iter().map(|(id, activity)| (id, bytes(activity))).collect()
    }

    /// What the VMM did for a sleep that came to nothing is not the guest's doing.
    pub(super) fn gauge_anew(&self, entry: &Entry) {
        if let Some(live) = self.machines.get(entry.row()) {
            lock(&live.gauge).begin_anew();
        }
    }
}

/// Returns what a guest's disks have read and written; `None` where it has none, or its VMM has
/// ended.
fn disk_bytes(record: &Record, live: &Live) -> Option<u64> {
    if record.spec.disks.is_empty() {
        return None;
    }
    let all = live.process.io().ok()?;
    match live.disk_traffic {
        DiskTraffic::Calls => {
            let has_net = record.spec.net != NetMode::None;
            let frames = has_net.then(|| live.process.frames(TAP).ok().flatten()).flatten();
            let of_frames = frames.map_or(0, |frames| {
                frames.bytes.saturating_add(frames.count.saturating_mul(FRAME_HEADER_BYTES))
            });
            Some(all.call_bytes.saturating_sub(of_frames))
        }
        DiskTraffic::Blocks { vcpus: None } => Some(all.block_bytes),
        DiskTraffic::Blocks { vcpus: Some(prefix) } => {
            // What they have by now is at least what they had when all was counted, so this
            // may be a little less than it was a moment ago, and never more.
            let of_memory = live.process.io_of_threads(prefix).ok()?;
            Some(all.block_bytes.saturating_sub(of_memory.block_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(millis: i64, cpu_millis: u64, disk_bytes: Option<u64>) -> Sample {
        let cpu = Duration::from_millis(cpu_millis);
        Sample { at: Timestamp::from_millis(millis), cpu, disk_bytes, network_bytes: None }
    }

    fn limits() -> Activity {
        Activity { cpu_percent: 10, disk_bytes_per_second: 1000, ..Activity::default() }
    }

    #[test]
    fn what_is_above_its_threshold_is_a_signal_and_what_is_at_it_is_not() {
        let mut gauge = Gauge::default();
        assert_eq!(gauge.take(sample(0, 500, Some(7)), &limits()), []);
        assert_eq!(gauge.busyness, Busyness::default(), "one sample is no rate");
        assert_eq!(gauge.take(sample(2000, 700, Some(2007)), &limits()), []);
        assert_eq!(gauge.busyness.now.cpu_percent, Some(10.0));
        assert_eq!(gauge.busyness.now.disk_bytes_per_second, Some(1000));
        assert_eq!(gauge.take(sample(4000, 700, Some(4009)), &limits()), [Signal::Disk]);
        assert_eq!(gauge.take(sample(6000, 1000, Some(4009)), &limits()), [Signal::Cpu]);
        let Busyness { now, counted } = gauge.busyness;
        assert_eq!((now.cpu_percent, counted.cpu_percent), (Some(15.0), Some(15.0)));
        assert_eq!(now.disk_bytes_per_second, Some(0));
        assert_eq!(counted.disk_bytes_per_second, Some(1001), "as it was when it counted");
    }

    #[test]
    fn bytes_of_the_network_are_held_against_a_threshold_of_their_own() {
        let mut gauge = Gauge::default();
        let with = |millis, bytes| Sample { network_bytes: Some(bytes), ..sample(millis, 0, None) };
        let limits = Activity { network_bytes_per_second: 10, ..limits() };
        gauge.take(with(0, 100), &limits);
        assert_eq!(gauge.take(with(1000, 110), &limits), []);
        assert_eq!(gauge.take(with(2000, 121), &limits), [Signal::Network]);
        assert_eq!(gauge.take(with(3000, 0), &limits), [], "its network was made anew");
        assert_eq!(gauge.busyness.counted.network_bytes_per_second, Some(11));
    }

    #[test]
    fn what_is_not_seen_has_no_rate() {
        let mut gauge = Gauge::default();
        gauge.take(sample(0, 0, None), &limits());
        assert_eq!(gauge.take(sample(1000, 0, Some(1 << 30)), &limits()), []);
        assert_eq!(gauge.busyness.now.disk_bytes_per_second, None);
    }

    #[test]
    fn what_was_used_before_a_new_beginning_does_not_count() {
        let mut gauge = Gauge::default();
        gauge.take(sample(0, 0, Some(0)), &limits());
        gauge.begin_anew();
        assert_eq!(gauge.take(sample(1000, 900, Some(1 << 30)), &limits()), []);
        assert_eq!(gauge.take(sample(2000, 900, Some(1 << 30)), &limits()), []);
    }

    #[test]
    fn one_that_is_about_to_be_put_to_sleep_is_looked_at_once_more() {
        let mut gauge = Gauge::default();
        let at = Timestamp::from_millis;
        assert!(gauge.is_due(at(0), Period::Never, None), "there is no sample yet");
        gauge.take(sample(0, 0, None), &limits());
        assert!(!gauge.is_due(at(4999), Period::Never, None));
        assert!(gauge.is_due(at(5000), Period::Never, None));
        assert!(!gauge.is_due(at(600), Period::Never, Some(at(601))));
        assert!(gauge.is_due(at(600), Period::Never, Some(at(600))));
        assert!(!gauge.is_due(at(499), Period::Never, Some(at(0))));
    }

    #[test]
    fn a_sample_is_shorter_than_any_idle_time_but_for_the_shortest() {
        let after = |millis| Period::After(Duration::from_millis(millis));
        assert_eq!(window(Period::Never), WINDOW_MAX);
        assert_eq!(window(after(900_000)), WINDOW_MAX);
        assert_eq!(window(after(8_000)), Duration::from_secs(2));
        assert_eq!(window(after(1_000)), WINDOW_MIN);
    }
}
