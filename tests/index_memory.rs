//! How much memory a sleeping sandbox takes in the daemon.
//!
//! It is what the process grows by, so this test has a process, and a file, of its own.

#![allow(clippy::unwrap_used, reason = "a test ends at its first surprise")]

use std::{fs, sync::Arc, time::Duration};

use dozed::{
    index::{Index, NewSandbox},
    lock::Locks,
    sandbox::{
        Owner, Period, ProcessIdentity, SandboxId, SnapshotFacts, Spec, Step, Timestamp, Users,
    },
};
use rusqlite::Connection;

const COUNT: u64 = 100_000;
/// The promise: the whole daemon takes this for each sleeping sandbox.
const LIMIT_BYTES: u64 = 1024;

#[test]
fn a_sleeping_sandbox_takes_less_than_a_kib_of_memory() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("index.db");
    let index = Index::open(&path).unwrap();
    put_one_to_sleep(&index);
    index.close().unwrap();
    drop(index);
    multiply(&Connection::open(&path).unwrap());

    let before = resident_bytes();
    let index = Index::open(&path).unwrap();
    let taken = resident_bytes().saturating_sub(before) / COUNT;

    println!("{taken} bytes a sandbox");
    assert_eq!(index.len() as u64, COUNT + 1);
    assert!((100..LIMIT_BYTES).contains(&taken), "{taken} bytes a sandbox");
}

fn put_one_to_sleep(index: &Index) {
    let id: SandboxId = "web-1".parse().unwrap();
    let held = Locks::new().lock(&id);
    let now = Timestamp::from_millis(0);
    let new = NewSandbox {
        owner: Owner { uid: 1, gid: 1 },
        spec: Arc::new(Spec::default()),
        idle_after: Period::After(Duration::from_secs(300)),
        delete_after: Period::Never,
    };
    let entry = index.create(&held, new, now).unwrap();
    index.give_user(&held, &entry, Users::default()).unwrap().unwrap();
    let process =
        ProcessIdentity { pid: 1, boot_id: "boot".into(), pidfs_inode: None, start_ticks: 1 };
    let snapshot = SnapshotFacts { generation: 1, bytes: 1 << 20, at: now };
    for step in [Step::Boot, Step::Booted(process), Step::Sleep, Step::Slept(snapshot)] {
        index
            .advance(&held, &entry, &step, now, |record| {
                record.vmm = Some("qemu 7.2.22".into());
                record.waking.cause = Some("write by pid 1234567 (python3) uid 1000".into());
            })
            .unwrap();
    }
}

/// Copies the one row, at once: through the index each would be a commit of its own.
fn multiply(connection: &Connection) {
    let columns: String = connection
        .query_row(
            "SELECT group_concat(name) FROM pragma_table_info('sandbox') \
             WHERE name NOT IN ('row', 'id', 'vmm_uid')",
            [],
            |row| row.get(0),
        )
        .unwrap();
    let copy = format!(
        "WITH RECURSIVE copy (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM copy LIMIT {COUNT}) \
         INSERT INTO sandbox (id, vmm_uid, {columns}) \
         SELECT 'customer-' || n || '-sandbox', vmm_uid + n, {columns} FROM sandbox, copy \
         WHERE row = 1"
    );
    connection.execute_batch(&copy).unwrap();
    let specs = "INSERT INTO spec SELECT sandbox.row, toml FROM sandbox, spec WHERE spec.row = 1 \
                 AND sandbox.row > 1";
    connection.execute_batch(specs).unwrap();
}

fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024
}
