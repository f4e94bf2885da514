//! A store that is full.

use std::fs;

use rustix::io::Errno;

use crate::support::{Disk, FileSystem, Host, Setup};

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
