//! A daemon that is killed, while its guests run on Cloud Hypervisor.

use std::thread;

use serde_json::json;

use crate::{
    daemon::Daemon,
    files::{assert_whole, counts_in},
    support::eventually,
};

const ID: &str = "web-1";
/// Longer than any machine takes to kill a process that it was told to.
const SLOW_MILLIS: u32 = 5000;

fn wait_for_lines(daemon: &Daemon, more: usize) {
    let lines = || counts_in(&daemon.read(ID, "console")).len();
    let wanted = lines() + more;
    eventually("the count", || (lines() >= wanted).then_some(()));
}

fn running() -> Daemon {
    let daemon = Daemon::start("53.0");
    daemon.make(ID);
    daemon.write(ID, "wake").unwrap();
    wait_for_lines(&daemon, 2);
    daemon
}

/// Waits until the start has settled the sandbox: the tree is served before, where its VMM is
/// busy still.
fn is_settled(daemon: &Daemon, state: &str) {
    eventually(state, || (daemon.state(ID) == state).then_some(()));
}

/// Shows that the sandbox, which runs, sleeps and wakes, and lost nothing.
fn is_whole(daemon: &Daemon) {
    is_settled(daemon, "running");
    wait_for_lines(daemon, 2);
    daemon.write(ID, "sleep").unwrap();
    daemon.write(ID, "wake").unwrap();
    wait_for_lines(daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
}

/// Kills the daemon while the VMM is at `endpoint` for `verb`, and starts another.
fn crash_at(daemon: &mut Daemon, verb: &str, endpoint: &str) {
    let heard = || daemon.standin.calls().iter().filter(|call| call.contains(endpoint)).count();
    let before = heard();
    daemon.standin.set_faults(&json!([{ "endpoint": endpoint, "act": { "slow": SLOW_MILLIS } }]));
    thread::scope(|scope| {
        let writing = scope.spawn(|| daemon.write(ID, verb));
        eventually("the call", || (heard() > before).then_some(()));
        daemon.kill();
        writing.join().unwrap().unwrap_err();
    });
    daemon.standin.set_faults(&json!([]));
    daemon.start_again();
}

#[test]
fn a_guest_outlives_its_daemon() {
    let mut daemon = running();
    let vmms = daemon.vmms();
    daemon.kill();
    daemon.start_again();
    assert_eq!(daemon.vmms(), vmms);
    is_whole(&daemon);
}

#[test]
fn a_sleep_that_was_cut_is_undone() {
    for endpoint in ["vm.pause", "vm.snapshot"] {
        let mut daemon = running();
        let vmms = daemon.vmms();
        crash_at(&mut daemon, "sleep", endpoint);
        assert_eq!(daemon.vmms(), vmms, "{endpoint}");
        is_settled(&daemon, "running");
        let files = daemon.files("store");
        assert!(files.iter().all(|path| !path.to_string_lossy().contains("partial")), "{files:?}");
        is_whole(&daemon);
    }
}

#[test]
fn a_wake_that_was_cut_before_the_guest_ran_is_undone() {
    for endpoint in ["vmm.ping", "vm.restore"] {
        let mut daemon = running();
        daemon.write(ID, "sleep").unwrap();
        crash_at(&mut daemon, "wake", endpoint);
        is_settled(&daemon, "snapshotted");
        eventually("the end of the VMM", || daemon.vmms().is_empty().then_some(()));
        daemon.write(ID, "wake").unwrap();
        is_whole(&daemon);
    }
}

#[test]
fn a_wake_that_was_cut_while_the_guest_began_to_run_is_finished() {
    let mut daemon = running();
    daemon.write(ID, "sleep").unwrap();
    crash_at(&mut daemon, "wake", "vm.resume");
    assert_eq!(daemon.vmms().len(), 1);
    is_whole(&daemon);
}
