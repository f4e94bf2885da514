//! What a user does that costs little costs the daemon little, at its next start too.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use crate::support::{Host, Setup, command, wait_until};

/// What an open file may cost, which is not what it or the list of its user's groups is long.
const OPEN_FILE_MAX_BYTES: u64 = 8 << 10;
/// What the daemon may come to have meanwhile, for threads and by its allocator.
const SLACK_BYTES: u64 = 4 << 20;
/// What the log of the index may be long, with what comes while it is being moved.
const LOG_MAX_BYTES: u64 = 64 << 20;

/// Runs as another user, with many groups.
const AS_USER: &str = "
import os, resource, sys
os.setgroups(range(100_000, 120_000))
os.setgid(65_432)
os.setuid(65_432)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
";

/// Has `count` files open, of each of which it has read the beginning.
const OPEN: &str = "
name, count = sys.argv[1], int(sys.argv[2])
files = [os.open(name, os.O_RDONLY) for _ in range(count)]
assert all(os.read(file, 64) is not None for file in files)
print('open', flush=True)
sys.stdin.readline()
";

/// Makes, changes and deletes sandboxes, and leaves some.
const BUSY: &str = "
names = [f'web-{number}' for number in range(300)]
for name in names:
    os.mkdir(name)
for round in range(8):
    for name in names:
        os.chmod(name + '/state', 0o660 if round % 2 else 0o600)
for name in names[10:]:
    os.rmdir(name)
";

/// Starts such a program in the tree.
fn as_user(host: &Host, program: &str, arguments: &[&str]) -> Child {
    let mut python = command("/usr/bin/python3");
    python.args(["-c", &format!("{AS_USER}{program}")]).args(arguments);
    python.current_dir(host.mount()).stdin(Stdio::piped()).stdout(Stdio::piped());
    python.spawn().unwrap()
}

/// Returns how much memory the daemon has.
fn memory_bytes(host: &Host) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.daemon_pid())).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix(" kB"));
    kib.unwrap().trim().parse::<u64>().unwrap() << 10
}

#[test]
fn open_files_cost_the_daemon_no_more_than_a_little_each() {
    let host = Setup::bare().start();
    host.bash_ok("mkdir web-1; chown 65432:65432 web-1");
    let mut holders = Vec::new();
    for (name, count) in [("web-1/config", 900), ("web-1/status", 900), ("dozed.events", 200)] {
        let before = memory_bytes(&host);
        let mut holder = as_user(&host, OPEN, &[name, &count.to_string()]);
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "open\n", "{name}");
        let cost = memory_bytes(&host).saturating_sub(before);
        let at_most = count * OPEN_FILE_MAX_BYTES + SLACK_BYTES;
        assert!(cost < at_most, "{count} times {name} cost {cost} bytes");
        holders.push(holder);
    }
    for mut holder in holders {
        drop(holder.stdin.take());
        assert!(holder.wait().unwrap().success());
    }
}

#[test]
fn what_a_user_did_leaves_nothing_for_the_next_start_to_do() {
    let mut host = Setup::bare().start();
    host.bash_ok("chmod 1777 .");
    let output = as_user(&host, BUSY, &[]).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    // A deletion that takes long is answered before.
    wait_until("all deletions are finished", || host.number("dozed.status", "sandboxes") == 10);
    host.kill_daemon();
    let log = fs::metadata(host.store().join("index.db-wal")).unwrap().len();
    assert!(log < LOG_MAX_BYTES, "the log of the index has {log} bytes");
    let said = host.log().len();
    host.restart();
    let log = host.log().split_off(said);
    let did = log.lines().find(|line| line.contains("reconciled")).unwrap();
    for nothing in ["adopted=0", "settled=0", "failed=0", "orphans=0", "late=0"] {
        assert!(did.contains(nothing), "{did}");
    }
    assert_eq!(host.list().len(), 10);
}
