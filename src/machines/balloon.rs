//! Memory that a guest can spare, taken from it before a sleep and given back after.
//!
//! What a guest frees it reports, and the host has it back at once. But it keeps what it has
//! read from files, and free memory in pieces too small to be reported. A balloon that grows
//! takes both, and what it has is a hole in the snapshot.
//!
//! It is only an attempt: a guest without a driver, or one that gives nothing, goes to sleep
//! with what it has. The driver gives memory back by itself where the guest runs short
//! (`deflate_on_oom`), so no process of the guest is killed because of it.

use std::time::Duration;

use super::Live;
use crate::{
    sandbox::{Record, text::chain},
    sync::lock,
    sys::{
        cancel::Cancel,
        clock::{self, Deadline, Stopwatch},
    },
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

/// Has the guest give up the memory that it can spare, and waits until it gives no more. The
/// sleep goes on whatever the result.
pub(crate) fn inflate(record: &Record, live: &Live, cancel: &Cancel) {
    let wanted = spare_bytes(record.spec.memory_bytes);
    if wanted == 0 {
        return;
    }
    let took = Stopwatch::start();
    // Not locked between the two, as each look locks it.
    let asked = lock(&live.machine).set_balloon(wanted);
    match asked.and_then(|()| wait_for_balloon(live, wanted, cancel)) {
        Ok(bytes) => {
            let millis = took.elapsed().as_millis();
            tracing::debug!(id = %record.id, bytes, wanted, millis, "the guest gave memory");
        }
        Err(error) => {
            tracing::warn!(id = %record.id, error = chain(&error), "asking the guest for memory");
        }
    }
}

/// Gives the guest all of its memory back, if it was asked for some. Nothing fails by this, as
/// the guest already runs.
pub(crate) fn deflate(record: &Record, live: &Live) {
    if !record.spec.inflate_before_sleep {
        return;
    }
    if let Err(error) = lock(&live.machine).set_balloon(0) {
        let error = chain(&error);
        tracing::warn!(id = %record.id, error, "giving the guest its memory back");
    }
}

/// Returns how much memory a guest with so much is asked for.
fn spare_bytes(memory_bytes: u64) -> u64 {
    memory_bytes.saturating_sub(FLOOR_BYTES + memory_bytes / FLOOR_PART)
}

/// Waits until the balloon has `wanted`, or stands still; returns what it has then.
fn wait_for_balloon(live: &Live, wanted: u64, cancel: &Cancel) -> Result<u64, vmm::Error> {
    let deadline = Deadline::after(INFLATE_LIMIT);
    let (mut has, mut still) = (0, Deadline::after(STILL_LIMIT));
    loop {
        // The machine is locked for each look only, so that typing on the console need not wait.
        let now = lock(&live.machine).balloon_bytes()?;
        if now != has {
            (has, still) = (now, Deadline::after(STILL_LIMIT));
        }
        let over = has >= wanted || still.passed() || deadline.passed();
        if over || cancel.check().is_err() {
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
