//! How busy each guest is, by what the kernel counts of its VMM. No VMM is asked.

use std::{collections::HashMap, io, time::Duration};

use super::{
    Activity, Entry, Error, Lifecycle, Signal, chain, machines::Live, network::net_failed,
};
use crate::{
    net::{self, Known, TAP},
    sandbox::{NetMode, Period, Record, RowId, SandboxId, SignalSet, State, Timestamp},
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

/// What came of reading one counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading<T> {
    Is(T),
    /// There is nothing to count, as of a guest without disks.
    Absent,
    /// It could not be read, which says nothing about the guest.
    Failed,
}

/// What was counted of a guest up to one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Timestamp,
    cpu: Reading<Duration>,
    disk_bytes: Reading<u64>,
    network_bytes: Reading<u64>,
}

/// The last reading of a counter that did not fail, and when it was.
#[derive(Debug)]
struct Counter<T>(Option<(Timestamp, T)>);

impl<T> Default for Counter<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Copy> Counter<T> {
    /// Takes a reading and returns the time since the last one, and both readings. One that
    /// failed changes nothing, so that the next one tells what passed meanwhile.
    fn take(&mut self, at: Timestamp, reading: Reading<T>) -> Option<(Duration, T, T)> {
        let last = match reading {
            Reading::Failed => return None,
            Reading::Absent => self.0.take(),
            Reading::Is(now) => self.0.replace((at, now)),
        };
        let (Reading::Is(now), Some((since, before))) = (reading, last) else { return None };
        Some((at.since(since).max(Duration::from_millis(1)), before, now))
    }
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Busyness {
    /// By the last two samples.
    pub now: Rates,
    /// Each by the last two samples of which it was above its threshold.
    pub counted: Rates,
    /// What could not be read by the last sample.
    pub unknown: SignalSet,
}

impl Default for Busyness {
    fn default() -> Self {
        Self { now: Rates::default(), counted: Rates::default(), unknown: SignalSet::NONE }
    }
}

/// What is known of a guest's use of the host while it lives.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    last: Option<Timestamp>,
    cpu: Counter<Duration>,
    disk_bytes: Counter<u64>,
    network_bytes: Counter<u64>,
    busyness: Busyness,
}

impl Gauge {
    /// Says whether the last sample is so old that another one makes sense. Of a sandbox that
    /// is about to be put to sleep the newest that there can be is wanted.
    fn is_due(&self, now: Timestamp, idle_after: Period, sleeps_at: Option<Timestamp>) -> bool {
        let is_idle = sleeps_at.is_some_and(|at| at <= now);
        let window = if is_idle { WINDOW_MIN } else { window(idle_after) };
        self.last.is_none_or(|last| now.since(last) >= window)
    }

    /// Takes a sample, and returns what it shows to be above its threshold.
    fn take(&mut self, sample: Sample, limits: &Activity) -> Vec<Signal> {
        self.last = Some(sample.at);
        let now = self.rates(&sample);
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
        self.busyness.unknown = failed(&sample);
        above
    }

    fn rates(&mut self, sample: &Sample) -> Rates {
        let Sample { at, cpu, disk_bytes, network_bytes } = *sample;
        let per_second = |(elapsed, before, after): (Duration, u64, u64)| {
            let bytes = u128::from(after.saturating_sub(before));
            u64::try_from(bytes * 1000 / elapsed.as_millis()).unwrap_or(u64::MAX)
        };
        let percent = |(elapsed, before, after): (Duration, Duration, Duration)| {
            100.0 * after.saturating_sub(before).as_secs_f64() / elapsed.as_secs_f64()
        };
        Rates {
            cpu_percent: self.cpu.take(at, cpu).map(percent),
            disk_bytes_per_second: self.disk_bytes.take(at, disk_bytes).map(per_second),
            network_bytes_per_second: self.network_bytes.take(at, network_bytes).map(per_second),
        }
    }

    /// Says whether so much has passed of the network since the last sample that it is a sign
    /// of use, by the count of `bytes` at `now`.
    fn is_network_above(&self, now: Timestamp, bytes: u64, limits: &Activity) -> bool {
        self.network_bytes.0.is_some_and(|(since, before)| {
            // In a shorter time one packet would be much.
            let millis = now.since(since).max(WINDOW_MIN).as_millis();
            let passed = u128::from(bytes.saturating_sub(before)) * 1000;
            passed > u128::from(limits.network_bytes_per_second) * millis
        })
    }

    /// Forgets the last sample: what was used since was not the guest's doing.
    pub(super) fn begin_anew(&mut self) {
        self.last = None;
        self.cpu = Counter::default();
        self.disk_bytes = Counter::default();
        self.network_bytes = Counter::default();
    }
}

/// Returns what of a sample failed.
fn failed(sample: &Sample) -> SignalSet {
    [
        (Signal::Cpu, sample.cpu == Reading::Failed),
        (Signal::Disk, sample.disk_bytes == Reading::Failed),
        (Signal::Network, sample.network_bytes == Reading::Failed),
    ]
    .into_iter()
    .filter(|(_, has_failed)| *has_failed)
    .fold(SignalSet::NONE, |all, (signal, _)| all.with(signal))
}

/// How long a sample has to be. A guest is seen to be active before its idle time is over.
fn window(idle_after: Period) -> Duration {
    let quarter = idle_after.duration().map_or(WINDOW_MAX, |idle_after| idle_after / 4);
    quarter.clamp(WINDOW_MIN, WINDOW_MAX)
}

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
            let running = record.state == State::Running;
            let due = running && lock(&live.gauge).is_due(now, record.idle_after, sleeps_at);
            due.then_some((entry, record, live))
        };
        let due: Vec<_> = lives.into_iter().filter_map(is_due).collect();
        let network = self.network_bytes(due.iter().map(|(_, record, _)| record.as_ref()));
        for (entry, record, live) in due {
            let at = self.now();
            let cpu = live.process.cpu_time();
            if live.process.exited().is_some() {
                continue;
            }
            let sample = Sample {
                at,
                cpu: reading(cpu.map(Some)),
                disk_bytes: reading(disk_bytes(&record, &live)),
                network_bytes: network.get(&record.id).copied().unwrap_or(Reading::Absent),
            };
            let (before, above, after) = {
                let mut gauge = lock(&live.gauge);
                let before = gauge.busyness.unknown;
                let above = gauge.take(sample, &self.activity_of(&record));
                (before, above, gauge.busyness.unknown)
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
    pub(crate) fn samples_of(&self, entry: &Entry) -> Option<Timestamp> {
        self.machines.get(entry.row()).and_then(|live| lock(&live.gauge).last)
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

    /// Says whether a sandbox is known to have been idle since the last sample, too.
    pub(super) fn is_idle_by_now(&self, entry: &Entry) -> bool {
        let unknown = self.unknown_signals(entry);
        if !unknown.is_empty() {
            tracing::debug!(id = %entry.id(), %unknown, "not known to be idle");
            return false;
        }
        let passed = match self.network_use(entry) {
            Ok(Some(passed)) => passed.bytes(),
            Ok(None) => return true,
            Err(error) => {
                tracing::warn!(id = %entry.id(), error = chain(&error), "not known to be idle");
                return false;
            }
        };
        let limits = self.activity_of(&entry.record());
        let is_above = self
            .machines
            .get(entry.row())
            .is_some_and(|live| lock(&live.gauge).is_network_above(self.now(), passed, &limits));
        if is_above {
            self.saw(entry, Signal::Network);
        }
        !is_above
    }

    /// Pauses a guest by `pause`. If anything that counts passed its firewall meanwhile, its
    /// guest may have taken it without having answered, and the sleep is not to go on.
    ///
    /// # Errors
    /// `Active` if something passed; and where the guest cannot be paused, or the kernel does
    /// not say what passed.
    pub(super) fn pause_unless_used(
        &self,
        entry: &Entry,
        pause: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let before = self.network_use(entry)?;
        pause()?;
        if self.network_use(entry)? == before {
            return Ok(());
        }
        self.saw(entry, Signal::Network);
        Err(Error::Active { id: entry.id().clone(), count: entry.activity_count() })
    }

    /// What the VMM did for a sleep that came to nothing is not the guest's doing.
    pub(super) fn gauge_anew(&self, entry: &Entry) {
        if let Some(live) = self.machines.get(entry.row()) {
            lock(&live.gauge).begin_anew();
        }
    }
}

/// Returns what a counter says; what the system does not let us read is not there for us.
fn reading<T>(read: io::Result<Option<T>>) -> Reading<T> {
    match read {
        Ok(Some(value)) => Reading::Is(value),
        Ok(None) => Reading::Absent,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Reading::Absent,
        Err(_) => Reading::Failed,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(millis: i64, cpu_millis: u64, disk_bytes: Option<u64>) -> Sample {
        Sample {
            at: Timestamp::from_millis(millis),
            cpu: Reading::Is(Duration::from_millis(cpu_millis)),
            disk_bytes: disk_bytes.map_or(Reading::Absent, Reading::Is),
            network_bytes: Reading::Absent,
        }
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
        let Busyness { now, counted, .. } = gauge.busyness;
        assert_eq!((now.cpu_percent, counted.cpu_percent), (Some(15.0), Some(15.0)));
        assert_eq!(now.disk_bytes_per_second, Some(0));
        assert_eq!(counted.disk_bytes_per_second, Some(1001), "as it was when it counted");
    }

    #[test]
    fn bytes_of_the_network_are_held_against_a_threshold_of_their_own() {
        let mut gauge = Gauge::default();
        let with =
            |millis, bytes| Sample { network_bytes: Reading::Is(bytes), ..sample(millis, 0, None) };
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
    fn what_could_not_be_read_is_unknown_and_what_passed_meanwhile_is_seen_by_the_next_sample() {
        let mut gauge = Gauge::default();
        let limits = Activity { network_bytes_per_second: 10, ..limits() };
        let failed = Sample {
            disk_bytes: Reading::Failed,
            network_bytes: Reading::Failed,
            ..sample(1000, 0, None)
        };
        let with = |millis, bytes| Sample {
            network_bytes: Reading::Is(bytes),
            ..sample(millis, 0, Some(0))
        };
        gauge.take(with(0, 0), &limits);
        assert!(gauge.busyness.unknown.is_empty());
        assert_eq!(gauge.take(failed, &limits), []);
        let unknown = SignalSet::NONE.with(Signal::Disk).with(Signal::Network);
        assert_eq!(gauge.busyness.unknown, unknown);
        assert_eq!(gauge.busyness.now.network_bytes_per_second, None);
        assert_eq!(gauge.take(with(2000, 30), &limits), [Signal::Network]);
        assert_eq!(gauge.busyness.now.network_bytes_per_second, Some(15));
        assert!(gauge.busyness.unknown.is_empty());
    }

    #[test]
    fn traffic_since_the_last_sample_is_held_against_the_same_threshold() {
        let mut gauge = Gauge::default();
        let limits = Activity { network_bytes_per_second: 100, ..limits() };
        let at = Timestamp::from_millis;
        assert!(!gauge.is_network_above(at(0), 1 << 20, &limits), "there is no sample yet");
        gauge.take(Sample { network_bytes: Reading::Is(0), ..sample(0, 0, None) }, &limits);
        assert!(!gauge.is_network_above(at(1), 50, &limits), "over half a second at the least");
        assert!(gauge.is_network_above(at(1), 51, &limits));
        assert!(!gauge.is_network_above(at(2000), 200, &limits));
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
