//! Holds the documents against the program: what they list is what there is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use dozed::{
    activity::{Busyness, Signals},
    config::Config,
    events::{ChangeFeed, Event, View, What},
    lifecycle::{Gauges, Metrics},
    sandbox::{
        Activity, Actor, Cause, Owner, Period, Phase, ProcessIdentity, Record, RowId,
        SnapshotFacts, Spec, State, Step, Timestamp, Waking,
    },
    tree::{BadCommand, DaemonFacts, DaemonFile, Facts, File, Verb, verb},
};

/// The words of one row of a table: those in backquotes, cell by cell.
type Row = Vec<String>;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the cells of every table row under the heading `## {heading}`, without the
/// rows that head the tables.
fn rows(text: &str, heading: &str) -> Vec<Row> {
    let (_, after) = text
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("there is no heading `{heading}`"));
    let section = after.split("\n## ").next().unwrap();
    let mut rows: Vec<Row> = Vec::new();
    for line in section.lines() {
        if line.starts_with("|---") {
            rows.pop();
        } else if let Some(line) = line.strip_prefix("| ") {
            let cells = line.trim_end_matches('|').split(" | ");
            rows.push(cells.map(|cell| cell.trim().to_owned()).collect());
        }
    }
    assert!(!rows.is_empty(), "there is no table under `{heading}`");
    rows
}

/// Returns what is in backquotes in `cell`.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

fn semantics() -> String {
    document("docs/SEMANTICS.md")
}

/// Returns the name and the mode of each row of `## The files`.
fn listed_files() -> Vec<(String, String)> {
    let rows = rows(&semantics(), "The files");
    rows.iter().map(|row| (quoted(&row[0])[0].to_owned(), row[1].clone())).collect()
}

#[test]
fn each_file_is_listed_in_order_and_with_its_mode() {
    let mut there: Vec<(String, String)> =
        DaemonFile::ALL.iter().map(|file| (file.name().to_owned(), "0444".to_owned())).collect();
    for file in File::every() {
        there.push((file.path(), format!("{:04o}", file.mode())));
    }
    assert_eq!(listed_files(), there);
}

#[test]
fn each_state_is_listed() {
    let text = semantics();
    let listed: Vec<String> =
        rows(&text, "States").iter().map(|row| quoted(&row[0])[0].to_owned()).collect();
    let there: Vec<String> = State::ALL.iter().map(|state| state.word().to_owned()).collect();
    assert_eq!(listed, there);
}

/// Returns the pairs of states that the picture of the states has an arrow between.
fn drawn_transitions() -> BTreeSet<(String, String)> {
    let source = document("docs/pictures/states.txt");
    let arrows = source.lines().filter_map(|line| line.strip_prefix("arrow "));
    let state = |end: &str| end.split(':').next().unwrap().to_owned();
    arrows
        .map(|arrow| {
            let mut ends = arrow.split(' ').map(state);
            (ends.next().unwrap(), ends.next().unwrap())
        })
        .collect()
}

/// The picture has one arrow for a loss and one for a deletion, which begin in most states.
#[test]
fn the_picture_of_the_states_has_every_transition() {
    let (process, snapshot) = (process(), snapshot());
    let running = Phase::Running { process: process.clone() };
    let phases = [
        Phase::Stopped,
        Phase::Booting { process: None },
        running.clone(),
        Phase::Snapshotting { process: process.clone() },
        Phase::Snapshotted { snapshot },
        Phase::Restoring { snapshot, process: None },
        Phase::Deleting { process: None, snapshot: None },
    ];
    assert_eq!(phases.each_ref().map(Phase::state), State::ALL);
    let steps = [
        Step::Boot,
        Step::Booted(process.clone()),
        Step::Sleep,
        Step::Slept(snapshot),
        Step::Wake,
        Step::Woken(process),
        Step::Undo,
    ];
    let pair =
        |from: &Phase, to: &Phase| (from.state().word().to_owned(), to.state().word().to_owned());
    let mut there: BTreeSet<_> = phases
        .iter()
        .flat_map(|from| steps.iter().map(move |step| (from, from.after(step))))
        .filter_map(|(from, to)| Some(pair(from, &to.ok()?)))
        .collect();
    there.insert(pair(&running, &running.after(&Step::Lost).unwrap()));
    there.insert(pair(&Phase::Stopped, &Phase::Stopped.after(&Step::Delete).unwrap()));
    assert_eq!(drawn_transitions(), there);
}

#[test]
fn each_listed_verb_is_accepted_and_leads_where_the_page_says() {
    let rows = rows(&semantics(), "Verbs");
    for row in &rows {
        let written = quoted(&row[0])[0].replace('N', "7");
        let makes = match verb(written.as_bytes()).unwrap().unwrap() {
            Verb::Wake => State::Running,
            Verb::Sleep { .. } => State::Snapshotted,
        };
        assert_eq!(quoted(&row[1]), [makes.word()], "{written}");
    }
    assert_eq!(rows.len(), 3);
    let refused = verb(b"snooze").unwrap_err();
    assert!(matches!(refused, BadCommand::UnknownVerb { .. }));
    assert!(
        document("README.md").contains(&refused.to_string()),
        "the README shows another sentence"
    );
}

/// The one table of the program is `tree::errno`, which names them as libc does.
#[test]
fn each_errno_is_listed() {
    let source = document("src/tree/errno.rs");
    let there: BTreeSet<&str> = source
        .split("libc::")
        .skip(1)
        .map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap())
        .collect();
    let text = semantics();
    let rows = rows(&text, "Errno");
    let listed: BTreeSet<&str> = rows.iter().flat_map(|row| row[0].split(", ")).collect();
    assert_eq!(listed, there);
}

/// Returns the keys of a table that the program made.
fn keys(table: &str) -> Vec<&str> {
    table.lines().map(|line| line.split_once(' ').unwrap().0).collect()
}

#[test]
fn each_key_of_the_tables_is_listed_in_order() {
    let record = record();
    let wall = |at: Timestamp| jiff::Timestamp::from_millisecond(at.as_millis()).unwrap();
    let facts = Facts {
        record: &record,
        now: Timestamp::default(),
        last_activity: Timestamp::default(),
        activity_count: 0,
        signals: Signals::default(),
        limits: Activity::default(),
        busyness: Busyness::default(),
        error: None,
        disk_bytes: 0,
        cached_bytes: None,
        lacks: Vec::new(),
        stale: None,
        grace_until: None,
        unwakeable: None,
        today: 0,
        holders: Vec::new(),
        vsock: None,
        wall: &wall,
    };
    let daemon = DaemonFacts {
        counts: State::ALL.map(|state| (state, 0)),
        memory_bytes: 0,
        memory_budget_bytes: None,
        reaper_last_tick: None,
        started: wall(Timestamp::default()),
        pid: 1,
        lacks: &[],
    };
    let tables = [
        ("status", facts.status()),
        ("activity", facts.activity()),
        ("idle", facts.idle()),
        ("dozed.status", daemon.status()),
    ];
    let text = semantics();
    let rows = rows(&text, "The tables");
    assert_eq!(rows.len(), tables.len());
    for (row, (file, table)) in rows.iter().zip(&tables) {
        assert_eq!(quoted(&row[0]), [*file]);
        assert_eq!(quoted(&row[1]), keys(table), "{file}");
    }
}

#[test]
fn each_metric_is_listed() {
    let metrics = Metrics::default();
    let (before, after) = (record(), Record { last_sleep: Some(Duration::ZERO), ..record() });
    let (process, snapshot) = (process(), snapshot());
    for step in
        [Step::Slept(snapshot), Step::Woken(process.clone()), Step::Booted(process), Step::Lost]
    {
        metrics.stepped(&step, &Cause::Idle, &before, &after);
    }
    metrics.failed("EIO");
    let text = metrics.expose(&Gauges {
        counts: State::ALL.map(|state| (state, 0)),
        memory_bytes: 0,
        memory_budget_bytes: Some(0),
        holds: 0,
        reaper_last_tick: Some(jiff::Timestamp::UNIX_EPOCH),
        started: jiff::Timestamp::UNIX_EPOCH,
    });
    let there: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let page = semantics();
    let rows = rows(&page, "Metrics");
    let listed: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    assert_eq!(listed, there);
}

fn actor() -> Actor {
    Actor { pid: Some(1), command: Some("sh".into()), uid: 0 }
}

fn event(what: What) -> Event {
    Event {
        time: jiff::Timestamp::UNIX_EPOCH,
        row: RowId(1),
        id: "web-1".parse().unwrap(),
        owner: Owner { uid: 0, gid: 0 },
        generation: 1,
        what,
        cause: Cause::Write(actor()),
    }
}

/// Returns the lines of every kind of event, each with all keys that it can have.
fn lines() -> Vec<String> {
    let stepped = What::Stepped {
        from: State::Snapshotting,
        to: State::Snapshotted,
        lasted: Duration::ZERO,
        took: Some(Duration::ZERO),
        snapshot_bytes: Some(0),
        error: Some("so".into()),
    };
    let kinds = [What::Created, stepped, What::Failed { error: "so".into() }, What::Deleted];
    let mut lines: Vec<String> = kinds.map(|what| event(what).line()).to_vec();
    let feed = ChangeFeed::default();
    let slow = feed.log().open(View::Sandbox(RowId(1)));
    let now = jiff::Timestamp::UNIX_EPOCH;
    feed.publish(&event(What::Created));
    let read = slow.read(0, 1 << 20, now).len() as u64;
    (0..5000).for_each(|_| feed.publish(&event(What::Created)));
    let gap = slow.read(read, 1 << 20, now);
    let gap = String::from_utf8(gap).unwrap();
    lines.push(gap.lines().next().unwrap().to_owned());
    lines
}

#[test]
fn each_kind_of_event_is_listed_with_its_keys() {
    let text = document("docs/events.md");
    let rows = rows(&text, "The kinds");
    let lines = lines();
    assert_eq!(rows.len(), lines.len());
    let mut all = BTreeSet::new();
    for (row, line) in rows.iter().zip(&lines) {
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).unwrap();
        assert_eq!(quoted(&row[0]), [object["event"].as_str().unwrap()]);
        let keys: BTreeSet<&str> = object.keys().map(String::as_str).collect();
        let listed = quoted(&row[2]);
        assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), keys, "{line}");
        // In the order in which the line has them.
        let places = listed.iter().map(|key| line.find(&format!("\"{key}\":")).unwrap());
        assert!(places.is_sorted(), "{line}");
        assert_eq!(object["v"], dozed::events::VERSION);
        all.extend(object.keys().cloned());
    }
    let explained = self::rows(&text, "The keys");
    let explained = explained.iter().flat_map(|row| quoted(&row[0])).map(str::to_owned);
    assert_eq!(explained.collect::<BTreeSet<_>>(), all);
}

#[test]
fn each_cause_is_listed() {
    let text = document("docs/events.md");
    let rows = rows(&text, "The causes");
    let listed: Vec<&str> = rows.iter().map(|row| quoted(&row[0])[0]).collect();
    let there = [
        Cause::Write(actor()),
        Cause::Hold(actor()),
        Cause::Mkdir(actor()),
        Cause::Rmdir(actor()),
        Cause::Packet("tcp/22 from 10.213.0.1".into()),
        Cause::Idle,
        Cause::Stale,
        Cause::GuestExit,
        Cause::Reconcile,
    ];
    assert_eq!(listed, there.each_ref().map(Cause::word));
    // A new one stops the build here.
    let (Cause::Write(_)
    | Cause::Hold(_)
    | Cause::Mkdir(_)
    | Cause::Rmdir(_)
    | Cause::Packet(_)
    | Cause::Idle
    | Cause::Stale
    | Cause::GuestExit
    | Cause::Reconcile) = &there[0];
}

fn process() -> ProcessIdentity {
    ProcessIdentity { pid: 1, boot_id: "boot".into(), pidfs_inode: None, start_ticks: 1 }
}

fn snapshot() -> SnapshotFacts {
    SnapshotFacts { generation: 1, bytes: 0, at: Timestamp::default() }
}

fn record() -> Record {
    Record {
        row: RowId(1),
        id: "web-1".parse().unwrap(),
        owner: Owner { uid: 0, gid: 0 },
        phase: Phase::Stopped,
        since: Timestamp::default(),
        created_at: Timestamp::default(),
        generation: 0,
        spec: Spec::default().into(),
        config_by: None,
        idle_after: Period::Never,
        delete_after: Period::Never,
        pinned: false,
        vmm: None,
        user: None,
        slot: None,
        sleeps: 0,
        wakes: 0,
        last_sleep: None,
        last_wake: None,
        error: None,
        retry_at: None,
        waking: Waking::default(),
    }
}

/// Returns the block of `docs/configuration.md`, which has every key.
fn example() -> String {
    let text = document("docs/configuration.md");
    let (_, block) = text.split_once("```toml\n").unwrap();
    block.split_once("```").unwrap().0.to_owned()
}

/// Reads a configuration, of which the files are looked for in `dir`.
fn load(text: &str, dir: &Path) -> Result<Config, String> {
    let file = dir.join("dozed.toml");
    fs::write(&file, text.replace("/srv/guest", dir.to_str().unwrap())).unwrap();
    Config::load(&file).map_err(|error| error.to_string())
}

/// Returns the keys that the program accepts in a table, from what it says of one that
/// it does not.
fn accepted(header: &str, dir: &Path) -> BTreeSet<String> {
    let refused = load(&format!("{header}\nno_such_key = 1\n"), dir).unwrap_err();
    let (_, keys) = refused.split_once("expected ").unwrap_or_else(|| panic!("{refused}"));
    quoted(keys).into_iter().map(str::to_owned).collect()
}

fn named(table: &toml::Table) -> BTreeSet<String> {
    table.keys().cloned().collect()
}

#[test]
fn the_configuration_page_has_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let whole: toml::Table = example().parse().unwrap();
    assert_eq!(named(&whole), accepted("", dir.path()));
    for (name, value) in &whole {
        if let Some(table) = value.as_table() {
            assert_eq!(named(table), accepted(&format!("[{name}]"), dir.path()), "{name}");
        }
    }
    let disk = whole["template"]["disks"][0].as_table().unwrap();
    assert_eq!(named(disk), accepted("[[template.disks]]", dir.path()));
}

#[test]
fn the_values_on_the_configuration_page_are_the_defaults() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "initramfs", "disk.ext4"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    for name in ["cloud-hypervisor", "qemu"] {
        std::os::unix::fs::symlink("/bin/true", dir.path().join(name)).unwrap();
    }
    let mut config = load(&example(), dir.path()).unwrap();
    // Those that the page marks as having no default.
    assert_eq!(config.template.disks.len(), 1);
    assert!(config.template.kernel.is_some() && config.template.initramfs.is_some());
    assert!(config.limits.memory_bytes.is_some());
    assert!(config.vmm.cloud_hypervisor.is_some() && config.vmm.qemu.is_some());
    config.vmm = Default::default();
    config.limits.memory_bytes = None;
    config.template.kernel = None;
    config.template.initramfs = None;
    config.template.disks.clear();
    assert_eq!(config, Config::default());
}
