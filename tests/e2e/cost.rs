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

/// Asks for everything that depends on who asks, in as many groups as a thread may be in.
const ASK: &str = "
import os
os.setgroups(range(100_000, 165_536))
os.setgid(65_432)
os.setuid(65_432)
for round in range(20):
    os.stat('dozed.events')
    os.stat('dozed.list')
    for name in ['dozed.events', 'dozed.list', 'dozed.error', 'web-1/state', 'web-1/status']:
        with open(name) as file:
            file.read()
    with open('web-1/config', 'a') as file:
        file.write('# a\\n' if round == 0 else '')
    with open('web-1/net/denied', 'w') as file:
        file.write('192.0.2.0/24\\n')
    os.utime('web-1/activity')
    os.mkdir(f'made-{round}')
    os.rmdir(f'made-{round}')
";

/// How much the threads that serve requests may read for all of this: some 2000 requests, and a
/// few lines of `/proc` for each. To list the groups once is half a MiB.
const SESSIONS_MAX_BYTES: u64 = 4 << 20;

/// Returns how much the threads that serve requests have read, and how often they did.
fn read_by_sessions(host: &Host) -> (u64, u64) {
    let tasks = fs::read_dir(format!("/proc/{}/task", host.daemon_pid())).unwrap();
    let tasks = tasks.map(|task| task.unwrap().path());
    let sessions: Vec<_> = tasks
        .filter(|task| {
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            name.strip_prefix("fuser-").is_some_and(|number| number.trim().parse::<u8>().is_ok())
        })
        .collect();
    assert_eq!(sessions.len(), 2, "the threads that serve requests have another name");
    let sum = |key: &str| {
        let of = |task: &std::path::PathBuf| -> u64 {
            let io = fs::read_to_string(task.join("io")).unwrap();
            let line = io.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap().trim().parse().unwrap()
        };
        sessions.iter().map(of).sum()
    };
    (sum("rchar:"), sum("syscr:"))
}

#[test]
fn a_user_in_as_many_groups_as_one_may_be_in_delays_nobody_elses_requests() {
    let host = Setup::bare().start();
    host.bash_ok("chmod 1777 .; mkdir web-1; chown 65432:65432 web-1");
    let before = read_by_sessions(&host);
    let mut python = command("/usr/bin/python3");
    let output = python.args(["-c", ASK]).current_dir(host.mount()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let after = read_by_sessions(&host);
    let (bytes, reads) = (after.0 - before.0, after.1 - before.1);
    assert!(reads > 500, "what they read is not counted: {reads} times");
    assert!(bytes < SESSIONS_MAX_BYTES, "{bytes} bytes, {reads} times");
}
