//! How much may be typed before the guest has shown a sign of reading.
//!
//! Cloud Hypervisor takes all that is typed into a queue of its own, whether or not its guest
//! reads it. The thread that does may not ask for more memory (its seccomp filter has no
//! `mprotect`), so a queue past 64 KiB or so is the end of the VMM, and of the guest.

use std::time::Duration;

/// The most that may be typed and not read: half of what it has been seen to survive.
const MAX_BYTES: u64 = 32 << 10;
/// What a guest that prints nothing is trusted to have read.
const BYTES_PER_SECOND: u64 = 256;

/// How much may be typed. A guest that echoes what it reads earns as much as it took.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u64,
    printed: u64,
    seconds: u64,
}

impl Allowance {
    /// Begins with all of it, when so much was printed.
    pub(super) fn new(printed: u64) -> Self {
        Self { left: MAX_BYTES, printed, seconds: 0 }
    }

    /// Returns how many of `wanted` bytes may be typed, when the guest has `printed` so
    /// much and lived for so long.
    pub(super) fn take(&mut self, wanted: usize, printed: u64, lived: Duration) -> usize {
        let earned = printed.saturating_sub(self.printed)
            + lived.as_secs().saturating_sub(self.seconds) * BYTES_PER_SECOND;
        self.left = (self.left + earned).min(MAX_BYTES);
        self.printed = printed;
        self.seconds = lived.as_secs();
        let taken = self.left.min(wanted as u64);
        self.left -= taken;
        usize::try_from(taken).expect("it is not more than was wanted")
    }

    /// Takes back what was not typed after all.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.left = (self.left + bytes as u64).min(MAX_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_shows_no_sign_of_reading_is_not_typed_to_death() {
        let mut allowance = Allowance::new(500);
        let start = Duration::ZERO;
        assert_eq!(allowance.take(20_000, 500, start), 20_000);
        assert_eq!(allowance.take(20_000, 500, start), 12_768);
        assert_eq!(allowance.take(20_000, 500, start), 0);
        assert_eq!(allowance.take(20_000, 500, Duration::from_secs(10)), 2560);
    }

    #[test]
    fn a_guest_that_echoes_is_typed_at_without_end() {
        let mut allowance = Allowance::new(0);
        for round in 0..100 {
            assert_eq!(allowance.take(30_000, round * 30_000, Duration::ZERO), 30_000);
        }
        // What the terminal had no room for does not count.
        assert_eq!(allowance.take(40_000, 3_000_000, Duration::ZERO), 32_768);
        allowance.give_back(1000);
        assert_eq!(allowance.take(40_000, 3_000_000, Duration::ZERO), 1000);
    }
}
