//! A store on a disk that fails for a moment.

use std::fs::File;

use dozed::sys::files::drop_cache;
use rustix::{io::Errno, process::Signal};

use crate::support::{Disk, FileSystem, Setup};

/// The disk loses what the first sleep writes. The next sleep must bring all of it there, as
/// the kernel takes the lost pages for written.
fn a_sleep_after_a_failed_one(system: FileSystem, restarts: bool) {
    let disk = Disk::new(system, system.least_bytes());
    let mut host = Setup::counter("touch=4").store(&disk.store()).start();
    host.boot("web-1");
    host.counts_on("web-1");
    let (vmm, memory) = (host.vmm("web-1"), host.home("web-1").join("0.live/memory"));
    // What the guest writes meanwhile would have room again before all of that is taken.
    host.signal_vmm(vmm, Signal::STOP);
    File::open(&memory).unwrap().sync_all().unwrap();
    disk.lose_writes_of(&memory);
    host.signal_vmm(vmm, Signal::CONT);
    host.counts_on("web-1");
    // A loop device hands up what it is told, and so this disk has no space.
    let error = host.write("web-1/state", "sleep").unwrap_err();
    assert!([Errno::IO, Errno::NOSPC].contains(&error), "{error}");
    assert!(host.error("web-1").contains("syncing"), "{}", host.error("web-1"));
    assert_eq!(host.state("web-1"), "running");
    disk.mend();
    if restarts {
        host.kill_daemon();
        host.restart();
    }
    host.counts_on("web-1");
    host.sleep("web-1");
    // Else it would be woken from the page cache, whatever is on the disk.
    let memory = File::open(host.home("web-1").join("1/memory")).unwrap();
    drop_cache(&memory).unwrap();
    host.wake("web-1");
    let before = host.counts_on("web-1");
    assert_eq!(before.boots, 1);
    // From here on it is as any other.
    host.sleep("web-1");
    host.wake("web-1");
    assert!(host.counts_on("web-1").count > before.count);
}

#[test]
fn a_sleep_after_a_failed_one_is_on_the_disk_ext4() {
    a_sleep_after_a_failed_one(FileSystem::Ext4, false);
}

#[test]
fn a_sleep_after_a_failed_one_is_on_the_disk_xfs() {
    a_sleep_after_a_failed_one(FileSystem::Xfs, false);
}

#[test]
fn a_restart_of_the_daemon_does_not_forget_that_a_sleep_failed() {
    a_sleep_after_a_failed_one(FileSystem::Ext4, true);
}
