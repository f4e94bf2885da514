//! What a guest uses of the host: samples of what the kernel counts, and the rates and signals
//! that follow from two of them.

use std::{collections::HashMap, io, time::Duration};

use crate::{
    sandbox::{Activity, Period, RowId, Signal, SignalSet, Timestamp},
    sync::{Arc, Mutex, lock},
};

/// Two samples closer than this say nothing: CPU time is counted in steps of 10 ms.
const WINDOW_MIN: Duration = Duration::from_millis(500);
/// Over this long a guest that does nothing is even: the kernel's flusher, and with it a file
/// system's journal, comes every five seconds. Looks that are closer are no new samples.
const WINDOW_MAX: Duration = Duration::from_secs(5);

/// What came of reading one counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading<T> {
    Is(T),
    /// There is nothing to count, as of a guest without disks.
    Absent,
    /// It could not be read, which says nothing about the guest.
    Failed,
}

impl<T> Reading<T> {
    /// Returns what a counter says; what the system does not let us read is not there for us.
    pub(crate) fn of(read: io::Result<Option<T>>) -> Self {
        match read {
            Ok(Some(value)) => Self::Is(value),
            Ok(None) => Self::Absent,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Self::Absent,
            Err(_) => Self::Failed,
        }
    }
}

/// What was counted of a guest up to one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) at: Timestamp,
    pub(crate) cpu: Reading<Duration>,
    pub(crate) disk_bytes: Reading<u64>,
    pub(crate) network_bytes: Reading<u64>,
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

/// What every guest that runs uses of the host, by the row of its sandbox.
#[derive(Debug, Default)]
pub(super) struct Usages {
    /// Each of them is a leaf lock, and so is the table.
    by_row: Mutex<HashMap<RowId, Arc<Mutex<Usage>>>>,
}

impl Usages {
    /// Starts with a guest of which nothing is known yet.
    pub(super) fn begin(&self, row: RowId) {
        lock(&self.by_row).insert(row, Arc::default());
    }

    /// Returns what is known of a guest.
    pub(super) fn get(&self, row: RowId) -> Option<Arc<Mutex<Usage>>> {
        lock(&self.by_row).get(&row).map(Arc::clone)
    }

    /// Forgets a guest that has ended.
    pub(super) fn end(&self, row: RowId) {
        lock(&self.by_row).remove(&row);
    }
}

/// What is known of a guest's use of the host while it runs.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) last: Option<Timestamp>,
    cpu: Counter<Duration>,
    disk_bytes: Counter<u64>,
    network_bytes: Counter<u64>,
    pub(super) busyness: Busyness,
}

impl Usage {
    /// Says whether the last sample is so old that another one makes sense. Of a sandbox that
    /// is about to be put to sleep the newest that there can be is wanted.
    pub(super) fn is_due(
        &self,
        now: Timestamp,
        idle_after: Period,
        sleeps_at: Option<Timestamp>,
    ) -> bool {
        let is_idle = sleeps_at.is_some_and(|at| at <= now);
        let window = if is_idle { WINDOW_MIN } else { window(idle_after) };
        self.last.is_none_or(|last| now.since(last) >= window)
    }

    /// Takes a sample, and returns what it shows to be above its threshold.
    pub(super) fn take(&mut self, sample: Sample, limits: &Activity) -> Vec<Signal> {
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
    pub(super) fn is_network_above(&self, now: Timestamp, bytes: u64, limits: &Activity) -> bool {
        self.network_bytes.0.is_some_and(|(since, before)| {
            // In a shorter time one packet would be much.
            let millis = now.since(since).max(WINDOW_MIN).as_millis();
            let passed = u128::from(bytes.saturating_sub(before)) * 1000;
            passed > u128::from(limits.network_bytes_per_second) * millis
        })
    }

    /// Forgets what the VMM used up to the last sample: what it used since was not the guest's
    /// doing. What passed the network was.
    pub(super) fn begin_anew(&mut self) {
        self.last = None;
        self.cpu = Counter::default();
        self.disk_bytes = Counter::default();
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
        let mut usage = Usage::default();
        assert_eq!(usage.take(sample(0, 500, Some(7)), &limits()), []);
        assert_eq!(usage.busyness, Busyness::default(), "one sample is no rate");
        assert_eq!(usage.take(sample(2000, 700, Some(2007)), &limits()), []);
        assert_eq!(usage.busyness.now.cpu_percent, Some(10.0));
        assert_eq!(usage.busyness.now.disk_bytes_per_second, Some(1000));
        assert_eq!(usage.take(sample(4000, 700, Some(4009)), &limits()), [Signal::Disk]);
        assert_eq!(usage.take(sample(6000, 1000, Some(4009)), &limits()), [Signal::Cpu]);
        let Busyness { now, counted, .. } = usage.busyness;
        assert_eq!((now.cpu_percent, counted.cpu_percent), (Some(15.0), Some(15.0)));
        assert_eq!(now.disk_bytes_per_second, Some(0));
        assert_eq!(counted.disk_bytes_per_second, Some(1001), "as it was when it counted");
    }

    #[test]
    fn bytes_of_the_network_are_held_against_a_threshold_of_their_own() {
        let mut usage = Usage::default();
        let with =
            |millis, bytes| Sample { network_bytes: Reading::Is(bytes), ..sample(millis, 0, None) };
        let limits = Activity { network_bytes_per_second: 10, ..limits() };
        usage.take(with(0, 100), &limits);
        assert_eq!(usage.take(with(1000, 110), &limits), []);
        assert_eq!(usage.take(with(2000, 121), &limits), [Signal::Network]);
        assert_eq!(usage.take(with(3000, 0), &limits), [], "its network was made anew");
        assert_eq!(usage.busyness.counted.network_bytes_per_second, Some(11));
    }

    #[test]
    fn what_is_not_seen_has_no_rate() {
        let mut usage = Usage::default();
        usage.take(sample(0, 0, None), &limits());
        assert_eq!(usage.take(sample(1000, 0, Some(1 << 30)), &limits()), []);
        assert_eq!(usage.busyness.now.disk_bytes_per_second, None);
    }

    #[test]
    fn what_could_not_be_read_is_unknown_and_what_passed_meanwhile_is_seen_by_the_next_sample() {
        let mut usage = Usage::default();
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
        usage.take(with(0, 0), &limits);
        assert!(usage.busyness.unknown.is_empty());
        assert_eq!(usage.take(failed, &limits), []);
        let unknown = SignalSet::NONE.with(Signal::Disk).with(Signal::Network);
        assert_eq!(usage.busyness.unknown, unknown);
        assert_eq!(usage.busyness.now.network_bytes_per_second, None);
        assert_eq!(usage.take(with(2000, 30), &limits), [Signal::Network]);
        assert_eq!(usage.busyness.now.network_bytes_per_second, Some(15));
        assert!(usage.busyness.unknown.is_empty());
    }

    #[test]
    fn traffic_since_the_last_sample_is_held_against_the_same_threshold() {
        let mut usage = Usage::default();
        let limits = Activity { network_bytes_per_second: 100, ..limits() };
        let at = Timestamp::from_millis;
        assert!(!usage.is_network_above(at(0), 1 << 20, &limits), "there is no sample yet");
        usage.take(Sample { network_bytes: Reading::Is(0), ..sample(0, 0, None) }, &limits);
        assert!(!usage.is_network_above(at(1), 50, &limits), "over half a second at the least");
        assert!(usage.is_network_above(at(1), 51, &limits));
        assert!(!usage.is_network_above(at(2000), 200, &limits));
    }

    #[test]
    fn what_was_used_before_a_new_beginning_does_not_count() {
        let mut usage = Usage::default();
        usage.take(sample(0, 0, Some(0)), &limits());
        usage.begin_anew();
        assert_eq!(usage.take(sample(1000, 900, Some(1 << 30)), &limits()), []);
        assert_eq!(usage.take(sample(2000, 900, Some(1 << 30)), &limits()), []);
    }

    #[test]
    fn what_passed_the_network_before_a_new_beginning_counts() {
        let mut usage = Usage::default();
        let limits = Activity { network_bytes_per_second: 100, ..limits() };
        let with =
            |millis, bytes| Sample { network_bytes: Reading::Is(bytes), ..sample(millis, 0, None) };
        usage.take(with(0, 0), &limits);
        usage.begin_anew();
        assert!(usage.is_network_above(Timestamp::from_millis(1000), 101, &limits));
        assert_eq!(usage.take(with(1000, 101), &limits), [Signal::Network]);
    }

    #[test]
    fn one_that_is_about_to_be_put_to_sleep_is_looked_at_once_more() {
        let mut usage = Usage::default();
        let at = Timestamp::from_millis;
        assert!(usage.is_due(at(0), Period::Never, None), "there is no sample yet");
        usage.take(sample(0, 0, None), &limits());
        assert!(!usage.is_due(at(4999), Period::Never, None));
        assert!(usage.is_due(at(5000), Period::Never, None));
        assert!(!usage.is_due(at(600), Period::Never, Some(at(601))));
        assert!(usage.is_due(at(600), Period::Never, Some(at(600))));
        assert!(!usage.is_due(at(499), Period::Never, Some(at(0))));
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
