-- Who wrote the spec, `uid:gid` and then other groups; NULL where it is the template's.
ALTER TABLE sandbox ADD COLUMN config_by TEXT;
-- Until now what it names was opened as the owner.
UPDATE sandbox SET config_by = uid || ':' || gid;
-- What belongs to a row goes with it; a mode had the inode number, a row times 64 and more.
UPDATE meta SET key = 'row:' || (CAST(substr(key, 6) AS INTEGER) / 64)
        || ':mode:' || (CAST(substr(key, 6) AS INTEGER) % 64)
    WHERE key LIKE 'mode:%';
