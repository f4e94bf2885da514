-- The number of the sandbox's address in the range, from when it first was to have one.
ALTER TABLE sandbox ADD COLUMN slot INTEGER;

CREATE UNIQUE INDEX sandbox_by_slot ON sandbox (slot) WHERE slot IS NOT NULL;
