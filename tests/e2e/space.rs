//! A store that is full.

use std::fs;

use rustix::io::Errno;

use crate::{
    linux::asks,
    support::{Disk, FileSystem, Host, Setup, counter_kernel, wait_until},
};

/// The sleep is refused for lack of space, and the guest runs on.
#[track_caller]
fn sleep_is_refused(host: &Host) {
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::NOSPC));
    assert_eq!(host.state("web-1"), "running");
    assert!(host.error("web-1").contains("are free"), "{}", host.error("web-1"));
    host.counts_on("web-1");
}

#[test]
fn a_sleep_that_would_not_fit_leaves_the_guest_running_until_there_is_room() {
    let disk = Disk::new(FileSystem::Ext4, 192 << 20);
    let host = Setup::counter("touch=4").store(&disk.store()).start();
    host.boot("web-1");
    host.counts_on("web-1");
    let filler = disk.fill(4 << 20);
    for _ in 0..3 {
        sleep_is_refused(&host);
    }
    let status = host.bash("echo sleep > web-1/state");
    let said = String::from_utf8_lossy(&status.stderr);
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(host.counts_on("web-1").boots, 1);
    fs::remove_file(filler).unwrap();
    host.sleep("web-1");
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn guests_whose_memory_does_not_fit_are_refused_and_those_that_run_are_left_alone() {
    let disk = Disk::new(FileSystem::Ext4, 160 << 20);
    let host = Setup::counter("touch=40").memory("48MiB").store(&disk.store()).start();
    for id in ["web-1", "web-2"] {
        host.boot(id);
    }
    for id in ["web-3", "web-4"] {
        host.mkdir(id).unwrap();
        assert_eq!(host.write(&format!("{id}/state"), "wake"), Err(Errno::NOSPC));
        assert_eq!(host.state(id), "stopped");
        assert!(host.error(id).contains("are free"), "{}", host.error(id));
    }
    let free = disk.free();
    assert!(!host.home("web-3").join("0.live").exists());
    for id in ["web-1", "web-2"] {
        assert_eq!(host.counts_on(id).boots, 1);
    }
    // What a sleeper does not need is there for others.
    host.sleep("web-1");
    assert!(disk.free() >= free + (2 << 20), "{} and {free}", disk.free());
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
}

/// A guest is booted, others fill the disk, and then it wants all of its memory.
fn a_running_guest_keeps_its_room(system: FileSystem) {
    let disk = Disk::new(system, system.least_bytes() + (192 << 20));
    let host = Setup::linux("dozed.quiet").store(&disk.store()).start();
    host.boot("web-1");
    wait_until("the guest is up", || host.read("web-1/console").contains("guest ready"));
    asks(&host, "web-1", "echo up-$((1 + 1))", "up-2");
    disk.fill_to_the_byte();
    let touch = "dd if=/dev/zero of=/run/new bs=1M count=50 2>/dev/null; echo touched-$((1 + 1))";
    asks(&host, "web-1", touch, "touched-2");
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::NOSPC));
    assert_eq!(host.state("web-1"), "running");
    disk.make_room();
    wait_until("there is room", || disk.free() > 64 << 20);
    host.sleep("web-1");
    let slept = disk.free();
    host.wake("web-1");
    assert!(disk.free() < slept, "it has its room again");
    asks(&host, "web-1", "cat /run/new > /dev/null && echo there-$((1 + 1))", "there-2");
}

#[test]
fn a_running_guest_keeps_its_room_ext4() {
    a_running_guest_keeps_its_room(FileSystem::Ext4);
}

#[test]
fn a_running_guest_keeps_its_room_xfs() {
    a_running_guest_keeps_its_room(FileSystem::Xfs);
}

#[test]
fn disks_that_do_not_fit_are_not_copied_and_a_boot_that_fails_leaves_no_copy() {
    let images = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (small, large) = (images.path().join("small"), images.path().join("large"));
    fs::write(&small, vec![1; 4 << 20]).unwrap();
    fs::write(&large, vec![1; 200 << 20]).unwrap();
    let disk = Disk::new(FileSystem::Ext4, 192 << 20);
    let host = Setup::counter("").store(&disk.store()).start();
    host.mkdir("web-1").unwrap();
    let config = |disks: &[&std::path::Path], kernel: &str| {
        let kernel =
            if kernel.is_empty() { String::new() } else { format!("kernel = {kernel:?}\n") };
        let disks = disks.iter().map(|path| format!("[[disks]]\npath = {path:?}\n"));
        host.write("web-1/config", kernel + &disks.collect::<String>()).unwrap();
    };
    config(&[&small, &large], "");
    let free = disk.free();
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::NOSPC));
    assert!(host.error("web-1").contains("finding space for the disks"), "{}", host.error("web-1"));
    assert!(disk.free() + (1 << 20) > free, "{} of {free}", disk.free());
    assert!(!host.home("web-1").join("disk-0.img").exists());
    // The boot fails after the copying.
    let kernel = images.path().join("kernel");
    fs::copy(counter_kernel(), &kernel).unwrap();
    config(&[&small], kernel.to_str().unwrap());
    fs::remove_file(&kernel).unwrap();
    host.write("web-1/state", "wake").unwrap_err();
    assert!(!host.home("web-1").join("disk-0.img").exists());
    config(&[&small], "");
    host.wake("web-1");
    assert!(host.home("web-1").join("disk-0.img").exists());
}

/// A store that is full to the last byte can be emptied, and a daemon can start on it.
fn a_full_store_can_be_emptied(system: FileSystem, restarts: bool) {
    let disk = Disk::new(system, system.least_bytes() + (160 << 20));
    let mut host = Setup::counter("touch=4").store(&disk.store()).start();
    for id in ["web-1", "web-2", "web-3"] {
        host.boot(id);
        host.counts_on(id);
    }
    for id in ["web-1", "web-2"] {
        host.sleep(id);
    }
    disk.fill_to_the_byte();
    // Nothing is begun, and nothing that runs is harmed.
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::NOSPC));
    if restarts {
        host.kill_daemon();
        host.restart();
        assert_eq!(host.state("web-1"), "snapshotted");
        assert_eq!(host.counts_on("web-3").boots, 1);
    }
    for id in ["web-1", "web-3", "web-2"] {
        host.rmdir(id).unwrap();
    }
    disk.make_room();
}

#[test]
fn a_full_store_can_be_emptied_ext4() {
    a_full_store_can_be_emptied(FileSystem::Ext4, false);
}

#[test]
fn a_full_store_can_be_emptied_xfs() {
    a_full_store_can_be_emptied(FileSystem::Xfs, false);
}

#[test]
fn a_daemon_starts_on_a_full_store() {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        a_full_store_can_be_emptied(system, true);
    }
}
