//! What `dozed.metrics` has: numbers of the whole daemon, as Prometheus reads them.
//!
//! No label names a sandbox, an owner or a process, so there are as many series on a host
//! with a million sandboxes as on one with ten.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};

use crate::sandbox::{Cause, Record, State, Step, Timestamp};

/// From a small guest on a fast disk to a large one on a slow disk, in seconds.
const BUCKETS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// What is so at the moment of reading.
#[derive(Debug, Clone, Copy)]
pub struct Gauges {
    /// Sandboxes in each state.
    pub counts: [(State, usize); State::ALL.len()],
    /// The memory of all that are awake, in bytes.
    pub memory_bytes: u64,
    /// The budget for it.
    pub memory_budget_bytes: Option<u64>,
    /// How many holds there are.
    pub holds: usize,
    /// When the reaper last looked, by the wall clock.
    pub reaper_last_tick: Option<jiff::Timestamp>,
    /// When the daemon started, by the wall clock.
    pub started: jiff::Timestamp,
}

/// What has happened since the daemon started.
#[derive(Debug)]
pub struct Metrics {
    /// When the reaper last looked; 0 before that.
    last_tick: AtomicI64,
    registry: Registry,
    sleeps: IntCounterVec,
    wakes: IntCounterVec,
    boots: IntCounterVec,
    losses: IntCounterVec,
    failures: IntCounterVec,
    reaper_failures: IntCounter,
    sleep_seconds: Histogram,
    wake_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let counted = |name: &str, help: &str, label: &str| {
            let made =
                IntCounterVec::new(Opts::new(name, help), &[label]).expect("names are valid");
            enter(&registry, made)
        };
        let timed = |name: &str, help: &str| {
            let opts = HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
            enter(&registry, Histogram::with_opts(opts).expect("names are valid"))
        };
        let reaper_failures =
            IntCounter::new("dozed_reaper_failures_total", "Failed attempts of the reaper");
        Self {
            sleeps: counted("dozed_sleeps_total", "Completed sleeps, by cause", "cause"),
            wakes: counted("dozed_wakes_total", "Wakes from a snapshot, by cause", "cause"),
            boots: counted("dozed_boots_total", "Completed boots, by cause", "cause"),
            losses: counted(
                "dozed_losses_total",
                "Guests that shut down, or were lost with their VMM, by cause",
                "cause",
            ),
            failures: counted(
                "dozed_failures_total",
                "Requested operations that failed or were refused, by errno",
                "errno",
            ),
            reaper_failures: enter(&registry, reaper_failures.expect("names are valid")),
            sleep_seconds: timed("dozed_sleep_duration_seconds", "Duration of sleeps"),
            wake_seconds: timed("dozed_wake_duration_seconds", "Duration of wakes"),
            last_tick: AtomicI64::new(0),
            registry,
        }
    }
}

impl Metrics {
    /// Counts a step that was taken.
    pub fn stepped(&self, step: &Step, cause: &Cause, before: &Record, after: &Record) {
        let took = |then: Option<Duration>, now: Option<Duration>| now.filter(|_| now != then);
        match step {
            Step::Slept(_) => {
                self.sleeps.with_label_values(&[cause.word()]).inc();
                if let Some(took) = took(before.last_sleep, after.last_sleep) {
                    self.sleep_seconds.observe(took.as_secs_f64());
                }
            }
            Step::Woken(_) => {
                self.wakes.with_label_values(&[cause.word()]).inc();
                if let Some(took) = took(before.last_wake, after.last_wake) {
                    self.wake_seconds.observe(took.as_secs_f64());
                }
            }
            Step::Booted(_) => self.boots.with_label_values(&[cause.word()]).inc(),
            Step::Lost => self.losses.with_label_values(&[cause.word()]).inc(),
            Step::Boot | Step::Sleep | Step::Wake | Step::Undo | Step::Delete => {}
        }
    }

    /// Counts something that was asked for and answered with an errno, such as `EIO`.
    pub fn failed(&self, errno: &str) {
        self.failures.with_label_values(&[errno]).inc();
    }

    /// Counts something that the reaper began in vain.
    pub fn reaper_failed(&self) {
        self.reaper_failures.inc();
    }

    /// Notes that the reaper looked.
    pub fn ticked(&self, at: Timestamp) {
        self.last_tick.store(at.as_millis(), Ordering::Relaxed);
    }

    /// Returns when the reaper last looked.
    #[must_use]
    pub fn last_tick(&self) -> Option<Timestamp> {
        let millis = self.last_tick.load(Ordering::Relaxed);
        (millis != 0).then(|| Timestamp::from_millis(millis))
    }

    /// Returns all numbers as text, in the format of Prometheus.
    ///
    /// # Panics
    /// Never: there is room for text, and every family has a sample.
    #[must_use]
    pub fn expose(&self, gauges: &Gauges) -> String {
        let mut families = gauges.collect();
        families.extend(self.registry.gather());
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).expect("every family has a sample");
        String::from_utf8(text).expect("names, help and labels are text")
    }
}

impl Gauges {
    /// Makes the families anew, so that two who read at once do not mix.
    fn collect(&self) -> Vec<prometheus::proto::MetricFamily> {
        let registry = Registry::new();
        let set = |name: &str, help: &str, value: f64| {
            enter(&registry, Gauge::new(name, help).expect("names are valid")).set(value);
        };
        let info = Opts::new("dozed_info", "The running daemon")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        enter(&registry, Gauge::with_opts(info).expect("names are valid")).set(1.0);
        let states = Opts::new("dozed_sandboxes", "Number of sandboxes, by state");
        let states = IntGaugeVec::new(states, &["state"]).expect("names are valid");
        let states = enter(&registry, states);
        for (state, count) in self.counts {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            states.with_label_values(&[state.word()]).set(count);
        }
        set("dozed_memory_bytes", "Memory of all running sandboxes", number(self.memory_bytes));
        if let Some(budget) = self.memory_budget_bytes {
            set(
                "dozed_memory_budget_bytes",
                "Limit of the memory of all running sandboxes",
                number(budget),
            );
        }
        set(
            "dozed_holds",
            "Number of open files that hold a sandbox awake",
            number(self.holds as u64),
        );
        let started = self.started.as_millisecond();
        set("dozed_start_time_seconds", "Start time of the daemon", seconds(started));
        if let Some(tick) = self.reaper_last_tick {
            let at = seconds(tick.as_millisecond());
            set("dozed_reaper_last_tick_seconds", "Time of the reaper's last tick", at);
        }
        registry.gather()
    }
}

/// The format has floating-point numbers only. Those here are exact up to 8 PiB.
#[allow(clippy::cast_precision_loss, reason = "it is what the format has")]
fn number(number: u64) -> f64 {
    number as f64
}

#[allow(clippy::cast_precision_loss, reason = "it is what the format has")]
fn seconds(millis: i64) -> f64 {
    millis as f64 / 1000.0
}

/// Enters a metric, of which there is no other of its name.
fn enter<T: Collector + Clone + 'static>(registry: &Registry, metric: T) -> T {
    registry.register(Box::new(metric.clone())).expect("each name is entered once");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauges() -> Gauges {
        Gauges {
            counts: State::ALL.map(|state| (state, usize::from(state == State::Running) * 7)),
            memory_bytes: 3 << 30,
            memory_budget_bytes: None,
            holds: 2,
            reaper_last_tick: None,
            started: jiff::Timestamp::from_millisecond(1_500).unwrap(),
        }
    }

    #[test]
    fn what_is_so_and_what_has_happened_is_exposed() {
        let metrics = Metrics::default();
        metrics.failed("EIO");
        metrics.failed("EIO");
        metrics.reaper_failed();
        let text = metrics.expose(&gauges());
        for line in [
            "# TYPE dozed_sandboxes gauge",
            "dozed_sandboxes{state=\"running\"} 7",
            "dozed_sandboxes{state=\"stopped\"} 0",
            "dozed_memory_bytes 3221225472",
            "dozed_holds 2",
            "dozed_start_time_seconds 1.5",
            "# TYPE dozed_failures_total counter",
            "dozed_failures_total{errno=\"EIO\"} 2",
            "dozed_reaper_failures_total 1",
            "dozed_wake_duration_seconds_bucket{le=\"0.005\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        for absent in ["dozed_memory_budget_bytes", "dozed_reaper_last_tick_seconds"] {
            assert!(!text.contains(absent), "{absent}: {text}");
        }
        assert!(text.ends_with('\n'));
    }
}
