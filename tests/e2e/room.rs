//! Room on the disk for memory where nobody keeps it: on file systems that cannot, and for
//! memory that somebody else takes away.

use std::fs::File;

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
    process::Signal,
};

use crate::support::{Disk, FileSystem, Host, Setup, wait_until};

/// Nobody looks whether memory has its room while a test takes it away.
const NO_TICK: &str = "[reaper]\ntick = \"1h\"";
/// What a guest with `touch=4 churn` writes to before each line.
const TOUCHED_BYTES: (u64, u64) = (16 << 20, 4 << 20);

/// Returns the file that the memory of `web-1` is in since its boot.
fn memory(host: &Host) -> File {
    File::options().write(true).open(host.home("web-1").join("0.live/memory")).unwrap()
}

/// Waits until `web-1` has lost its guest, and returns why.
#[track_caller]
fn why_stopped(host: &Host) -> String {
    wait_until("the guest is lost", || host.state("web-1") == "stopped");
    host.error("web-1")
}

#[test]
fn a_guest_that_a_full_disk_kills_has_the_disk_named_in_its_error() {
    let disk = Disk::new(FileSystem::Ext4, 160 << 20);
    let host = Setup::counter("touch=4 churn").config(NO_TICK).store(&disk.store()).start();
    host.boot("web-1");
    host.counts_on("web-1");
    let vmm = host.vmm("web-1");
    host.signal_vmm(vmm, Signal::STOP);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(memory(&host), punch, TOUCHED_BYTES.0, TOUCHED_BYTES.1).unwrap();
    disk.fill_to_the_byte();
    host.signal_vmm(vmm, Signal::CONT);
    let error = why_stopped(&host);
    let store = host.store().display().to_string();
    for says in ["signal 7 (SIGBUS)", "the disk had no space", "bytes are free", &store] {
        assert!(error.contains(says), "{error}");
    }
    disk.make_room();
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 2);
}

#[test]
fn a_guest_whose_memory_the_disk_does_not_give_has_that_in_its_error() {
    let host = Setup::counter("touch=4 churn").config(NO_TICK).start();
    host.boot("web-1");
    host.counts_on("web-1");
    memory(&host).set_len(0).unwrap();
    let error = why_stopped(&host);
    let store = host.store().display().to_string();
    for says in ["signal 7 (SIGBUS)", "could not be read from or written to", &store] {
        assert!(error.contains(says), "{error}");
    }
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 2);
}

/// What all who are awake may still want is counted where the file system keeps no room.
fn room_is_counted(system: FileSystem) {
    let disk = Disk::new(system, system.least_bytes() + (400 << 20));
    let host = Setup::counter("touch=4").memory("48MiB").store(&disk.store()).start();
    // Two guests and what a sleep needs fit, and three do not.
    disk.fill(140 << 20);
    for id in ["web-1", "web-2"] {
        host.boot(id);
        host.counts_on(id);
    }
    host.mkdir("web-3").unwrap();
    assert!(disk.free() > 64 << 20, "each has room by itself: {}", disk.free());
    assert_eq!(host.write("web-3/state", "wake"), Err(Errno::NOSPC));
    assert!(host.error("web-3").contains("are free"), "{}", host.error("web-3"));
    assert_eq!(host.state("web-3"), "stopped");
    // Who sleeps wants no more.
    host.sleep("web-1");
    host.wake("web-3");
    host.counts_on("web-3");
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::NOSPC));
    assert_eq!(host.state("web-1"), "snapshotted");
    host.rmdir("web-3").unwrap();
    wait_until("its room is free", || host.write("web-1/state", "wake").is_ok());
    for id in ["web-1", "web-2"] {
        assert_eq!(host.counts_on(id).boots, 1, "{id}");
    }
}

#[test]
fn room_is_counted_where_the_file_system_keeps_none_btrfs() {
    room_is_counted(FileSystem::Btrfs);
}

#[test]
fn room_is_counted_where_the_file_system_keeps_none_tmpfs() {
    room_is_counted(FileSystem::Tmpfs);
}
