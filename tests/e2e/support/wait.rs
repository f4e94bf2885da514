//! Waiting for a condition. The only place where a test rests.

use std::time::Duration;

use dozed::sys::clock::{Deadline, pause_for};

/// How long anything may take. Nothing here measures speed, and a machine that builds
/// something else at the same time is slow.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// How long to rest between two looks.
const REST: Duration = Duration::from_millis(5);

/// Returns what `look` finds as soon as it finds anything.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(PATIENCE);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(!deadline.passed(), "waited {} s in vain: {what}", PATIENCE.as_secs());
        pause_for(REST);
    }
}

/// Says whether `holds` comes to be true.
pub(super) fn wait_within(mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Deadline::after(PATIENCE);
    while !holds() {
        if deadline.passed() {
            return false;
        }
        pause_for(REST);
    }
    true
}

/// Returns as soon as `holds` is true.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}
