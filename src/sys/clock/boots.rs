//! How much time certainly passed between two boots.
//!
//! After a boot the time line continues at the wall clock, because nothing else shows how long the
//! host was off. If that clock is ahead, everything from before looks too old. So ages from before
//! this boot are not trusted until the clock is synchronised, and are then corrected.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::millis;
use crate::sandbox::Timestamp;

/// How long after its first start in a boot the daemon waits for the wall clock to be synchronised.
/// NTP may take minutes; on a host without NTP the administrator has this time to set the clock.
pub const SYNC_GRACE: Duration = Duration::from_secs(3600);
/// A smaller step back is a normal correction by NTP.
const EXCESS_MIN_MILLIS: i64 = 1000;
/// How many corrections are kept. There is at most one for each boot with a wrong clock;
/// more are merged so that nothing is deleted earlier for it.
const CORRECTIONS_MAX: usize = 16;

/// What is known of the boots that the time line went through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boots {
    /// Set while the wall clock of this boot is not yet believed.
    unconfirmed: Option<Unconfirmed>,
    /// Ascending by `before`.
    corrections: Vec<Correction>,
}

/// A boot in which the wall clock has not been synchronised so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Unconfirmed {
    /// Where the line was when the first daemon of this boot started.
    #[serde(with = "millis")]
    began: Timestamp,
    /// For how long the host was off as the wall clock has it, and at earlier boots that
    /// nobody confirmed.
    gap_millis: i64,
}

/// Moments before `before` seem older than they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Correction {
    #[serde(with = "millis")]
    before: Timestamp,
    excess_millis: i64,
}

/// By how much a moment may be younger than it seems.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Excess {
    /// So much of its age did not pass.
    pub certain: Duration,
    /// Until this moment its age is not believed at all.
    pub unknown_until: Option<Timestamp>,
}

impl Boots {
    /// Begins a boot whose wall clock nobody has confirmed; by it the host was off for
    /// `gap_millis`.
    pub(super) fn begin(&mut self, began: Timestamp, gap_millis: i64) {
        let earlier_millis = self.unconfirmed.as_ref().map_or(0, |boot| boot.gap_millis);
        let gap_millis = earlier_millis.saturating_add(gap_millis.max(0));
        self.unconfirmed = Some(Unconfirmed { began, gap_millis });
    }

    /// Returns whether the wall clock of this boot is still waited for.
    pub(super) fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.is_some()
    }

    /// Believes the wall clock, by which the offset of the line would be `by_wall_millis`
    /// and is `offset_millis`, if it is synchronised or `now` is past the grace. Says
    /// whether anything changed.
    pub(super) fn confirm(
        &mut self,
        is_synchronised: bool,
        now: Timestamp,
        by_wall_millis: i64,
        offset_millis: i64,
    ) -> bool {
        let Some(unconfirmed) = &self.unconfirmed else { return false };
        if !is_synchronised && now < unconfirmed.began.after(SYNC_GRACE) {
            return false;
        }
        let excess_millis =
            offset_millis.saturating_sub(by_wall_millis).min(unconfirmed.gap_millis);
        if excess_millis >= EXCESS_MIN_MILLIS {
            self.corrections.push(Correction { before: unconfirmed.began, excess_millis });
            if self.corrections.len() > CORRECTIONS_MAX {
                let oldest = self.corrections.remove(0);
                self.corrections[0].excess_millis += oldest.excess_millis;
            }
        }
        self.unconfirmed = None;
        true
    }

    /// Returns by how much `moment` may be younger than it seems.
    pub(super) fn excess(&self, moment: Timestamp) -> Excess {
        let later = self.corrections.iter().filter(|correction| moment < correction.before);
        let millis: i64 = later.map(|correction| correction.excess_millis).sum();
        let unconfirmed = self.unconfirmed.as_ref().filter(|boot| moment < boot.began);
        Excess {
            certain: Duration::from_millis(millis.try_into().unwrap_or(0)),
            unknown_until: unconfirmed.map(|boot| boot.began.after(SYNC_GRACE)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MILLIS: i64 = 86_400_000;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn days(count: u64) -> Duration {
        Duration::from_secs(count * 86_400)
    }

    #[test]
    fn ages_of_before_a_boot_wait_until_the_clock_is_synchronised() {
        let mut boots = Boots::default();
        assert_eq!(boots.excess(at(0)), Excess::default());
        // The line is 30 days ahead of where it would be had no time passed.
        let began = at(30 * DAY_MILLIS);
        boots.begin(began, 30 * DAY_MILLIS);
        let waits =
            Excess { certain: Duration::ZERO, unknown_until: Some(began.after(SYNC_GRACE)) };
        assert_eq!(boots.excess(at(0)), waits);
        assert_eq!(boots.excess(began), Excess::default(), "what is of this boot has its age");
        let offset = 30 * DAY_MILLIS;
        assert!(!boots.confirm(false, began, offset, offset));
        assert_eq!(boots.excess(at(0)), waits);
        // It was off for a day, as turns out when NTP has set the clock back.
        assert!(boots.confirm(true, began, DAY_MILLIS, offset));
        assert_eq!(boots.excess(at(0)), Excess { certain: days(29), unknown_until: None });
        assert_eq!(boots.excess(began), Excess::default());
        assert!(!boots.confirm(true, began, 0, offset), "once for each boot");
    }

    #[test]
    fn a_host_that_is_never_synchronised_is_believed_after_the_grace() {
        let mut boots = Boots::default();
        let began = at(DAY_MILLIS);
        boots.begin(began, DAY_MILLIS);
        let end = began.after(SYNC_GRACE);
        assert!(!boots.confirm(false, at(end.as_millis() - 1), DAY_MILLIS, DAY_MILLIS));
        assert!(boots.confirm(false, end, DAY_MILLIS + 500, DAY_MILLIS));
        assert_eq!(boots, Boots::default());
        // Nor does a clock that was slewed a little correct anything.
        boots.begin(began, DAY_MILLIS);
        assert!(boots.confirm(true, began, DAY_MILLIS - 999, DAY_MILLIS));
        assert_eq!(boots, Boots::default());
    }

    #[test]
    fn a_clock_that_is_set_back_behind_the_line_takes_no_more_than_the_gap() {
        let mut boots = Boots::default();
        boots.begin(at(DAY_MILLIS), DAY_MILLIS);
        assert!(boots.confirm(true, at(DAY_MILLIS), -100 * DAY_MILLIS, DAY_MILLIS));
        assert_eq!(boots.excess(at(0)).certain, days(1));
    }

    #[test]
    fn a_boot_that_ended_unconfirmed_is_judged_by_the_clock_of_the_next() {
        let mut boots = Boots::default();
        boots.begin(at(30 * DAY_MILLIS), 30 * DAY_MILLIS);
        // The clock is right from now on, but the line does not go back.
        boots.begin(at(31 * DAY_MILLIS), 0);
        assert!(boots.confirm(true, at(31 * DAY_MILLIS), 0, 30 * DAY_MILLIS));
        assert_eq!(boots.excess(at(0)).certain, days(30));
    }

    #[test]
    fn corrections_add_up_and_are_bounded_without_making_anything_older() {
        let mut boots = Boots::default();
        let count = CORRECTIONS_MAX + 4;
        for boot in (1..).take(count) {
            boots.begin(at(boot * 10 * DAY_MILLIS), 9 * DAY_MILLIS);
            assert!(boots.confirm(true, at(boot * 10 * DAY_MILLIS), 0, DAY_MILLIS));
        }
        assert_eq!(boots.corrections.len(), CORRECTIONS_MAX);
        assert_eq!(boots.excess(at(0)).certain, days(count as u64));
        for boot in 1..=i64::try_from(count).unwrap() {
            let since = at(boot * 10 * DAY_MILLIS);
            let right = days(count as u64 - u64::try_from(boot).unwrap());
            assert!(boots.excess(since).certain >= right, "{boot}");
        }
        let text = serde_json::to_string(&boots).unwrap();
        assert_eq!(serde_json::from_str::<Boots>(&text).unwrap(), boots);
    }
}
