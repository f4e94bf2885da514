//! Sandboxes on Cloud Hypervisor that have their memory in a file of the store, through a
//! daemon: what they keep when they sleep and wake, and when that goes wrong.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    thread,
};

use serde_json::{Value, json};

use crate::{
    daemon::Daemon,
    files::{assert_whole, counts_in},
    support::eventually,
};

const ID: &str = "web-1";
/// How much memory a sandbox of these tests has.
const MEMORY_BYTES: u64 = 64 << 20;

/// Starts a daemon with a sandbox whose memory is in a file, and whose guest counts.
fn running(version: &str) -> Daemon {
    let daemon = Daemon::start(version);
    daemon.make(ID);
    daemon.configure(ID, "memory_mode = \"file\"\n").unwrap();
    succeed(&daemon, "wake");
    wait_for_lines(&daemon, 2);
    daemon
}

fn succeed(daemon: &Daemon, verb: &str) {
    if let Err(error) = daemon.write(ID, verb) {
        panic!("{verb}: {error}: {}\n{}", daemon.read(ID, "error"), daemon.log());
    }
}

fn wait_for_lines(daemon: &Daemon, more: usize) {
    let lines = || counts_in(&daemon.read(ID, "console")).len();
    let wanted = lines() + more;
    eventually("the count", || (lines() >= wanted).then_some(()));
}

/// Returns the memory files that there are, below the sandbox's directory.
fn memories(daemon: &Daemon) -> Vec<PathBuf> {
    let mut files = daemon.files("store/sandboxes/1");
    files.retain(|path| path.ends_with("memory") || path.ends_with("memory-ranges"));
    files
}

/// Shows that the sandbox, which runs, sleeps and wakes, and lost nothing.
fn is_whole(daemon: &Daemon) {
    assert_eq!(daemon.state(ID), "running", "{}", daemon.log());
    wait_for_lines(daemon, 2);
    succeed(daemon, "sleep");
    succeed(daemon, "wake");
    wait_for_lines(daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
}

#[test]
fn the_one_file_is_the_guests_and_the_snapshots_in_turn() {
    for version in ["53.0", "44.0"] {
        let daemon = running(version);
        let mut inode = None;
        for cycle in 1..=20 {
            let [vmm] = daemon.vmms()[..] else { panic!("{:?}", daemon.vmms()) };
            let maps = fs::read_to_string(format!("/proc/{vmm}/maps")).unwrap_or_default();
            assert!(!maps.contains("memfd:ch_ram"), "{maps}");
            let [live] = &memories(&daemon)[..] else { panic!("{:?}", memories(&daemon)) };
            assert!(live.to_string_lossy().ends_with(".live/memory"), "{live:?}");
            succeed(&daemon, "sleep");
            let [asleep] = &memories(&daemon)[..] else { panic!("{:?}", memories(&daemon)) };
            assert_eq!(asleep.to_string_lossy().split_once('/').unwrap().1, "memory");
            assert!(asleep.parent().unwrap().to_string_lossy().parse::<u64>().is_ok());
            let meta = fs::metadata(daemon.path("store/sandboxes/1").join(asleep)).unwrap();
            assert_eq!(meta.len(), MEMORY_BYTES);
            assert_eq!(*inode.get_or_insert(meta.ino()), meta.ino(), "nothing is copied");
            succeed(&daemon, "wake");
            wait_for_lines(&daemon, 1);
            assert_whole(&daemon.read(ID, "console"));
            assert_eq!(daemon.state(ID), "running", "{cycle}");
        }
        daemon.remove(ID);
    }
}

#[test]
fn a_wake_that_failed_before_the_guest_ran_is_taken_back_whoever_says_so() {
    let refused = json!({ "error": { "status": 500, "chain": ["Error from API", "as planned"] } });
    for (version, act) in [
        ("53.0", refused.clone()),
        ("44.0", refused),
        ("53.0", json!("die")),
        ("44.0", json!("die")),
    ] {
        let daemon = running(version);
        succeed(&daemon, "sleep");
        let before = memories(&daemon);
        daemon.standin.set_faults(&json!([{ "endpoint": "vm.resume", "act": act }]));
        daemon.write(ID, "wake").unwrap_err();
        daemon.standin.set_faults(&json!([]));
        // The memory is as it was, which proves it also where nobody is left to say it.
        assert_eq!(daemon.state(ID), "snapshotted", "{version} {act}: {}", daemon.log());
        assert_eq!(memories(&daemon), before);
        assert!(daemon.vmms().is_empty());
        succeed(&daemon, "wake");
        is_whole(&daemon);
    }
}

#[test]
fn a_wake_that_failed_when_the_guest_had_run_is_neither_taken_back_nor_ended() {
    let daemon = running("53.0");
    succeed(&daemon, "sleep");
    let printed = counts_in(&daemon.read(ID, "console")).len();
    daemon.standin.set_faults(&json!([{ "endpoint": "vm.resume", "act": "hang-after" }]));
    daemon.write(ID, "wake").unwrap_err();
    daemon.standin.set_faults(&json!([]));
    assert!(counts_in(&daemon.read(ID, "console")).len() > printed);
    assert_eq!(daemon.state(ID), "restoring", "{}", daemon.log());
    assert_eq!((daemon.vmms().len(), memories(&daemon).len()), (1, 1));
    let printed = counts_in(&daemon.read(ID, "console")).len();
    eventually("the count", || {
        (counts_in(&daemon.read(ID, "console")).len() > printed).then_some(())
    });
    daemon.remove(ID);
}

#[test]
fn a_sleep_that_failed_gives_the_memory_back() {
    let refused = json!({ "error": { "status": 500, "chain": ["Error from API", "as planned"] } });
    for act in [refused, json!("half"), json!({ "say": "SSH-2.0-OpenSSH_9.2\r\n" })] {
        let daemon = running("53.0");
        let before = memories(&daemon);
        daemon.standin.set_faults(&json!([{ "endpoint": "vm.snapshot", "act": act }]));
        daemon.write(ID, "sleep").unwrap_err();
        daemon.standin.set_faults(&json!([]));
        assert_eq!(memories(&daemon), before, "{act}");
        is_whole(&daemon);
    }
}

/// Kills the daemon while the VMM is at `endpoint` for `verb`, and starts another.
fn crash_at(daemon: &mut Daemon, verb: &str, endpoint: &str) {
    let heard = || daemon.standin.calls().iter().filter(|call| call.contains(endpoint)).count();
    let before = heard();
    let slow: Value = json!([{ "endpoint": endpoint, "act": { "slow": 1000 } }]);
    daemon.standin.set_faults(&slow);
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
fn a_daemon_that_was_killed_leaves_memory_that_the_next_one_finds() {
    for (verb, endpoint, then) in [
        ("sleep", "vm.pause", "running"),
        ("sleep", "vm.snapshot", "running"),
        ("wake", "vm.restore", "snapshotted"),
        ("wake", "vm.resume", "running"),
    ] {
        let mut daemon = running("53.0");
        if verb == "wake" {
            succeed(&daemon, "sleep");
        }
        crash_at(&mut daemon, verb, endpoint);
        assert_eq!(daemon.state(ID), then, "{endpoint}: {}", daemon.log());
        assert_eq!(memories(&daemon).len(), 1, "{endpoint}");
        if then == "snapshotted" {
            eventually("the end of the VMM", || daemon.vmms().is_empty().then_some(()));
            succeed(&daemon, "wake");
        }
        is_whole(&daemon);
    }
}

#[test]
fn memory_that_changed_while_its_guest_slept_is_told_and_kept() {
    let daemon = running("53.0");
    succeed(&daemon, "sleep");
    let memory = daemon.path("store/sandboxes/1").join(&memories(&daemon)[0]);
    let file = File::options().write(true).open(&memory).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 40 << 20).unwrap();
    daemon.write(ID, "wake").unwrap_err();
    assert_eq!(daemon.state(ID), "snapshotted");
    assert!(daemon.read(ID, "error").contains("damaged"), "{}", daemon.read(ID, "error"));
    assert!(memory.exists());
}

#[test]
fn config_refuses_what_cannot_be_and_says_what_can() {
    let daemon = Daemon::start("53.0");
    daemon.make(ID);
    for (text, says) in [
        ("vmm = \"qemu\"\nmemory_mode = \"shared\"", "line 2: `memory_mode`: qemu keeps"),
        ("memory_mode = \"file\"\nrestore_mode = \"on-demand\"", "line 2: `restore_mode`: memory"),
        ("restore_mode = \"copy-on-write\"", "line 1: `restore_mode`: \"copy-on-write\" takes"),
    ] {
        daemon.configure(ID, text).unwrap_err();
        let error = daemon.read(ID, "error");
        assert!(error.contains(says), "{text}: {error}");
    }
    assert!(daemon.read(ID, "config").contains("memory_mode = \"auto\""));
}
