//! Indexes with many rows, and what the daemon makes of them.

use std::{path::Path, sync::Arc, time::Duration};

use dozed::{
    index::{Index, NewSandbox},
    lock::Locks,
    sandbox::{Owner, Period, ProcessIdentity, SandboxId, SnapshotFacts, Spec, Step, Timestamp},
    sys::clock::Stopwatch,
};
use rusqlite::Connection;

use super::{
    Bench,
    daemon::Daemon,
    report::{Bound, Line, Samples},
    site::Result,
};

/// The reaper reads the index in pages of so many.
const PAGE: usize = 64;
/// When all rows were made, long before the first of them is due.
const MADE: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// What the whole daemon may take, besides what each sandbox may.
const DAEMON_MOST_BYTES: u64 = 32 * MIB;

/// Fills an index with `sleeping` and `running` sandboxes of which none is due.
fn fill(path: &Path, sleeping: u64, running: u64) -> Result<()> {
    let index = Index::open(path)?;
    let process =
        ProcessIdentity { pid: 1, boot_id: "boot".into(), pidfs_inode: None, start_ticks: 1 };
    let snapshot = SnapshotFacts { generation: 1, bytes: MIB, at: MADE };
    let run = [Step::Boot, Step::Booted(process)];
    make_one(&index, "runner", &run)?;
    let [boot, booted] = run;
    make_one(&index, "sleeper", &[boot, booted, Step::Sleep, Step::Slept(snapshot)])?;
    index.close()?;
    let connection = Connection::open(path)?;
    for (id, count) in [("sleeper", sleeping), ("runner", running)] {
        multiply(&connection, id, count)?;
    }
    connection.execute("DELETE FROM sandbox WHERE id IN ('sleeper', 'runner')", [])?;
    Ok(())
}

fn make_one(index: &Index, id: &str, steps: &[Step]) -> Result<()> {
    let id: SandboxId = id.parse()?;
    let held = Locks::new().lock(&id);
    let new = NewSandbox {
        owner: Owner { uid: 0, gid: 0 },
        spec: Arc::new(Spec::default()),
        idle_after: Period::After(Duration::from_secs(900)),
        delete_after: Period::After(Duration::from_secs(7 * 86400)),
    };
    let entry = index.create(&held, new, MADE)?;
    for step in steps {
        index.advance(&held, &entry, step, MADE, |record| {
            record.vmm = Some("qemu 7.2.22".into());
        })?;
    }
    Ok(())
}

/// Copies a row at once, through the index each copy would be a commit of its own. Each
/// copy is due a millisecond after the one before.
fn multiply(connection: &Connection, id: &str, count: u64) -> Result<()> {
    let columns: String = connection.query_row(
        "SELECT group_concat(name) FROM pragma_table_info('sandbox') \
         WHERE name NOT IN ('row', 'id', 'sleep_at', 'delete_at')",
        [],
        |row| row.get(0),
    )?;
    connection.execute_batch(&format!(
        "WITH RECURSIVE copy (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM copy WHERE n < {count}) \
         INSERT INTO sandbox (id, sleep_at, delete_at, {columns}) \
         SELECT 'customer-' || n || '-{id}', sleep_at + n, delete_at + n, {columns} \
         FROM sandbox, copy WHERE id = '{id}' AND {count} > 0; \
         INSERT OR IGNORE INTO spec SELECT row, (SELECT toml FROM spec) FROM sandbox"
    ))?;
    Ok(())
}

/// A look of the reaper at an index with a million rows against one with a thousand.
pub(crate) fn tick(bench: &Bench) -> Result<Vec<Line>> {
    let (dir, _runtime) = bench.site.place("tick")?;
    let most = if bench.quick { 100_000 } else { 1_000_000 };
    let open = |count: u64| -> Result<Index> {
        let path = dir.join(format!("{count}.db"));
        fill(&path, count / 2, count / 2)?;
        let index = Index::open(&path)?;
        if index.len() as u64 == count { Ok(index) } else { Err("rows are missing".into()) }
    };
    let (many, few) = (open(most)?, open(1000)?);
    let now = MADE.after(Duration::from_secs(1));
    let (mut with_many, mut with_few) = (Samples::default(), Samples::default());
    for round in 0..bench.rounds(5000, 1000) + PAGE {
        let (of_many, of_few) = (look(&many, now)?, look(&few, now)?);
        if round >= PAGE {
            with_many.add(of_many);
            with_few.add(of_few);
        }
    }
    Ok(vec![Line::held_against(
        "tick",
        format!("a tick of the reaper with nothing due at {most} rows"),
        &with_many,
        ("at 1000 rows", &with_few),
        Bound::TimesWithin(1.5, Duration::from_millis(1)),
    )])
}

/// Does with the index what the reaper does at a tick.
fn look(index: &Index, now: Timestamp) -> Result<Duration> {
    let watch = Stopwatch::start();
    let written = index.flush_activity()?;
    let due = index.due_to_sleep(now, None, PAGE)?.len();
    let stale = index.due_to_delete(now, None, PAGE)?.len();
    let next = index.next_due(now)?;
    let took = watch.elapsed();
    if (written, due, stale) == (0, 0, 0) && next.is_some() {
        Ok(took)
    } else {
        Err("something was due".into())
    }
}

/// What the daemon takes of memory for each sleeping sandbox.
pub(crate) fn memory(bench: &Bench) -> Result<Vec<Line>> {
    let count = if bench.quick { 20_000 } else { 100_000 };
    let (mut empty, mut full) = (Vec::new(), Vec::new());
    for round in 0..bench.rounds(5, 3) {
        for (sandboxes, taken) in [(0, &mut empty), (count, &mut full)] {
            let name = format!("memory-{sandboxes}-{round}");
            let mut daemon = Daemon::place(&bench.site, &name, "")?;
            fill(&daemon.store().join("index.db"), sandboxes, 0)?;
            daemon.start()?;
            taken.push(daemon.resident_bytes()?);
        }
    }
    for taken in [&mut empty, &mut full] {
        taken.sort_unstable();
    }
    let median = |taken: &[u64]| taken.get(taken.len() / 2).copied().unwrap_or_default();
    let (empty, full) = (median(&empty), median(&full));
    let each = full.saturating_sub(empty) / count;
    let line = |what: String, ours: String, against: String, at_most: String, met: bool| Line {
        row: "memory",
        what,
        ours,
        against,
        ratio: String::new(),
        at_most,
        verdict: met.into(),
    };
    let whole_most = DAEMON_MOST_BYTES + count * KIB;
    Ok(vec![
        line(
            format!("memory for each of {count} sleeping sandboxes"),
            format!("{each} B"),
            format!("empty daemon: {} KiB", empty / KIB),
            format!("{KIB} B"),
            each <= KIB,
        ),
        line(
            "the whole daemon with them".to_owned(),
            format!("{} KiB", full / KIB),
            String::new(),
            format!("{} KiB", whole_most / KIB),
            full <= whole_most,
        ),
    ])
}
