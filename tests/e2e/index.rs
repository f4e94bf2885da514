//! An index that is lost, of an earlier time, or spoilt in places.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use rusqlite::Connection;

use crate::support::{Host, Setup, is_alive};

/// The files of the index.
const FILES: [&str; 3] = ["index.db", "index.db-wal", "index.db-shm"];

/// Copies the files of the index from `from` to `to`, where there are no others then.
fn copy_index(from: &Path, to: &Path) {
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

fn names_and_sizes(store: &Path) -> Vec<(PathBuf, u64)> {
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
    assert!(host.error("asleep").contains("and yet sleeps in"), "{}", host.error("asleep"));
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
    change("UPDATE sandbox SET spec = 'vcpus = 0 #' || spec WHERE id = 'spoilt'");
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
    assert!(log.contains(says) && log.contains("makes no sense and is left out"), "{log}");
    host.kill_daemon();
    let change = |sql: &str| {
        Connection::open(host.store().join("index.db")).unwrap().execute_batch(sql).unwrap();
    };
    change("UPDATE sandbox SET spec = substr(spec, 12) WHERE id = 'spoilt'");
    host.restart();
    assert_eq!(host.vmm("spoilt"), vmm);
    assert_eq!(host.counts_on("spoilt").boots, 1);
}
