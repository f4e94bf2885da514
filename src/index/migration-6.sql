-- A spec is written when it changes, and not with each change of state.
CREATE TABLE spec (
    row  INTEGER PRIMARY KEY REFERENCES sandbox (row) ON DELETE CASCADE,
    toml TEXT NOT NULL  -- as `config` reads
) STRICT;
INSERT INTO spec (row, toml) SELECT row, spec FROM sandbox;
ALTER TABLE sandbox DROP COLUMN spec;
