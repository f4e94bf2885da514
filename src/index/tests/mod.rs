//! Rows that survive, updates that lose, sweeps that do not scan.

use std::{fs, time::Duration};

use tempfile::TempDir;

use super::*;
use crate::{
    index::flush::FLUSH_MAX,
    lock::{Held, Locks},
    sandbox::{ProcessIdentity, SnapshotFacts},
};

mod change;
mod file;
mod load;
mod sweep;

/// An index in a directory of its own, and the locks.
struct Host {
    temp: TempDir,
    locks: Arc<Locks>,
    index: Index,
}

const OWNER: Owner = Owner { uid: 1000, gid: 100 };

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn process() -> ProcessIdentity {
    ProcessIdentity { pid: 7, boot_id: "boot".into(), pidfs_inode: Some(9), start_ticks: 8 }
}

fn minutes(count: u64) -> Period {
    Period::After(Duration::from_secs(60 * count))
}

impl Host {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let index = Index::open(&temp.path().join("index.db")).unwrap();
        Self { temp, locks: Locks::new(), index }
    }

    fn path(&self) -> PathBuf {
        self.temp.path().join("index.db")
    }

    fn reopened(mut self) -> Self {
        self.index.close().unwrap();
        self.index = Index::open(&self.path()).unwrap();
        self
    }

    /// As after a kill: nobody closes the index.
    fn reopened_after_a_crash(mut self) -> Self {
        self.index = Index::open(&self.path()).unwrap();
        self
    }

    fn held(&self, id: &str) -> Held {
        self.locks.lock(&id.parse().unwrap())
    }

    fn create(&self, id: &str, now: i64) -> Arc<Entry> {
        let new = NewSandbox {
            owner: OWNER,
            spec: Arc::new(Spec::default()),
            idle_after: minutes(5),
            delete_after: minutes(60),
        };
        self.index.create(&self.held(id), new, at(now)).unwrap()
    }

    fn running(&self, id: &str, now: i64) -> Arc<Entry> {
        let entry = self.create(id, now);
        self.step(&entry, Step::Boot, now);
        self.step(&entry, Step::Booted(process()), now);
        entry
    }

    fn asleep(&self, id: &str, now: i64) -> Arc<Entry> {
        let entry = self.running(id, now);
        self.step(&entry, Step::Sleep, now);
        let snapshot = SnapshotFacts { generation: 1, bytes: 4096, at: at(now) };
        self.step(&entry, Step::Slept(snapshot), now);
        entry
    }

    fn step(&self, entry: &Entry, step: Step, now: i64) -> Arc<Record> {
        let held = self.locks.lock(entry.id());
        self.index.advance(&held, entry, &step, at(now), |_| {}).unwrap()
    }

    fn amend(&self, entry: &Entry, change: impl FnOnce(&mut Record)) {
        let held = self.locks.lock(entry.id());
        self.index.amend(&held, entry, change).unwrap();
    }

    fn get(&self, id: &str) -> Option<Arc<Entry>> {
        self.index.by_id(&id.parse().unwrap())
    }

    /// Changes the file behind the index's back.
    fn meddle(&self, sql: &str) {
        let connection = Connection::open(self.path()).unwrap();
        connection.execute_batch(sql).unwrap();
    }

    /// Asks the file behind the index's back.
    fn ask(&self, sql: &str) -> String {
        Connection::open(self.path()).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
    }
}

#[test]
fn a_sandbox_is_found_by_name_and_number() {
    let host = Host::new();
    let entry = host.create("web-1", 10);
    let record = entry.record();
    assert_eq!((record.state(), record.since), (State::Stopped, at(10)));
    assert_eq!((entry.owner(), entry.last_activity()), (OWNER, at(10)));
    assert!(Arc::ptr_eq(&host.get("web-1").unwrap(), &entry));
    assert!(Arc::ptr_eq(&host.index.by_row(entry.row()).unwrap(), &entry));
    assert!(host.get("web-2").is_none() && host.index.by_row(RowId(99)).is_none());
}

#[test]
fn a_name_is_given_once() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    let new = NewSandbox {
        owner: OWNER,
        spec: Arc::new(Spec::default()),
        idle_after: Period::Never,
        delete_after: Period::Never,
    };
    let error = host.index.create(&host.held("web-1"), new, at(1)).unwrap_err();
    assert_eq!(error.to_string(), "there is a sandbox web-1 already");
    assert!(Arc::ptr_eq(&host.get("web-1").unwrap(), &entry));
}

#[test]
fn sandboxes_are_listed_page_by_page() {
    let host = Host::new();
    for id in ["c", "a", "b"] {
        host.create(id, 0);
    }
    let page = |after, limit| -> Vec<String> {
        let entries = host.index.rows_after(after, limit);
        entries.iter().map(|entry| entry.id().to_string()).collect()
    };
    assert_eq!(page(RowId(0), 2), ["c", "a"]);
    assert_eq!(page(host.get("a").unwrap().row(), 2), ["b"]);
}

#[test]
fn a_walk_goes_over_all_pages_and_sees_what_comes_behind_it() {
    let host = Host::new();
    let ids: Vec<_> = (0..PAGE + 2).map(|number| format!("s{number}")).collect();
    let (last, first) = ids.split_last().unwrap();
    first.iter().for_each(|id| drop(host.create(id, 0)));
    let mut walk = host.index.entries_after(RowId(0));
    let mut seen: Vec<_> = walk.by_ref().take(PAGE).map(|entry| entry.id().to_string()).collect();
    host.create(last, 0);
    seen.extend(walk.map(|entry| entry.id().to_string()));
    assert_eq!(seen, ids);
    let second = host.get(&ids[1]).unwrap().row();
    assert_eq!(host.index.entries_after(second).count(), PAGE);
}

#[test]
fn a_step_changes_state_time_and_what_goes_with_it() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    let held = host.held("web-1");
    let before = entry.record();
    let record = host
        .index
        .advance(&held, &entry, &Step::Boot, at(5), |record| {
            record.vmm = Some("qemu 7.2.22".into());
        })
        .unwrap();
    assert_eq!((record.state(), record.since), (State::Booting, at(5)));
    assert_eq!(entry.record().vmm.as_deref(), Some("qemu 7.2.22"));
    assert_eq!(before.state(), State::Stopped, "a record in hand never changes");
    let error = host.index.advance(&held, &entry, &Step::Sleep, at(6), |_| {}).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    assert_eq!(entry.record(), record);
}

#[test]
fn states_are_counted() {
    let host = Host::new();
    host.create("a", 0);
    let gone = host.asleep("b", 0);
    host.asleep("c", 0);
    host.step(&gone, Step::Delete, 1);
    host.index.remove(&host.held("b"), &gone).unwrap();
    let check = |host: &Host| {
        for (state, count) in host.index.count_by_state() {
            let want = usize::from(matches!(state, State::Stopped | State::Snapshotted));
            assert_eq!(count, want, "{state}");
        }
        assert_eq!(host.index.len(), 2);
    };
    check(&host);
    check(&host.reopened());
}

#[test]
fn an_update_that_finds_something_else_changes_nothing() {
    for meddling in [
        "UPDATE sandbox SET state = 'restoring'",
        "UPDATE sandbox SET id = 'web-2'",
        "UPDATE sandbox SET uid = 0",
        "DELETE FROM sandbox",
    ] {
        let host = Host::new();
        let entry = host.create("web-1", 0);
        let before = entry.record();
        host.meddle(meddling);
        let held = host.held("web-1");
        let lost = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::Lost { .. })), "{meddling}: {result:?}");
        };
        lost(host.index.advance(&held, &entry, &Step::Boot, at(1), |_| {}).map(|_| ()));
        lost(host.index.amend(&held, &entry, |record| record.pinned = true).map(|_| ()));
        lost(host.index.remove(&held, &entry));
        assert_eq!(entry.record(), before);
        assert!(host.get("web-1").is_some());
    }
}

#[test]
fn an_owner_is_replaced_under_the_old_owners_guard() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    let other = Owner { uid: 7, gid: 8 };
    host.amend(&entry, |record| record.owner = other);
    host.amend(&entry, |record| record.pinned = true);
    let host = host.reopened();
    assert_eq!(host.get("web-1").unwrap().owner(), other);
}

#[test]
#[should_panic(expected = "the lock is that of the sandbox")]
fn another_sandboxes_lock_will_not_do() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    host.create("web-2", 0);
    host.index.amend(&host.held("web-2"), &entry, |_| {}).unwrap();
}

#[test]
fn a_number_is_never_used_again() {
    let host = Host::new();
    host.create("a", 0);
    let last = host.create("b", 0);
    host.index.remove(&host.held("b"), &last).unwrap();
    let host = host.reopened();
    assert!(host.get("b").is_none());
    let again = host.create("b", 0);
    assert!(again.row() > last.row());
}

#[test]
fn activity_shows_at_once_and_is_written_behind() {
    let host = Host::new();
    let entry = host.running("web-1", 0);
    let count = entry.activity_count();
    entry.touch(at(60_000));
    entry.touch(at(50_000));
    assert_eq!(entry.last_activity(), at(60_000), "time does not go back");
    assert_eq!(entry.activity_count(), count + 2);
    assert_eq!(host.sleep_due(), Some(300_000), "not written yet");
    assert_eq!(host.index.flush_activity().unwrap(), 1);
    assert_eq!(host.index.flush_activity().unwrap(), 0);
    assert_eq!(host.sleep_due(), Some(360_000));
    let host = host.reopened_after_a_crash();
    assert_eq!(host.get("web-1").unwrap().last_activity(), at(60_000));
}

#[test]
fn a_flush_writes_a_bounded_batch_and_close_all_of_it() {
    let host = Host::new();
    for number in 0..=FLUSH_MAX {
        host.create(&format!("s{number}"), 0).touch(at(1));
    }
    assert_eq!(host.index.flush_activity().unwrap(), FLUSH_MAX);
    host.get("s0").unwrap().touch(at(2));
    let host = host.reopened();
    assert_eq!(host.get("s0").unwrap().last_activity(), at(2));
    let last = host.get(&format!("s{FLUSH_MAX}")).unwrap();
    assert_eq!(last.last_activity(), at(1));
}

#[test]
fn activity_that_cannot_be_written_waits() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    entry.touch(at(5));
    host.meddle("CREATE TRIGGER no BEFORE UPDATE ON sandbox BEGIN SELECT raise(ABORT, 'no'); END");
    host.index.flush_activity().unwrap_err();
    host.meddle("DROP TRIGGER no");
    assert_eq!(host.index.flush_activity().unwrap(), 1);
}

#[test]
fn a_sandbox_without_keys_is_removed_by_one_write_and_one_with_keys_takes_them_along() {
    let host = Host::new();
    // Each write has a number of its own, and so has each look at it.
    let numbers = || host.index.wal.wrote();
    let remove = |id| {
        let before = numbers();
        host.index.remove(&host.held(id), &host.get(id).unwrap()).unwrap();
        (before, numbers())
    };
    let (bare, rich, other) = (host.create("a", 0), host.create("b", 0), host.create("c", 0));
    let key = |entry: &Entry| format!("{}mode:1", keys_of_row(entry.row()));
    for entry in [&rich, &other] {
        host.index.set_meta(&key(entry), "600").unwrap();
    }
    let (before, after) = remove("a");
    assert_eq!(after.since(before), 2, "{bare:?}");
    let (before, after) = remove("b");
    assert_eq!(after.since(before), 3, "{rich:?}");
    assert_eq!(host.index.meta(&key(&rich)).unwrap(), None);
    assert_eq!(host.index.meta(&key(&other)).unwrap().as_deref(), Some("600"));
}

#[test]
fn activity_of_a_sandbox_that_is_gone_is_passed_over() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    host.index.remove(&host.held("web-1"), &entry).unwrap();
    entry.touch(at(5));
    host.index.flush_activity().unwrap();
    assert!(host.reopened().index.is_empty());
}

#[test]
fn a_count_of_activity_never_comes_again() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    entry.touch(at(1));
    entry.touch(at(2));
    let seen = entry.activity_count();
    let host = host.reopened_after_a_crash();
    assert!(host.get("web-1").unwrap().activity_count() > seen);
}

#[test]
fn texts_are_kept() {
    let host = Host::new();
    assert_eq!(host.index.meta("clock").unwrap(), None);
    host.index.set_meta("clock", "one").unwrap();
    host.index.set_meta("clock", "two").unwrap();
    let host = host.reopened();
    assert_eq!(host.index.meta("clock").unwrap().as_deref(), Some("two"));
}

#[test]
fn a_closed_index_refuses_writes_and_still_tells() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    host.index.close().unwrap();
    let held = host.held("web-1");
    let error = host.index.amend(&held, &entry, |_| {}).unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
    assert!(matches!(host.index.close(), Err(Error::Closed)));
    assert!(host.get("web-1").is_some());
    let log = fs::metadata(host.temp.path().join("index.db-wal")).unwrap();
    assert_eq!(log.len(), 0, "all is in the file");
}

#[test]
fn equal_specs_share_memory_also_after_a_start() {
    let host = Host::new();
    let spec = |host: &Host, id: &str| Arc::clone(&host.get(id).unwrap().record().spec);
    for id in ["a", "b", "c"] {
        host.create(id, 0);
    }
    host.amend(&host.get("c").unwrap(), |record| {
        record.spec = Arc::new(Spec { kernel: Some("/no/such/kernel".into()), ..Spec::default() });
    });
    let check = |host: &Host| {
        assert!(Arc::ptr_eq(&spec(host, "a"), &spec(host, "b")));
        assert!(!Arc::ptr_eq(&spec(host, "a"), &spec(host, "c")));
    };
    check(&host);
    check(&host.reopened());
}

#[test]
fn looking_and_touching_wait_for_no_writer() {
    let host = Host::new();
    let entry = host.create("web-1", 0);
    let _writer_at_work = lock(&host.index.connection);
    entry.touch(at(1));
    assert_eq!(host.get("web-1").unwrap().last_activity(), at(1));
    assert_eq!(entry.record().state(), State::Stopped);
    assert_eq!(host.index.rows_after(RowId(0), 9).len(), host.index.len());
}

#[test]
fn a_user_is_one_sandboxes_own_until_that_is_deleted() {
    let host = Host::new();
    let users: Users = "5000-5001".parse().unwrap();
    let give = |host: &Host, id: &str| {
        let entry = host.get(id).unwrap();
        host.index.give_user(&host.held(id), &entry, users).unwrap()
    };
    for id in ["a", "b", "c"] {
        host.create(id, 0);
    }
    let (a, b) = (give(&host, "a").unwrap(), give(&host, "b").unwrap());
    assert!(a != b && users.contains(a) && users.contains(b));
    assert_eq!(give(&host, "c"), None);
    let host = host.reopened();
    assert_eq!((give(&host, "a"), give(&host, "c")), (Some(a), None), "it is kept");
    host.index.remove(&host.held("b"), &host.get("b").unwrap()).unwrap();
    assert_eq!(give(&host, "c"), Some(b));
    // Of another range it gets another, and the old one is free.
    let other = "6000-6000".parse().unwrap();
    let entry = host.get("a").unwrap();
    assert_eq!(host.index.give_user(&host.held("a"), &entry, other).unwrap(), Some(6000));
    assert_eq!(entry.record().user, Some(6000));
    host.create("d", 0);
    assert_eq!(give(&host, "d"), Some(a));
}

#[test]
fn two_rows_with_one_user_are_refused_by_the_file() {
    let host = Host::new();
    let (a, b) = (host.create("a", 0), host.create("b", 0));
    host.amend(&a, |record| record.user = Some(5000));
    let twice = |record: &mut Record| record.user = Some(5000);
    host.index.amend(&host.held("b"), &b, twice).unwrap_err();
    assert_eq!(b.record().user, None);
}
