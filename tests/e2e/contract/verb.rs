//! What is written to control files, and what is refused.

use rustix::io::Errno;

use super::{refused, shell_fails};
use crate::support::{Setup, wait_until};

#[test]
fn what_is_no_verb_is_refused_and_changes_nothing() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for (bytes, says) in [
        (&b"running"[..], "`sleep` or `wake`"),
        (b"Wake", "`sleep` or `wake`"),
        (b"wake up", "`sleep` or `wake`"),
        (b"sleep now", "`sleep N`"),
        (b"sleep -1", "`sleep N`"),
        (b"sleep\nwake\n", "one at a time"),
        (b"sleep wake", "one at a time"),
        (b"\xff\xfe", "UTF-8"),
        (b"s\0leep", "`sleep` or `wake`"),
    ] {
        refused(&host, "web-1/state", bytes, Errno::INVAL, says);
    }
    let mut long = vec![b' '; 4092];
    long.extend_from_slice(b"sleep");
    refused(&host, "web-1/state", &long, Errno::TOOBIG, "4096");
    let dd = "dd if=/dev/zero of=web-1/state bs=5000 count=1";
    shell_fails(&host, dd, &[], Errno::TOOBIG);
    assert_eq!(host.state("web-1"), "running");
    host.write("web-1/state", &long[1..]).unwrap();
    assert_eq!(host.state("web-1"), "snapshotted", "4096 bytes are not too many");
    assert_eq!(host.error("web-1"), "ok", "a success clears the error");
}

#[test]
fn a_verb_that_is_done_already_is_a_success_without_work() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for _ in 0..3 {
        host.wake("web-1");
    }
    let pid = host.vmm("web-1");
    host.wake("web-1");
    assert_eq!(host.vmm("web-1"), pid);
    for _ in 0..3 {
        host.sleep("web-1");
    }
    assert_eq!(host.number("web-1/status", "sleeps"), 1);
    assert_eq!(host.value("web-1/status", "pid"), "none");
}

#[test]
fn a_verb_that_makes_no_sense_in_the_state_is_refused() {
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    refused(&host, "web-1/state", b"sleep", Errno::INVAL, "stopped");
    refused(&host, "web-1/console", b"x", Errno::INVAL, "wake it first");
    assert_eq!(host.state("web-1"), "stopped");
}

#[test]
fn a_sleep_with_a_count_happens_only_if_nothing_happened_since() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let count = || host.number("web-1/activity", "count");
    let seen = count();
    host.bash_ok("touch web-1/activity");
    let verb = format!("sleep {seen}");
    refused(&host, "web-1/state", verb.as_bytes(), Errno::AGAIN, "was active");
    assert_eq!(host.state("web-1"), "running");
    host.write("web-1/state", format!("sleep {}", count())).unwrap();
    assert_eq!(host.state("web-1"), "snapshotted");
}

#[test]
fn values_that_are_none_are_refused_and_change_nothing() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    for file in ["idle_after", "delete_after"] {
        let file = format!("web-1/{file}");
        host.write(&file, "90s\n").unwrap();
        for bytes in [&b"soon"[..], b"5", b"-5m", b"5m 5m", b"1.5h", b"0s", b"5M"] {
            refused(&host, &file, bytes, Errno::INVAL, "`never`");
        }
        assert_eq!(host.read(&file), "90s\n");
        for period in ["5m", "2h", "7d", "never"] {
            host.write(&file, period).unwrap();
            assert_eq!(host.read(&file), format!("{period}\n"));
        }
    }
    refused(&host, "web-1/pinned", b"yes", Errno::INVAL, "neither `0` nor `1`");
    assert_eq!(host.read("web-1/pinned"), "0\n");
    let long = vec![b'1'; 5000];
    for file in ["idle_after", "delete_after", "pinned", "activity"] {
        refused(&host, &format!("web-1/{file}"), &long, Errno::TOOBIG, "4096");
    }
}

#[test]
fn what_is_pinned_is_not_deleted() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    host.write("web-1/pinned", "1\n").unwrap();
    assert_eq!(host.rmdir("web-1"), Err(Errno::PERM));
    assert!(host.error("web-1").contains("pinned"));
    shell_fails(&host, "rmdir web-1", &[], Errno::PERM);
    host.write("web-1/pinned", "0").unwrap();
    host.rmdir("web-1").unwrap();
}

#[test]
fn policy_and_owner_outlive_the_daemon() {
    let mut host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    host.bash_ok(
        "echo 90s > web-1/idle_after; echo 2d > web-1/delete_after; echo 1 > web-1/pinned; \
         chown 7:8 web-1; chmod 770 web-1; chmod 600 web-1/state; echo 'vcpus = 2' > web-1/config",
    );
    let all =
        "cat web-1/{idle_after,delete_after,pinned,config}; stat -c %a:%u:%g web-1 web-1/state";
    let before = host.bash_ok(all);
    assert!(before.contains("770:7:8") && before.contains("vcpus = 2"), "{before}");
    host.kill_daemon();
    host.restart();
    assert_eq!(host.bash_ok(all), before);
}

#[test]
fn an_open_file_of_what_was_deleted_answers_enodev() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let files = ["state", "config", "activity", "console", "pinned"];
    let open = files.map(|file| host.open(&format!("web-1/{file}")).unwrap());
    let reader = std::fs::File::open(host.path("web-1/status")).unwrap();
    host.rmdir("web-1").unwrap();
    for (name, file) in files.iter().zip(&open) {
        let written = crate::support::write_once(file, b"wake");
        assert_eq!(written, Err(Errno::NODEV), "{name}");
    }
    let mut buffer = [0; 16];
    assert_eq!(rustix::io::read(&reader, &mut buffer), Err(Errno::NODEV));
    // Another of that name is another.
    host.mkdir("web-1").unwrap();
    assert_eq!(crate::support::write_once(&open[0], b"wake"), Err(Errno::NODEV));
    assert_eq!(host.state("web-1"), "stopped");
}

#[test]
fn what_is_written_to_activity_keeps_alive_and_a_wake_is_activity() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let count = || host.number("web-1/activity", "count");
    let before = count();
    host.bash_ok("touch web-1/activity; echo x > web-1/activity");
    assert_eq!(count(), before + 2);
    let mtime = || std::fs::metadata(host.path("web-1/activity")).unwrap().modified().unwrap();
    let touched = mtime();
    wait_until("a touch moves the time of activity", || {
        host.bash_ok("touch web-1/activity");
        mtime() > touched
    });
}
