//! An index that was lost, or set back to an earlier time.

use super::*;
use crate::lifecycle::evidence::{is_leftover, tokened};
use crate::{
    lifecycle::{Contradicted, check_index_file},
    sandbox::Period,
};

/// Brings a sandbox that is stopped to `state`, by way of all that come before it.
fn bring(host: &Host, id: &str, state: State) {
    if state == State::Snapshotted {
        host.wake(id).unwrap();
        host.sleep(id).unwrap();
    } else if state == State::Running {
        host.wake(id).unwrap();
    }
    assert_eq!(host.state(id), state);
}

fn vmms(host: &Host) -> Vec<u32> {
    let mut pids: Vec<_> =
        tokened(&host.daemon).iter().map(|vmm| vmm.process.identity().pid).collect();
    pids.sort_unstable();
    pids
}

/// Everything below the directory of all sandboxes, with the sizes.
fn files(host: &Host) -> Vec<(std::path::PathBuf, u64)> {
    let mut files = Vec::new();
    let mut dirs = vec![host.daemon.settings.store.join("sandboxes")];
    while let Some(dir) = dirs.pop() {
        for entry in dir.read_dir().unwrap().map(Result::unwrap) {
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                dirs.push(entry.path());
            }
            files.push((entry.path(), meta.len()));
        }
    }
    files.sort_unstable();
    files
}

#[track_caller]
fn is_refused(host: &Host, says: &str) {
    let before = (vmms(host), files(host));
    let error = host.daemon.check_index().unwrap_err();
    assert!(matches!(error, Contradicted::Behind { .. }), "{error:?}");
    let error = error.to_string();
    assert!(error.contains(says) && error.contains("restore the index.db"), "{error}");
    assert_eq!((vmms(host), files(host)), before);
}

fn kill_vmms(host: &Host) {
    for vmm in tokened(&host.daemon) {
        vmm.process.kill();
        vmm.process.wait(PATIENCE).unwrap();
    }
}

#[test]
fn a_start_with_an_empty_index_on_the_files_of_another_is_refused() {
    let mut host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    let running = tokened(&host.daemon);
    host.start_on_index("other.db");
    is_refused(&host, "it has no row for the directory");
    assert!(running[0].process.exited().is_none());
    running[0].process.kill();
}

#[test]
fn no_index_is_made_beside_the_files_of_an_earlier_one() {
    let host = Host::new();
    let store = host.daemon.settings.store.clone();
    let index = store.join("other.db");
    check_index_file(&store, &index).unwrap();
    host.create("a");
    host.wake("a").unwrap();
    for emptied in [false, true] {
        if emptied {
            std::fs::write(&index, "").unwrap();
        }
        let error = check_index_file(&store, &index).unwrap_err().to_string();
        assert!(error.contains("no row for the directory"), "{error}");
        assert_eq!(index.exists(), emptied);
    }
    check_index_file(&store, host.daemon.index.path()).unwrap();
}

#[test]
fn an_index_of_an_earlier_time_than_a_guest_that_runs_is_refused() {
    for (then, says) in [
        (State::Stopped, "a (row 1) is stopped in it, and process"),
        (State::Snapshotted, "a (row 1) is snapshotted in it, and process"),
        (State::Running, "a (row 1) is running in it, and process"),
    ] {
        let mut host = Host::new();
        host.create("a");
        bring(&host, "a", then);
        let copy = host.copy_index();
        if then == State::Running {
            host.sleep("a").unwrap();
        }
        host.wake("a").unwrap();
        host.start_on_index(&copy);
        is_refused(&host, says);
        // Also where somebody asks for it all the same.
        host.daemon.reconcile(PATIENCE);
        if then != State::Running {
            assert_eq!(vmms(&host).len(), 1, "{then}");
        }
        kill_vmms(&host);
    }
}

#[test]
fn an_index_of_an_earlier_time_than_a_sleeper_is_refused_or_the_sleeper_is_left() {
    let mut host = Host::new();
    host.create("a");
    bring(&host, "a", State::Running);
    let copy = host.copy_index();
    host.sleep("a").unwrap();
    host.start_on_index(&copy);
    is_refused(&host, "a (row 1) is running in it, and has the snapshot");

    let mut host = Host::new();
    host.create("a");
    let copy = host.copy_index();
    bring(&host, "a", State::Snapshotted);
    host.start_on_index(&copy);
    host.daemon.check_index().unwrap();
    host.daemon.reconcile(PATIENCE);
    assert_eq!(host.state("a"), State::Stopped);
    let before = files(&host);
    let error = host.wake("a").unwrap_err();
    assert!(matches!(error, Error::Unrecorded { .. }), "{error}");
    assert!(
        host.error("a").contains("it is stopped, but has a snapshot in"),
        "{}",
        host.error("a")
    );
    assert_eq!((host.state("a"), files(&host)), (State::Stopped, before));
    assert!(host.destroy("a").unwrap());
}

#[test]
fn a_sleeper_that_is_newer_than_its_record_is_not_deleted_for_its_age() {
    let mut host = Host::new();
    host.create("a");
    let age = Duration::from_secs(600);
    host.set("a", Policy::DeleteAfter(Period::After(age))).unwrap();
    bring(&host, "a", State::Snapshotted);
    let copy = host.copy_index();
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    host.start_on_index(&copy);
    host.daemon.check_index().unwrap();
    host.daemon.reconcile(PATIENCE);
    host.clock.advance(age);
    let before = files(&host);
    let entry = host.entry("a");
    let held = host.daemon.lock(&entry, Wait::ForIt, crate::sandbox::Cause::Stale).unwrap();
    let error = host.daemon.destroy_stale(&held, &entry).unwrap_err();
    assert!(matches!(error, Error::Unrecorded { .. }), "{error}");
    drop(held);
    assert_eq!(files(&host), before);
    host.wake("a").unwrap_err();
    assert_eq!(files(&host), before);
}

#[test]
fn the_guest_of_a_row_that_makes_no_sense_runs_on_and_the_others_are_served() {
    let mut host = Host::new();
    for id in ["a", "b"] {
        host.create(id);
        host.wake(id).unwrap();
    }
    let row = host.entry("a").row();
    let copy = host.copy_index();
    host.daemon.index.break_row(&host.daemon.settings.store.join(&copy), row);
    let before = files(&host);
    let vmms_before = vmms(&host);
    host.start_on_index(&copy);
    host.daemon.check_index().unwrap();
    assert_eq!(host.daemon.reconcile(PATIENCE).adopted, 1);
    assert!(host.daemon.by_id(&name("a")).is_none());
    assert!(host.guest_runs("b"));
    assert_eq!((vmms(&host), files(&host)), (vmms_before, before));
    host.sleep("b").unwrap();
    host.check("b");
    kill_vmms(&host);
}

#[test]
fn a_vmm_is_a_leftover_only_where_the_files_prove_it() {
    let host = Host::new();
    host.create("a");
    let entry = host.entry("a");
    assert!(is_leftover(&host.daemon, &entry), "it has no memory");
    host.wake("a").unwrap();
    assert!(!is_leftover(&host.daemon, &entry));
    host.sleep("a").unwrap();
    assert!(is_leftover(&host.daemon, &entry), "its memory is in the snapshot");
    let generation = entry.record().snapshot().unwrap().generation;
    let home = host.daemon.store.home(&entry.record());
    std::fs::remove_dir_all(home.snapshot_dir(generation)).unwrap();
    assert!(!is_leftover(&host.daemon, &entry));
}

#[test]
fn the_vmms_of_the_store_that_this_is_a_copy_of_are_not_ours() {
    let mut host = Host::new();
    for id in ["a", "b"] {
        host.create(id);
        host.wake(id).unwrap();
    }
    let theirs = tokened(&host.daemon);
    assert_eq!(theirs.len(), 2);
    // The same index and names, and other files.
    host.start_on_a_copy();
    assert_eq!(vmms(&host), [0; 0]);
    host.daemon.check_index().unwrap();
    let found = host.daemon.reconcile(PATIENCE);
    assert_eq!((found.adopted, found.orphans), (0, 0));
    for (vmm, id) in theirs.iter().zip(["a", "b"]) {
        assert_eq!(host.state(id), State::Stopped);
        assert!(host.error(id).contains("the VMM died"), "{id}");
        assert!(vmm.process.exited().is_none());
    }
    host.wake("a").unwrap();
    host.destroy("a").unwrap();
    for vmm in theirs {
        assert!(vmm.process.exited().is_none(), "deleting the copy ended the original's guest");
        vmm.process.kill();
        vmm.process.wait(PATIENCE).unwrap();
    }
}

#[test]
fn a_guest_that_runs_is_not_ended_where_the_index_lost_that_its_vmm_was_recorded() {
    let mut host = Host::new();
    host.create("a");
    crash(&mut host, CrashPoint::BootSpawned, |host| drop(host.wake("a")));
    assert_eq!(host.entry("a").record().process(), None);
    let copy = host.copy_index();
    let live = host.daemon.machines.get(host.entry("a").row()).unwrap();
    crate::sync::lock(&live.machine).resume().unwrap();
    let before = vmms(&host);
    host.start_on_index(&copy);
    host.daemon.check_index().unwrap();
    host.daemon.reconcile(PATIENCE);
    assert_eq!((host.state("a"), vmms(&host)), (State::Running, before));
    assert!(host.guest_runs("a"));
    host.check("a");
}
