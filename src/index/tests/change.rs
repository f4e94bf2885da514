//! Disks that fail or hang, and other processes that have the file locked.

use std::{sync::atomic::Ordering, thread};

use super::*;
use crate::{
    index::wal::Disk,
    sys::clock::{Deadline, Stopwatch, pause_for},
};

/// How long a condition may take to come true on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn all(host: &Host) -> String {
    host.ask(
        "SELECT group_concat(row || id || state || pinned || ifnull(slot, '-') || \
         ifnull(vmm_uid, '-') || since || toml) || (SELECT group_concat(key || value) FROM meta) \
         FROM sandbox JOIN spec USING (row)",
    )
}

#[test]
fn what_the_disk_does_not_take_in_time_is_in_neither_ram_nor_file() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    host.index.set_meta("k", "before").unwrap();
    let (file, record) = (all(&host), entry.record());
    // Each of them finds a disk that has taken everything before it.
    let hang = || {
        host.index.wal.disk(Disk::Works);
        host.index.wal.settle();
        host.index.wal.disk(Disk::Hangs);
    };
    let held = host.held("a");
    let new = NewSandbox {
        owner: OWNER,
        spec: Arc::new(Spec::default()),
        idle_after: Period::Never,
        delete_after: Period::Never,
    };
    let users = "70000-70009".parse().unwrap();
    let changes: [&dyn Fn() -> Error; 9] = [
        &|| host.index.advance(&held, &entry, &Step::Sleep, at(2), |_| ()).unwrap_err(),
        &|| host.index.amend(&held, &entry, |record| record.pinned = true).unwrap_err(),
        &|| host.index.give_slot(&held, &entry, 9).unwrap_err(),
        &|| host.index.give_user(&held, &entry, users).unwrap_err(),
        &|| host.index.remove(&held, &entry).unwrap_err(),
        &|| host.index.create(&host.held("b"), new.clone(), at(3)).unwrap_err(),
        &|| host.index.set_meta("k", "after").unwrap_err(),
        &|| host.index.set_meta("new", "after").unwrap_err(),
        &|| host.index.remove_meta("k").unwrap_err(),
    ];
    for change in changes {
        hang();
        let error = change();
        assert!(matches!(error, Error::Stalled { .. }), "{error}");
    }
    assert_eq!(all(&host), file);
    assert_eq!(entry.record(), record);
    assert!(host.get("b").is_none() && host.get("a").is_some());

    // Once the disk answers again all goes on.
    host.index.wal.disk(Disk::Works);
    host.index.check().unwrap();
    assert_eq!(host.index.give_slot(&held, &entry, 9).unwrap(), Some(0));
    host.index.advance(&held, &entry, &Step::Sleep, at(2), |_| ()).unwrap();
    host.index.remove_meta("k").unwrap();
    drop(held);
    host.create("b", 3);
    let before = entry.record();
    host = host.reopened_after_a_crash();
    assert_eq!(host.get("a").unwrap().record(), before);
    assert_eq!(host.index.meta("k").unwrap(), None);
}

#[test]
fn while_the_disk_takes_nothing_no_further_change_is_begun() {
    let host = Host::new();
    let (a, b) = (host.running("a", 1), host.running("b", 1));
    let (held_a, held_b) = (host.held("a"), host.held("b"));
    host.index.wal.disk(Disk::Hangs);
    host.index.amend(&held_a, &a, |record| record.pinned = true).unwrap_err();
    let log_bytes = || fs::metadata(host.temp.path().join("index.db-wal")).unwrap().len();
    let (before, record) = (log_bytes(), b.record());
    let refused = [
        host.index.amend(&held_b, &b, |record| record.pinned = true).unwrap_err(),
        host.index
            .amend_unsynced(&held_b, &b, |record| record.pinned = true)
            .map(drop)
            .unwrap_err(),
        host.index.advance(&held_b, &b, &Step::Sleep, at(2), |_| ()).unwrap_err(),
        host.index.remove(&held_b, &b).unwrap_err(),
        host.index.set_meta("k", "v").unwrap_err(),
    ];
    for error in refused {
        let says = "did not accept a change of the index within 120 s, and no other is begun";
        assert!(error.to_string().contains(says), "{error}");
    }
    assert_eq!((log_bytes(), b.record()), (before, record));
    // It stalls, it has not failed: the daemon goes on, and so do changes once it takes them.
    host.index.check().unwrap();
    host.index.wal.disk(Disk::Works);
    host.index.advance(&held_b, &b, &Step::Sleep, at(2), |_| ()).unwrap();
}

#[test]
fn a_failed_sync_is_told_with_its_number_and_no_opening_is_needed_to_see_it() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    host.index.check().unwrap();
    // A pipe has no disk.
    let (_reader, writer) = std::io::pipe().unwrap();
    host.index.wal = WriteAheadLog::over(std::os::fd::OwnedFd::from(writer).into()).unwrap();
    let held = host.held("a");
    host.index.amend(&held, &entry, |record| record.pinned = true).unwrap_err();
    let Err(Error::Unsynced { source }) = host.index.check() else { panic!("it failed") };
    assert_eq!(source.raw_os_error(), Some(rustix::io::Errno::INVAL.raw_os_error()));
    entry.touch(at(99));
    assert!(matches!(host.index.flush_activity(), Err(Error::Unsynced { .. })));
    assert!(matches!(host.index.close(), Err(Error::Unsynced { .. })));
    // It is not taken for closed in order.
    assert_eq!(host.ask("SELECT value FROM meta WHERE key = 'index.clean'"), "no");
}

#[test]
fn activity_is_written_without_waiting_for_the_disk() {
    let host = Host::new();
    let entry = host.running("a", 1);
    host.index.wal.disk(Disk::Hangs);
    entry.touch(at(77_000));
    assert_eq!(host.index.flush_activity().unwrap(), 1);
    assert_eq!(host.ask("SELECT last_activity_at || '' FROM sandbox"), "77000");
}

#[test]
fn who_waits_for_the_disk_keeps_nobody_from_reading_or_writing() {
    let host = Host::new();
    let (a, b) = (host.running("a", 1), host.running("b", 1));
    let held = host.held("b");
    thread::scope(|scope| {
        // It gives up only when the disk hangs no more, or much later.
        host.index.wal.disk(Disk::Slow);
        let waiting = scope.spawn(|| host.amend(&a, |record| record.pinned = true));
        let deadline = Deadline::after(PATIENCE);
        while host.ask("SELECT pinned || '' FROM sandbox WHERE id = 'a'") != "1" {
            assert!(!deadline.passed());
            pause_for(Duration::from_millis(1));
        }
        assert!(!a.record().pinned, "the disk does not have it");
        b.touch(at(5));
        host.index.flush_activity().unwrap();
        let (changed, _) = host.index.amend_unsynced(&held, &b, |b| b.pinned = true).unwrap();
        assert!(
            changed.pinned && !host.index.due_to_sleep(at(i64::MAX), None, 9).unwrap().is_empty()
        );
        assert_eq!(host.index.meta("none").unwrap(), None);
        host.index.wal.disk(Disk::Works);
        waiting.join().unwrap();
    });
    assert!(a.record().pinned);
}

#[test]
fn activity_does_not_overwrite_a_deadline_that_does_not_show_yet() {
    let host = Host::new();
    let entry = host.running("a", 1000);
    thread::scope(|scope| {
        host.index.wal.disk(Disk::Slow);
        let waiting = scope.spawn(|| host.amend(&entry, |record| record.idle_after = minutes(1)));
        let deadline = Deadline::after(PATIENCE);
        while host.sleep_due() != Some(61_000) {
            assert!(!deadline.passed());
            pause_for(Duration::from_millis(1));
        }
        entry.touch(at(2000));
        assert_eq!(host.index.flush_activity().unwrap(), 0);
        assert_eq!(host.sleep_due(), Some(61_000), "and not by the five minutes of before");
        host.index.wal.disk(Disk::Works);
        waiting.join().unwrap();
    });
    assert_eq!(host.index.flush_activity().unwrap(), 1);
    assert_eq!(host.sleep_due(), Some(62_000));
}

#[test]
fn another_process_that_has_the_file_locked_delays_a_change_and_no_look() {
    let host = Host::new();
    let entry = host.running("a", 1);
    let other = Connection::open(host.path()).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| host.amend(&entry, |record| record.pinned = true));
        entry.touch(at(5));
        assert_eq!(host.index.flush_activity().unwrap(), 0, "the next tick does it");
        assert_eq!(host.index.due_to_sleep(at(i64::MAX), None, 9).unwrap().len(), 1);
        assert_eq!(host.index.meta("none").unwrap(), None);
        assert!(!entry.record().pinned);
        other.execute_batch("ROLLBACK").unwrap();
        waiting.join().unwrap();
    });
    assert!(entry.record().pinned);
    assert_eq!(host.index.flush_activity().unwrap(), 1);
}

#[test]
fn a_lock_of_another_process_that_does_not_end_is_an_error_that_changes_nothing() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    host.index.locked_limit = Duration::from_millis(50);
    let other = Connection::open(host.path()).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let held = host.held("a");
    let error = host.index.advance(&held, &entry, &Step::Sleep, at(2), |_| ()).unwrap_err();
    assert!(matches!(error, Error::Sql { .. }), "{error}");
    assert_eq!(entry.record().state(), State::Running);
    assert_eq!(host.index.count_by_state()[2], (State::Running, 1));
    other.execute_batch("ROLLBACK").unwrap();
    host.index.advance(&held, &entry, &Step::Sleep, at(2), |_| ()).unwrap();
}

#[test]
fn not_every_change_waits_for_a_lock_of_another_process_that_does_not_end() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    let other = Connection::open(host.path()).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let held = host.held("a");
    host.index.locked_limit = Duration::from_millis(50);
    host.index.amend(&held, &entry, |record| record.pinned = true).unwrap_err();
    host.index.locked_limit = Duration::from_secs(600);
    let since = Stopwatch::start();
    host.index.amend(&held, &entry, |record| record.pinned = true).unwrap_err();
    assert!(since.elapsed() < host.index.locked_limit, "it waited as if it were the first");
    other.execute_batch("ROLLBACK").unwrap();
    host.index.amend(&held, &entry, |record| record.pinned = true).unwrap();
    assert!(!host.index.is_locked_out.load(Ordering::Relaxed), "the next one waits again");
}

#[test]
fn the_log_is_moved_into_the_file_and_does_not_grow_without_end() {
    let host = Host::new();
    let entry = host.running("a", 1);
    let held = host.held("a");
    let size = || fs::metadata(host.temp.path().join("index.db-wal")).unwrap().len();
    let mut largest = 0;
    for round in 0..12_000 {
        let _synced = host.index.amend_unsynced(&held, &entry, |a| a.sleeps = round).unwrap();
        largest = largest.max(size());
    }
    assert!(largest < 80 << 20, "{largest}");
    let deadline = Deadline::after(PATIENCE);
    let moved = || {
        let alone = host.temp.path().join("alone.db");
        fs::copy(host.path(), &alone).unwrap();
        let alone = Connection::open_with_flags(alone, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY);
        let sleeps = "SELECT sleeps FROM sandbox";
        alone.unwrap().query_row(sleeps, [], |row| row.get::<_, i64>(0)).is_ok_and(|n| n > 600)
    };
    while !moved() {
        assert!(!deadline.passed(), "nothing was moved");
        pause_for(Duration::from_millis(5));
    }
}

#[test]
fn what_is_in_the_log_is_written_anew_by_the_next_opening_whatever_its_length() {
    use std::os::unix::fs::FileExt as _;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("log");
    for len in [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 7] {
        let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
        fs::write(&path, &bytes).unwrap();
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        crate::index::wal::write_anew(&file).unwrap();
        assert!(fs::read(&path).unwrap() == bytes);
    }
    // A file that can only be read is not passed over in silence.
    let file = fs::File::open(&path).unwrap();
    file.read_exact_at(&mut [0], 0).unwrap();
    crate::index::wal::write_anew(&file).unwrap_err();
}
