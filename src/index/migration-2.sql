-- The user id that the VMM runs as, from the first boot on that gave it one.
ALTER TABLE sandbox ADD COLUMN vmm_uid INTEGER;

CREATE UNIQUE INDEX sandbox_by_vmm_uid ON sandbox (vmm_uid) WHERE vmm_uid IS NOT NULL;
