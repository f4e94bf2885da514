//! How a sandbox came to be awake, how often, and how long it stays so for that.
//!
//! A sandbox that is put to sleep as it is idle, and is wanted again at once, pays for each
//! such cycle with a wake that somebody waits for and a snapshot that the disk has to take.
//! So it stays awake after a wake for a minimum, which doubles for as long as this goes on.
//! It only matters where that is longer than its idle time.

use std::time::Duration;

use super::{AwakeMin, Cause, Timestamp};

/// A sleep that the reaper began and that ended before this was in vain.
const SHORT: Duration = Duration::from_secs(60);
/// After so long awake or asleep all that went before is forgotten. It is more than
/// [`AWAKE_MAX`], or the longest minimum would look like calm.
const CALM: Duration = Duration::from_secs(3600);
/// What the minimum grows to at the most, unless it is longer to begin with: by then a wake
/// and a sleep are a small part of the time.
const AWAKE_MAX: Duration = Duration::from_secs(15 * 60);
/// How often at the most it counts: far more than it takes from a second to [`AWAKE_MAX`].
const IN_VAIN_MAX: u8 = 16;
/// A day of the wall clock in UTC.
const DAY_SECONDS: i64 = 86_400;

/// What is remembered of the wakes of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waking {
    /// Who or what last woke it or booted it.
    pub cause: Option<Box<str>>,
    /// The day of its last wake, counted from 1970 in UTC, as the wall clock was then.
    pub day: i32,
    /// How often it was woken on that day.
    pub of_day: u32,
    /// Whether its last sleep was the reaper's doing.
    pub slept_idle: bool,
    /// How many sleeps were in vain one after the other.
    pub in_vain: u8,
    /// Until when the reaper leaves it awake, whether it is idle or not.
    pub awake_until: Option<Timestamp>,
}

impl Waking {
    /// It is being put to sleep, having been awake since `awake_since`.
    pub fn sleeps(&mut self, cause: &Cause, awake_since: Timestamp, now: Timestamp) {
        // The minimum stays, as the sleep may fail; the next wake sets it anew.
        self.slept_idle = matches!(cause, Cause::Idle);
        if now.since(awake_since) >= CALM {
            self.in_vain = 0;
        }
    }

    /// It was woken, having slept since `asleep_since`, on a `day` of the wall clock.
    pub fn woke(&mut self, cause: &Cause, asleep_since: Timestamp, now: Timestamp, day: i32) {
        self.cause = Some(cause.to_string().into());
        self.of_day = self.of_day(day).saturating_add(1);
        self.day = day;
        self.in_vain = in_vain(self.in_vain, self.slept_idle, now.since(asleep_since));
    }

    /// It was booted.
    pub fn booted(&mut self, cause: &Cause) {
        self.cause = Some(cause.to_string().into());
    }

    /// It has been awake since `since`, and stays so for the minimum.
    pub fn stays_awake(&mut self, since: Timestamp, min: AwakeMin) {
        let minimum = minimum(min.0, self.in_vain);
        self.awake_until = (!minimum.is_zero()).then(|| since.after(minimum));
    }

    /// Returns how often it was woken on `day`.
    #[must_use]
    pub fn of_day(&self, day: i32) -> u32 {
        if self.day == day { self.of_day } else { 0 }
    }
}

/// Returns the day of a moment of the wall clock.
#[must_use]
pub fn day_of(unix_seconds: i64) -> i32 {
    i32::try_from(unix_seconds.div_euclid(DAY_SECONDS)).unwrap_or(i32::MAX)
}

/// Returns how many sleeps were in vain, after one more that took so long.
fn in_vain(before: u8, idle: bool, asleep: Duration) -> u8 {
    match asleep {
        _ if asleep >= CALM => 0,
        _ if asleep >= SHORT => before.saturating_sub(1),
        _ if idle => (before + 1).min(IN_VAIN_MAX),
        // Whoever asked for it knows why.
        _ => before,
    }
}

/// Returns how long it stays awake. Once is no habit, so the second in a row is the first that
/// makes it longer.
fn minimum(min: Duration, in_vain: u8) -> Duration {
    let doublings = u32::from(in_vain.saturating_sub(1).min(IN_VAIN_MAX));
    min.saturating_mul(1 << doublings).min(AWAKE_MAX.max(min))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// One that is idle at once, and is woken `asleep` seconds after it was put to sleep.
    /// Returns for how long it stays awake then.
    fn cycle(waking: &mut Waking, now: &mut i64, cause: &Cause, asleep: i64) -> i64 {
        let awake_since = *now;
        let until = waking.awake_until.map_or(*now, |until| until.as_millis() / 1000);
        waking.sleeps(cause, at(awake_since), at(until));
        *now = until + asleep;
        waking.woke(&Cause::Reconcile, at(until), at(*now), 1);
        waking.stays_awake(at(*now), AwakeMin(seconds(10)));
        waking.awake_until.unwrap().as_millis() / 1000 - *now
    }

    #[test]
    fn the_minimum_doubles_while_sleeps_are_in_vain_up_to_a_bound() {
        let (mut waking, mut now) = (Waking::default(), 0);
        let stays: Vec<i64> =
            (0..10).map(|_| cycle(&mut waking, &mut now, &Cause::Idle, 5)).collect();
        assert_eq!(stays, [10, 20, 40, 80, 160, 320, 640, 900, 900, 900]);
    }

    #[test]
    fn a_good_sleep_takes_one_back_and_calm_takes_all() {
        let (mut waking, mut now) = (Waking::default(), 0);
        for _ in 0..4 {
            cycle(&mut waking, &mut now, &Cause::Idle, 5);
        }
        assert_eq!(cycle(&mut waking, &mut now, &Cause::Idle, 60), 40);
        assert_eq!(cycle(&mut waking, &mut now, &Cause::Idle, 59), 80);
        assert_eq!(cycle(&mut waking, &mut now, &Cause::Idle, 3600), 10);
        for _ in 0..4 {
            cycle(&mut waking, &mut now, &Cause::Idle, 5);
        }
        waking.sleeps(&Cause::Idle, at(now), at(now + 3600));
        assert_eq!(waking.in_vain, 0);
    }

    #[test]
    fn a_sleep_that_was_asked_for_is_never_in_vain() {
        let (mut waking, mut now) = (Waking::default(), 0);
        for _ in 0..9 {
            assert_eq!(cycle(&mut waking, &mut now, &Cause::Reconcile, 0), 10);
        }
    }

    #[test]
    fn a_minimum_that_is_off_stays_off_and_a_long_one_does_not_shrink() {
        assert_eq!(minimum(Duration::ZERO, IN_VAIN_MAX), Duration::ZERO);
        let mut waking = Waking { in_vain: 9, ..Waking::default() };
        waking.stays_awake(at(0), AwakeMin(Duration::ZERO));
        assert_eq!(waking.awake_until, None);
        assert_eq!(minimum(seconds(7200), 5), seconds(7200));
        assert_eq!(minimum(seconds(1), u8::MAX), AWAKE_MAX);
        assert_eq!(minimum(Duration::MAX, IN_VAIN_MAX), Duration::MAX);
    }

    #[test]
    fn wakes_are_counted_by_the_day_of_the_wall_clock() {
        let mut waking = Waking::default();
        let noon = day_of(12 * 3600);
        for count in 1..=3 {
            waking.woke(&Cause::Reconcile, at(0), at(1), noon);
            assert_eq!(waking.of_day(noon), count);
        }
        assert_eq!(waking.of_day(day_of(DAY_SECONDS)), 0);
        assert_eq!(waking.of_day(day_of(-1)), 0);
        waking.woke(&Cause::Reconcile, at(0), at(1), day_of(DAY_SECONDS));
        assert_eq!((waking.of_day(day_of(DAY_SECONDS)), waking.of_day(noon)), (1, 0));
        assert_eq!(waking.cause.as_deref(), Some("reconcile"));
    }
}
