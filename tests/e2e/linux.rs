//! A Linux guest, as users have: a shell on its console, and a disk.

use std::time::Duration;

use dozed::sys::clock::Stopwatch;

use crate::support::{Host, Setup, wait_until};

/// Types a line, and waits until the guest has printed `answer`.
#[track_caller]
pub(crate) fn asks(host: &Host, id: &str, line: &str, answer: &str) {
    assert!(!line.contains(answer), "the guest prints also what is typed");
    let before = host.read(&format!("{id}/console")).len();
    host.types(id, line);
    wait_until(&format!("the guest answers `{answer}` to `{line}`"), || {
        host.read(&format!("{id}/console"))[before..].contains(answer)
    });
}

/// Returns how many seconds the guest has been counting.
fn seconds(host: &Host, id: &str) -> u64 {
    let before = host.read(&format!("{id}/console")).len();
    host.types(id, "echo at-$(cat /run/count)-");
    crate::support::wait_for("the guest says its count", || {
        let console = host.read(&format!("{id}/console"));
        let said = console[before..].rsplit_once("\nat-")?.1;
        said.split_once('-')?.0.parse().ok()
    })
}

fn boots(host: &Host, id: &str) -> usize {
    host.read(&format!("{id}/console")).matches("guest ready").count()
}

#[test]
fn a_linux_guest_keeps_its_files_and_its_time_over_sleeps_and_its_disk_over_a_shutdown() {
    let host = Setup::linux("dozed.quiet").start();
    host.boot("web-1");
    wait_until("the guest is up", || boots(&host, "web-1") == 1);
    asks(&host, "web-1", "echo up-$((1 + 1))", "up-2");
    let mut last = seconds(&host, "web-1");
    for cycle in 1..=5 {
        let line = format!("echo note-$((10 + {cycle})) | tee /run/note > /data/note; sync");
        host.types("web-1", &line);
        asks(
            &host,
            "web-1",
            &format!("echo written-$((20 + {cycle}))"),
            &format!("written-{}", 20 + cycle),
        );
        host.sleep("web-1");
        host.wake("web-1");
        let note = format!("note-{}", 10 + cycle);
        asks(&host, "web-1", "echo in-$(cat /run/note)", &format!("in-{note}"));
        asks(&host, "web-1", "echo on-$(cat /data/note)", &format!("on-{note}"));
        let mut now = seconds(&host, "web-1");
        assert!(now >= last, "its time went back from {last} to {now}");
        wait_until("the guest counts on", || {
            now = seconds(&host, "web-1");
            now > last
        });
        last = now;
    }
    assert_eq!(boots(&host, "web-1"), 1);

    host.types("web-1", "poweroff");
    wait_until("the guest has shut down", || host.state("web-1") == "stopped");
    assert_eq!(host.error("web-1"), "the guest shut down");
    assert_eq!(host.value("web-1/status", "pid"), "none");
    assert!(host.number("web-1/status", "disk_bytes") > 0);
    host.wake("web-1");
    wait_until("the guest is up again", || boots(&host, "web-1") == 2);
    asks(&host, "web-1", "echo on-$(cat /data/note)", "on-note-15");

    // Another machine meanwhile does not cost it what is on its disk.
    host.types("web-1", "poweroff");
    wait_until("the guest has shut down again", || host.state("web-1") == "stopped");
    let config = host.read("web-1/config");
    host.write("web-1/config", "disks = []\n").unwrap();
    assert!(!host.home("web-1").join("disk-0.img").exists());
    host.write("web-1/config", &config).unwrap();
    host.wake("web-1");
    wait_until("the guest is up once more", || boots(&host, "web-1") == 3);
    asks(&host, "web-1", "echo on-$(cat /data/note)", "on-note-15");
}

#[test]
fn a_linux_guest_of_an_owner_who_is_not_root_has_the_files_that_are_theirs() {
    let host = Setup::linux("dozed.quiet").start();
    let dir = tempfile::tempdir().unwrap();
    host.mkdir("web-1").unwrap();
    // Each of the files is the owner's alone.
    host.bash_ok(&format!(
        "cd {dir} && paths=$(grep -o '\"/.*\"' {config} | tr -d '\"') && cp $paths . && \
         truncate -s 1M more && printf mark-1 | dd of=more conv=notrunc && \
         printf mark-2 | dd of=more conv=notrunc bs=4096 seek=128 && \
         chmod 600 * && chown -R 65532:65532 . && chown 65532:65532 {sandbox}",
        dir = dir.path().display(),
        config = host.path("web-1/config").display(),
        sandbox = host.path("web-1").display(),
    ));
    let path = |name: &str| format!("\"{}\"", dir.path().join(name).display());
    let config = host.read("web-1/config");
    let cmdline = config.lines().find(|line| line.starts_with("cmdline = ")).unwrap();
    let document = format!(
        "kernel = {}\ninitramfs = {}\n{cmdline}\n\
         disks = [{{ path = {} }}, {{ path = {}, readonly = true }}]\n",
        path("vmlinuz"),
        path("initramfs"),
        path("disk.ext4"),
        path("more")
    );
    host.write("web-1/config", &document).unwrap();
    host.wake("web-1");
    wait_until("the guest is up", || boots(&host, "web-1") == 1);
    asks(&host, "web-1", "head -c 6 /dev/vdb; echo", "mark-1");
    asks(&host, "web-1", "echo note-$((1 + 1)) > /data/note; sync; cat /data/note", "note-2");
    host.sleep("web-1");
    host.wake("web-1");
    // What it has not read before comes from the disk that was attached anew.
    asks(&host, "web-1", "dd if=/dev/vdb bs=4096 skip=128 count=1 | head -c 6; echo", "mark-2");
    asks(&host, "web-1", "echo on-$(cat /data/note)", "on-note-2");
    assert_eq!(boots(&host, "web-1"), 1);
}

/// Returns the pages that the guest's balloon has taken so far, less those it gave back.
fn pages_in_balloon(host: &Host, id: &str) -> i64 {
    let before = host.read(&format!("{id}/console")).len();
    let count = |word: &str| format!("$(grep balloon_{word}late /proc/vmstat | cut -d' ' -f2)");
    host.types(id, &format!("echo has-$(({} - {}))-", count("inf"), count("def")));
    crate::support::wait_for("the guest says what its balloon has", || {
        let console = host.read(&format!("{id}/console"));
        let said = console[before..].rsplit_once("\nhas-")?.1;
        said.split_once("-\r")?.0.parse().ok()
    })
}

#[test]
fn a_guest_that_is_asked_for_memory_has_a_smaller_snapshot_and_all_of_its_memory_afterwards() {
    // On a disk it is up to its file system whether small holes stay; see docs/qemu.md.
    let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
    let host = Setup::linux("dozed.quiet").memory("256MiB").store(tmpfs.path()).start();
    let snapshot_bytes = |id: &str| {
        host.sleep(id);
        let bytes = host.number(&format!("{id}/status"), "snapshot_bytes");
        host.wake(id);
        bytes
    };
    let mut as_it_is = 0;
    for id in ["as-it-is", "inflated"] {
        host.mkdir(id).unwrap();
        let asked = id == "inflated";
        host.write(&format!("{id}/config"), format!("inflate_before_sleep = {asked}\n")).unwrap();
        host.wake(id);
        wait_until("the guest is up", || boots(&host, id) == 1);
        // What was read stays in the guest's page cache, which is no free memory.
        asks(&host, id, "cat /dev/vda >/dev/null; echo read-$((1 + 1))", "read-2");
        asks(&host, id, "echo kept >/run/note; echo noted-$((1 + 1))", "noted-2");
        if !asked {
            as_it_is = snapshot_bytes(id);
        }
    }
    // A guest that has no CPU for half a second is taken for one that gives no more.
    let gave = (0..5).any(|_| {
        let inflated = snapshot_bytes("inflated");
        println!("{inflated} after {as_it_is}");
        inflated + (40 << 20) < as_it_is
    });
    assert!(gave, "no snapshot was smaller than {as_it_is}");

    let id = "inflated";
    asks(&host, id, "echo in-$(cat /run/note)", "in-kept");
    wait_until("the guest has its memory back", || pages_in_balloon(&host, id) == 0);
    // More than the balloon left to it.
    let fill = "head -c 100000000 /dev/zero >/tmp/big && wc -c </tmp/big && rm /tmp/big";
    asks(&host, id, fill, "\n100000000");
    asks(&host, id, "echo killed-$(dmesg | grep -ci 'out of memory')-", "killed-0-");
    assert_eq!(boots(&host, id), 1);
}

#[test]
fn disk_traffic_above_the_threshold_keeps_awake_and_a_line_of_a_log_now_and_then_does_not() {
    let idle_after = Duration::from_secs(10);
    let host = Setup::linux("dozed.quiet").config("[reaper]\ntick = \"1s\"").start();
    host.mkdir("web-1").unwrap();
    // On software alone a guest that writes needs CPU too, and that is not what is looked for.
    host.write("web-1/config", "[activity]\nsignals = [\"disk\"]\n").unwrap();
    host.write("web-1/idle_after", "never").unwrap();
    host.wake("web-1");
    wait_until("the guest is up", || boots(&host, "web-1") == 1);
    let copies = "while :; do dd if=/dev/zero of=/data/big bs=256k count=4 conv=fsync; done";
    host.types("web-1", &format!("({copies}) 2>/dev/null & echo on-$((1 + 1))"));
    let activity = |key| host.value("web-1/activity", key);
    wait_until("its disk counts", || activity("disk_age_seconds") != "none");
    host.write("web-1/idle_after", "10s").unwrap();
    let since = Stopwatch::start();
    wait_until("it is awake for longer than it may be idle", || since.elapsed() > 2 * idle_after);
    assert_eq!(host.state("web-1"), "running");
    assert_eq!(host.number("web-1/status", "sleeps"), 0);
    let because = host.value("web-1/idle", "because");
    assert!(because.starts_with("the last activity was disk traffic of "), "{because}");
    assert!(because.contains(", above the threshold of 65536 bytes/s, "), "{because}");

    host.write("web-1/idle_after", "never").unwrap();
    let logs = "while :; do date; sleep 1; done >>/data/log";
    host.types("web-1", &format!("kill %1; sync; ({logs}) & echo off-$((1 + 1))"));
    host.write("web-1/idle_after", "10s").unwrap();
    wait_until("it sleeps", || host.state("web-1") == "snapshotted");
    // A busy machine may take longer for the answer than it may be idle.
    host.write("web-1/idle_after", "never").unwrap();
    host.wake("web-1");
    asks(&host, "web-1", "echo has-$(test -s /data/log && echo some)-log", "has-some-log");
    host.write("web-1/idle_after", "10s").unwrap();
    wait_until("it sleeps again", || host.state("web-1") == "snapshotted");
}
