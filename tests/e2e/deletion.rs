//! `rmdir` deletes, or fails and changes nothing.

use std::{
    fs::OpenOptions,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use dozed::sys::clock::pause_for;
use rustix::{io::Errno, process::Signal};

use crate::support::{LockedIndex, Setup, is_alive, wait_until};

#[test]
fn an_index_that_is_locked_refuses_a_deletion_and_the_guest_runs_on() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let (vmm, before) = (host.vmm("web-1"), host.counts_on("web-1"));
    let locked = LockedIndex::of(&host);
    assert_eq!(host.rmdir("web-1"), Err(Errno::IO));
    assert_eq!((host.state("web-1").as_str(), host.vmm("web-1")), ("running", vmm));
    assert!(host.error("web-1").contains("database is locked"), "{}", host.error("web-1"));
    assert!(host.counts_on("web-1").count > before.count);
    drop(locked);
    host.sleep("web-1");
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
    host.rmdir("web-1").unwrap();
}

#[test]
fn a_sandbox_can_be_deleted_while_all_threads_wait_for_a_vmm_that_does_not_answer() {
    // More than there are threads for operations.
    let host = Setup::counter("").config("[limits]\nholds = 5000").start();
    host.boot("stuck");
    host.boot("web-1");
    host.counts_on("stuck");
    let stuck = host.vmm("stuck");
    host.signal_vmm(stuck, Signal::STOP);
    let full = AtomicBool::new(false);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| host.write("stuck/state", "sleep"));
        wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
        let holder = || match OpenOptions::new().write(true).open(host.path("stuck/awake")) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                full.store(true, Ordering::SeqCst);
            }
            Ok(_) | Err(_) => {}
        };
        for _ in 0..1100 {
            let small = thread::Builder::new().stack_size(64 << 10);
            small.spawn_scoped(scope, holder).unwrap();
        }
        wait_until("all threads are taken", || full.load(Ordering::SeqCst));
        assert_eq!(host.rmdir("web-1"), Ok(()));
        assert!(!host.list().contains(&"web-1".to_owned()));
        assert_eq!(host.mkdir("web-2"), Err(Errno::BUSY));
        // Holders keep it from being deleted, and end with it.
        host.signal_vmm(stuck, Signal::CONT);
        sleeper.join().unwrap().ok();
    });
    host.mkdir("web-1").unwrap();
}

#[test]
fn a_crash_at_any_moment_of_a_deletion_leaves_a_guest_that_runs_or_nothing() {
    let mut host = Setup::counter("").start();
    let mut kept = 0;
    for round in 0..20u64 {
        if !host.list().contains(&"web-1".to_owned()) {
            host.boot("web-1");
        }
        let (vmm, path) = (host.vmm("web-1"), host.path("web-1"));
        thread::scope(|scope| {
            let remover = scope.spawn(move || std::fs::remove_dir(path));
            // Where in the deletion this ends is what the rounds are to vary.
            pause_for(Duration::from_micros(round * 7919 % 16_000));
            host.kill_daemon();
            drop(remover.join().unwrap());
        });
        host.restart();
        if host.list().contains(&"web-1".to_owned()) {
            assert_eq!((host.state("web-1").as_str(), host.vmm("web-1")), ("running", vmm));
            assert_eq!(host.error("web-1"), "ok");
            kept += 1;
        } else {
            wait_until("its VMM is gone", || !is_alive(vmm));
        }
    }
    println!("{kept} of 20 were kept");
}

#[test]
fn a_daemon_that_is_ending_begins_nothing_and_says_so() {
    let mut host = Setup::counter("").start();
    host.boot("stuck");
    host.boot("web-1");
    host.counts_on("stuck");
    let (stuck, vmm) = (host.vmm("stuck"), host.vmm("web-1"));
    host.signal_vmm(stuck, Signal::STOP);
    let path = host.path("stuck/state");
    let sleeper = thread::Builder::new().spawn(move || std::fs::write(path, "sleep")).unwrap();
    wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
    host.ask_to_end();
    // One that is made before the daemon is told of its end stays; each try needs its own name.
    let mut names = (0..).map(|number| format!("late-{number}"));
    wait_until("it ends", || host.mkdir(&names.next().unwrap()) == Err(Errno::SHUTDOWN));
    assert_eq!(host.rmdir("web-1"), Err(Errno::SHUTDOWN));
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::SHUTDOWN));
    host.signal_vmm(stuck, Signal::CONT);
    sleeper.join().unwrap().unwrap();
    host.ended();
    host.restart();
    assert_eq!((host.state("web-1").as_str(), host.vmm("web-1")), ("running", vmm));
    assert_eq!(host.state("stuck"), "snapshotted");
}
