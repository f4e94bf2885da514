//! Files that are older, newer, somebody else's or damaged.

use super::*;

#[test]
fn a_file_of_a_later_version_is_refused() {
    let host = Host::new();
    host.index.close().unwrap();
    host.meddle("PRAGMA user_version = 7");
    let error = Index::open(&host.path()).unwrap_err().to_string();
    assert!(error.contains("has version 7, and this dozed knows versions up to 6"), "{error}");
}

#[test]
fn a_database_of_something_else_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("index.db");
    let other = Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE t (x)").unwrap();
    drop(other);
    let before = fs::read(&path).unwrap();
    let error = Index::open(&path).unwrap_err().to_string();
    assert!(error.contains("is a database, but not an index of dozed"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn migrations_go_forward_from_any_version_and_a_failed_one_changes_nothing() {
    let mut connection = Connection::open_in_memory().unwrap();
    let version = |connection: &Connection| -> i64 {
        connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
    };
    schema::migrate(&mut connection, 0, &schema::MIGRATIONS).unwrap();
    let latest = schema::MIGRATIONS.len();
    let number = i64::try_from(latest).unwrap();
    assert_eq!(version(&connection), number);
    let with = |next| schema::MIGRATIONS.into_iter().chain([next]).collect::<Vec<_>>();
    let broken = with("CREATE TABLE a (x); CREATE TABLE meta (x);");
    schema::migrate(&mut connection, number, &broken).unwrap_err();
    assert_eq!(version(&connection), number);
    let mended = with("CREATE TABLE a (x)");
    schema::migrate(&mut connection, number, &mended).unwrap();
    assert_eq!(version(&connection), number + 1);
}

#[test]
fn the_rows_of_a_file_of_the_first_version_have_no_user() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("index.db");
    let mut connection = Connection::open(&path).unwrap();
    schema::migrate(&mut connection, 0, &schema::MIGRATIONS[..1]).unwrap();
    connection
        .execute_batch(
            "INSERT INTO sandbox (id, uid, gid, state, since, created_at, generation, spec, \
             pinned, sleeps, wakes, last_activity_at) \
             VALUES ('web-1', 1, 1, 'stopped', 0, 0, 0, '', 0, 0, 0, 0)",
        )
        .unwrap();
    drop(connection);
    let index = Index::open(&path).unwrap();
    assert_eq!(index.by_id(&"web-1".parse().unwrap()).unwrap().record().user, None);
}

#[test]
fn the_rows_of_version_5_keep_everything_and_their_specs_get_a_table() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("index.db");
    let mut connection = Connection::open(&path).unwrap();
    schema::migrate(&mut connection, 0, &schema::MIGRATIONS[..5]).unwrap();
    connection
        .execute_batch(
            "INSERT INTO sandbox (row, id, uid, gid, state, since, created_at, generation, spec, \
             idle_after, delete_after, pinned, vmm, pid, boot_id, start_ticks, \
             snapshot_generation, snapshot_bytes, snapshotted_at, sleeps, wakes, error, \
             last_activity_at, delete_at, vmm_uid, slot, config_by) VALUES \
             (3, 'a', 1, 2, 'running', 4, 5, 6, 'vcpus = 3', 60, NULL, 0, 'qemu 7.2.22', 7, 'b', \
              8, NULL, NULL, NULL, 9, 10, 'why', 11, NULL, 70000, 12, '1:2:3'), \
             (9, 'b', 1, 2, 'snapshotted', 4, 5, 6, '', NULL, 60, 1, NULL, NULL, NULL, \
              NULL, 13, 14, 15, 9, 10, NULL, 11, NULL, NULL, NULL, NULL)",
        )
        .unwrap();
    drop(connection);
    let index = Index::open(&path).unwrap();
    assert_eq!(index.malformed(), []);
    let get = |id: &str| index.by_id(&id.parse().unwrap()).unwrap();
    let (a, b) = (get("a").record(), get("b").record());
    let process =
        ProcessIdentity { pid: 7, boot_id: "b".into(), pidfs_inode: None, start_ticks: 8 };
    let snapshot = SnapshotFacts { generation: 13, bytes: 14, at: at(15) };
    assert_eq!((a.row, b.row), (RowId(3), RowId(9)));
    assert_eq!(a.phase, Phase::Running { process });
    assert_eq!(b.phase, Phase::Snapshotted { snapshot });
    assert_eq!((a.spec.vcpus, &*b.spec), (3, &Spec::default()));
    assert_eq!((a.generation, a.sleeps, a.wakes, a.since, a.created_at), (6, 9, 10, at(4), at(5)));
    assert_eq!((a.idle_after, a.delete_after, b.pinned), (minutes(1), Period::Never, true));
    assert_eq!((a.user, a.slot, a.error.as_deref()), (Some(70_000), Some(12), Some("why")));
    assert_eq!(a.config_by.as_deref().unwrap().to_string(), "1:2:3");
    assert_eq!(get("a").last_activity(), at(11));
    // The next sandbox gets a number that none had.
    drop(index);
    let index = Index::open(&path).unwrap();
    let id = "c".parse().unwrap();
    let new = NewSandbox {
        owner: OWNER,
        spec: Arc::new(Spec::default()),
        idle_after: minutes(5),
        delete_after: minutes(60),
    };
    assert_eq!(index.create(&Locks::new().lock(&id), new, at(0)).unwrap().row(), RowId(10));
}

#[test]
fn a_spec_is_written_when_it_changes_and_goes_with_its_row() {
    let host = Host::new();
    let entry = host.create("a", 0);
    let spec = Arc::new(Spec { cmdline: "x".repeat(200_000), ..Spec::default() });
    host.amend(&entry, |record| record.spec = Arc::clone(&spec));
    host.meddle(
        "CREATE TRIGGER refused BEFORE UPDATE ON spec BEGIN SELECT raise(FAIL, 'refused'); END",
    );
    let log_bytes = || fs::metadata(host.temp.path().join("index.db-wal")).unwrap().len();
    let before = log_bytes();
    host.step(&entry, Step::Boot, 1);
    host.amend(&entry, |record| record.pinned = true);
    // An equal one is not written either.
    host.amend(&entry, |record| record.spec = Arc::new(Spec::clone(&spec)));
    assert!(log_bytes() - before < 200_000, "{}", log_bytes() - before);
    let held = host.held("a");
    let change = |record: &mut Record| record.spec = Arc::new(Spec::default());
    host.index.amend(&held, &entry, change).unwrap_err();
    assert_eq!(entry.record().spec, spec);
    host.meddle("DROP TRIGGER refused");
    host.index.amend(&held, &entry, change).unwrap();
    assert_eq!(host.ask("SELECT (length(toml) < 200000) || '' FROM spec"), "1");
    host.index.remove(&held, &entry).unwrap();
    assert_eq!(host.ask("SELECT count(*) || '' FROM spec"), "0");
}

#[test]
fn a_damaged_file_is_refused_and_left() {
    let damages: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes[..16].fill(b'x'),
        // The root pages of the tables and their indexes.
        |bytes| bytes[2 * 4096..].fill(0xff),
        |bytes| bytes.truncate(3 * 4096),
    ];
    for damage in damages {
        let mut host = Host::new();
        for number in 0..200 {
            host.create(&format!("s{number}"), 0);
        }
        host.index.close().unwrap();
        // It is opened and not closed, so that the next opening has to look.
        host = host.reopened_after_a_crash();
        drop(host.index);
        let path = host.temp.path().join("index.db");
        let mut bytes = fs::read(&path).unwrap();
        fs::remove_file(host.temp.path().join("index.db-wal")).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let error = Index::open(&path).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains("restore it from a backup"), "{error}");
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn a_row_that_makes_no_sense_is_left_out_and_stays_as_it_is() {
    for (sql, says) in [
        ("UPDATE sandbox SET id = 'Web.1' WHERE row = 1", "`Web.1`: an id consists of lower-case"),
        ("UPDATE spec SET toml = 'vcpus = 0' WHERE row = 1", "its spec: line 1: `vcpus`"),
        ("DELETE FROM spec WHERE row = 1", "it has no spec"),
        ("UPDATE sandbox SET pid = 7 WHERE row = 1", "half a process"),
        ("UPDATE sandbox SET snapshot_bytes = 7 WHERE row = 1", "half a snapshot"),
        (
            "UPDATE sandbox SET state = 'snapshotted' WHERE row = 1",
            "it is snapshotted and has no process and no snapshot",
        ),
        (
            "UPDATE sandbox SET state = 'running' WHERE row = 1",
            "it is running and has no process and no snapshot",
        ),
        (
            "UPDATE sandbox SET pid = 7, boot_id = 'b', start_ticks = 1 WHERE row = 1",
            "it is stopped and has a process and no snapshot",
        ),
    ] {
        let host = Host::new();
        host.create("web-1", 0);
        host.create("web-2", 0);
        host.index.close().unwrap();
        host.meddle(sql);
        let rows = "SELECT group_concat(id || ifnull(toml, '') || ifnull(pid, '') || \
                    ifnull(snapshot_bytes, '')) FROM sandbox LEFT JOIN spec USING (row)";
        let before = host.ask(rows);
        let index = Index::open(&host.path()).unwrap();
        let [malformed] = index.malformed() else { panic!("{:?}", index.malformed()) };
        assert_eq!(malformed.row, RowId(1));
        assert!(malformed.why.contains(says), "{}", malformed.why);
        assert!(index.by_id(&"web-1".parse().unwrap()).is_none());
        assert!(index.by_id(&"web-2".parse().unwrap()).is_some());
        assert_eq!((index.len(), host.ask(rows)), (1, before));
    }
}

#[test]
fn what_a_row_that_makes_no_sense_has_is_given_to_nobody_else() {
    let mut host = Host::new();
    let users: Users = "70000-70001".parse().unwrap();
    let first = host.create("web-1", 0);
    host.index.give_slot(&host.held("web-1"), &first, 9).unwrap();
    let user = host.index.give_user(&host.held("web-1"), &first, users).unwrap();
    host.index.close().unwrap();
    host.meddle("UPDATE spec SET toml = 'vcpus = 0'");
    host.index = Index::open(&host.path()).unwrap();
    let new = NewSandbox {
        owner: OWNER,
        spec: Arc::new(Spec::default()),
        idle_after: minutes(5),
        delete_after: minutes(60),
    };
    let again = host.index.create(&host.held("web-1"), new, at(0));
    assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
    let second = host.create("web-2", 0);
    assert_eq!(host.index.give_slot(&host.held("web-2"), &second, 9).unwrap(), Some(1));
    let other = host.index.give_user(&host.held("web-2"), &second, users).unwrap();
    assert!(other.is_some() && other != user, "{user:?} {other:?}");
}

#[test]
fn a_change_that_cannot_reach_the_disk_does_not_show_and_is_the_last() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    // A pipe has no disk.
    let (_reader, writer) = std::io::pipe().unwrap();
    host.index.wal = WriteAheadLog::over(std::os::fd::OwnedFd::from(writer).into()).unwrap();
    let held = host.held("a");
    let error = host.index.amend(&held, &entry, |record| record.pinned = true).unwrap_err();
    assert!(matches!(error, Error::Unsynced { .. }), "{error}");
    assert!(!entry.record().pinned);
    let later = host.index.amend_unsynced(&held, &entry, |record| record.pinned = true);
    assert!(matches!(later, Err(Error::Unsynced { .. })), "{later:?}");
    assert!(!entry.record().pinned);
    assert!(matches!(host.index.set_meta("k", "v"), Err(Error::Unsynced { .. })));
    drop(held);
    assert!(host.reopened_after_a_crash().index.by_id(&"a".parse().unwrap()).is_some());
}

#[test]
fn a_power_cut_takes_back_what_nobody_waited_for_from_the_last_change_on() {
    let mut host = Host::new();
    let entry = host.running("a", 1);
    let held = host.held("a");
    let change = |sleeps| {
        let changed = host.index.amend_unsynced(&held, &entry, |record| record.sleeps = sleeps);
        changed.unwrap().1
    };
    let commits: Vec<_> = (1..=3).map(change).collect();
    assert_eq!(entry.record().sleeps, 3);
    let left = |host: &Host, name: &str| {
        let path = host.temp.path().join(name);
        host.index.cut_power(&path);
        Index::open(&path).unwrap().by_id(&"a".parse().unwrap()).unwrap().record().sleeps
    };
    assert_eq!(left(&host, "first.db"), 0);
    host.index.sync(commits[1]).unwrap();
    assert_eq!(left(&host, "second.db"), 2);
    drop(held);
    host = host.reopened_after_a_crash();
    assert_eq!(host.index.by_id(&"a".parse().unwrap()).unwrap().record().sleeps, 3);
}
