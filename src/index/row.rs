//! A record as the columns of a row, and back.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use rusqlite::{Connection, Row, params_from_iter, types::FromSql, types::Value};

use super::{Error, spec::Specs};
use crate::sandbox::{
    Mismatched, Owner, Period, Phase, ProcessIdentity, Record, RowId, SandboxId, SnapshotFacts,
    Spec, State, Timestamp, Waking, Writer,
};

/// The columns that change, in the order in which [`values`] and [`read`] have them. The spec
/// is in a table of its own.
const COLUMNS: [&str; 35] = [
    "uid",
    "gid",
    "state",
    "since",
    "created_at",
    "generation",
    "idle_after",
    "delete_after",
    "pinned",
    "vmm",
    "vmm_uid",
    "slot",
    "pid",
    "boot_id",
    "pidfs_inode",
    "start_ticks",
    "snapshot_generation",
    "snapshot_bytes",
    "snapshotted_at",
    "sleeps",
    "wakes",
    "last_sleep_ns",
    "last_wake_ns",
    "error",
    "retry_at",
    "wake_cause",
    "wakes_day",
    "wakes_of_day",
    "slept_idle",
    "in_vain",
    "awake_until",
    "config_by",
    "last_activity_at",
    "sleep_at",
    "delete_at",
];

/// Inserts a record, whose `row` does not matter, and returns the row it was given.
pub(super) fn insert(
    connection: &Connection,
    record: &Record,
    last_activity: Timestamp,
) -> rusqlite::Result<RowId> {
    let columns = COLUMNS.join(", ");
    let places = ", ?".repeat(COLUMNS.len());
    let id = Value::from(record.id.to_string());
    let transaction = connection.unchecked_transaction()?;
    let row = transaction
        .prepare_cached(&format!("INSERT INTO sandbox (id, {columns}) VALUES (?{places})"))?
        .insert(params_from_iter([id].into_iter().chain(values(record, last_activity))))
        .map(|row| RowId(row.cast_unsigned()))?;
    write_spec(&transaction, row, &record.spec)?;
    transaction.commit()?;
    Ok(row)
}

/// Inserts a record that was deleted, with the row that it had. Returns true.
pub(super) fn put_back(
    connection: &Connection,
    record: &Record,
    last_activity: Timestamp,
) -> rusqlite::Result<bool> {
    let columns = COLUMNS.join(", ");
    let places = ", ?".repeat(COLUMNS.len());
    let known = [unsigned(record.row.0), Value::from(record.id.to_string())];
    let transaction = connection.unchecked_transaction()?;
    transaction
        .prepare_cached(&format!("INSERT INTO sandbox (row, id, {columns}) VALUES (?, ?{places})"))?
        .execute(params_from_iter(known.into_iter().chain(values(record, last_activity))))?;
    write_spec(&transaction, record.row, &record.spec)?;
    transaction.commit()?;
    Ok(true)
}

/// Replaces the record `old` by `new`, whose specs are one where they are equal. Returns false,
/// and has done nothing, where the row has another name, owner or state than `old`.
pub(super) fn update(
    connection: &Connection,
    old: &Record,
    new: &Record,
    last_activity: Timestamp,
) -> rusqlite::Result<bool> {
    let update = |connection: &Connection| {
        let columns = COLUMNS.join(" = ?, ");
        connection
            .prepare_cached(&format!("UPDATE sandbox SET {columns} = ? WHERE {GUARD}"))?
            .execute(params_from_iter(values(new, last_activity).into_iter().chain(guard(old))))
            .map(|changed| changed == 1)
    };
    if Arc::ptr_eq(&old.spec, &new.spec) {
        return update(connection);
    }
    let transaction = connection.unchecked_transaction()?;
    let changed = update(&transaction)?;
    if changed {
        write_spec(&transaction, new.row, &new.spec)?;
    }
    transaction.commit()?;
    Ok(changed)
}

fn write_spec(connection: &Connection, row: RowId, spec: &Spec) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO spec (row, toml) VALUES (?, ?) \
             ON CONFLICT (row) DO UPDATE SET toml = excluded.toml",
        )?
        .execute((row.0.cast_signed(), spec.to_toml()))?;
    Ok(())
}

/// Deletes the row of a record, and with it its spec, under the same conditions as [`update`].
pub(super) fn delete(connection: &Connection, record: &Record) -> rusqlite::Result<bool> {
    let changed = connection
        .prepare_cached(&format!("DELETE FROM sandbox WHERE {GUARD}"))?
        .execute(params_from_iter(guard(record)))?;
    Ok(changed == 1)
}

/// Writes an activity, and the deadline that follows from it.
pub(super) fn update_activity(
    connection: &Connection,
    record: &Record,
    last_activity: Timestamp,
) -> rusqlite::Result<()> {
    let sleep_at = record.sleep_at(last_activity);
    connection
        .prepare_cached("UPDATE sandbox SET last_activity_at = ?, sleep_at = ? WHERE row = ?")?
        .execute((
            last_activity.as_millis(),
            sleep_at.map(Timestamp::as_millis),
            record.row.0.cast_signed(),
        ))?;
    Ok(())
}

/// A row of which no record can be made. It stays in the file as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MalformedRow {
    /// Its number.
    pub row: RowId,
    /// Its name, if that can be read.
    pub id: Option<SandboxId>,
    /// The user id that it has, if that can be read.
    pub user: Option<u32>,
    /// The slot that it has, if that can be read.
    pub slot: Option<u32>,
    /// What is wrong with it.
    pub why: String,
}

impl MalformedRow {
    fn of(row: &Row<'_>, why: String) -> Self {
        let number = row.get::<_, i64>("row").unwrap_or_default();
        let name = row.get::<_, String>("id").ok();
        Self {
            row: RowId(number.cast_unsigned()),
            id: name.and_then(|name| name.parse().ok()),
            user: row.get("vmm_uid").ok().flatten(),
            slot: row.get("slot").ok().flatten(),
            why,
        }
    }
}

/// Hands over every row by ascending number: as a record with its last activity, or as one
/// that is malformed.
pub(super) fn load(
    connection: &Connection,
    path: &Path,
    specs: &Specs,
    mut each: impl FnMut(Result<(Record, Timestamp), MalformedRow>),
) -> Result<(), Error> {
    let reading = || Error::sql(path, || format!("reading the index {}", path.display()));
    // Most rows have the same text, and to parse it takes longer than all the rest.
    let mut parsed: HashMap<String, Arc<Spec>> = HashMap::new();
    let columns = COLUMNS.join(", ");
    let mut statement = connection
        .prepare(&format!(
            "SELECT sandbox.row AS row, id, toml, {columns} \
             FROM sandbox LEFT JOIN spec ON spec.row = sandbox.row ORDER BY sandbox.row"
        ))
        .map_err(reading())?;
    let mut rows = statement.query([]).map_err(reading())?;
    while let Some(row) = rows.next().map_err(reading())? {
        let spec = |text: Option<String>| -> Result<Arc<Spec>, String> {
            let text = text.ok_or("it has no spec")?;
            if let Some(spec) = parsed.get(&text) {
                return Ok(Arc::clone(spec));
            }
            let spec = Spec::parse(&text, &Spec::default(), &|_, _| None)
                .map_err(|error| format!("its spec: {error}"))?;
            let spec = specs.intern(Arc::new(spec));
            parsed.insert(text, Arc::clone(&spec));
            Ok(spec)
        };
        each(read(row, spec).map_err(|Malformation(why)| MalformedRow::of(row, why)));
    }
    Ok(())
}

/// What a row has to be for [`update`] and [`delete`] to touch it.
const GUARD: &str = "row = ? AND id = ? AND uid = ? AND state = ?";

fn guard(record: &Record) -> [Value; 4] {
    [
        unsigned(record.row.0),
        record.id.to_string().into(),
        record.owner.uid.into(),
        record.state().word().to_owned().into(),
    ]
}

fn values(record: &Record, last_activity: Timestamp) -> [Value; COLUMNS.len()] {
    let process = record.process();
    let snapshot = record.snapshot();
    [
        record.owner.uid.into(),
        record.owner.gid.into(),
        record.state().word().to_owned().into(),
        moment(record.since),
        moment(record.created_at),
        unsigned(record.generation),
        seconds(record.idle_after),
        seconds(record.delete_after),
        record.pinned.into(),
        text(record.vmm.as_deref()),
        record.user.into(),
        record.slot.into(),
        process.map(|process| process.pid).into(),
        text(process.map(|process| &*process.boot_id)),
        process.and_then(|process| process.pidfs_inode).map(unsigned).into(),
        process.map(|process| unsigned(process.start_ticks)).into(),
        snapshot.map(|snapshot| unsigned(snapshot.generation)).into(),
        snapshot.map(|snapshot| unsigned(snapshot.bytes)).into(),
        snapshot.map(|snapshot| moment(snapshot.at)).into(),
        unsigned(record.sleeps),
        unsigned(record.wakes),
        record.last_sleep.map(nanos).into(),
        record.last_wake.map(nanos).into(),
        text(record.error.as_deref()),
        record.retry_at.map(moment).into(),
        text(record.waking.cause.as_deref()),
        record.waking.day.into(),
        record.waking.of_day.into(),
        record.waking.slept_idle.into(),
        record.waking.in_vain.into(),
        record.waking.awake_until.map(moment).into(),
        record.config_by.as_ref().map(|writer| writer.to_string()).into(),
        moment(last_activity),
        record.sleep_at(last_activity).map(moment).into(),
        record.delete_at().map(moment).into(),
    ]
}

/// Why a row is malformed.
struct Malformation(String);

impl From<rusqlite::Error> for Malformation {
    fn from(error: rusqlite::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<Mismatched> for Malformation {
    fn from(error: Mismatched) -> Self {
        Self(error.to_string())
    }
}

impl From<String> for Malformation {
    fn from(why: String) -> Self {
        Self(why)
    }
}

/// The columns of a row, one after the other.
struct Columns<'a> {
    row: &'a Row<'a>,
    next: usize,
}

impl Columns<'_> {
    fn next<T: FromSql>(&mut self) -> rusqlite::Result<T> {
        self.next += 1;
        self.row.get(self.next - 1)
    }

    fn number(&mut self) -> rusqlite::Result<u64> {
        Ok(self.next::<i64>()?.cast_unsigned())
    }

    fn number_or_none(&mut self) -> rusqlite::Result<Option<u64>> {
        Ok(self.next::<Option<i64>>()?.map(i64::cast_unsigned))
    }

    fn moment(&mut self) -> rusqlite::Result<Timestamp> {
        self.next().map(Timestamp::from_millis)
    }

    fn moment_or_none(&mut self) -> rusqlite::Result<Option<Timestamp>> {
        Ok(self.next::<Option<i64>>()?.map(Timestamp::from_millis))
    }

    fn period(&mut self) -> rusqlite::Result<Period> {
        let seconds = self.number_or_none()?;
        Ok(seconds.map_or(Period::Never, |seconds| Period::After(Duration::from_secs(seconds))))
    }
}

fn read(
    row: &Row<'_>,
    spec: impl FnOnce(Option<String>) -> Result<Arc<Spec>, String>,
) -> Result<(Record, Timestamp), Malformation> {
    let mut columns = Columns { row, next: 0 };
    let c = &mut columns;
    let (row, id) = (RowId(c.number()?), id(&c.next::<String>()?)?);
    let spec = spec(c.next()?)?;
    let owner = Owner { uid: c.next()?, gid: c.next()? };
    let state = state(&c.next::<String>()?)?;
    // The fields stand in the order of the columns, as that is the order of evaluation.
    let record = Record {
        row,
        id,
        owner,
        since: c.moment()?,
        created_at: c.moment()?,
        generation: c.number()?,
        spec,
        idle_after: c.period()?,
        delete_after: c.period()?,
        pinned: c.next()?,
        vmm: c.next()?,
        user: c.next()?,
        slot: c.next()?,
        phase: Phase::of(state, process(c)?, snapshot(c)?)?,
        sleeps: c.number()?,
        wakes: c.number()?,
        last_sleep: c.number_or_none()?.map(Duration::from_nanos),
        last_wake: c.number_or_none()?.map(Duration::from_nanos),
        error: c.next()?,
        retry_at: c.moment_or_none()?,
        waking: Waking {
            cause: c.next()?,
            day: c.next()?,
            of_day: c.next()?,
            slept_idle: c.next()?,
            in_vain: c.next()?,
            awake_until: c.moment_or_none()?,
        },
        config_by: c.next::<Option<String>>()?.map(|text| writer(&text)).transpose()?,
    };
    Ok((record, c.moment()?))
}

fn writer(text: &str) -> Result<Arc<Writer>, String> {
    text.parse().map(Arc::new).map_err(|error| format!("`{text}` wrote no config: {error}"))
}

fn id(text: &str) -> Result<SandboxId, String> {
    text.parse().map_err(|error| format!("`{text}`: {error}"))
}

fn state(word: &str) -> Result<State, String> {
    State::from_word(word).ok_or_else(|| format!("`{word}` is not a state"))
}

fn process(c: &mut Columns<'_>) -> Result<Option<ProcessIdentity>, Malformation> {
    let (pid, boot_id) = (c.next::<Option<u32>>()?, c.next()?);
    let (pidfs_inode, start_ticks) = (c.number_or_none()?, c.number_or_none()?);
    match (pid, boot_id, start_ticks) {
        (None, None, None) => Ok(None),
        (Some(pid), Some(boot_id), Some(start_ticks)) => {
            Ok(Some(ProcessIdentity { pid, boot_id, pidfs_inode, start_ticks }))
        }
        _ => Err("half a process".to_owned().into()),
    }
}

fn snapshot(c: &mut Columns<'_>) -> Result<Option<SnapshotFacts>, Malformation> {
    let (generation, bytes) = (c.number_or_none()?, c.number_or_none()?);
    let at = c.moment_or_none()?;
    match (generation, bytes, at) {
        (None, None, None) => Ok(None),
        (Some(generation), Some(bytes), Some(at)) => {
            Ok(Some(SnapshotFacts { generation, bytes, at }))
        }
        _ => Err("half a snapshot".to_owned().into()),
    }
}

/// SQLite's integers are signed; the bits are ours.
fn unsigned(number: u64) -> Value {
    number.cast_signed().into()
}

fn moment(at: Timestamp) -> Value {
    at.as_millis().into()
}

fn seconds(period: Period) -> Value {
    period.duration().map(|duration| unsigned(duration.as_secs())).into()
}

fn nanos(duration: Duration) -> Value {
    // Three centuries fit.
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX).into()
}

fn text(text: Option<&str>) -> Value {
    text.map(str::to_owned).into()
}
