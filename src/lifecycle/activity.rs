//! What counts as activity, and what each sandbox showed of it.
//!
//! Only what somebody does to a sandbox, or its guest does, is activity. Looking is
//! free: nothing that reads comes here.

use std::{collections::HashMap, time::Duration};

use super::{Entry, Lifecycle};
use crate::{
    sandbox::{RowId, State, Timestamp},
    sync::{Mutex, lock},
};

/// A kind of activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Signal {
    /// A verb written to `state` that was understood.
    Control,
    /// `touch activity`, or a write to it.
    Touch,
    /// A boot.
    Boot,
    /// A wake.
    Wake,
    /// Guest CPU above the threshold.
    Cpu,
    /// Something typed on the console.
    Console,
    /// An open `awake`.
    Hold,
}

impl Signal {
    /// All of them, in the order in which `activity` lists them.
    pub const ALL: [Self; 7] =
        [Self::Control, Self::Touch, Self::Boot, Self::Wake, Self::Cpu, Self::Console, Self::Hold];

    /// Returns the key of the signal in `activity`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Touch => "touch",
            Self::Boot => "boot",
            Self::Wake => "wake",
            Self::Cpu => "cpu",
            Self::Console => "console",
            Self::Hold => "hold",
        }
    }
}

/// When a sandbox last showed each kind of activity, since this daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Signals {
    last: [Option<Timestamp>; Signal::ALL.len()],
    /// The guest's CPU time over the last sample, in percent of one host CPU.
    pub cpu_percent: Option<f64>,
}

impl Signals {
    /// Returns when `signal` was last seen.
    #[must_use]
    pub fn last(&self, signal: Signal) -> Option<Timestamp> {
        self.last[signal as usize]
    }

    /// Returns the latest signal of all.
    #[must_use]
    pub fn latest(&self) -> Option<(Signal, Timestamp)> {
        Signal::ALL
            .into_iter()
            .filter_map(|signal| self.last(signal).map(|at| (signal, at)))
            .max_by_key(|(_, at)| *at)
    }
}

/// What is remembered only while the daemon lives. Bounded by the count of sandboxes.
#[derive(Debug, Default)]
pub(super) struct Activities {
    /// A leaf lock.
    signals: Mutex<HashMap<RowId, Signals>>,
    /// Why the last command was not understood, if it was not. A leaf lock.
    notes: Mutex<HashMap<RowId, Box<str>>>,
}

/// The guest's CPU time at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuSample {
    at: Timestamp,
    used: Duration,
}

/// Two samples closer than this say nothing: CPU time is counted in steps of 10 ms.
const SAMPLE_MIN: Duration = Duration::from_millis(500);

impl Activities {
    fn see(&self, row: RowId, signal: Signal, at: Timestamp) {
        lock(&self.signals).entry(row).or_default().last[signal as usize] = Some(at);
    }

    pub(super) fn note(&self, row: RowId, text: String) {
        lock(&self.notes).insert(row, text.into_boxed_str());
    }

    pub(super) fn forget_note(&self, row: RowId) {
        lock(&self.notes).remove(&row);
    }

    pub(super) fn forget(&self, row: RowId) {
        lock(&self.signals).remove(&row);
        self.forget_note(row);
    }
}

impl Lifecycle {
    /// Counts activity of a sandbox, in memory; the index learns of it later.
    pub fn saw(&self, entry: &Entry, signal: Signal) {
        let now = self.now();
        self.activities.see(entry.row(), signal, now);
        entry.touch(now);
    }

    /// Returns what a sandbox showed of each kind of activity.
    #[must_use]
    pub fn signals(&self, row: RowId) -> Signals {
        lock(&self.activities.signals).get(&row).copied().unwrap_or_default()
    }

    /// Notes why a command was refused before it became an operation.
    pub fn note(&self, entry: &Entry, error: &(dyn std::error::Error + 'static)) {
        self.activities.note(entry.row(), super::chain(error));
    }

    /// Returns what `error` reads as: why the last command or operation failed.
    #[must_use]
    pub fn last_error(&self, entry: &Entry) -> Option<Box<str>> {
        let note = lock(&self.activities.notes).get(&entry.row()).cloned();
        note.or_else(|| entry.record().error.clone())
    }

    /// Looks at the CPU time of every guest that runs. Called at each tick.
    pub fn sample_activity(&self) {
        for (row, live) in self.machines.all() {
            let Ok(used) = live.process.cpu_time() else {
                continue;
            };
            let now = self.now();
            let before = {
                let mut last = lock(&live.cpu);
                if last.is_some_and(|last| now.since(last.at) < SAMPLE_MIN) {
                    continue;
                }
                last.replace(CpuSample { at: now, used })
            };
            let (Some(before), Some(entry)) = (before, self.by_row(row)) else {
                continue;
            };
            let share =
                used.saturating_sub(before.used).as_secs_f64() / now.since(before.at).as_secs_f64();
            let percent = 100.0 * share;
            lock(&self.activities.signals).entry(row).or_default().cpu_percent = Some(percent);
            let running = entry.record().state == State::Running;
            if running && percent > f64::from(self.settings.active_cpu_percent) {
                self.saw(&entry, Signal::Cpu);
            }
        }
    }

    /// Returns the guest's CPU time, of a sandbox that is awake.
    #[must_use]
    pub fn cpu_time(&self, row: RowId) -> Option<Duration> {
        self.machines.get(row).and_then(|live| live.process.cpu_time().ok())
    }

    /// Writes what was seen of activity to the index.
    ///
    /// # Errors
    /// Where the index cannot be written; the next try has it all.
    pub fn flush_activity(&self) -> Result<(), crate::index::Error> {
        while self.index.flush_activity()? > 0 {}
        Ok(())
    }
}
