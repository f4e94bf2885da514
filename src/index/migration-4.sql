-- How it came to be awake, how often, and how long it stays so: see sandbox::Waking.
ALTER TABLE sandbox ADD COLUMN wake_cause TEXT;
ALTER TABLE sandbox ADD COLUMN wakes_day INTEGER NOT NULL DEFAULT 0;     -- from 1970, UTC
ALTER TABLE sandbox ADD COLUMN wakes_of_day INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandbox ADD COLUMN slept_idle INTEGER NOT NULL DEFAULT 0 CHECK (slept_idle IN (0, 1));
ALTER TABLE sandbox ADD COLUMN in_vain INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandbox ADD COLUMN awake_until INTEGER;
