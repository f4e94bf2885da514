//! Waking: a restore from a snapshot, or a boot.

use std::{path::Path, thread};

use super::{
    Arrow, Entry, Error, Lifecycle, Outcome, Signal,
    disks::take_back_disks,
    error::{host_failed, snapshot_failed, vmm_failed},
    files::Files,
    images::check_formats,
    memory_of,
    operation::Operation,
    undo::Undo,
};
use crate::{
    lifecycle::Held,
    machines::{Live, balloon::deflate, end},
    sandbox::{NetMode, ProcessIdentity, Record, Spec, State, Step},
    snapshot::{self, Memory, Snapshot},
    sync::{Arc, lock},
    sys::{
        cancel::Cancel,
        clock::Stopwatch,
        files::{let_through, make_private_dir},
    },
    vmm::{Machine, Plan, PlannedDisk, PlannedNic, PlannedVsock, Vmm, VmmIdentity},
};

impl Lifecycle {
    /// Makes a sandbox `running`: by a restore if it sleeps, by a boot if it is stopped.
    ///
    /// # Errors
    /// After an error it is in the state that it was found in, or `stopped` where the
    /// guest ran and was lost.
    pub fn wake(&self, held: &Held, entry: &Arc<Entry>) -> Result<Outcome, Error> {
        self.operate(held, entry, |operation| {
            self.settle(held, entry, operation)?;
            match entry.record().state() {
                State::Running => {
                    self.activity.saw(entry, Signal::Control);
                    Ok(Outcome::Already)
                }
                State::Snapshotted => self
                    .restore(held, entry, operation)
                    .inspect_err(|_| self.networks.refuse_packets(entry))
                    .map(|()| Outcome::Done),
                State::Stopped => self.boot(held, entry, operation).map(|()| Outcome::Done),
                State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                    Err(entry
                        .record()
                        .phase
                        .after(&Step::Wake)
                        .map_or_else(Error::Refused, |_| Error::Gone { id: entry.id().clone() }))
                }
            }
        })
    }

    fn restore(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
    ) -> Result<(), Error> {
        let took = Stopwatch::start();
        let record = entry.record();
        let _slot = self.admission.wake(&record.id)?;
        let (memory, process) = self.start(held, entry, operation, |undo, intended| {
            self.restore_acts(held, entry, operation, undo, intended)
        })?;
        self.activity.saw(entry, Signal::Wake);
        // After a power cut the record says at least `restoring`, and the guest is lost
        // either way.
        let recorded = self.step_unsynced(held, entry, Step::Woken(process), |record| {
            record.generation += 1;
            record.wakes += 1;
            record.retry_at = None;
            record.last_wake = Some(took.elapsed());
        });
        if let Err(error) = recorded {
            self.record_later(entry, "a wake", &error);
        }
        self.drop_copy_later(&record, memory);
        Ok(())
    }

    /// Does the acts of a restore or a boot, within the budget, and takes them back if they fail.
    /// They say whether they have recorded their intent.
    fn start<'a, T>(
        &'a self,
        held: &Held,
        entry: &'a Arc<Entry>,
        operation: &Operation<'_>,
        acts: impl FnOnce(&mut Undo<'a>, &mut bool) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let record = entry.record();
        self.admission.book(record.row, &record.id, record.spec.memory_bytes)?;
        let mut undo = Undo::new();
        undo.push("giving back its memory", || {
            self.admission.give_back(entry.row());
            Ok(())
        });
        let mut intended = false;
        acts(&mut undo, &mut intended).map_err(|cause| {
            if matches!(cause, Error::Unanswered { .. }) {
                self.settle_later(entry.row());
                return cause;
            }
            let error = undo.run(cause);
            if intended {
                self.end_failed(held, entry, operation, &error);
            }
            error
        })
    }

    /// Does everything up to and with `resume`.
    fn restore_acts<'a>(
        &'a self,
        held: &Held,
        entry: &'a Arc<Entry>,
        operation: &'a Operation<'_>,
        undo: &mut Undo<'a>,
        intended: &mut bool,
    ) -> Result<(Memory, ProcessIdentity), Error> {
        let record = entry.record();
        let home = self.home(&record);
        let failed = snapshot_failed(entry, "opening the snapshot of");
        let facts = record
            .snapshot()
            .ok_or_else(|| failed(snapshot::Error::Absent { dir: home.dir().to_owned() }))?;
        let snapshot = home.open(&record.id, facts.generation).map_err(failed)?;
        let made = &snapshot.manifest().vmm;
        let vmm = self.vmms.that_made(&record, &made.name, &made.version)?;
        let identity = vmm.identity().map_err(vmm_failed(entry, "asking what would wake"))?;
        self.check_origin(&record, &snapshot, &identity)?;
        let memory = memory_of(vmm.as_ref(), &record);
        self.check_room(entry, memory, facts.bytes)?;
        self.give_user(held, entry, vmm.as_ref())?;
        self.vmms.check_fit(vmm.as_ref(), &entry.record())?;
        let files = self.open_to_wake(&record, &operation.cancel)?;

        // A crash after this line is found at start-up.
        let (_, intent) = self
            .step_unsynced(held, entry, Step::Wake, |record| record.vmm = Some(named(&identity)))?;
        *intended = true;
        self.reach(Arrow::WakeIntended);

        if memory == Memory::Mapped {
            undo.push("giving back its room", move || {
                let dir = self.home(&record).snapshot_dir(facts.generation);
                if dir.exists() {
                    self.give_back_room(&record, facts.generation);
                }
                Ok(())
            });
            snapshot
                .take_room()
                .map_err(snapshot_failed(entry, "taking space for the memory of"))?;
        }

        let nic = self.networks.connect(held, entry, undo)?;
        self.reach(Arrow::WakeConnected);

        // Also where the VMM does not start there are its sockets.
        undo.push("ending the VMM", move || Ok(self.end_machine(entry)?));
        let plan = self.plan(&entry.record(), &snapshot.dir(), &files, nic, &operation.cancel)?;
        let machine = self.load(entry, vmm.as_ref(), &plan, &snapshot)?;
        let live = self.enter(entry, machine)?;
        self.reach(Arrow::WakeRestored);

        let process = live.process.identity().clone();
        // No process outlasts a power cut.
        let (_, _moot) =
            self.amend_unsynced(held, entry, |record| record.phase.set_process(process.clone()))?;
        self.reach(Arrow::WakeRecorded);

        let _connected = live.connect().map_err(vmm_failed(entry, "reaching"))?;
        // Else a power cut could leave a record that says `snapshotted`, and no snapshot.
        self.sync(entry, intent)?;
        // The commit point. From here on the snapshot is no longer the truth; it can
        // be again only while the guest has provably not run.
        snapshot.consume().map_err(snapshot_failed(entry, "consuming the snapshot of"))?;
        let woken = Arc::clone(&live);
        undo.push("taking the snapshot back", move || {
            // What has not run by now must not begin to.
            end(entry.id(), &woken.process)?;
            let ran = memory == Memory::Copied && !lock(&woken.machine).never_ran();
            if ran {
                return Err(Error::MayHaveRun { id: entry.id().clone() }.into());
            }
            Ok(self.unconsume(entry, facts.generation, &operation.cancel)?)
        });
        self.reach(Arrow::WakeConsumed);

        self.networks.deliver(entry)?;
        self.let_run(entry, &live, memory, facts.generation)?;
        deflate(&entry.record(), &live);
        self.reach(Arrow::WakeResumed);
        Ok((memory, process))
    }

    /// Loads the machine, while its memory is checked beside it.
    fn load(
        &self,
        entry: &Entry,
        vmm: &dyn Vmm,
        plan: &Plan,
        snapshot: &Snapshot,
    ) -> Result<Box<dyn Machine>, Error> {
        let cancel = &plan.cancel;
        let damaged = snapshot_failed(entry, "checking the memory of");
        thread::scope(|scope| {
            let check = self
                .settings
                .verify_memory
                .then(|| {
                    thread::Builder::new()
                        .name("dozed-check".to_owned())
                        .spawn_scoped(scope, || snapshot.check_memory(cancel))
                })
                .transpose()
                .map_err(host_failed(entry, "starting to check the memory of"))?;
            let machine = vmm.restore(plan, &snapshot.dir());
            let checked = check.map_or(Ok(()), |check| {
                check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            let machine = machine.map_err(vmm_failed(entry, "restoring"))?;
            if let Err(error) = checked {
                end(entry.id(), machine.process())?;
                return Err(damaged(error));
            }
            Ok(machine)
        })
    }

    /// Refuses a snapshot that another VMM made, or the same one at another version.
    fn check_origin(
        &self,
        record: &Record,
        snapshot: &Snapshot,
        here: &VmmIdentity,
    ) -> Result<(), Error> {
        let made = &snapshot.manifest().vmm;
        let machine = machine_of(&record.spec, here);
        let differs = [
            ("VMM", made.name.as_str(), here.name),
            ("version", &made.version, &here.version),
            ("accelerator", &made.accelerator, here.accelerator),
            ("machine", &made.machine, &machine),
            ("CPU", &made.cpu, &here.cpu),
            ("program digest", &made.digest, &here.digest),
        ]
        .into_iter()
        .find(|(_, then, now)| then != now);
        match differs {
            None => Ok(()),
            Some((what, then, now)) => Err(Error::Foreign {
                id: record.id.clone(),
                why: format!(
                    "it was made with {what} `{then}` and here it is `{now}`; put back what \
                     made it ({} {}), or delete the sandbox",
                    made.name, made.version
                ),
            }),
        }
    }

    fn boot(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
    ) -> Result<(), Error> {
        if entry.record().spec.kernel.is_none() {
            return Err(Error::NoKernel { id: entry.id().clone() });
        }
        let process = self.start(held, entry, operation, |undo, intended| {
            self.boot_acts(held, entry, operation, undo, intended)
        })?;
        self.activity.saw(entry, Signal::Boot);
        let recorded =
            self.step(held, entry, Step::Booted(process), |record| record.retry_at = None);
        if let Err(error) = recorded {
            self.record_later(entry, "a boot", &error);
        }
        Ok(())
    }

    fn boot_acts<'a>(
        &'a self,
        held: &Held,
        entry: &'a Arc<Entry>,
        operation: &Operation<'_>,
        undo: &mut Undo<'a>,
        intended: &mut bool,
    ) -> Result<ProcessIdentity, Error> {
        self.check_nothing_sleeps(entry)?;
        let record = entry.record();
        let home = self.home(&record);
        let vmm = self.vmms.to_boot(&record)?;
        let identity = vmm.identity().map_err(vmm_failed(entry, "asking what would boot"))?;
        let memory = memory_of(vmm.as_ref(), &record);
        self.give_user(held, entry, vmm.as_ref())?;
        self.vmms.check_fit(vmm.as_ref(), &entry.record())?;
        take_back_disks(&home, &record).map_err(host_failed(entry, "taking back a disk of"))?;
        let files = self.open_to_boot(&record, &home, &operation.cancel)?;
        check_formats(&record, &home, &files)?;

        // A crash after this line is found at start-up.
        self.step(held, entry, Step::Boot, |record| record.vmm = Some(named(&identity)))?;
        *intended = true;
        self.reach(Arrow::BootIntended);

        home.create().map_err(snapshot_failed(entry, "making the directory of"))?;
        self.check_room(entry, memory, 0)?;
        let life = home
            .begin_life(record.generation, memory, record.spec.memory_bytes)
            .map_err(snapshot_failed(entry, "making the memory of"))?;
        undo.push("removing its memory", move || Ok(self.home(&entry.record()).end_life()?));
        let may_have_run = self.make_disks(entry, &files, operation, undo)?;
        let _slot = self.admission.wake(&record.id)?;

        let nic = self.networks.connect(held, entry, undo)?;
        self.reach(Arrow::BootConnected);

        // Also where the VMM does not start there are its sockets.
        undo.push("ending the VMM", move || Ok(self.end_machine(entry)?));
        let plan = self.plan(&entry.record(), &life, &files, nic, &operation.cancel)?;
        let machine = vmm.boot(&plan).map_err(vmm_failed(entry, "booting"))?;
        let live = self.enter(entry, machine)?;
        self.reach(Arrow::BootSpawned);

        let process = live.process.identity().clone();
        self.amend(held, entry, |record| record.phase.set_process(process.clone()))?;
        self.reach(Arrow::BootRecorded);

        let _connected = live.connect().map_err(vmm_failed(entry, "reaching"))?;
        may_have_run.set(true);
        lock(&live.machine).resume().map_err(vmm_failed(entry, "starting"))?;
        self.reach(Arrow::BootResumed);
        Ok(process)
    }

    /// Gives a sandbox its user id, if its VMM is to run as one and it has none yet. It keeps
    /// it until it is deleted.
    fn give_user(&self, held: &Held, entry: &Entry, vmm: &dyn Vmm) -> Result<(), Error> {
        let Some(users) = self.settings.users.filter(|_| vmm.takes_user()) else {
            return Ok(());
        };
        let given = self
            .index
            .give_user(held, entry, users)
            .map_err(|source| Error::Index { id: entry.id().clone(), source })?;
        given.map(drop).ok_or_else(|| Error::NoUser { id: entry.id().clone(), users })
    }

    /// Says everything that a driver has to know; `life` is the directory of its memory, and
    /// `nic` its network device, where one is to be opened.
    pub(super) fn plan(
        &self,
        record: &Record,
        life: &Path,
        files: &Files,
        nic: Option<PlannedNic>,
        cancel: &Arc<Cancel>,
    ) -> Result<Plan, Error> {
        let home = self.home(record);
        let runtime_dir = self.runtime_dir(record.row);
        let mut made = make_private_dir(&runtime_dir);
        if record.spec.vsock {
            // Its owner has to get there; the rest of the way is the driver's to open.
            made = made.and_then(|()| let_through(&self.settings.runtime));
        }
        made.map_err(|source| Error::Host {
            doing: "making the directory for the sockets of",
            id: record.id.clone(),
            source,
        })?;
        let disks = record.spec.disks.iter().enumerate().map(|(number, disk)| PlannedDisk {
            path: if disk.readonly { files.disk(disk) } else { home.disk(number) },
            readonly: disk.readonly,
        });
        Ok(Plan {
            id: record.id.clone(),
            token: self.token(record.row),
            user: self.vmms.user_of(record),
            vcpus: record.spec.vcpus,
            memory_bytes: record.spec.memory_bytes,
            memory_mode: record.spec.memory_mode,
            restore_mode: record.spec.restore_mode,
            kernel: record.spec.kernel.as_deref().and_then(|path| files.path(path)),
            initramfs: record.spec.initramfs.as_deref().and_then(|path| files.path(path)),
            cmdline: record.spec.cmdline.clone(),
            disks: disks.collect(),
            balloon: record.spec.balloon,
            vsock: record.spec.vsock.then(|| PlannedVsock::new(&runtime_dir, record.owner)),
            nic,
            memory: life.join(snapshot::MEMORY),
            runtime_dir,
            console_log: home.console_log(),
            vmm_log: home.vmm_log(),
            held: files.held(),
            cancel: Arc::clone(cancel),
        })
    }

    pub(super) fn enter(
        &self,
        entry: &Entry,
        machine: Box<dyn Machine>,
    ) -> Result<Arc<Live>, Error> {
        self.activity.guest_starts(entry.row());
        let added = self.machines.add(entry.row(), machine);
        added.map_err(host_failed(entry, "watching the VMM of"))
    }

    /// Ends the VMM, and gives back what only it needed.
    fn end_machine(&self, entry: &Entry) -> Result<(), Error> {
        self.release(entry)
    }

    /// Has what a guest was woken from removed, where it is a copy: the VMM has the memory,
    /// and the guest runs. It may be many GiB, so the wake does not wait for it.
    ///
    /// `record` is of before the wake.
    pub(super) fn drop_copy_later(&self, record: &Record, memory: Memory) {
        let Some(facts) = record.snapshot().filter(|_| memory == Memory::Copied) else {
            return;
        };
        let (home, id) = (self.home(record), record.id.clone());
        let dropping = self.pool.run(move || {
            if let Err(error) = home.drop_copy(facts.generation) {
                tracing::warn!(%id, error = super::chain(&error), "dropping a used snapshot");
            }
        });
        if dropping.is_err() {
            tracing::debug!(id = %record.id, "a used snapshot stays until the next sleep");
        }
    }

    /// Makes a consumed snapshot the truth again, if its guest has provably not run: one that
    /// executes anything changes memory that is mapped. Of copied memory the VMM says it.
    fn unconsume(&self, entry: &Entry, generation: u64, cancel: &Cancel) -> Result<(), Error> {
        let home = self.home(&entry.record());
        let failed = snapshot_failed(entry, "taking back the snapshot of");
        home.unconsume(entry.id(), generation, cancel).map_err(failed)
    }

    /// After a failed and undone wake or boot: takes the intent back too. Where undoing
    /// failed, the rules of `reconcile` say what is left.
    pub(super) fn end_failed(
        &self,
        held: &Held,
        entry: &Arc<Entry>,
        operation: &Operation<'_>,
        error: &Error,
    ) {
        if self.operations.is_deleting(entry.row()) {
            return; // The next to have the lock removes it from whatever state.
        }
        let ended = if matches!(error, Error::Undo { .. }) {
            self.recover(held, entry, operation)
        } else {
            self.step(held, entry, Step::Undo, |_| ()).map(|_| self.networks.after_sleep(entry))
        };
        if let Err(error) = ended {
            tracing::error!(id = %entry.id(), error = super::chain(&error), "ending an operation");
            self.settle_later(entry.row());
        }
    }
}

/// Says which machine a VMM makes of `spec`, in so far as a snapshot of one does not load
/// into another. What has the devices that there were from the start is called as then.
pub(super) fn machine_of(spec: &Spec, vmm: &VmmIdentity) -> String {
    let balloon = if spec.balloon { "" } else { ", no balloon" };
    let vsock = if spec.vsock { ", vsock" } else { "" };
    let nic = if spec.net == NetMode::None { "" } else { ", network" };
    format!("{}{balloon}{vsock}{nic}", vmm.machine)
}

/// Names a VMM as `status` shows it.
pub(super) fn named(identity: &VmmIdentity) -> Box<str> {
    format!("{} {}", identity.name, identity.version).into()
}
