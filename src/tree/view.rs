//! What the files read as: facts in, text out. Pure.
//!
//! One value a file, or a flat-keyed table, `key value` a line, newline-terminated.
//! Keyed files may gain keys at their end, never lose or reorder them.

use std::{borrow::Cow, fmt::Write, path::PathBuf, time::Duration};

use crate::{
    lifecycle::{Counters, Holder, Signal, Signals},
    sandbox::{Period, Record, State, Timestamp},
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
    /// Guest CPU in percent from which on it counts.
    pub active_cpu_percent: u32,
    /// Why the last command or operation failed.
    pub error: Option<Box<str>>,
    /// The bytes of its own disks.
    pub disk_bytes: u64,
    /// The bytes of its snapshot that the kernel caches, where it tells.
    pub cached_bytes: Option<u64>,
    /// A sentence for each thing that its VMM lacks.
    pub lacks: Vec<Cow<'static, str>>,
    /// Who holds it awake, and since when.
    pub holders: Vec<(Holder, Timestamp)>,
    /// The socket by which the host reaches its guest, if there is one.
    pub vsock: Option<PathBuf>,
    /// Says when a moment was, by the wall clock.
    pub wall: &'a dyn Fn(Timestamp) -> jiff::Timestamp,
}

/// What an absent value reads as.
const NONE: &str = "none";

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key} {value}").expect("writing to a string does not fail");
}

fn or_none<T: std::fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| value.to_string())
}

impl Facts<'_> {
    /// `status`: everything else that there is to know.
    #[must_use]
    pub fn status(&self) -> String {
        let record = self.record;
        let millis = |took: Option<Duration>| or_none(took.map(|took| took.as_millis()));
        let mut text = String::new();
        line(&mut text, "state", record.state);
        line(&mut text, "since", self.time(record.since));
        line(&mut text, "generation", record.generation);
        line(&mut text, "vmm", or_none(record.vmm.as_deref()));
        line(&mut text, "pid", or_none(record.process.as_ref().map(|process| process.pid)));
        line(&mut text, "vcpus", record.spec.vcpus);
        line(&mut text, "memory_bytes", record.spec.memory_bytes);
        line(&mut text, "snapshot_bytes", record.snapshot.map_or(0, |snapshot| snapshot.bytes));
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
        for signal in Signal::ALL.into_iter().filter(|signal| *signal != Signal::Hold) {
            age(&mut text, signal);
        }
        let percent = self.signals.cpu_percent.map(|percent| format!("{percent:.1}"));
        line(&mut text, "cpu_percent", or_none(percent));
        line(&mut text, "cpu_counts_from_percent", self.active_cpu_percent);
        age(&mut text, Signal::Hold);
        line(&mut text, "holds", self.holders.len());
        text
    }

    /// `idle`: the verdict, why, and when what happens.
    #[must_use]
    pub fn idle(&self) -> String {
        let record = self.record;
        // What is held has no time to sleep at.
        let sleeps = self.holders.is_empty().then(|| record.sleep_at(self.last_activity)).flatten();
        let (verdict, because) = match (record.state, sleeps) {
            (State::Running, None) if !self.holders.is_empty() => ("held", self.held()),
            (State::Running, None) => ("exempt", "idle_after is never".to_owned()),
            (State::Running, Some(due)) if record.retry_at.is_some_and(|at| at > self.now) => (
                "put-off",
                format!(
                    "the last try to put it to sleep failed; the next is in {} s",
                    due.since(self.now).as_secs()
                ),
            ),
            (State::Running, Some(due)) => {
                let verdict = if due <= self.now { "idle" } else { "active" };
                (verdict, format!("{}; idle_after is {}", self.latest(), record.idle_after))
            }
            (state, _) => (state.word(), format!("it is {state}, not running")),
        };
        let mut text = String::new();
        line(&mut text, "verdict", verdict);
        line(&mut text, "because", because);
        line(&mut text, "sleeps_at", self.due(sleeps, record.idle_after));
        line(&mut text, "deletes_at", self.due(record.delete_at(), record.delete_after));
        text
    }

    /// Says who holds it: the one who has for the longest.
    fn held(&self) -> String {
        let Some((Holder { pid, uid, command }, since)) = self.holders.first() else {
            return NONE.to_owned();
        };
        let more = match self.holders.len() - 1 {
            0 => String::new(),
            more => format!(", and by {more} more"),
        };
        let age = self.age(*since);
        format!("held awake by {command} (pid {pid}, uid {uid}) for {age} s{more}")
    }

    fn latest(&self) -> String {
        let age = self.age(self.last_activity);
        match self.signals.latest() {
            // The index may have an older daemon's activity, of which only the time is known.
            Some((signal, at)) if at >= self.last_activity => {
                let what = match signal {
                    Signal::Control => "a verb written to state",
                    Signal::Touch => "a touch of activity",
                    Signal::Boot => "its boot",
                    Signal::Wake => "its wake",
                    Signal::Cpu => "guest CPU above the threshold",
                    Signal::Console => "input on its console",
                    Signal::Hold => "a hold",
                };
                format!("the last activity was {what}, {age} s ago")
            }
            Some(_) | None => format!("the last activity was {age} s ago"),
        }
    }

    /// One line of `dozed.list`.
    #[must_use]
    pub fn list_line(&self) -> String {
        let record = self.record;
        format!(
            "{} {} {}:{} {}\n",
            record.id,
            record.state,
            record.owner.uid,
            record.owner.gid,
            self.time(self.last_activity)
        )
    }

    fn age(&self, at: Timestamp) -> u64 {
        self.now.since(at).as_secs()
    }

    /// RFC 3339, UTC, milliseconds.
    fn time(&self, at: Timestamp) -> String {
        format!("{:.3}", (self.wall)(at))
    }

    fn due(&self, at: Option<Timestamp>, period: Period) -> String {
        match (at, period) {
            (Some(at), _) => self.time(at),
            (None, Period::Never) => "never".to_owned(),
            (None, Period::After(_)) => NONE.to_owned(),
        }
    }
}

/// What `dozed.status` is made of.
#[derive(Debug)]
pub struct DaemonFacts {
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
}

impl DaemonFacts {
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
