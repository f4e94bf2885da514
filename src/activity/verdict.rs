//! The verdict: whether a sandbox is awake for a reason, and when the reaper acts on it. Pure.

use std::time::Duration;

use crate::sandbox::{Record, SignalSet, State, Timestamp};

/// What the verdict depends on.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The record.
    pub record: &'a Record,
    /// The moment of the verdict.
    pub now: Timestamp,
    /// The last activity.
    pub last_activity: Timestamp,
    /// Which signals that count could not be read.
    pub unknown: SignalSet,
    /// Whether somebody holds it awake.
    pub is_held: bool,
    /// Until when the reaper leaves it alone because an earlier daemon had a hold.
    pub grace_until: Option<Timestamp>,
    /// Whether nothing here could wake it.
    pub is_unwakeable: bool,
    /// When it has slept for too long.
    pub stale_at: Option<Timestamp>,
}

/// Why a sandbox is awake, or is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is in this state, in which nothing happens to it by itself except that a sleeper is
    /// deleted.
    NotRunning(State),
    /// Somebody holds it awake.
    Held,
    /// It never sleeps by itself.
    Exempt,
    /// An earlier daemon had a hold, which may come back within this time.
    Grace(Duration),
    /// The last attempt to put it to sleep failed, and the next is in this time.
    PutOff(Duration),
    /// It was woken not long ago, and stays awake until then.
    JustWoken(Timestamp),
    /// It looks idle, but these signals could not be read.
    Unknown(SignalSet),
    /// It is about to be put to sleep.
    Idle,
    /// It was active not long ago.
    Active,
}

impl Verdict {
    /// Returns the word for it in the file `idle`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NotRunning(state) => state.word(),
            Self::Held | Self::Grace(_) => "held",
            Self::Exempt => "exempt",
            Self::PutOff(_) => "put-off",
            Self::JustWoken(_) => "just-woken",
            Self::Unknown(_) => "unknown",
            Self::Idle => "idle",
            Self::Active => "active",
        }
    }
}

impl Facts<'_> {
    /// Returns when the reaper is to put it to sleep.
    #[must_use]
    pub fn sleeps_at(&self) -> Option<Timestamp> {
        let is_left_alone = self.is_held || self.is_unwakeable;
        let due = self.record.sleep_at(self.last_activity).filter(|_| !is_left_alone)?;
        Some(self.grace_until.map_or(due, |until| due.max(until)))
    }

    /// Returns when the reaper is to delete it.
    #[must_use]
    pub fn deletes_at(&self) -> Option<Timestamp> {
        let due = self.stale_at.filter(|_| !self.is_held)?;
        Some(self.grace_until.map_or(due, |until| due.max(until)))
    }

    /// Returns the verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let record = self.record;
        let is_ahead = |at: &Timestamp| *at > self.now;
        let due = match (record.state(), self.sleeps_at()) {
            (State::Running, Some(due)) => due,
            (State::Running, None) if self.is_held => return Verdict::Held,
            (State::Running, None) => return Verdict::Exempt,
            (state, _) => return Verdict::NotRunning(state),
        };
        if let Some(until) = self.grace_until.filter(is_ahead) {
            return Verdict::Grace(until.since(self.now));
        }
        if record.retry_at.as_ref().is_some_and(is_ahead) {
            return Verdict::PutOff(due.since(self.now));
        }
        match record.waking.awake_until.filter(is_ahead) {
            Some(until) if until == due => Verdict::JustWoken(until),
            Some(_) | None if due > self.now => Verdict::Active,
            Some(_) | None if !self.unknown.is_empty() => Verdict::Unknown(self.unknown),
            Some(_) | None => Verdict::Idle,
        }
    }
}
