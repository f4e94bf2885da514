//! Putting to sleep: a durable snapshot, and then nothing of it left in RAM.

use super::{
    CrashPoint, Entry, Error, Lifecycle, Outcome, Why, crash_point,
    error::{host_failed, snapshot_failed, vmm_failed},
    exits::{lose, release, why_ended},
    files::open_disks,
    memory_of,
    operate::operate_unless,
    operation::Op,
    plan::{machine_of, named},
    recover::{recover, settle},
    room::give_back_room,
    sampling::{Counted, count_known_use, count_use, pause_unless_used},
};
use crate::{
    lifecycle::Held,
    machines::{
        Live, Slot,
        balloon::{deflate, inflate},
    },
    sandbox::{Disk, Record, RowId, SnapshotFacts, State, Step},
    snapshot::{
        self, Committed, DiskFacts, HardwareFacts, HostFacts, ManifestFacts, Memory,
        SLEEP_RESERVE_BYTES, Staged, VmmFacts,
    },
    sync::{Arc, lock},
    sys::{
        cancel::Cancel,
        clock::Stopwatch,
        files::{PieceError, write_anew},
    },
    vmm::{Vmm, VmmIdentity},
};

/// How a sleep is wanted, by a look at the sandbox's activity.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// Whatever its guest does.
    InAnyCase,
    /// Unless the sandbox was used since that look, until its guest is paused.
    UnlessUsedSince(Counted),
}

/// A guest that is being put to sleep.
struct Guest {
    /// Its record of before the intent.
    record: Arc<Record>,
    live: Arc<Live>,
    /// The VMM that runs it.
    identity: Arc<VmmIdentity>,
    memory: Memory,
    slot: Slot,
}

impl Lifecycle {
    /// Makes a sandbox `snapshotted`.
    ///
    /// # Errors
    /// After an error the guest runs on, or was lost together with its VMM.
    pub fn sleep(&self, held: &Held, entry: &Arc<Entry>, why: Why) -> Result<Outcome, Error> {
        let is_skipped = |outcome: &Outcome| *outcome == Outcome::Skipped;
        operate_unless(self, held, entry, is_skipped, |op| {
            settle(self, op)?;
            let record = entry.record();
            let wanted = is_wanted(self, entry, &record, why)?;
            match record.state() {
                State::Snapshotted => Ok(Outcome::Already),
                State::Running => match wanted {
                    None => Ok(Outcome::Skipped),
                    Some(wanted) => save(self, op, why, wanted),
                },
                State::Stopped
                | State::Booting
                | State::Snapshotting
                | State::Restoring
                | State::Deleting => match record.phase.after(&Step::Sleep) {
                    Err(_) if why == Why::Idle => Ok(Outcome::Skipped),
                    Err(refused) => Err(Error::Refused(refused)),
                    Ok(_) => Err(Error::Gone { id: record.id.clone() }),
                },
            }
        })
    }

    /// Returns why a sandbox that runs could not be woken if it were put to sleep, by the last
    /// look at it.
    #[must_use]
    pub fn why_unwakeable(&self, row: RowId) -> Option<String> {
        let live = self.machines.get(row)?;
        lock(&live.unwakeable).clone()
    }
}

/// Returns how the sleep is wanted, by the activity of this moment. `None`: it is not.
fn is_wanted(
    lifecycle: &Lifecycle,
    entry: &Entry,
    record: &Record,
    why: Why,
) -> Result<Option<Wanted>, Error> {
    let runs = record.state() == State::Running;
    if why != Why::Idle && runs {
        lifecycle.activity.unless_held(entry, || Ok::<_, Error>(()))?;
    }
    match why {
        Why::Asked => Ok(Some(Wanted::InAnyCase)),
        Why::AskedAt(wanted) => {
            // What does not run is not used.
            let counted = if runs { Some(count_use(lifecycle, entry)?) } else { None };
            let count = counted.map_or_else(|| entry.activity_count(), |it| it.activity);
            if count != wanted {
                return Err(Error::Active { id: entry.id().clone(), count });
            }
            Ok(counted.map(Wanted::UnlessUsedSince))
        }
        Why::Idle if lifecycle.activity.is_held(entry.row()) => Ok(None),
        Why::Idle => {
            let before = entry.activity_count();
            let due = record.sleep_at(entry.last_activity());
            if due.is_none_or(|due| due > lifecycle.clock.now()) {
                return Ok(None);
            }
            let counted = count_known_use(lifecycle, entry).filter(|it| it.activity == before);
            Ok(counted.map(Wanted::UnlessUsedSince))
        }
    }
}

fn save<'a>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
    why: Why,
    wanted: Wanted,
) -> Result<Outcome, Error> {
    let (took, entry, record) = (Stopwatch::start(), op.entry, op.entry.record());
    let slot = lifecycle.admission.sleep(&record.id)?;
    let live =
        lifecycle.machines.get(record.row).ok_or_else(|| Error::Gone { id: record.id.clone() })?;
    let no_space = snapshot_failed(entry, "finding space for the snapshot of");
    let bytes = lock(&live.machine).save_bytes() + SLEEP_RESERVE_BYTES;
    lifecycle.store.home(&record).check_space(bytes).map_err(no_space)?;
    let vmm = lifecycle.vmms.of(&record)?;
    let memory = memory_of(vmm.as_ref(), &record);
    let identity = live.identity(vmm.as_ref()).map_err(vmm_failed(entry, "asking what runs"))?;
    let unwakeable = why_unwakeable(vmm.as_ref(), &identity);
    lock(&live.unwakeable).clone_from(&unwakeable);
    match unwakeable {
        None => {}
        Some(_) if why == Why::Idle => return Ok(Outcome::Skipped),
        Some(why) => return Err(Error::Unwakeable { id: record.id.clone(), why }),
    }

    lifecycle.records.intend(op, Step::Sleep, |_| ())?;
    crash_point(lifecycle, CrashPoint::SleepIntended);
    let guest = Guest { record, live, identity, memory, slot };
    // To the end, so that neither the sleep nor what takes it back fails for want of it.
    let connected = guest.live.connect().map_err(vmm_failed(entry, "pausing"));
    let _connected =
        connected.inspect_err(|error| end_failed_sleep(lifecycle, op, &guest.live, error))?;
    let wanted = match last_look(lifecycle, op, &guest, why, wanted) {
        Ok(Some(wanted)) => wanted,
        not_wanted => {
            deflate(&entry.record(), &guest.live);
            lifecycle.activity.restart_samples(entry.row());
            lifecycle
                .records
                .step(op.held, entry, Step::Undo, |_| ())
                .inspect_err(|_| lifecycle.unsettled.later(entry.row()))?;
            return not_wanted.map(|_| Outcome::Skipped);
        }
    };
    let committed = match save_acts(lifecycle, op, &guest, wanted) {
        Ok(committed) => committed,
        Err(cause) => {
            // Of a VMM that died there is nothing to take back; `lose` clears up after it.
            let dead = guest.live.process.exited().is_some();
            let error = if dead { cause } else { op.undo.run(cause) };
            end_failed_sleep(lifecycle, op, &guest.live, &error);
            let is_used = why == Why::Idle && matches!(error, Error::Active { .. });
            return if is_used { Ok(Outcome::Skipped) } else { Err(error) };
        }
    };
    crash_point(lifecycle, CrashPoint::SleepCommitted);
    end_sleep(lifecycle, op, &guest, &committed, &took)
}

/// Returns how the sleep is still wanted, which whoever touched the sandbox while it was
/// still seen running decides; and likewise in the seconds that its guest may take to
/// give up memory, if it is asked to. `first` is of before the intent.
fn last_look<'a>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
    guest: &Guest,
    why: Why,
    first: Wanted,
) -> Result<Option<Wanted>, Error> {
    let (entry, record) = (op.entry, &guest.record);
    if is_wanted(lifecycle, entry, record, why)?.is_none() {
        return Ok(None);
    }
    if !record.spec.inflate_before_sleep {
        // Who saw that it is about to sleep may have called it since.
        return Ok(Some(first));
    }
    let inflated = Arc::clone(&guest.live);
    op.undo.push("giving its memory back", move || {
        deflate(&entry.record(), &inflated);
        Ok(())
    });
    inflate(record, &guest.live, &op.cancel);
    crash_point(lifecycle, CrashPoint::SleepInflated);
    // In so long a time even an idle guest has traffic below the threshold.
    is_wanted(lifecycle, entry, record, why)
}

/// Does everything up to and with the commit point.
fn save_acts<'a>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
    guest: &Guest,
    wanted: Wanted,
) -> Result<Committed, Error> {
    let (entry, home) = (op.entry, lifecycle.store.home(&guest.record));
    // A file system that does not answer keeps the guest from nothing.
    let disks = disk_facts(lifecycle, entry, &op.cancel)?;

    // A pause that we did not hear the end of may have been one.
    let paused = Arc::clone(&guest.live);
    op.undo.push("resuming", move || Ok(lock(&paused.machine).resume()?));
    let pause = || lock(&guest.live.machine).pause().map_err(vmm_failed(entry, "pausing"));
    match wanted {
        Wanted::InAnyCase => pause()?,
        Wanted::UnlessUsedSince(counted) => pause_unless_used(lifecycle, entry, counted, pause)?,
    }
    guest.slot.answered();
    crash_point(lifecycle, CrashPoint::SleepPaused);

    let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
    let run = survey.live.ok_or_else(|| {
        snapshot_failed(entry, "finding the memory of")(snapshot::Error::Absent {
            dir: home.dir().to_owned(),
        })
    })?;
    let mut staged = home
        .stage(guest.record.generation + 1, guest.memory)
        .map_err(snapshot_failed(entry, "starting the snapshot of"))?;
    crash_point(lifecycle, CrashPoint::SleepStaged);
    let filled = fill(lifecycle, op, guest, run, &mut staged);
    let facts = filled.and_then(|()| manifest_facts(lifecycle, entry, &guest.identity, disks));
    // Else a power cut could leave the snapshot beside a record that says `running`.
    match facts.and_then(|facts| lifecycle.records.sync_intent(op).map(|()| facts)) {
        Ok(facts) => staged.commit(facts, &op.cancel).map_err(|error| {
            discard_later(op, *error.staged);
            snapshot_failed(entry, "committing the snapshot of")(error.source)
        }),
        Err(error) => {
            discard_later(op, staged);
            Err(error)
        }
    }
}

/// Saves the paused guest, and moves its memory into the snapshot.
fn fill(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    guest: &Guest,
    run: u64,
    staged: &mut Staged,
) -> Result<(), Error> {
    let entry = op.entry;
    if guest.memory == Memory::Mapped {
        staged.read_memory(run, &op.cancel);
    }
    prepare_disks(lifecycle, op, staged)?;
    let saved = lock(&guest.live.machine).save(&staged.dir());
    saved.map_err(vmm_failed(entry, "saving"))?;
    crash_point(lifecycle, CrashPoint::SleepSaved);
    if guest.memory == Memory::Mapped {
        let taken = staged.take_memory(run);
        taken.map_err(snapshot_failed(entry, "committing the snapshot of"))?;
    }
    Ok(())
}

/// Ends a sleep whose snapshot is committed: it is the truth now, and this guest never runs
/// again.
fn end_sleep(
    lifecycle: &Lifecycle,
    op: &Op<'_>,
    guest: &Guest,
    committed: &Committed,
    took: &Stopwatch,
) -> Result<Outcome, Error> {
    let (entry, record) = (op.entry, &guest.record);
    guest.live.process.kill();
    // It takes a moment to go; meanwhile we tidy up. What stays, the next wake removes.
    lifecycle.store.home(record).end_run().ok();
    release(lifecycle, entry).inspect_err(|_| lifecycle.unsettled.later(entry.row()))?;
    let left = give_back_room(lifecycle, record, committed.generation);
    crash_point(lifecycle, CrashPoint::SleepKilled);
    // After a power cut the record says at least `snapshotting`, and the manifest the rest.
    let snapshot = SnapshotFacts {
        generation: committed.generation,
        bytes: left.unwrap_or(committed.bytes),
        at: lifecycle.clock.now(),
    };
    let recorded =
        lifecycle.records.step_unsynced(op.held, entry, Step::Slept(snapshot), |record| {
            record.generation += 1;
            record.sleeps += 1;
            record.vmm = Some(named(&guest.identity));
            record.retry_at = None;
            record.last_sleep = Some(took.elapsed());
        });
    match recorded {
        Ok((record, _proven)) => {
            lifecycle.page_cache.drop_later(record.row, committed.generation, record.since);
            lifecycle.networks.after_sleep(entry);
        }
        Err(error) => lifecycle.unsettled.record_later(entry, "a sleep", &error),
    }
    Ok(Outcome::Done)
}

/// Has the disks of the paused machine synced by nobody who would not notice what an earlier
/// sync lost.
fn prepare_disks(lifecycle: &Lifecycle, op: &Op<'_>, staged: &Staged) -> Result<(), Error> {
    let entry = op.entry;
    if staged.follows_failed_sync() {
        let record = entry.record();
        let home = lifecycle.store.home(&record);
        tracing::warn!(id = %entry.id(), "a sync failed; all its data is written again");
        let disks = record.spec.disks.iter().enumerate().filter(|(_, disk)| !disk.readonly);
        for (number, _) in disks {
            write_anew(&home.disk(number), &op.cancel).map_err(|error| match error {
                PieceError::CalledOff(_) => Error::Gone { id: record.id.clone() },
                PieceError::Io(source) => host_failed(entry, "rewriting a disk of")(source),
            })?;
        }
    }
    staged.begin_sync().map_err(snapshot_failed(entry, "beginning to sync the files of"))
}

/// Says what disks the machine has, and how large they are.
fn disk_facts(
    lifecycle: &Lifecycle,
    entry: &Entry,
    cancel: &Cancel,
) -> Result<Vec<DiskFacts>, Error> {
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let files = open_disks(lifecycle, &record, cancel)?;
    let disk = |(number, disk): (usize, &Disk)| {
        let bytes = if disk.readonly {
            files.image(disk)?.size.bytes
        } else {
            std::fs::symlink_metadata(home.disk(number))?.len()
        };
        Ok(DiskFacts { path: disk.path.clone(), readonly: disk.readonly, bytes })
    };
    let disks: std::io::Result<_> = record.spec.disks.iter().enumerate().map(disk).collect();
    disks.map_err(host_failed(entry, "measuring the disks of"))
}

fn manifest_facts(
    lifecycle: &Lifecycle,
    entry: &Entry,
    identity: &VmmIdentity,
    disks: Vec<DiskFacts>,
) -> Result<ManifestFacts, Error> {
    let record = entry.record();
    Ok(ManifestFacts {
        id: record.id.clone(),
        created_at: lifecycle.clock.wall(lifecycle.clock.now()).to_string(),
        host: HostFacts::of_this_host().map_err(host_failed(entry, "describing the host of"))?,
        vmm: VmmFacts {
            name: identity.name.to_owned(),
            version: identity.version.clone(),
            digest: identity.digest.clone(),
            accelerator: identity.accelerator.to_owned(),
            machine: machine_of(&record.spec, identity),
            cpu: identity.cpu.clone(),
        },
        hardware: HardwareFacts {
            vcpus: record.spec.vcpus,
            memory_bytes: record.spec.memory_bytes,
            disks,
        },
    })
}

/// After a failed and undone sleep: the guest runs on, unless its VMM died.
fn end_failed_sleep(lifecycle: &Lifecycle, op: &Op<'_>, live: &Live, error: &Error) {
    let entry = op.entry;
    if lifecycle.operations.is_deleting(entry.row()) {
        return; // The next to have the lock removes it from whatever state.
    }
    let ended = match live.process.exited() {
        Some(exit) => lose(lifecycle, op.held, entry, &why_ended(lifecycle, entry, exit)),
        None if matches!(error, Error::Undo { .. }) => recover(lifecycle, op),
        None => lifecycle.records.step(op.held, entry, Step::Undo, |_| ()).map(drop),
    };
    lifecycle.activity.restart_samples(entry.row());
    if let Err(error) = ended {
        tracing::error!(id = %entry.id(), error = super::chain(&error), "ending a sleep");
        lifecycle.unsettled.later(entry.row());
    }
}

/// Has a snapshot that came to nothing discarded with the rest.
fn discard_later(op: &mut Op<'_>, staged: Staged) {
    op.undo.push("discarding the snapshot", move || Ok(staged.discard()?));
}

/// Returns why a guest that runs by `runs` could not be woken by what is installed of its
/// VMM, if that is so: a snapshot loads only into the build that saved it.
fn why_unwakeable(vmm: &dyn Vmm, runs: &VmmIdentity) -> Option<String> {
    let mended = "reinstall the former, or shut the guest down and boot it again";
    let here = match vmm.identity() {
        Ok(here) => here,
        Err(error) => {
            let (name, version) = (runs.name, &runs.version);
            let error = super::chain(&error);
            return Some(format!("its guest runs on {name} {version}, and {error}; {mended}"));
        }
    };
    let (what, then, now) = runs.difference(&here)?;
    Some(format!(
        "its guest runs on a {} with {what} `{then}`, and the installed one has `{now}`; {mended}",
        runs.name
    ))
}
