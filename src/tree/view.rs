//! What the files read as: facts in, text out. Pure.
//!
//! One value a file, or a flat-keyed table, `key value` a line, newline-terminated.
//! Keyed files may gain keys at their end, never lose or reorder them.

use std::{borrow::Cow, fmt::Write, path::PathBuf, time::Duration};

use crate::{
    activity::{Busyness, Holder, Signals},
    lifecycle::{Counters, Stale},
    sandbox::{Activity, Record, Signal, State, Timestamp},
};

/// What a view is made of.
#[allow(missing_debug_implementations, reason = "it is made and used within one call")]
pub struct Facts<'a> {
    /// The record.
    pub record: &'a Record,
    /// The moment of looking.
    pub now: Timestamp,
    /// The last activity.
    pub last_activity: Timestamp,
    /// The count of its activity.
    pub activity_count: u64,
    /// The kinds of activity.
    pub signals: Signals,
    /// What counts as activity, and from when on.
    pub limits: Activity,
    /// How busy the guest is.
    pub busyness: Busyness,
    /// Why the last command or operation failed.
    pub error: Option<Box<str>>,
    /// The bytes of its own disks.
    pub disk_bytes: u64,
    /// The bytes of its snapshot that the kernel caches, where it tells.
    pub cached_bytes: Option<u64>,
    /// A sentence for each thing that its VMM lacks.
    pub lacks: Vec<Cow<'static, str>>,
    /// When the reaper is to delete it.
    pub stale: Option<Stale>,
    /// Until when the reaper leaves it alone, as an earlier daemon's holders may be back.
    pub grace_until: Option<Timestamp>,
    /// The day of the wall clock.
    pub today: i32,
    /// Why it could not be woken if it were put to sleep.
    pub unwakeable: Option<String>,
    /// Who holds it awake, and since when.
    pub holders: Vec<(Holder, Timestamp)>,
    /// The socket by which the host reaches its guest, if there is one.
    pub vsock: Option<PathBuf>,
    /// Says when a moment was, by the wall clock.
    pub wall: &'a dyn Fn(Timestamp) -> jiff::Timestamp,
}

/// What an absent value reads as.
pub(super) const NONE: &str = "none";

pub(super) fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key} {value}").expect("writing to a string does not fail");
}

pub(super) fn tenths(percent: f64) -> String {
    format!("{percent:.1}")
}

pub(super) fn or_none<T: std::fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| value.to_string())
}

impl Facts<'_> {
    /// `status`: everything else that there is to know.
    #[must_use]
    pub fn status(&self) -> String {
        let record = self.record;
        let millis = |took: Option<Duration>| or_none(took.map(|took| took.as_millis()));
        let mut text = String::new();
        line(&mut text, "state", record.state());
        line(&mut text, "since", self.time(record.since));
        line(&mut text, "generation", record.generation);
        line(&mut text, "vmm", or_none(record.vmm.as_deref()));
        line(&mut text, "pid", or_none(record.process().map(|process| process.pid)));
        line(&mut text, "vcpus", record.spec.vcpus);
        line(&mut text, "memory_bytes", record.spec.memory_bytes);
        line(&mut text, "snapshot_bytes", record.snapshot().map_or(0, |snapshot| snapshot.bytes));
        line(&mut text, "disk_bytes", self.disk_bytes);
        line(&mut text, "sleeps", record.sleeps);
        line(&mut text, "wakes", record.wakes);
        line(&mut text, "last_sleep_ms", millis(record.last_sleep));
        line(&mut text, "last_wake_ms", millis(record.last_wake));
        line(&mut text, "owner", format_args!("{}:{}", record.owner.uid, record.owner.gid));
        line(&mut text, "created", self.time(record.created_at));
        line(&mut text, "cached_bytes", or_none(self.cached_bytes));
        let lacks = (!self.lacks.is_empty()).then(|| self.lacks.join("; "));
        line(&mut text, "lacks", or_none(lacks));
        line(&mut text, "vsock", or_none(self.vsock.as_ref().map(|path| path.display())));
        text
    }

    /// `error`: `ok`, or one line.
    #[must_use]
    pub fn error(&self) -> String {
        format!("{}\n", self.error.as_deref().unwrap_or("ok"))
    }

    /// `awake`: who holds it, a line for each hold: process, user, seconds, command.
    #[must_use]
    pub fn awake(&self) -> String {
        let mut text = String::new();
        for (Holder { pid, uid, command }, since) in &self.holders {
            line(&mut text, &pid.to_string(), format_args!("{uid} {} {command}", self.age(*since)));
        }
        text
    }

    /// `activity`: what counts, and how long ago it was.
    #[must_use]
    pub fn activity(&self) -> String {
        let mut text = String::new();
        line(&mut text, "count", self.activity_count);
        line(&mut text, "last", self.time(self.last_activity));
        line(&mut text, "last_age_seconds", self.age(self.last_activity));
        let age = |text: &mut String, signal: Signal| {
            let age = self.signals.last(signal).map(|at| self.age(at));
            line(text, &format!("{}_age_seconds", signal.word()), or_none(age));
        };
        for signal in [
            Signal::Control,
            Signal::Touch,
            Signal::Boot,
            Signal::Wake,
            Signal::Cpu,
            Signal::Console,
        ] {
            age(&mut text, signal);
        }
        let (limits, now) = (self.limits, self.busyness.now);
        line(&mut text, "cpu_percent", or_none(now.cpu_percent.map(tenths)));
        line(&mut text, "cpu_counts_from_percent", limits.cpu_percent);
        age(&mut text, Signal::Hold);
        line(&mut text, "holds", self.holders.len());
        age(&mut text, Signal::Disk);
        line(&mut text, "disk_bytes_per_second", or_none(now.disk_bytes_per_second));
        let key = "disk_counts_from_bytes_per_second";
        line(&mut text, key, limits.disk_bytes_per_second);
        age(&mut text, Signal::Network);
        line(&mut text, "network_bytes_per_second", or_none(now.network_bytes_per_second));
        let key = "network_counts_from_bytes_per_second";
        line(&mut text, key, limits.network_bytes_per_second);
        line(&mut text, "signals", limits.signals);
        text
    }

    /// One line of `dozed.list`.
    #[must_use]
    pub fn list_line(&self) -> String {
        let record = self.record;
        format!(
            "{} {} {}:{} {}\n",
            record.id,
            record.state(),
            record.owner.uid,
            record.owner.gid,
            self.time(self.last_activity)
        )
    }

    pub(super) fn age(&self, at: Timestamp) -> u64 {
        self.now.since(at).as_secs()
    }

    /// RFC 3339, UTC, milliseconds.
    pub(super) fn time(&self, at: Timestamp) -> String {
        format!("{:.3}", (self.wall)(at))
    }
}

/// Returns the length of a sandbox's line in `dozed.list` without making it: a time in RFC 3339
/// with milliseconds has one length.
pub(super) fn list_line_len(record: &Record) -> u64 {
    let digits = |number: u32| u64::from(number.checked_ilog10().unwrap_or(0) + 1);
    let words = record.id.as_str().len() + record.state().word().len();
    let time_and_separators = "2026-01-01T00:00:00.000Z".len() + "  : \n".len();
    (words + time_and_separators) as u64 + digits(record.owner.uid) + digits(record.owner.gid)
}

/// What `dozed.status` is made of.
#[derive(Debug)]
pub struct DaemonFacts<'a> {
    /// Sandboxes in each state.
    pub counts: [(State, usize); State::ALL.len()],
    /// The memory of all that are awake, in bytes.
    pub memory_bytes: u64,
    /// The budget for it.
    pub memory_budget_bytes: Option<u64>,
    /// When the reaper last looked, by the wall clock.
    pub reaper_last_tick: Option<jiff::Timestamp>,
    /// When the daemon started, by the wall clock.
    pub started: jiff::Timestamp,
    /// The daemon's process.
    pub pid: u32,
    /// A few words for each thing that this daemon is forbidden and needs.
    pub lacks: &'a [String],
}

impl DaemonFacts<'_> {
    /// `dozed.status`.
    #[must_use]
    pub fn status(&self) -> String {
        let mut text = String::new();
        line(&mut text, "version", env!("CARGO_PKG_VERSION"));
        line(&mut text, "pid", self.pid);
        line(&mut text, "started", format_args!("{:.3}", self.started));
        let all: usize = self.counts.iter().map(|(_, count)| count).sum();
        line(&mut text, "sandboxes", all);
        for (state, count) in self.counts {
            line(&mut text, state.word(), count);
        }
        line(&mut text, "memory_bytes", self.memory_bytes);
        line(&mut text, "memory_budget_bytes", or_none(self.memory_budget_bytes));
        let tick = self.reaper_last_tick.map(|at| format!("{at:.3}"));
        line(&mut text, "reaper_last_tick", or_none(tick));
        let lacks = (!self.lacks.is_empty()).then(|| self.lacks.join("; "));
        line(&mut text, "lacks", or_none(lacks));
        text
    }
}
/// Returns the table of what passed a sandbox's firewall and what did not.
#[must_use]
pub(super) fn counters(counted: &Counters) -> String {
    let mut text = String::new();
    for (name, count) in counted.by_name() {
        line(&mut text, &format!("{name}_packets"), count.packets);
        line(&mut text, &format!("{name}_bytes"), count.bytes);
    }
    text
}
