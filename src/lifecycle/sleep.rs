//! Putting to sleep: a durable snapshot, and then nothing of it left in RAM.

use std::{cell::RefCell, rc::Rc};

use super::{
    Arrow, Entry, Error, Lifecycle, Outcome, Why,
    error::{host_failed, snapshot_failed, vmm_failed},
    memory_of,
    operation::Operation,
    sampling::Counted,
    undo::Undo,
    wake::{machine_of, named},
};
use crate::{
    index::Commit,
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

impl Lifecycle {
    /// Makes a sandbox `snapshotted`.
    ///
    /// # Errors
    /// After an error the guest runs on, or was lost together with its VMM.
    pub fn sleep(&self, held: &Held, entry: &Arc<Entry>, why: Why) -> Result<Outcome, Error> {
        let is_spared = |outcome: &Outcome| *outcome == Outcome::Spared;
        self.operate_unless(held, entry, is_spared, |operation| {
            self.settle(held, entry, operation)?;
            let record = entry.record();
            let wanted = self.is_wanted(entry, &record, why)?;
            match record.state() {
                State::Snapshotted => Ok(Outcome::Already),
                State::Running => match wanted {
                    None => Ok(Outcome::Spared),
                    Some(wanted) => self.save(held, entry, operation, why, wanted),
                },
                State::Stopped
                | State::Booting
                | State::Snapshotting
                | State::Restoring
                | State::Deleting => match record.phase.after(&Step::Sleep) {
                    Err(_) if why == Why::Idle => Ok(Outcome::Spared),
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

    /// Returns how the sleep is wanted, by the activity of this moment. `None`: it is not.
    fn is_wanted(&self, entry: &Entry, record: &Record, why: Why) -> Result<Option<Wanted>, Error> {
        let runs = record.state() == State::Running;
        if why != Why::Idle && runs {
            self.activity.unless_held(entry, || Ok::<_, Error>(()))?;
        }
        match why {
            Why::Asked => Ok(Some(Wanted::InAnyCase)),
            Why::AskedAt(wanted) => {
                // What does not run is not used.
                let counted = if runs { Some(self.count_use(entry)?) } else { None };
                let count = counted.map_or_else(|| entry.activity_count(), |it| it.activity);
                if count != wanted {
                    return Err(Error::Active { id: entry.id().clone(), count });
                }
                Ok(counted.map(Wanted::UnlessUsedSince))
            }
            Why::Idle if self.activity.is_held(entry.row()) => Ok(None),
            Why::Idle => {
                let before = entry.activity_count();
                let due = record.sleep_at(entry.last_activity());
                if due.is_none_or(|due| due > self.now()) {
                    return Ok(None);
                }
                let counted = self.count_known_use(entry).filter(|it| it.activity == before);
                Ok(counted.map(Wanted::UnlessUsedSince))
            }
        }
    }

    fn save(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
        why: Why,
        wanted: Wanted,
    ) -> Result<Outcome, Error> {
        let (took, record) = (Stopwatch::start(), entry.record());
        let slot = self.admission.sleep(&record.id)?;
        let live =
            self.machines.get(record.row).ok_or_else(|| Error::Gone { id: record.id.clone() })?;
        let no_space = snapshot_failed(entry, "finding space for the snapshot of");
        let bytes = lock(&live.machine).save_bytes() + SLEEP_RESERVE_BYTES;
        self.home(&record).check_space(bytes).map_err(no_space)?;
        let vmm = self.vmms.of(&record)?;
        let identity =
            live.identity(vmm.as_ref()).map_err(vmm_failed(entry, "asking what runs"))?;
        let unwakeable = why_unwakeable(vmm.as_ref(), &identity);
        lock(&live.unwakeable).clone_from(&unwakeable);
        match unwakeable {
            None => {}
            Some(_) if why == Why::Idle => return Ok(Outcome::Spared),
            Some(why) => return Err(Error::Unwakeable { id: record.id.clone(), why }),
        }

        // A crash after this line is found at start-up.
        let (_, intent) = self.step_unsynced(held, entry, Step::Sleep, |_| ())?;
        self.reach(Arrow::SleepIntended);
        // To the end, so that neither the sleep nor what takes it back fails for want of it.
        let failed = |error: &Error| self.end_failed_sleep(held, entry, operation, &live, error);
        let _connected =
            live.connect().map_err(vmm_failed(entry, "pausing")).inspect_err(failed)?;
        let mut undo = Undo::new();
        let (first, begun) = (wanted, (record.as_ref(), why));
        let wanted = self.last_look(entry, begun, operation, &live, first, &mut undo);
        let Ok(Some(wanted)) = wanted else {
            deflate(&entry.record(), &live);
            self.activity.restart_samples(entry.row());
            self.step(held, entry, Step::Undo, |_| ())
                .inspect_err(|_| self.settle_later(entry.row()))?;
            return wanted.map(|_| Outcome::Spared);
        };
        let begun = (intent, wanted, &slot);
        let committed = match self.save_acts(entry, operation, &live, &identity, begun, &mut undo) {
            Ok(committed) => committed,
            Err(cause) => {
                // Of a VMM that died there is nothing to take back; `lose` clears up after it.
                let dead = live.process.exited().is_some();
                let error = if dead { cause } else { undo.run(cause) };
                failed(&error);
                let is_used = why == Why::Idle && matches!(error, Error::Active { .. });
                return if is_used { Ok(Outcome::Spared) } else { Err(error) };
            }
        };
        self.reach(Arrow::SleepCommitted);

        // The snapshot is the truth now; this guest never runs again.
        live.process.kill();
        // It takes a moment to go; meanwhile we tidy up. What stays, the next wake removes.
        self.home(&record).end_life().ok();
        self.release(entry).inspect_err(|_| self.settle_later(entry.row()))?;
        let left = self.give_back_room(&record, committed.generation);
        self.reach(Arrow::SleepKilled);
        // After a power cut the record says at least `snapshotting`, and the manifest the rest.
        let snapshot = SnapshotFacts {
            generation: committed.generation,
            bytes: left.unwrap_or(committed.bytes),
            at: self.now(),
        };
        let recorded = self.step_unsynced(held, entry, Step::Slept(snapshot), |record| {
            record.generation += 1;
            record.sleeps += 1;
            record.vmm = Some(named(&identity));
            record.retry_at = None;
            record.last_sleep = Some(took.elapsed());
        });
        match recorded {
            Ok((record, _proven)) => {
                self.page_cache.drop_later(record.row, committed.generation, record.since);
                self.networks.after_sleep(entry);
            }
            Err(error) => self.record_later(entry, "a sleep", &error),
        }
        Ok(Outcome::Done)
    }

    /// Returns how the sleep is still wanted, which whoever touched the sandbox while it was
    /// still seen running decides; and likewise in the seconds that its guest may take to
    /// give up memory, if it is asked to. `record` is of before the intent, and `first` too.
    fn last_look<'a>(
        &'a self,
        entry: &'a Entry,
        (record, why): (&Record, Why),
        operation: &Operation<'_>,
        live: &Arc<Live>,
        first: Wanted,
        undo: &mut Undo<'a>,
    ) -> Result<Option<Wanted>, Error> {
        if self.is_wanted(entry, record, why)?.is_none() {
            return Ok(None);
        }
        if !record.spec.inflate_before_sleep {
            // Who saw that it is about to sleep may have called it since.
            return Ok(Some(first));
        }
        let inflated = Arc::clone(live);
        undo.push("giving its memory back", move || {
            deflate(&entry.record(), &inflated);
            Ok(())
        });
        inflate(record, live, &operation.cancel);
        self.reach(Arrow::SleepInflated);
        // In so long a time even an idle guest has traffic below the threshold.
        self.is_wanted(entry, record, why)
    }

    /// Does everything up to and with the commit point.
    fn save_acts(
        &self,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
        live: &Arc<Live>,
        identity: &VmmIdentity,
        (intent, wanted, slot): (Commit, Wanted, &Slot),
        undo: &mut Undo<'_>,
    ) -> Result<Committed, Error> {
        let record = entry.record();
        let memory = memory_of(self.vmms.of(&record)?.as_ref(), &record);
        let home = self.home(&record);
        // A file system that does not answer keeps the guest from nothing.
        let disks = self.disk_facts(entry, &operation.cancel)?;

        // A pause that we did not hear the end of may have been one.
        let paused = Arc::clone(live);
        undo.push("resuming", move || Ok(lock(&paused.machine).resume()?));
        let pause = || lock(&live.machine).pause().map_err(vmm_failed(entry, "pausing"));
        match wanted {
            Wanted::InAnyCase => pause()?,
            Wanted::UnlessUsedSince(counted) => self.pause_unless_used(entry, counted, pause)?,
        }
        slot.answered();
        self.reach(Arrow::SleepPaused);

        let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
        let life = survey.live.ok_or_else(|| {
            snapshot_failed(entry, "finding the memory of")(snapshot::Error::Absent {
                dir: home.dir().to_owned(),
            })
        })?;
        let mut staged = home
            .stage(record.generation + 1, memory)
            .map_err(snapshot_failed(entry, "beginning the snapshot of"))?;
        let dir = staged.dir();
        if memory == Memory::Mapped {
            staged.read_memory(life, &operation.cancel);
        }
        let staged = Rc::new(RefCell::new(Some(staged)));
        let discarded = Rc::clone(&staged);
        undo.push("discarding the snapshot", move || {
            discarded.borrow_mut().take().map_or(Ok(()), |staged| Ok(staged.discard()?))
        });
        self.reach(Arrow::SleepStaged);

        self.prepare_disks(entry, operation, &staged)?;
        lock(&live.machine).save(&dir).map_err(vmm_failed(entry, "saving"))?;
        self.reach(Arrow::SleepSaved);

        let facts = self.facts(entry, identity, disks)?;
        let failed = snapshot_failed(entry, "committing the snapshot of");
        let mut sealed = staged.borrow_mut().take().expect("nothing was undone so far");
        if memory == Memory::Mapped
            && let Err(error) = sealed.take_memory(life)
        {
            *staged.borrow_mut() = Some(sealed);
            return Err(failed(error));
        }
        // Else a power cut could leave the snapshot beside a record that says `running`.
        if let Err(error) = self.sync(entry, intent) {
            *staged.borrow_mut() = Some(sealed);
            return Err(error);
        }
        sealed.commit(facts, &operation.cancel).map_err(|error| {
            *staged.borrow_mut() = Some(*error.staged);
            failed(error.source)
        })
    }

    /// Has the disks of the paused machine synced by nobody who would not notice what an earlier
    /// sync lost.
    fn prepare_disks(
        &self,
        entry: &Entry,
        operation: &Operation<'_>,
        staged: &RefCell<Option<Staged>>,
    ) -> Result<(), Error> {
        let staged = staged.borrow();
        let staged = staged.as_ref().expect("nothing was undone so far");
        if staged.follows_failed_sync() {
            let record = entry.record();
            let home = self.home(&record);
            tracing::warn!(id = %entry.id(), "a sync failed: all that it has is written anew");
            let disks = record.spec.disks.iter().enumerate().filter(|(_, disk)| !disk.readonly);
            for (number, _) in disks {
                write_anew(&home.disk(number), &operation.cancel).map_err(|error| match error {
                    PieceError::CalledOff(_) => Error::Gone { id: record.id.clone() },
                    PieceError::Io(source) => host_failed(entry, "writing a disk anew of")(source),
                })?;
            }
        }
        staged.begin_sync().map_err(snapshot_failed(entry, "beginning to sync the files of"))
    }

    /// Says what disks the machine has, and how large they are.
    fn disk_facts(&self, entry: &Entry, cancel: &Cancel) -> Result<Vec<DiskFacts>, Error> {
        let record = entry.record();
        let home = self.home(&record);
        let files = self.open_disks(&record, cancel)?;
        let disk = |(number, disk): (usize, &Disk)| {
            let bytes = if disk.readonly {
                files.bytes(disk)?
            } else {
                std::fs::symlink_metadata(home.disk(number))?.len()
            };
            Ok(DiskFacts { path: disk.path.clone(), readonly: disk.readonly, bytes })
        };
        let disks: std::io::Result<_> = record.spec.disks.iter().enumerate().map(disk).collect();
        disks.map_err(host_failed(entry, "measuring the disks of"))
    }

    fn facts(
        &self,
        entry: &Entry,
        identity: &VmmIdentity,
        disks: Vec<DiskFacts>,
    ) -> Result<ManifestFacts, Error> {
        let record = entry.record();
        Ok(ManifestFacts {
            id: record.id.clone(),
            created_at: self.clock.wall(self.now()).to_string(),
            host: HostFacts::of_this_host()
                .map_err(host_failed(entry, "describing the host of"))?,
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
    fn end_failed_sleep(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
        live: &Live,
        error: &Error,
    ) {
        if self.operations.is_deleting(entry.row()) {
            return; // The next to have the lock removes it from whatever state.
        }
        let ended = match live.process.exited() {
            Some(exit) => self.lose(held, entry, &self.reason(entry, exit)),
            None if matches!(error, Error::Undo { .. }) => self.recover(held, entry, operation),
            None => self.step(held, entry, Step::Undo, |_| ()).map(drop),
        };
        self.activity.restart_samples(entry.row());
        if let Err(error) = ended {
            tracing::error!(id = %entry.id(), error = super::chain(&error), "ending a sleep");
            self.settle_later(entry.row());
        }
    }
}

/// Returns why a guest that runs by `runs` could not be woken by what is installed of its
/// VMM, if that is so: a snapshot loads only into the build that saved it.
fn why_unwakeable(vmm: &dyn Vmm, runs: &VmmIdentity) -> Option<String> {
    let mended = "put that back, or have the guest shut down and boot it again";
    let here = match vmm.identity() {
        Ok(here) => here,
        Err(error) => {
            let (name, version) = (runs.name, &runs.version);
            let error = super::chain(&error);
            return Some(format!("its guest runs by {name} {version}, and {error}; {mended}"));
        }
    };
    let (what, then, now) = runs.difference(&here)?;
    Some(format!(
        "its guest runs by a {} with {what} `{then}`, and the one installed now has `{now}`; \
         {mended}",
        runs.name
    ))
}
