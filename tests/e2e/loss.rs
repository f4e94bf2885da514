//! Guests that end, and VMMs that die.

use dozed::sys::clock::Stopwatch;
use rustix::{io::Errno, process::Signal};

use crate::support::{LockedIndex, Setup, wait_until};

#[test]
fn a_vmm_that_is_killed_leaves_its_sandbox_stopped_and_the_error_says_so() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for boots in 1..=3 {
        assert_eq!(host.counts_on("web-1").boots, boots);
        let since = Stopwatch::start();
        host.signal_vmm(host.vmm("web-1"), Signal::KILL);
        wait_until("it is stopped", || host.state("web-1") == "stopped");
        println!("stopped {:?} after the kill", since.elapsed());
        assert_eq!(host.error("web-1"), "the VMM was killed by signal 9");
        assert_eq!(host.value("web-1/status", "pid"), "none");
        assert_eq!(host.number("dozed.status", "memory_bytes"), 0);
        host.wake("web-1");
    }
}

#[test]
fn a_guest_that_shuts_down_leaves_its_sandbox_stopped() {
    let host = Setup::counter("quit=3").start();
    host.mkdir("web-1").unwrap();
    // A guest that counts to three may be through before anyone looks at its state.
    host.write("web-1/state", "wake").unwrap();
    wait_until("it is stopped", || host.state("web-1") == "stopped");
    assert_eq!(host.error("web-1"), "the guest shut down");
    let console = host.read("web-1/console");
    assert!(console.ends_with("counter guest quits\n"), "{console}");
    assert_eq!(host.counted("web-1").count, 3);
}

#[test]
fn a_guest_that_shuts_down_after_a_wake_is_not_woken_from_what_it_was() {
    let host = Setup::counter("quit=50").start();
    host.mkdir("web-1").unwrap();
    // It counts for five seconds, in which a busy machine may not come to the sleep.
    wait_until("it sleeps before it ends", || {
        host.write("web-1/state", "wake").unwrap();
        host.write("web-1/state", "sleep").is_ok()
    });
    let boots = host.counted("web-1").boots.max(1);
    host.write("web-1/state", "wake").unwrap();
    wait_until("it is stopped", || host.state("web-1") == "stopped");
    assert_eq!(host.error("web-1"), "the guest shut down");
    assert_eq!(host.counted("web-1").boots, boots, "it was woken, and not booted");
    assert_eq!(host.number("web-1/status", "snapshot_bytes"), 0);
    host.write("web-1/state", "wake").unwrap();
    // It counts from the start, so that its last count may be less than the one before.
    wait_until("it is booted anew", || host.counted("web-1").boots == boots + 1);
}

#[test]
fn an_end_that_the_index_could_not_record_is_recorded_when_it_can() {
    // It is not a tick that has it tried again.
    let host = Setup::counter("").config("[reaper]\ntick = \"1h\"").start();
    host.boot("web-1");
    host.counts_on("web-1");
    let locked = LockedIndex::of(&host);
    host.signal_vmm(host.vmm("web-1"), Signal::KILL);
    // The index waits for its turn before it gives up.
    wait_until("the end could not be recorded", || {
        host.log().contains("the end of its guest is recorded later")
    });
    assert_eq!(host.state("web-1"), "running");
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::IO), "it runs no more");
    assert_eq!(host.open("web-1/awake").map(drop), Err(Errno::IO), "nor can it be held");
    drop(locked);
    wait_until("it is stopped", || host.state("web-1") == "stopped");
    assert_eq!(host.error("web-1"), "the VMM was killed by signal 9");
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 2);
}
