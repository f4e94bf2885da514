//! The frequency of the time stamp counter.

use std::sync::OnceLock;

/// Returns the frequency in kHz, or `None` if it cannot be measured. It is measured once, in about
/// 20 ms, to some ten parts in a million.
pub fn khz() -> Option<u32> {
    static KHZ: OnceLock<Option<u32>> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u32> {
    None
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u32> {
    use std::time::Duration;

    use crate::sys::clock;

    /// The longer, the less do the nanoseconds matter that reading a clock takes.
    const WINDOW: Duration = Duration::from_millis(20);
    /// No counter was ever slower or faster; past these we believe nothing.
    const PLAUSIBLE_KHZ: std::ops::Range<u64> = 100_000..20_000_000;

    let start = moment()?;
    clock::pause_for(WINDOW);
    let end = moment()?;
    let nanos = end.nanos.checked_sub(start.nanos)?;
    let counts = end.count.checked_sub(start.count)?;
    let khz = counts.checked_mul(1_000_000)?.checked_div(nanos)?;
    PLAUSIBLE_KHZ.contains(&khz).then(|| u32::try_from(khz).ok()).flatten()
}

/// The counter and the clock, read at the same moment.
#[cfg(target_arch = "x86_64")]
struct Moment {
    count: u64,
    nanos: u64,
}

/// Reads both a few times and keeps the pair between whose readings we were held up least.
#[cfg(target_arch = "x86_64")]
fn moment() -> Option<Moment> {
    const TRIES: usize = 8;
    (0..TRIES)
        .filter_map(|_| {
            let before = raw_nanos()?;
            // SAFETY: every x86-64 CPU has the instruction, and Linux lets user space use it.
            let count = unsafe { core::arch::x86_64::_rdtsc() };
            let held_up = raw_nanos()?.checked_sub(before)?;
            let nanos = before.checked_add(held_up / 2)?;
            Some((held_up, Moment { count, nanos }))
        })
        .min_by_key(|(held_up, _)| *held_up)
        .map(|(_, moment)| moment)
}

/// Reads the clock that no time daemon bends.
#[cfg(target_arch = "x86_64")]
fn raw_nanos() -> Option<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    let seconds = u64::try_from(now.tv_sec).ok()?;
    let nanos = u64::try_from(now.tv_nsec).ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let one = f64::from(measure().unwrap());
        let other = f64::from(measure().unwrap());
        assert!((one / other - 1.0).abs() < 0.001, "{one} kHz, {other} kHz");
        assert_eq!(khz(), khz());
    }
}
