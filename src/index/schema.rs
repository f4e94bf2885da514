//! The file: its settings, its migrations, and whether it is whole.
//!
//! Migrations go forward only, one transaction each. A change of the schema is a new
//! line in [`MIGRATIONS`]; lines that were released are never edited.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, config::DbConfig};

use super::Error;
use crate::sys::files;

/// What version 0, an empty file, and each later version are brought forward by.
pub(super) const MIGRATIONS: [&str; 6] = [
    include_str!("migration-1.sql"),
    include_str!("migration-2.sql"),
    include_str!("migration-3.sql"),
    include_str!("migration-4.sql"),
    include_str!("migration-5.sql"),
    include_str!("migration-6.sql"),
];

/// Marks the file as ours: `dozd` in ASCII.
const APPLICATION_ID: i64 = 0x646f_7a64;
/// How long an opening waits for another process, such as a backup, that has the file locked.
const BUSY_LIMIT: Duration = Duration::from_secs(30);
/// How long SQLite waits for it within a change, whose caller has the connection and tries
/// again. Short, since others wait for the connection.
const BUSY_STEP: Duration = Duration::from_millis(20);
/// Upper pages of four small indexes and the rows of some thousand sandboxes; in KiB.
const CACHE_KIB: i64 = 2048;
/// The room that each opening has for its counts of activity. A billion touches of
/// one sandbox between two starts of the daemon are a touch a second for thirty years.
const COUNTS_PER_OPENING: u64 = 1_000_000_000;

const CLEAN: &str = "index.clean";
const OPENINGS: &str = "index.openings";

/// Opens the file, checks it if the last one did not close it, and migrates it.
pub(super) fn open(path: &Path) -> Result<Connection, Error> {
    make(path).map_err(|source| Error::Make { path: path.to_owned(), source })?;
    let opening = || Error::sql(path, || format!("opening the index {}", path.display()));
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(opening())?;
    let version = recognise(&connection, path)?;
    if version > 0 {
        check(&connection, path)?;
    }
    configure(&connection).map_err(opening())?;
    migrate(&mut connection, version, &MIGRATIONS)
        .map_err(Error::sql(path, || format!("migrating the index {}", path.display())))?;
    Ok(connection)
}

/// Notes that the index is in use. Returns the first count of activity of this opening.
pub(super) fn mark_open(connection: &mut Connection, path: &Path) -> Result<u64, Error> {
    let mut marked = || -> rusqlite::Result<u64> {
        let transaction = connection.transaction()?;
        let before = meta(&transaction, OPENINGS)?.and_then(|text| text.parse::<u64>().ok());
        let openings = before.unwrap_or(0) + 1;
        set_meta(&transaction, OPENINGS, &openings.to_string())?;
        set_meta(&transaction, CLEAN, "no")?;
        transaction.commit()?;
        Ok(openings.saturating_mul(COUNTS_PER_OPENING))
    };
    marked().map_err(Error::sql(path, || format!("opening the index {}", path.display())))
}

/// Has each attempt to write wait but briefly for another process, from now on.
pub(super) fn wait_briefly(connection: &Connection, path: &Path) -> Result<(), Error> {
    let opening = || format!("opening the index {}", path.display());
    connection.busy_timeout(BUSY_STEP).map_err(Error::sql(path, opening))
}

/// Says whether another process has the file locked.
pub(super) fn is_locked(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(error.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
}

/// Does `work` while no other process can write.
pub(super) fn while_locked<T>(
    connection: &Connection,
    path: &Path,
    work: impl FnOnce() -> T,
) -> Result<T, Error> {
    let failed = || Error::sql(path, || format!("locking the index {}", path.display()));
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed())?;
    let done = work();
    connection.execute_batch("ROLLBACK").map_err(failed())?;
    Ok(done)
}

/// Opens a second connection, that moves the log into the file.
pub(super) fn open_for_checkpoints(path: &Path) -> Result<Connection, Error> {
    let opening = || Error::sql(path, || format!("opening the index {}", path.display()));
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(opening())?;
    let ready = || -> rusqlite::Result<()> {
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        // It opens its files now, and not when it is first needed.
        connection
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map(|_: i64| ())
    };
    ready().map_err(opening())?;
    Ok(connection)
}

/// Moves of the log what nobody reads any more into the file, beside those who write. If the
/// log is longer than so many pages after that, all of it, which they wait for: else one who
/// writes all the time would have it grow for ever.
pub(super) fn checkpoint(connection: &Connection, pages_max: i64) -> rusqlite::Result<()> {
    let run = |mode: &str| {
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        connection.query_row(&sql, [], |row| row.get::<_, i64>("log"))
    };
    if run("PASSIVE")? > pages_max {
        run("RESTART")?;
    }
    Ok(())
}

/// Notes that all is written, and brings it from the log into the file.
pub(super) fn mark_closed(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_LIMIT)?;
    set_meta(connection, CLEAN, "yes")?;
    connection.pragma_update_and_check(None, "wal_checkpoint", "TRUNCATE", |_| Ok(()))
}

pub(super) fn meta(connection: &Connection, key: &str) -> rusqlite::Result<Option<String>> {
    connection
        .prepare_cached("SELECT value FROM meta WHERE key = ?")?
        .query_row([key], |row| row.get(0))
        .optional()
}

pub(super) fn set_meta(connection: &Connection, key: &str, value: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO meta (key, value) VALUES (?, ?) \
             ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        )?
        .execute([key, value])?;
    Ok(())
}

pub(super) fn metas(
    connection: &Connection,
    prefix: &str,
) -> rusqlite::Result<Vec<(String, String)>> {
    connection
        .prepare_cached("SELECT key, value FROM meta WHERE substr(key, 1, length(?1)) = ?1")?
        .query_map([prefix], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

pub(super) fn remove_meta(connection: &Connection, key: &str) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM meta WHERE key = ?")?.execute([key])?;
    Ok(())
}

/// Says whether there is a key that [`remove_metas`] would remove.
pub(super) fn has_metas(connection: &Connection, prefix: &str) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM meta WHERE key >= ?1 AND key < ?1 || char(1114111) LIMIT 1")?
        .exists([prefix])
}

/// Removes all keys that begin with `prefix`, whose last byte is no `0xff`, as in no text.
pub(super) fn remove_metas(connection: &Connection, prefix: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM meta WHERE key >= ?1 AND key < ?1 || char(1114111)")?
        .execute([prefix])?;
    Ok(())
}

/// Makes an empty file that is its owner's alone, if there is none. SQLite gives its other
/// files the same mode.
fn make(path: &Path) -> std::io::Result<()> {
    if path.try_exists()? {
        return Ok(());
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    path.parent().map_or(Ok(()), files::sync_dir)
}

/// Returns the version of a file that is ours. It writes nothing.
fn recognise(connection: &Connection, path: &Path) -> Result<i64, Error> {
    let number = |sql: &str| {
        connection
            .query_row(sql, [], |row| row.get::<_, i64>(0))
            .map_err(Error::sql(path, || format!("reading the index {}", path.display())))
    };
    // Whoever refuses a file does not move its log into it on the way out either.
    connection
        .busy_timeout(BUSY_LIMIT)
        .and_then(|()| connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true))
        .map_err(Error::sql(path, || format!("opening the index {}", path.display())))?;
    let version = number("PRAGMA user_version")?;
    let is_empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    let is_ours = number("PRAGMA application_id")? == APPLICATION_ID;
    let known = i64::try_from(MIGRATIONS.len()).expect("there are few");
    match version {
        0 if is_empty => Ok(0),
        _ if !is_ours => Err(Error::Foreign { path: path.to_owned() }),
        found if found > known => Err(Error::Newer { path: path.to_owned(), found, known }),
        found => Ok(found),
    }
}

/// Has SQLite look at every page, unless the index was closed in order.
fn check(connection: &Connection, path: &Path) -> Result<(), Error> {
    let reading = || Error::sql(path, || format!("checking the index {}", path.display()));
    if meta(connection, CLEAN).map_err(reading())?.as_deref() == Some("yes") {
        return Ok(());
    }
    let verdict: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(reading())?;
    if verdict == "ok" {
        return Ok(());
    }
    Err(Error::Damaged { path: path.to_owned(), why: verdict })
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // The log is synced before it is moved into the file, and otherwise as `log` says.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    // See `checkpoint`.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)
}

pub(super) fn migrate(
    connection: &mut Connection,
    version: i64,
    migrations: &[&str],
) -> rusqlite::Result<()> {
    for (next, migration) in (1..).zip(migrations) {
        if next <= version {
            continue;
        }
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", next)?;
        transaction.commit()?;
    }
    Ok(())
}
