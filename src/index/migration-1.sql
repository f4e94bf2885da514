CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Moments are milliseconds on the daemon's steady time line. NULL is never, or nothing.
-- AUTOINCREMENT: a number is never used again, as it names directories and inodes.
CREATE TABLE sandbox (
    row                 INTEGER PRIMARY KEY AUTOINCREMENT,
    id                  TEXT    NOT NULL UNIQUE,
    uid                 INTEGER NOT NULL,
    gid                 INTEGER NOT NULL,
    state               TEXT    NOT NULL CHECK (state IN ('stopped', 'booting', 'running',
                            'snapshotting', 'snapshotted', 'restoring', 'deleting')),
    since               INTEGER NOT NULL,
    created_at          INTEGER NOT NULL,
    generation          INTEGER NOT NULL,
    spec                TEXT    NOT NULL,  -- TOML, as `config` reads
    idle_after          INTEGER,           -- seconds
    delete_after        INTEGER,           -- seconds
    pinned              INTEGER NOT NULL CHECK (pinned IN (0, 1)),
    vmm                 TEXT,
    pid                 INTEGER,           -- with it: boot_id, start_ticks
    boot_id             TEXT,
    pidfs_inode         INTEGER,
    start_ticks         INTEGER,
    snapshot_generation INTEGER,           -- with it: snapshot_bytes, snapshotted_at
    snapshot_bytes      INTEGER,
    snapshotted_at      INTEGER,
    sleeps              INTEGER NOT NULL,
    wakes               INTEGER NOT NULL,
    last_sleep_ns       INTEGER,
    last_wake_ns        INTEGER,
    error               TEXT,
    retry_at            INTEGER,
    last_activity_at    INTEGER NOT NULL,
    sleep_at            INTEGER,           -- follows from the others, see 0001-deadline-columns.md
    delete_at           INTEGER            -- as sleep_at
) STRICT;

CREATE INDEX sandbox_by_sleep_at ON sandbox (state, sleep_at);
CREATE INDEX sandbox_by_delete_at ON sandbox (state, delete_at);
CREATE INDEX sandbox_by_owner ON sandbox (uid);
