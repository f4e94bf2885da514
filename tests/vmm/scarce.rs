//! A daemon that has no descriptor left, while its guests run on Cloud Hypervisor: what fails
//! for want of one leaves everything as it was.

use std::fs;

use crate::{
    daemon::Daemon,
    descriptors::{leave_descriptors, limit_descriptors},
    files::{assert_whole, counts_in},
    support::eventually,
};

const ID: &str = "web-1";
/// More than a sleep needs at once.
const SLEEP_SPARE_MAX: usize = 8;
/// As many as it takes to come to the start of the VMM's process. That fails whatever there is
/// to spare, as the limit is below the numbers that the files of a VMM have.
const WAKE_SPARE_MAX: usize = 16;

/// Returns what the guest has printed. The daemon is not asked, as it would open a file for it.
fn console(daemon: &Daemon) -> String {
    let text = fs::read(daemon.path("store/sandboxes/1/console.log")).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// Waits until the guest has printed so many more lines.
fn wait_for_lines(daemon: &Daemon, more: usize) {
    let lines = || counts_in(&console(daemon)).len();
    let wanted = lines() + more;
    eventually("the count", || (lines() >= wanted).then_some(()));
}

#[test]
fn a_sleep_that_runs_out_of_descriptors_leaves_the_guest_running() {
    let daemon = Daemon::start("53.0");
    daemon.make(ID);
    daemon.write(ID, "wake").unwrap();
    let paused = || daemon.standin.calls().iter().filter(|call| call.contains("vm.pause")).count();
    let mut failed_paused = 0;
    for spare in 0..=SLEEP_SPARE_MAX {
        wait_for_lines(&daemon, 2);
        let pauses = paused();
        leave_descriptors(daemon.pid(), spare);
        let slept = daemon.write(ID, "sleep");
        if slept.is_err() {
            failed_paused += paused() - pauses;
            // Nothing is asked of the daemon meanwhile, which might resume the guest then.
            wait_for_lines(&daemon, 1);
            assert_eq!(daemon.state(ID), "running", "with {spare}: {}", daemon.log());
        }
        limit_descriptors(daemon.pid(), None);
        if slept.is_ok() {
            daemon.write(ID, "wake").unwrap();
        }
    }
    assert!(failed_paused > 1, "no sleep failed after its pause: {}", daemon.log());
    wait_for_lines(&daemon, 2);
    assert_whole(&console(&daemon));
}

#[test]
fn a_wake_that_runs_out_of_descriptors_leaves_the_sandbox_asleep() {
    let daemon = Daemon::start("53.0");
    daemon.make(ID);
    daemon.write(ID, "wake").unwrap();
    for spare in 0..=WAKE_SPARE_MAX {
        wait_for_lines(&daemon, 2);
        daemon.write(ID, "sleep").unwrap();
        leave_descriptors(daemon.pid(), spare);
        daemon.write(ID, "wake").unwrap_err();
        let state = daemon.state(ID);
        limit_descriptors(daemon.pid(), None);
        assert_eq!(state, "snapshotted", "with {spare}: {}", daemon.log());
        assert!(daemon.vmms().is_empty(), "with {spare}: {}", daemon.log());
        daemon.write(ID, "wake").unwrap();
    }
    wait_for_lines(&daemon, 2);
    assert_whole(&console(&daemon));
}

#[test]
fn a_boot_that_runs_out_of_descriptors_leaves_the_sandbox_stopped() {
    let daemon = Daemon::start("53.0");
    for spare in 0..=WAKE_SPARE_MAX {
        daemon.make(ID);
        leave_descriptors(daemon.pid(), spare);
        daemon.write(ID, "wake").unwrap_err();
        let state = daemon.state(ID);
        limit_descriptors(daemon.pid(), None);
        assert_eq!(state, "stopped", "with {spare}: {}", daemon.log());
        assert!(daemon.vmms().is_empty(), "with {spare}: {}", daemon.log());
        daemon.write(ID, "wake").unwrap();
        daemon.remove(ID);
    }
}
