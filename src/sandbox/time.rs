//! Moments, on the daemon's steady time line.

use std::time::Duration;

/// A moment in milliseconds on the daemon's steady time line.
///
/// The line starts as Unix time and then goes on as `CLOCK_BOOTTIME` does, so that
/// a step of the wall clock neither ages nor rejuvenates a sandbox, while a host's
/// suspend counts. `sys::clock` owns the line and translates it for display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// Makes a moment of a count of milliseconds.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Returns the count of milliseconds.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Returns the moment `duration` later, or the end of time.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(millis))
    }

    /// Returns how long ago `earlier` was, or nought if it is yet to come.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        let millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }
}
