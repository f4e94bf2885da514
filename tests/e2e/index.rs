//! An index that is lost, of an earlier time, spoilt in places, locked, or on a disk that fails.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Output},
    sync::mpsc,
    thread,
    time::Duration,
};

use rusqlite::Connection;
use rustix::io::Errno;

use crate::support::{Host, LockedIndex, Setup, command, is_alive, wait_until};

/// How many write at once: more than a daemon has idle threads.
const WRITERS: usize = 32;
/// How long the first answer may take on a busy machine. It comes before the daemon gives up
/// to wait for whoever has the index locked.
const PATIENCE: Duration = Duration::from_secs(25);

/// The files of the index.
const FILES: [&str; 3] = ["index.db", "index.db-wal", "index.db-shm"];

/// Copies the files of the index from `from` to `to`, where there are no others then.
pub(crate) fn copy_index(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in FILES {
        fs::remove_file(to.join(name)).ok();
        if from.join(name).exists() && name != "index.db-shm" {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

/// The start ends with `says`, and without having changed the index.
#[track_caller]
fn start_is_refused(host: &Host, says: &str) {
    let before = names_and_sizes(host.store());
    let Output { status, stderr, .. } = host.second_start();
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(1), "{stderr}");
    for says in [says, "nothing was changed; restore the index.db and index.db-wal"] {
        assert!(stderr.contains(says), "{stderr}");
    }
    assert_eq!(names_and_sizes(host.store()), before);
}

pub(crate) fn names_and_sizes(store: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut dirs = vec![store.join("sandboxes")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.metadata().unwrap().is_dir() {
                dirs.push(entry.path());
            } else if entry.file_name() != "console.log" {
                found.push((entry.path(), entry.metadata().unwrap().len()));
            }
        }
    }
    found.extend(store.join("index.db").exists().then(|| (store.join("index.db"), 0)));
    found.sort_unstable();
    found
}

#[test]
fn an_index_that_is_lost_or_set_back_stops_the_start_and_harms_no_guest() {
    let mut host = Setup::counter("").start();
    let (store, early, late) =
        (host.store().to_owned(), host.store().join("early"), host.store().join("late"));
    host.mkdir("running").unwrap();
    host.mkdir("asleep").unwrap();
    copy_index(&store, &early);
    for id in ["running", "asleep"] {
        host.wake(id);
        host.counts_on(id);
    }
    host.sleep("asleep");
    let vmm = host.vmm("running");
    host.kill_daemon();
    copy_index(&store, &late);

    let nothing = host.store().join("nothing");
    fs::create_dir(&nothing).unwrap();
    copy_index(&nothing, &store);
    start_is_refused(&host, "it has no row for the directory");
    fs::write(store.join("index.db"), "").unwrap();
    start_is_refused(&host, "it has no row for the directory");
    copy_index(&late, &store);
    fs::remove_file(store.join("index.db-wal")).unwrap();
    start_is_refused(&host, "it has no row for the directory");
    copy_index(&late, &store);
    Connection::open(store.join("index.db")).unwrap().execute("DELETE FROM sandbox", []).unwrap();
    start_is_refused(&host, "it has no row for the directory");
    copy_index(&early, &store);
    start_is_refused(&host, "running (row 1) is stopped in it, and process");

    assert!(is_alive(vmm));
    copy_index(&late, &store);
    for dir in [early, late, nothing] {
        fs::remove_dir_all(dir).unwrap();
    }
    host.restart();
    assert_eq!(host.vmm("running"), vmm);
    host.wake("asleep");
    for id in ["running", "asleep"] {
        assert_eq!(host.counts_on(id).boots, 1, "{id}");
    }
}

#[test]
fn a_sleeper_that_an_earlier_index_takes_for_stopped_is_not_booted() {
    let mut host = Setup::counter("").start();
    let (store, early, late) =
        (host.store().to_owned(), host.store().join("early"), host.store().join("late"));
    host.mkdir("asleep").unwrap();
    copy_index(&store, &early);
    host.wake("asleep");
    host.counts_on("asleep");
    host.sleep("asleep");
    host.kill_daemon();
    copy_index(&store, &late);
    copy_index(&early, &store);
    host.restart();
    assert_eq!(host.state("asleep"), "stopped");
    let before = names_and_sizes(&store);
    host.write("asleep/state", "wake").unwrap_err();
    assert!(host.error("asleep").contains("but has a snapshot in"), "{}", host.error("asleep"));
    assert_eq!(names_and_sizes(&store), before);

    host.kill_daemon();
    copy_index(&late, &store);
    for dir in [early, late] {
        fs::remove_dir_all(dir).unwrap();
    }
    host.restart();
    host.wake("asleep");
    assert_eq!(host.counts_on("asleep").boots, 1);
}

#[test]
fn a_row_that_makes_no_sense_is_left_out_and_the_others_are_served() {
    let mut host = Setup::counter("").start();
    host.boot("spoilt");
    host.boot("other");
    let (vmm, home) = (host.vmm("spoilt"), host.home("spoilt"));
    host.kill_daemon();
    let change = |sql: &str| {
        Connection::open(host.store().join("index.db")).unwrap().execute_batch(sql).unwrap();
    };
    change("UPDATE spec SET toml = 'vcpus = 0 #' || toml WHERE row = 1");
    host.restart();
    assert_eq!(host.list(), ["other"]);
    host.counts_on("other");
    host.sleep("other");
    host.wake("other");
    assert!(host.mkdir("spoilt").is_err(), "its name is taken");
    assert!(is_alive(vmm));
    assert!(home.exists());
    let log = host.log();
    let says = "row 1 (spoilt) of the index";
    assert!(log.contains(says) && log.contains("cannot be decoded and is skipped"), "{log}");
    host.kill_daemon();
    let change = |sql: &str| {
        Connection::open(host.store().join("index.db")).unwrap().execute_batch(sql).unwrap();
    };
    change("UPDATE spec SET toml = substr(toml, 12) WHERE row = 1");
    host.restart();
    assert_eq!(host.vmm("spoilt"), vmm);
    assert_eq!(host.counts_on("spoilt").boots, 1);
}

/// Has these calls of the daemon fail, all of them from now on, until the child has ended.
fn inject(host: &Host, calls: &str, error: &str) -> Child {
    let pid = host.daemon_pid();
    let mut strace = command("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
    strace.args(["-e", &format!("inject={calls}:error={error}"), "-p", &pid.to_string()]);
    let child = strace.spawn().unwrap();
    let is_traced = |thread: PathBuf| {
        // One that has ended meanwhile needs no tracing.
        let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
        !status.lines().any(|line| line == "TracerPid:\t0")
    };
    wait_until("strace has all threads", || {
        let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        threads.all(|thread| is_traced(thread.unwrap().path()))
    });
    child
}

#[test]
fn an_index_that_cannot_be_synced_ends_the_daemon_with_a_sentence_and_no_guest() {
    // Nor may the reaper write before the `mkdir` does, of which the daemon would end as well.
    let mut host = Setup::counter("").config("[reaper]\ntick = \"1h\"").start();
    host.boot("web-1");
    let (vmm, before) = (host.vmm("web-1"), host.counts_on("web-1"));
    let said = host.log().len();
    let mut strace = inject(&host, "fdatasync", "EIO");
    assert_eq!(host.mkdir("web-2"), Err(Errno::IO));
    assert_eq!(host.ended().code(), Some(1));
    strace.wait().unwrap();
    let log = host.log().split_off(said);
    let says = "failed, so dozed exits; its next start continues";
    assert!(log.contains(says) && log.contains("Input/output error"), "{log}");
    assert!(!log.contains("uncategorized"), "{log}");
    assert!(log.matches(" ERROR ").count() <= 3, "{log}");
    assert!(is_alive(vmm));
    host.restart();
    assert_eq!(host.vmm("web-1"), vmm);
    let after = host.counts_on("web-1");
    assert!(after.boots == 1 && after.count > before.count, "{before:?} {after:?}");
    host.sleep("web-1");
    host.wake("web-1");
}

#[test]
fn another_process_that_has_the_index_locked_delays_and_breaks_nothing() {
    let host = Setup::counter("").start();
    for id in ["sleeps", "goes", "stays"] {
        host.boot(id);
    }
    let locked = LockedIndex::of(&host);
    thread::scope(|scope| {
        let changes = [
            scope.spawn(|| host.write("sleeps/state", "sleep")),
            scope.spawn(|| host.rmdir("goes")),
            scope.spawn(|| host.mkdir("comes")),
            scope.spawn(|| host.write("stays/idle_after", "99s")),
        ];
        // All is seen as it was, and goes on.
        let before = host.counts_on("stays");
        assert_eq!(host.state("stays"), "running");
        assert!(host.counts_on("stays").count > before.count);
        drop(locked);
        for change in changes {
            assert_eq!(change.join().unwrap(), Ok(()));
        }
    });
    assert_eq!(host.state("sleeps"), "snapshotted");
    assert_eq!(host.state("comes"), "stopped");
    assert!(!host.list().contains(&"goes".to_owned()));
    host.wake("sleeps");
    assert_eq!(host.counts_on("sleeps").boots, 1);
}

#[test]
fn where_the_host_gives_no_thread_an_operation_is_refused_and_the_daemon_goes_on() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let others: Vec<_> = (0..WRITERS).map(|number| format!("other-{number}")).collect();
    for id in &others {
        host.mkdir(id).unwrap();
    }
    let mut strace = inject(&host, "clone,clone3", "EAGAIN");
    // Each waits in a thread that the daemon has already, until there is none.
    let locked = LockedIndex::of(&host);
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        for id in &others {
            let (tell, host) = (tell.clone(), &host);
            let file = format!("{id}/idle_after");
            scope.spawn(move || tell.send(host.write(&file, "99s")).unwrap());
        }
        drop(tell);
        let first = told.recv_timeout(PATIENCE);
        let state = host.try_read("web-1/state");
        drop(locked);
        assert_eq!((first, state), (Ok(Err(Errno::NOMEM)), Ok("running\n".to_owned())));
        assert!(told.iter().all(|answer| matches!(answer, Ok(()) | Err(Errno::NOMEM))));
    });
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&strace),
        rustix::process::Signal::INT,
    )
    .unwrap();
    strace.wait().unwrap();
    host.sleep("web-1");
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn a_config_that_names_the_index_lets_no_other_process_take_its_log() {
    let mut host = Setup::counter("").start();
    for id in ["asleep", "odd"] {
        host.mkdir(id).unwrap();
    }
    let index = host.store().join("index.db");
    // The daemon closes what it opened, and with that ends all locks that its process has there.
    for name in ["index.db", "index.db-shm"] {
        let document = format!("disks = [{{ path = {:?} }}]\n", host.store().join(name));
        host.write("odd/config", &document).unwrap();
    }
    // Whoever is the last to close a database takes its log away.
    let other = Connection::open(&index).unwrap();
    let count = other.query_row("SELECT count(*) FROM sandbox", [], |row| row.get(0));
    assert_eq!(count, Ok(2));
    other.close().unwrap();
    assert!(host.store().join("index.db-wal").exists());
    host.wake("asleep");
    host.counts_on("asleep");
    host.sleep("asleep");
    host.kill_daemon();
    host.restart();
    assert_eq!(host.state("asleep"), "snapshotted");
    host.wake("asleep");
    assert_eq!(host.counts_on("asleep").boots, 1);
}
