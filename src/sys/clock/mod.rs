//! Clocks: the daemon's steady time line, deadlines and stopwatches.
//!
//! The steady line ([`Clock`]) measures the ages of sandboxes: it follows `CLOCK_BOOTTIME`,
//! continues across restarts of the daemon and reboots of the host, and ignores steps of the wall
//! clock. The wall clock starts the line, also after a boot ([`boots`]), and is shown to people.
//! `CLOCK_MONOTONIC`, which a suspend stops, measures waits ([`Deadline`], [`Stopwatch`]).

pub mod boots;

use std::{
    fmt, fs, io,
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::{Duration, Instant},
};

use boots::{Boots, Excess};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::{
    sandbox::Timestamp,
    sync::{Mutex, lock},
};

const BOOT_ID_FILE: &str = "/proc/sys/kernel/random/boot_id";
/// Longer than any wait, and far from an overflow.
const DEADLINE_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The drift of the wall clock from which on displayed times change.
const WALL_TREMBLE_MILLIS: i64 = 1000;

/// Reads the steady time line.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Returns the present moment.
    fn now(&self) -> Timestamp;

    /// Returns what the wall clock would have shown at `at`, as it is set today.
    fn wall(&self, at: Timestamp) -> jiff::Timestamp;

    /// Returns how much younger `moment` may be than it seems, because the wall clock may have been
    /// ahead at a boot since.
    fn excess(&self, moment: Timestamp) -> Excess;

    /// Checks whether the wall clock is synchronised now, if that is awaited. Returns the basis to
    /// store, if it changed.
    fn confirm(&self) -> Option<ClockBasis>;
}

/// The stored state from which the next daemon continues the time line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockBasis {
    /// The boot in which `offset_millis` holds.
    pub boot_id: String,
    /// The steady line minus `CLOCK_BOOTTIME`, in milliseconds.
    pub offset_millis: i64,
    /// The latest moment so far; the line never goes back.
    #[serde(with = "millis")]
    pub last_seen: Timestamp,
    /// What is known of the boots before; an earlier version knew nothing.
    #[serde(default)]
    pub boots: Boots,
}

/// The steady time line of this host.
#[derive(Debug)]
pub struct HostClock {
    boot_id: String,
    offset_millis: i64,
    /// A leaf lock.
    boots: Mutex<Boots>,
    /// The wall clock minus the steady line, as last displayed, in milliseconds.
    wall_offset_millis: AtomicI64,
}

impl ClockBasis {
    /// Returns the text that reads back as this basis.
    #[must_use]
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("a basis is three plain values")
    }

    /// Parses a basis.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

impl HostClock {
    /// Continues the line of `stored`, or starts one at the wall clock.
    pub fn start(stored: Option<&ClockBasis>) -> io::Result<Self> {
        let boot_id = boot_id()?;
        let since_boot = millis_of(ClockId::Boottime);
        let wall = millis_of(ClockId::Realtime);
        let offset_millis = continued_offset(stored, &boot_id, since_boot, wall);
        let began = Timestamp::from_millis(since_boot.saturating_add(offset_millis));
        let mut boots = stored.map(|stored| stored.boots.clone()).unwrap_or_default();
        if let Some(stored) = stored.filter(|stored| stored.boot_id != boot_id) {
            boots.begin(began, began.as_millis().saturating_sub(stored.last_seen.as_millis()));
        }
        let wall_offset_millis = AtomicI64::new(i64::MIN);
        let clock = Self { boot_id, offset_millis, boots: Mutex::new(boots), wall_offset_millis };
        clock.confirm();
        Ok(clock)
    }

    /// Returns the state for the next daemon.
    #[must_use]
    pub fn basis(&self) -> ClockBasis {
        ClockBasis {
            boot_id: self.boot_id.clone(),
            offset_millis: self.offset_millis,
            last_seen: self.now(),
            boots: lock(&self.boots).clone(),
        }
    }
}

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        let since_boot = millis_of(ClockId::Boottime);
        Timestamp::from_millis(since_boot.saturating_add(self.offset_millis))
    }

    fn wall(&self, at: Timestamp) -> jiff::Timestamp {
        // The offset is kept until it changes noticeably, so that a moment is always displayed the
        // same: the two clocks are not read at once, and the wall clock is slewed.
        let offset = millis_of(ClockId::Realtime).saturating_sub(self.now().as_millis());
        let kept = self.wall_offset_millis.load(Ordering::Relaxed);
        let kept = if offset.saturating_sub(kept).saturating_abs() > WALL_TREMBLE_MILLIS {
            self.wall_offset_millis.store(offset, Ordering::Relaxed);
            offset
        } else {
            kept
        };
        displayed(at.as_millis().saturating_add(kept))
    }

    fn excess(&self, moment: Timestamp) -> Excess {
        lock(&self.boots).excess(moment)
    }

    fn confirm(&self) -> Option<ClockBasis> {
        let is_confirmed = {
            let mut boots = lock(&self.boots);
            let by_wall = millis_of(ClockId::Realtime) - millis_of(ClockId::Boottime);
            boots.is_unconfirmed()
                && boots.confirm(is_synchronised(), self.now(), by_wall, self.offset_millis)
        };
        is_confirmed.then(|| self.basis())
    }
}

/// Returns whether the wall clock is synchronised, as by NTP.
#[must_use]
pub fn is_synchronised() -> bool {
    // SAFETY: it has only numbers, for which zero is valid.
    let mut query: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `query` outlives the call, and with `modes` zero nothing is set.
    let state = unsafe { libc::adjtimex(&raw mut query) };
    state != -1 && state != libc::TIME_ERROR && query.status & libc::STA_UNSYNC == 0
}

/// A clock that tests move.
#[derive(Debug, Default)]
pub struct ManualClock {
    millis: AtomicI64,
    /// The wall clock minus the steady line, in milliseconds.
    wall_offset_millis: AtomicI64,
    /// A leaf lock.
    boots: Mutex<Boots>,
    is_synchronised: AtomicBool,
}

impl ManualClock {
    /// Makes a clock that stands at `at`.
    #[must_use]
    pub fn at(at: Timestamp) -> Self {
        Self { millis: AtomicI64::new(at.as_millis()), ..Self::default() }
    }

    /// Puts the clock at `at`.
    pub fn set(&self, at: Timestamp) {
        self.millis.store(at.as_millis(), Ordering::SeqCst);
    }

    /// Steps the wall clock by so many milliseconds, as an administrator or NTP does.
    pub fn step_wall(&self, by_millis: i64) {
        self.wall_offset_millis.fetch_add(by_millis, Ordering::SeqCst);
    }

    /// Boots the host, which was off for `off` as its wall clock has it, and is synchronised
    /// to no other so far.
    pub fn boot(&self, off: Duration) {
        self.advance(off);
        self.is_synchronised.store(false, Ordering::SeqCst);
        lock(&self.boots).begin(self.now(), i64::try_from(off.as_millis()).unwrap_or(i64::MAX));
    }

    /// Synchronises the wall clock, which was `ahead`.
    pub fn synchronise(&self, ahead: Duration) {
        let millis = i64::try_from(ahead.as_millis()).unwrap_or(i64::MAX);
        self.step_wall(-millis);
        self.is_synchronised.store(true, Ordering::SeqCst);
    }

    /// Moves the clock on.
    pub fn advance(&self, by: Duration) {
        self.set(self.now().after(by));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.millis.load(Ordering::SeqCst))
    }

    fn wall(&self, at: Timestamp) -> jiff::Timestamp {
        displayed(at.as_millis().saturating_add(self.wall_offset_millis.load(Ordering::SeqCst)))
    }

    fn excess(&self, moment: Timestamp) -> Excess {
        lock(&self.boots).excess(moment)
    }

    fn confirm(&self) -> Option<ClockBasis> {
        let is_synchronised = self.is_synchronised.load(Ordering::SeqCst);
        let by_wall = self.wall_offset_millis.load(Ordering::SeqCst);
        let mut boots = lock(&self.boots);
        boots.confirm(is_synchronised, self.now(), by_wall, 0).then(|| ClockBasis {
            boot_id: String::new(),
            offset_millis: 0,
            last_seen: self.now(),
            boots: boots.clone(),
        })
    }
}

/// The moment at which a bounded wait ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    at: Instant,
}

impl Deadline {
    /// Makes the deadline `limit` from now; more than a year counts as a year.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self { at: monotonic_now() + limit.min(DEADLINE_MAX) }
    }

    /// Returns the time left, or zero.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(monotonic_now())
    }

    /// Returns whether it has passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }
}

/// Measures how long something takes.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    started: Instant,
}

impl Stopwatch {
    /// Starts measuring.
    #[must_use]
    pub fn start() -> Self {
        Self { started: monotonic_now() }
    }

    /// Returns how long it has been.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        monotonic_now().saturating_duration_since(self.started)
    }
}

/// Returns the host's boot id.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID_FILE)?.trim().to_owned())
}

/// Pauses between two tries, for at most a second.
#[allow(clippy::disallowed_methods, reason = "this is the one sleep that the ban leaves")]
pub fn pause_for(duration: Duration) {
    std::thread::sleep(duration.min(PAUSE_MAX));
}

/// Returns how far the steady line is ahead of `since_boot`.
fn continued_offset(stored: Option<&ClockBasis>, boot: &str, since_boot: i64, wall: i64) -> i64 {
    let Some(stored) = stored else {
        return wall.saturating_sub(since_boot);
    };
    let earliest = stored.last_seen.as_millis().saturating_sub(since_boot);
    let offset =
        if stored.boot_id == boot { stored.offset_millis } else { wall.saturating_sub(since_boot) };
    // In the same boot this only matters where the host is itself a machine that was
    // taken back to an earlier snapshot.
    offset.max(earliest)
}

fn millis_of(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
}

#[allow(clippy::disallowed_methods, reason = "this is the place that the ban points to")]
fn monotonic_now() -> Instant {
    Instant::now()
}

/// Returns `millis` of Unix time for people; what no calendar has is the nearest that it has.
fn displayed(millis: i64) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(millis).unwrap_or(if millis < 0 {
        jiff::Timestamp::MIN
    } else {
        jiff::Timestamp::MAX
    })
}

/// A moment as its count of milliseconds.
mod millis {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::sandbox::Timestamp;

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
    pub(super) fn serialize<S: Serializer>(at: &Timestamp, output: S) -> Result<S::Ok, S::Error> {
        output.serialize_i64(at.as_millis())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Timestamp, D::Error> {
        i64::deserialize(input).map(Timestamp::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basis(boot: &str, offset_millis: i64, last_seen: i64) -> ClockBasis {
        ClockBasis {
            boot_id: boot.to_owned(),
            offset_millis,
            last_seen: Timestamp::from_millis(last_seen),
            boots: Boots::default(),
        }
    }

    #[test]
    fn a_new_line_starts_at_the_wall_clock() {
        assert_eq!(continued_offset(None, "b", 500, 10_000), 9_500);
    }

    #[test]
    fn a_restart_in_the_same_boot_ignores_the_wall_clock() {
        let stored = basis("b", 9_500, 10_000);
        for wall in [0, 10_100, 99_999_999] {
            assert_eq!(continued_offset(Some(&stored), "b", 600, wall), 9_500);
        }
    }

    #[test]
    fn after_a_reboot_the_line_goes_on_at_the_wall_clock_and_never_back() {
        let stored = basis("old", 9_500, 10_000);
        assert_eq!(continued_offset(Some(&stored), "new", 50, 20_000), 19_950);
        assert_eq!(continued_offset(Some(&stored), "new", 50, 1_000), 9_950);
    }

    #[test]
    fn a_line_that_would_be_behind_what_was_seen_is_moved_up() {
        let stored = basis("b", 9_500, 10_000);
        assert_eq!(continued_offset(Some(&stored), "b", 100, 0), 9_900);
    }

    #[test]
    fn the_host_clock_is_taken_up_where_it_was_left() {
        let first = HostClock::start(None).unwrap();
        let stored = first.basis();
        let text = serde_json::to_string(&stored).unwrap();
        assert_eq!(serde_json::from_str::<ClockBasis>(&text).unwrap(), stored, "{text}");
        let second = HostClock::start(Some(&stored)).unwrap();
        assert_eq!(second.basis().offset_millis, stored.offset_millis);
        assert!(second.now() >= stored.last_seen);
        let wall = first.wall(first.now()).as_millisecond();
        assert!((wall - millis_of(ClockId::Realtime)).abs() < 5_000);
    }

    #[test]
    fn a_clock_of_another_boot_is_believed_only_if_it_is_synchronised() {
        const DAY_MILLIS: i64 = 86_400_000;
        let now = HostClock::start(None).unwrap();
        let month_ago = now.now().as_millis() - 30 * DAY_MILLIS;
        let stored = basis("another", 0, month_ago);
        let clock = HostClock::start(Some(&stored)).unwrap();
        let of_before = Timestamp::from_millis(month_ago - 1);
        let unknown = clock.excess(of_before).unknown_until;
        assert_eq!(unknown.is_none(), is_synchronised(), "{unknown:?}");
        assert_eq!(clock.excess(clock.now()), Excess::default());
        // A restart in the same boot goes on waiting; one of an earlier version did not know.
        let again = HostClock::start(Some(&clock.basis())).unwrap();
        assert_eq!(again.excess(of_before), clock.excess(of_before));
        let text = now.basis().to_text();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json.as_object_mut().unwrap().remove("boots").unwrap();
        assert_eq!(ClockBasis::from_text(&json.to_string()).unwrap().boots, Boots::default());
    }

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::at(Timestamp::from_millis(1_000));
        clock.advance(Duration::from_secs(2));
        assert_eq!(clock.now(), Timestamp::from_millis(3_000));
        assert_eq!(clock.wall(Timestamp::from_millis(0)).to_string(), "1970-01-01T00:00:00Z");
        clock.set(Timestamp::from_millis(i64::MAX));
        assert_eq!(clock.wall(clock.now()).to_string()[..4], *"9999");
        clock.step_wall(86_400_000);
        assert_eq!(clock.now(), Timestamp::from_millis(i64::MAX), "the line has no steps");
        assert_eq!(clock.wall(Timestamp::from_millis(0)).to_string(), "1970-01-02T00:00:00Z");
    }

    #[test]
    fn deadlines_pass_and_none_overflows() {
        assert!(Deadline::after(Duration::ZERO).passed());
        let far = Deadline::after(Duration::MAX);
        assert!(!far.passed());
        assert!(far.left() > Duration::from_secs(365 * 86_400));
        let watch = Stopwatch::start();
        pause_for(Duration::from_millis(2));
        assert!(watch.elapsed() >= Duration::from_millis(2));
    }
}
