//! Daemons that end, in order and otherwise, and what the next one finds.

use std::{process::Stdio, thread, time::Duration};

use dozed::sys::clock::pause_for;
use rustix::{io::Errno, process::Signal};

use crate::support::{Host, Setup, command, is_alive, wait_for, wait_until};

#[test]
fn guests_outlive_the_daemon_and_the_next_one_takes_them_over() {
    let mut host = Setup::counter("").start();
    host.boot("running");
    host.boot("asleep");
    host.sleep("asleep");
    host.mkdir("stopped").unwrap();
    let vmm = host.vmm("running");
    for crash in [false, true, true, false] {
        let before = host.counts_on("running");
        if crash {
            host.kill_daemon();
        } else {
            host.terminate();
        }
        assert!(is_alive(vmm));
        host.restart();
        assert_eq!(host.vmm("running"), vmm);
        for id in ["running", "stopped"] {
            assert_eq!((host.state(id).as_str(), host.error(id).as_str()), (id, "ok"));
        }
        assert_eq!(host.state("asleep"), "snapshotted");
        assert!(host.counts_on("running").count > before.count);
    }
    host.sleep("running");
    assert!(!is_alive(vmm));
    for id in ["running", "asleep", "stopped"] {
        host.wake(id);
        assert_eq!(host.counts_on(id).boots, 1, "{id}");
    }
}

#[test]
fn a_vmm_that_dies_while_no_daemon_is_there_leaves_its_sandbox_stopped() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    let vmm = host.vmm("web-1");
    host.kill_daemon();
    host.signal_vmm(vmm, Signal::KILL);
    wait_until("the VMM is gone", || !is_alive(vmm));
    host.restart();
    wait_until("its end is told", || host.state("web-1") == "stopped");
    assert!(host.error("web-1").contains("while dozed was not running"), "{}", host.error("web-1"));
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 2);
}

/// Kills the daemon some time after `verb` was written, and starts it again.
fn crash_within(host: &mut Host, verb: &str, after: Duration) {
    let path = host.path("web-1/state");
    thread::scope(|scope| {
        let writer = scope.spawn(move || std::fs::write(path, verb));
        // Where in the operation this ends is what the rounds are to vary.
        pause_for(after);
        host.kill_daemon();
        // The write was done, or its daemon has gone.
        drop(writer.join().unwrap());
    });
    host.restart();
}

/// Waits until a sandbox is in one of these states, and returns which. On a busy machine the
/// tree may be served before what the crash cut off is settled.
#[track_caller]
fn settled(host: &Host, id: &str, states: [&str; 2]) -> String {
    wait_for("what was cut off is settled", || {
        Some(host.state(id)).filter(|state| states.contains(&state.as_str()))
    })
}

#[test]
fn a_crash_at_any_moment_of_a_sleep_or_a_wake_loses_nothing() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    host.counts_on("web-1");
    let mut seen = Vec::new();
    // In the middle of something: what the start then found it settled.
    let is_cut_off = |host: &Host| {
        let log = host.log();
        log.contains("settled=1") || log.contains("late=1")
    };
    for round in 0.. {
        if round >= 24 && is_cut_off(&host) {
            break;
        }
        assert!(round < 240, "no crash was in the middle of anything: {seen:?}");
        let verb = if host.state("web-1") == "running" { "sleep" } else { "wake" };
        // On a busy machine later moments are those in the middle.
        let most = 60_000 * (1 + round / 24);
        crash_within(&mut host, verb, Duration::from_micros(round * 7919 % most));
        let state = settled(&host, "web-1", ["running", "snapshotted"]);
        seen.push(format!("{verb}: {state}"));
        if round % 4 == 3 {
            host.wake("web-1");
        }
        if host.state("web-1") == "running" {
            assert_eq!(host.counts_on("web-1").boots, 1);
        } else {
            host.counted("web-1");
        }
    }
    println!("{seen:?}");
}

#[test]
fn a_crash_at_any_moment_of_a_boot_or_a_delete_leaves_nothing_half_done() {
    let mut host = Setup::counter("").start();
    for round in 0..12u64 {
        host.mkdir("web-1").unwrap();
        crash_within(&mut host, "wake", Duration::from_micros(round * 7919 % 100_000));
        settled(&host, "web-1", ["running", "stopped"]);
        host.wake("web-1");
        host.counts_on("web-1");
        let path = host.path("web-1");
        thread::scope(|scope| {
            let remover = scope.spawn(move || std::fs::remove_dir(path));
            pause_for(Duration::from_micros(round * 7919 % 20_000));
            host.kill_daemon();
            drop(remover.join().unwrap());
        });
        host.restart();
        match host.rmdir("web-1") {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => panic!("{round}: {error}"),
        }
    }
}

#[test]
fn a_second_daemon_is_refused_while_the_first_lives() {
    let host = Setup::bare().start();
    let output = host.second_start();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let pid = host.daemon_pid();
    assert!(said.contains(&format!("is in use by another dozed (process {pid})")), "{said}");
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    host.mkdir("web-1").unwrap();
    // Nor may one with directories of its own take the mount.
    let dir = tempfile::tempdir().unwrap();
    let (store, runtime) = (dir.path().join("s"), dir.path().join("r"));
    let output = host.start_beside(&Setup::bare(), &store, &runtime);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let mount = host.mount().display();
    let want = format!("dozed: {mount} is in use by another dozed; each needs a `mount`");
    assert!(said.starts_with(&want), "{said}");
    assert_eq!(host.list(), ["web-1"]);
}

#[test]
fn a_stale_mount_is_found_also_where_its_path_has_a_link_in_it() {
    // As `/var/run` is one to `/run`.
    let mut host = Setup::counter("").linked().start();
    host.boot("web-1");
    host.kill_daemon();
    host.restart();
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn an_end_during_a_wake_is_in_order_and_harms_no_guest() {
    let mut host = Setup::counter("").start();
    host.boot("bystander");
    host.boot("web-1");
    let vmm = host.vmm("bystander");
    for round in 0..5 {
        host.counts_on("web-1");
        host.sleep("web-1");
        let path = host.path("web-1/state");
        thread::scope(|scope| {
            let writer = scope.spawn(move || std::fs::write(path, "wake"));
            pause_for(Duration::from_millis(round * 10));
            host.terminate();
            drop(writer.join().unwrap());
        });
        assert!(is_alive(vmm));
        host.restart();
        settled(&host, "web-1", ["running", "snapshotted"]);
        host.wake("web-1");
        assert_eq!(host.counts_on("web-1").boots, 1);
    }
    assert_eq!(host.counts_on("bystander").boots, 1);
}

#[test]
fn a_daemon_whose_tree_is_taken_away_says_so_and_ends() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    let vmm = host.vmm("web-1");
    dozed::sys::mount::detach(host.mount()).unwrap();
    assert_eq!(host.ended().code(), Some(1));
    assert!(host.log().contains("was unmounted by somebody else; guests keep running"));
    assert!(is_alive(vmm));
    host.restart();
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn a_vmm_that_is_stopped_when_the_daemon_dies_lives_on() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    let vmm = host.vmm("web-1");
    let before = host.counts_on("web-1");
    host.signal_vmm(vmm, Signal::STOP);
    host.kill_daemon();
    // A stopped job whose shell dies gets SIGHUP, and this is none.
    host.signal_vmm(vmm, Signal::CONT);
    host.restart();
    assert_eq!((host.vmm("web-1"), host.state("web-1").as_str()), (vmm, "running"));
    assert!(host.counts_on("web-1").count > before.count);
}

#[test]
fn processes_that_only_mention_the_name_of_a_vmm_are_left_alone() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", host.vmm("web-1"))).unwrap();
    let cmdline = String::from_utf8(cmdline).unwrap();
    let name = cmdline.split('\0').find_map(|argument| argument.strip_prefix("guest=")).unwrap();
    assert!(name.starts_with("dozed:"), "{name}");
    host.sleep("web-1");
    let named = format!("guest={name}");
    let strangers: Vec<_> = [["-c", "read line", name, ""], ["-c", "read line", "-name", &named]]
        .iter()
        .map(|args| {
            let mut shell = command("/bin/sh");
            shell.args(args).stdin(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    host.kill_daemon();
    host.restart();
    for mut stranger in strangers {
        assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
        drop(stranger.stdin.take());
        stranger.wait().unwrap();
    }
    host.wake("web-1");
}

#[test]
fn vmms_that_do_not_answer_do_not_keep_the_tree_from_being_served() {
    let mut host = Setup::counter("").start();
    for id in ["stuck", "fine"] {
        host.boot(id);
    }
    let vmm = host.vmm("stuck");
    let before = host.counts_on("stuck");
    host.signal_vmm(vmm, Signal::STOP);
    host.kill_daemon();
    host.restart();
    // It was served before the VMM had its time to answer.
    assert!(host.log().lines().any(|line| line.contains("reconciled") && line.contains("late=1")));
    assert_eq!(host.state("stuck"), "running");
    host.sleep("fine");
    host.wake("fine");
    host.signal_vmm(vmm, Signal::CONT);
    host.wake("stuck");
    assert_eq!(host.vmm("stuck"), vmm);
    assert!(host.counts_on("stuck").count > before.count);
}
