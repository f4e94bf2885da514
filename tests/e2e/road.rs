//! The main road: asleep and awake again, without the guest noticing.

use std::thread;

use rustix::io::Errno;

use crate::support::{Setup, is_alive, leave_descriptors, limit_descriptors, wait_until};

#[test]
fn fifty_sleeps_and_wakes_lose_nothing_of_a_guest() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let first = host.counts_on("web-1");
    for cycle in 1..=50 {
        let vmm = host.vmm("web-1");
        let awake = host.counts_on("web-1");
        host.sleep("web-1");
        assert!(!is_alive(vmm), "cycle {cycle}: asleep costs no process");
        assert_eq!(host.value("web-1/status", "pid"), "none");
        let asleep = host.counted("web-1");
        host.wake("web-1");
        let woken = host.counts_on("web-1");
        assert!(awake.count <= asleep.count && asleep.count < woken.count);
        assert_eq!((woken.boots, &woken.sum), (1, &first.sum), "cycle {cycle}");
    }
    for (key, count) in [("sleeps", 50), ("wakes", 50), ("generation", 100)] {
        assert_eq!(host.number("web-1/status", key), count, "{key}");
    }
}

#[test]
fn ten_wakes_at_once_are_one_restore_and_ten_successes() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for round in 1..=5 {
        host.sleep("web-1");
        let wake = || host.write("web-1/state", "wake");
        let results: Vec<_> = thread::scope(|scope| {
            let wakers: Vec<_> = (0..10).map(|_| scope.spawn(wake)).collect();
            wakers.into_iter().map(|waker| waker.join().unwrap()).collect()
        });
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_eq!(host.number("web-1/status", "wakes"), round);
        host.counts_on("web-1");
    }
    host.sleep("web-1");
    host.bash_ok(
        "for i in $(seq 10); do echo wake > web-1/state & jobs+=($!); done
         for job in ${jobs[@]}; do wait $job || exit 1; done",
    );
    assert_eq!(host.number("web-1/status", "wakes"), 6);
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn guests_do_not_get_one_anothers_memory() {
    let host = Setup::counter("").start();
    let ids = ["a", "b", "c", "d"];
    for (id, seed) in ids.iter().zip(1..) {
        host.mkdir(id).unwrap();
        host.write(&format!("{id}/config"), format!("cmdline = \"seed={seed} churn\"")).unwrap();
        host.wake(id);
    }
    let sums = ids.map(|id| host.counts_on(id).sum);
    for (one, sum) in sums.iter().enumerate() {
        assert!(!sums[..one].contains(sum), "the guests differ: {sums:?}");
    }
    host.bash_ok("for id in a b c d; do echo sleep > $id/state & done; wait");
    host.bash_ok("for id in d c b a; do echo wake > $id/state & done; wait");
    for (id, sum) in ids.iter().zip(sums) {
        assert_eq!(host.counts_on(id).sum, sum, "{id}");
    }
}

#[test]
fn a_guest_that_is_put_to_sleep_while_it_boots_goes_on_booting_when_it_is_woken() {
    // The firmware takes a while over this file, which the guest does not look at.
    let dir = tempfile::tempdir().unwrap();
    let initramfs = dir.path().join("initramfs");
    std::fs::write(&initramfs, vec![1; 48 << 20]).unwrap();
    let host = Setup::counter("").start();
    let config = format!("memory = \"128MiB\"\ninitramfs = \"{}\"", initramfs.display());
    for round in 0..8 {
        let id = format!("web-{round}");
        host.mkdir(&id).unwrap();
        host.write(&format!("{id}/config"), &config).unwrap();
        host.wake(&id);
        host.sleep(&id);
        host.wake(&id);
        assert_eq!(host.counts_on(&id).boots, 1, "{id}");
        host.rmdir(&id).unwrap();
    }
}

#[test]
fn a_large_guest_sleeps_and_its_snapshot_is_as_large_as_what_it_touched() {
    let host = Setup::counter("touch=64").memory("2GiB").start();
    host.boot("web-1");
    host.counts_on("web-1");
    host.sleep("web-1");
    let bytes = host.number("web-1/status", "snapshot_bytes");
    assert!((64 << 20..128 << 20).contains(&bytes), "{bytes}");
    host.wake("web-1");
    host.counts_on("web-1");
    assert_eq!(host.number("web-1/status", "memory_bytes"), 2 << 30);
}

#[test]
fn a_lock_that_a_stranger_has_on_a_shared_image_stops_neither_boot_nor_wake() {
    let images = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = images.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let locked = std::fs::File::open(&image).unwrap();
    rustix::fs::fcntl_lock(&locked, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    let disk = format!("[[disks]]\npath = {image:?}\nreadonly = true\n");
    host.write("web-1/config", disk).unwrap();
    host.wake("web-1");
    host.sleep("web-1");
    host.wake("web-1");
    drop(locked);
}

#[test]
fn a_sleep_that_runs_out_of_descriptors_leaves_the_guest_running() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let daemon = host.daemon_pid();
    let mut failed = 0;
    for spare in 0..8 {
        host.counts_on("web-1");
        let console = host.home("web-1").join("console.log");
        let printed = || std::fs::metadata(&console).unwrap().len();
        leave_descriptors(daemon, spare);
        let slept = host.write("web-1/state", "sleep");
        if slept.is_err() {
            failed += 1;
            let before = printed();
            // Nothing is asked of the daemon meanwhile, which might resume the guest then.
            wait_until("the guest prints", || printed() > before);
        }
        limit_descriptors(daemon, None);
        if slept.is_ok() {
            host.wake("web-1");
        }
        wait_until("it runs", || host.state("web-1") == "running");
        assert_eq!(host.counts_on("web-1").boots, 1, "{spare}");
    }
    assert!(failed > 1, "it never ran out of descriptors");
}

#[test]
fn the_log_has_the_request_and_the_operation_that_a_message_belongs_to() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    host.write("web-1/pinned", "1").unwrap();
    assert_eq!(host.rmdir("web-1"), Err(Errno::PERM));
    assert_eq!(host.write("web-1/state", "doze"), Err(Errno::INVAL));
    host.sleep("web-1");
    let log = host.log();
    let has = |parts: &[&str]| log.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    for (operation, path, errno) in
        [("rmdir", "web-1", "EPERM"), ("write", "web-1/state", "EINVAL")]
    {
        let request = format!("operation=\"{operation}\" pid=");
        let (path, errno) = (format!("path=\"{path}\""), format!("errno=\"{errno}\""));
        assert!(has(&["request: answered", &request, &path, &errno]), "{operation}: {log}");
    }
    assert!(has(&["operation: snapshotted id=web-1", "generation=0 cause=write"]), "{log}");
}
