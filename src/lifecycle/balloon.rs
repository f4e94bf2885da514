//! Memory that a guest can spare, taken from it before a sleep and given back after.
//!
//! What a guest frees it reports, and the host has it back at once. But it keeps what it has
//! read from files, and free memory in pieces too small to be reported. A balloon that grows
//! takes both, and what it has is a hole in the snapshot.
//!
//! No more than an attempt: a guest without a driver, or one that gives nothing, goes to
//! sleep with what it has. Its driver gives memory back by itself where a guest runs short
//! (`deflate_on_oom`), so that nothing of it is killed for our sake.

use std::time::Duration;

use super::{Entry, Lifecycle, chain, machines::Live, operation::Operation};
use crate::{
    sync::lock,
    sys::clock::{self, Deadline, Stopwatch},
    vmm,
};

/// What a guest keeps, whatever it is: the kernel, and what its processes read again and
/// again. With less, a small Linux reads its own programs from the disk at every turn.
const FLOOR_BYTES: u64 = 64 << 20;
/// The part of its memory that a guest keeps besides: its tables of pages take a 64th, and
/// it holds as much back for moments of need.
const FLOOR_PART: u64 = 32;
/// How long a guest may go on giving: a CPU frees some 2 GiB in that time under emulation,
/// and ten times as much without.
const INFLATE_LIMIT: Duration = Duration::from_secs(10);
/// How long the balloon stands still before that is taken for the end. Linux rests for a
/// fifth of a second when it has found nothing, and then looks again.
const STILL_LIMIT: Duration = Duration::from_millis(500);
/// How often to look at it. A look takes a twentieth of this.
const LOOK: Duration = Duration::from_millis(10);

impl Lifecycle {
    /// Has the guest give up what it can spare, and waits until it gives no more. Whatever
    /// comes of it, the sleep goes on.
    pub(super) fn inflate(&self, entry: &Entry, operation: &Operation<'_>, live: &Live) {
        let wanted = spare_bytes(entry.record().spec.memory_bytes);
        if wanted == 0 {
            return;
        }
        let took = Stopwatch::start();
        // It is let go of between the two, as a look takes it anew each time.
        let asked = lock(&live.machine).set_balloon(wanted);
        let inflated = asked.and_then(|()| wait_for_balloon(operation, live, wanted));
        match inflated {
            Ok(bytes) => {
                let millis = took.elapsed().as_millis();
                tracing::debug!(id = %entry.id(), bytes, wanted, millis, "the guest gave memory");
            }
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(id = %entry.id(), error, "asking the guest for memory");
            }
        }
    }

    /// Lets the guest have all of its memory. It runs already, so this fails nothing.
    pub(super) fn deflate(&self, entry: &Entry, live: &Live) {
        if !entry.record().spec.inflate_before_sleep {
            return;
        }
        if let Err(error) = lock(&live.machine).set_balloon(0) {
            let error = chain(&error);
            tracing::warn!(id = %entry.id(), error, "giving the guest its memory back");
        }
    }
}

/// Returns how much of so much memory is asked for.
fn spare_bytes(memory_bytes: u64) -> u64 {
    memory_bytes.saturating_sub(FLOOR_BYTES + memory_bytes / FLOOR_PART)
}

/// Waits until the balloon has `wanted`, or stands still; returns what it has then.
fn wait_for_balloon(
    operation: &Operation<'_>,
    live: &Live,
    wanted: u64,
) -> Result<u64, vmm::Error> {
    let deadline = Deadline::after(INFLATE_LIMIT);
    let (mut has, mut still) = (0, Deadline::after(STILL_LIMIT));
    loop {
        // It is locked anew for each look, so that who types on the console is not held up.
        let now = lock(&live.machine).balloon_bytes()?;
        if now != has {
            (has, still) = (now, Deadline::after(STILL_LIMIT));
        }
        let over = has >= wanted || still.passed() || deadline.passed();
        if over || operation.cancel.check().is_err() {
            return Ok(has);
        }
        clock::pause_for(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_keeps_what_it_lives_on() {
        let mib = |count: u64| count << 20;
        assert_eq!(spare_bytes(mib(8)), 0);
        assert_eq!(spare_bytes(mib(64)), 0);
        assert_eq!(spare_bytes(mib(128)), mib(60));
        assert_eq!(spare_bytes(mib(4096)), mib(4096 - 64 - 128));
        assert_eq!(spare_bytes(u64::MAX), u64::MAX - FLOOR_BYTES - u64::MAX / FLOOR_PART);
    }
}
