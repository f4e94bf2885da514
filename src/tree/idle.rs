//! What `idle` reads as: what happens next to a sandbox by itself, and the one thing that
//! decides. Pure, as all views.

use super::view::{Facts, NONE, line, or_none, tenths};
use crate::{
    activity::{self, Holder, Verdict},
    lifecycle::Stale,
    sandbox::{Period, Signal, SignalSet, State, Timestamp},
};

impl Facts<'_> {
    /// `idle`: the verdict, why, and when what happens.
    #[must_use]
    pub fn idle(&self) -> String {
        let record = self.record;
        let outlook = self.outlook();
        let verdict = outlook.verdict();
        let mut text = String::new();
        line(&mut text, "verdict", verdict.word());
        line(&mut text, "because", self.because(verdict));
        line(&mut text, "sleeps_at", self.due(outlook.sleeps_at(), record.idle_after));
        line(&mut text, "deletes_at", self.due(outlook.deletes_at(), record.delete_after));
        line(&mut text, "last_wake_cause", or_none(record.waking.cause.as_deref()));
        line(&mut text, "wakes_today", record.waking.of_day(self.today));
        let until = record.waking.awake_until.filter(|_| record.state() == State::Running);
        line(&mut text, "awake_until", or_none(until.map(|until| self.time(until))));
        text
    }

    fn outlook(&self) -> activity::Facts<'_> {
        activity::Facts {
            record: self.record,
            now: self.now,
            last_activity: self.last_activity,
            unknown: self.busyness.unknown.and(self.limits.signals),
            is_held: !self.holders.is_empty(),
            grace_until: self.grace_until,
            is_unwakeable: self.unwakeable.is_some(),
            stale_at: self.stale.map(|stale| stale.at),
        }
    }

    /// Says in a sentence what decides.
    fn because(&self, verdict: Verdict) -> String {
        match verdict {
            Verdict::NotRunning(State::Snapshotted) => self.asleep(),
            Verdict::NotRunning(state) => format!("it is {state}, not running"),
            Verdict::Held => self.held(),
            Verdict::Exempt => self.exempt(),
            Verdict::Grace(left) => {
                let why = "it was held awake when the daemon was restarted, and its holders have";
                format!("{why} {} s more to open it again", left.as_secs())
            }
            Verdict::PutOff(left) => {
                let why = "the last try to put it to sleep failed; the next is in";
                format!("{why} {} s", left.as_secs())
            }
            Verdict::JustWoken(until) => self.just_woken(until),
            Verdict::Unknown(signals) => self.why_unknown(signals),
            Verdict::Idle | Verdict::Active => {
                format!("{}; idle_after is {}", self.latest(), self.record.idle_after)
            }
        }
    }

    fn why_unknown(&self, signals: SignalSet) -> String {
        let what = signals.to_string().replace(' ', " and ");
        format!("its {what} could not be read at the last check; {}", self.latest())
    }

    /// Says why it is not put to sleep.
    fn exempt(&self) -> String {
        match &self.unwakeable {
            Some(why) if self.record.idle_after != Period::Never => {
                format!("nothing here could wake it: {why}")
            }
            Some(_) | None => "idle_after is never".to_owned(),
        }
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

    fn asleep(&self) -> String {
        let record = self.record;
        let pinned = if record.pinned { ", and it is pinned" } else { "" };
        let (since, delete_after) = (self.time(record.since), record.delete_after);
        let text = format!("asleep since {since}; delete_after is {delete_after}{pinned}");
        match self.stale.filter(|stale| stale.waits_for_clock) {
            Some(Stale { at, .. }) => {
                let why = "but the host's clock has not been synchronised since it booted, so it \
                           is not deleted until that is done or it is";
                format!("{text}, {why} {}", self.time(at))
            }
            None => text,
        }
    }

    fn just_woken(&self, until: Timestamp) -> String {
        let record = self.record;
        let (age, stays) = (self.age(record.since), until.since(record.since).as_secs());
        let why = match record.waking.in_vain {
            0 | 1 => String::new(),
            sleeps => format!(", because its last {sleeps} sleeps were short"),
        };
        format!("woken {age} s ago, it stays awake for {stays} s{why}")
    }

    fn latest(&self) -> String {
        let age = self.age(self.last_activity);
        match self.signals.latest(self.limits.signals) {
            // The index may have an older daemon's activity, of which only the time is known.
            Some((signal, at)) if at >= self.last_activity => {
                format!("the last activity was {}, {age} s ago", self.what(signal))
            }
            Some(_) | None => format!("the last activity was {age} s ago"),
        }
    }

    /// Says what a signal was, with its numbers.
    fn what(&self, signal: Signal) -> String {
        let (limits, counted) = (self.limits, self.busyness.counted);
        match signal {
            Signal::Control => "a verb written to state".to_owned(),
            Signal::Touch => "a touch of activity".to_owned(),
            Signal::Boot => "its boot".to_owned(),
            Signal::Wake => "its wake".to_owned(),
            Signal::Console => "input on its console".to_owned(),
            Signal::Hold => "a hold".to_owned(),
            Signal::Cpu => {
                let of = counted.cpu_percent.map(|percent| format!(" of {}%", tenths(percent)));
                let of = of.unwrap_or_default();
                format!("guest CPU{of}, above the threshold of {}%", limits.cpu_percent)
            }
            Signal::Disk => {
                let (rate, limit) = (counted.disk_bytes_per_second, limits.disk_bytes_per_second);
                above("disk traffic", rate, limit)
            }
            Signal::Network => {
                let rate = counted.network_bytes_per_second;
                above("network traffic", rate, limits.network_bytes_per_second)
            }
        }
    }

    fn due(&self, at: Option<Timestamp>, period: Period) -> String {
        match (at, period) {
            (Some(at), _) => self.time(at),
            (None, Period::Never) => "never".to_owned(),
            (None, Period::After(_)) => NONE.to_owned(),
        }
    }
}

fn above(what: &str, rate: Option<u64>, limit: u64) -> String {
    let of = rate.map(|rate| format!(" of {rate} bytes/s")).unwrap_or_default();
    format!("{what}{of}, above the threshold of {limit} bytes/s")
}
