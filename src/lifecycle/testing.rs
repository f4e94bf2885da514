//! A host for model tests, with a fake VMM whose faults are planned.
//!
//! The machines are real processes, the store is a real directory and the index is a
//! real one; only the guest and the clock are not. A "crash" leaves everything as it
//! is at that point and starts another daemon on it.

use crate::lifecycle::delete::resume_deletions;
use crate::lifecycle::unsettled::settle_due;
use std::{
    any::Any,
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind},
    path::Path,
    time::Duration,
};

use super::{CrashPoint, Entry, Error, Lifecycle, Outcome, Parts, Policy, Settings, Wait, Why};
use crate::{
    index::Index,
    net::{Network, fake::FakeNetwork},
    sandbox::{
        Activity, Actor, Cause, Owner, Period, SandboxId, Spec, State, Timestamp, VmmChoice,
        network::AddressPlan,
    },
    snapshot::{Home, MEMORY},
    sync::{Arc, Mutex, lock},
    sys::{
        clock::{Clock, Deadline, ManualClock, pause_for},
        command::output,
        opener::{self, Openers},
        pool::Pool,
        process::reserve_fixed_fds,
    },
    vmm::fake::{FakeHost, FakeVmm, runs_in},
};

/// Where the daemon is to crash.
#[derive(Debug, Default)]
pub(crate) struct CrashPlan {
    at: Mutex<Option<CrashPoint>>,
}

/// What a planned crash panics with.
struct Crash;

impl CrashPlan {
    pub(super) fn reached(&self, point: CrashPoint) {
        let mut at = lock(&self.at);
        if *at == Some(point) {
            *at = None;
            drop(at);
            panic_any(Crash);
        }
    }

    /// A crash is no bug that is recovered from: it goes on, as the end of the daemon.
    pub(super) fn pass_on(payload: Box<dyn Any + Send>) -> Box<dyn Any + Send> {
        if payload.is::<Crash>() {
            resume_unwind(payload);
        }
        payload
    }
}

/// How long a condition may take to come true on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// How long the network of a sleeper stays.
pub(crate) const LINGER: Duration = Duration::from_secs(600);

/// A host with one sandbox store, on which daemons come and go.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) vmm: Arc<FakeHost>,
    pub(crate) network: Arc<FakeNetwork>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) daemon: Arc<Lifecycle>,
    budget_bytes: Option<u64>,
    /// How often the power was cut, after each of which the index has another name.
    cuts: usize,
}

/// What became of what a guest wrote to its memory just before a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// It had reached the disk.
    Kept,
    /// It was in the page cache.
    Lost,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with_budget(None)
    }

    /// A host whose store is on a disk, whatever the temporary directory is.
    pub(crate) fn on_disk() -> Self {
        Self::within(
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap(),
            None,
        )
    }

    pub(crate) fn with_budget(budget_bytes: Option<u64>) -> Self {
        Self::within(tempfile::tempdir().unwrap(), budget_bytes)
    }

    fn within(dir: tempfile::TempDir, budget_bytes: Option<u64>) -> Self {
        // As a daemon does, before a long test has so much open that one of them is taken.
        reserve_fixed_fds().unwrap();
        let vmm = Arc::new(FakeHost::default());
        let clock = Arc::new(ManualClock::at(Timestamp::from_millis(1_000_000)));
        let network = Arc::default();
        let daemon = start(dir.path(), &vmm, &network, &clock, budget_bytes);
        Self { dir, vmm, network, clock, daemon, budget_bytes, cuts: 0 }
    }

    /// A host whose VMM has the memory of its guests in its processes.
    pub(crate) fn copying() -> Self {
        let host = Self::new();
        host.vmm.copy_memory();
        host
    }

    /// Another daemon takes over, as after kill -9.
    pub(crate) fn restart(&mut self) {
        let (dir, index) = (self.dir.path(), index_name(self.cuts));
        self.network.forget_lingering();
        self.daemon =
            start_on(dir, &index, &self.vmm, &self.network, &self.clock, self.budget_bytes);
        self.daemon.check_index().unwrap();
        let found = self.daemon.reconcile(PATIENCE);
        assert_eq!(found.failed, 0, "{found:?}");
    }

    /// As `restart`, but the first daemon ends in order if `ordered`; `meanwhile` happens while
    /// none runs, and what start-up could not settle is the caller's to judge.
    pub(crate) fn restart_after(&mut self, ordered: bool, meanwhile: impl FnOnce(&Self)) {
        if ordered {
            assert_eq!(self.daemon.close(PATIENCE), 0, "nothing is under way");
            self.daemon.activity().flush().unwrap();
            self.daemon.index.close().unwrap();
        }
        for (row, _) in self.daemon.machines.all() {
            // What happens from here on no daemon sees.
            self.daemon.machines.remove(row);
        }
        meanwhile(self);
        let (dir, index) = (self.dir.path(), index_name(self.cuts));
        self.network.forget_lingering();
        self.daemon =
            start_on(dir, &index, &self.vmm, &self.network, &self.clock, self.budget_bytes);
        self.daemon.check_index().unwrap();
        self.daemon.reconcile(PATIENCE);
    }

    /// Copies the index as it is now, to be set back to it later. Nobody changes it meanwhile.
    pub(crate) fn copy_index(&mut self) -> String {
        self.cuts += 1;
        let store = self.dir.path().join("store");
        let (now, copy) = (self.daemon.index.path(), store.join(index_name(self.cuts)));
        for suffix in ["", "-wal"] {
            let named = |path: &Path| format!("{}{suffix}", path.display());
            std::fs::copy(named(now), named(&copy)).unwrap();
        }
        index_name(self.cuts)
    }

    /// The daemon is killed, and another starts on `index` instead of its own. Nothing is
    /// checked or settled yet.
    pub(crate) fn start_on_index(&mut self, index: &str) {
        for (row, _) in self.daemon.machines.all() {
            self.daemon.machines.remove(row);
        }
        self.network.forget_lingering();
        self.daemon = start_on(
            self.dir.path(),
            index,
            &self.vmm,
            &self.network,
            &self.clock,
            self.budget_bytes,
        );
    }

    /// Another daemon starts on a copy of the store, as it is now. The first one's VMMs stay.
    pub(crate) fn start_on_a_copy(&mut self) {
        for (row, _) in self.daemon.machines.all() {
            self.daemon.machines.remove(row);
        }
        let dir = self.dir.path().join("copy");
        std::fs::create_dir(&dir).unwrap();
        let (from, to) = (self.dir.path().join("store"), dir.join("store"));
        let args = ["-a", from.to_str().unwrap(), to.to_str().unwrap()];
        let copied = output(Path::new("/bin/cp"), &args, PATIENCE).unwrap();
        assert!(copied.status.success());
        let index = index_name(self.cuts);
        let budget_bytes = self.budget_bytes;
        self.daemon = start_on(&dir, &index, &self.vmm, &self.network, &self.clock, budget_bytes);
    }

    /// Does what crashes at `point`, if it gets there. Says whether it did.
    pub(crate) fn crashes_at(&self, point: CrashPoint, operation: impl FnOnce()) -> bool {
        *lock(&self.daemon.crash.at) = Some(point);
        match catch_unwind(AssertUnwindSafe(operation)) {
            Ok(()) => {
                *lock(&self.daemon.crash.at) = None;
                false
            }
            Err(payload) => {
                assert!(payload.is::<Crash>(), "it crashed by a bug");
                true
            }
        }
    }

    /// The host loses power and boots again: no process is left, and of the index only
    /// what somebody waited for.
    pub(crate) fn cut_power(&mut self, pages: Pages) {
        for (row, live) in self.daemon.machines.all() {
            // The daemon must not see the end of its VMM, as it is gone itself.
            self.daemon.machines.remove(row);
            live.process.kill();
            live.process.wait(PATIENCE).unwrap();
            let home = Home::new(&self.daemon.settings.store, row);
            let run = home.survey().unwrap().live;
            if let (Some(run), Pages::Lost) = (run, pages) {
                let memory = std::fs::File::options().write(true).open(home.live_memory(run));
                let before = runs_in(&home.live_memory(run)) - 1;
                memory.unwrap().write_all_at(&before.to_le_bytes(), 0).unwrap();
            }
        }
        self.cuts += 1;
        self.daemon.index.cut_power(&self.dir.path().join("store").join(index_name(self.cuts)));
        self.restart();
    }

    /// The index's disk fails from now on.
    pub(crate) fn fail_syncs(&self) {
        self.daemon.index.fail_syncs();
    }

    /// The index refuses writes such as `UPDATE ON sandbox`, as it does while another process
    /// has it locked or the disk is full, until [`Host::accept_writes`].
    pub(crate) fn refuse_writes(&self, of: &str) {
        self.daemon.index.run_sql(&format!(
            "CREATE TRIGGER refused BEFORE {of} BEGIN SELECT RAISE(ABORT, 'as planned'); END"
        ));
    }

    pub(crate) fn accept_writes(&self) {
        self.daemon.index.run_sql("DROP TRIGGER refused");
    }

    pub(crate) fn create(&self, id: &str) -> Arc<Entry> {
        self.daemon.create(&name(id), Owner { uid: 1, gid: 2 }, Cause::Mkdir(actor())).unwrap()
    }

    pub(crate) fn entry(&self, id: &str) -> Arc<Entry> {
        self.daemon.by_id(&name(id)).expect("it exists")
    }

    pub(crate) fn state(&self, id: &str) -> State {
        self.entry(id).record().state()
    }

    pub(crate) fn wake(&self, id: &str) -> Result<Outcome, Error> {
        let entry = self.entry(id);
        let held = self.daemon.lock(&entry, Wait::ForIt, Cause::Write(actor()))?;
        self.daemon.wake(&held, &entry)
    }

    pub(crate) fn sleep(&self, id: &str) -> Result<Outcome, Error> {
        self.sleep_because(id, Why::Asked)
    }

    pub(crate) fn sleep_because(&self, id: &str, why: Why) -> Result<Outcome, Error> {
        let entry = self.entry(id);
        let held = self.daemon.lock(&entry, Wait::ForIt, Cause::Write(actor()))?;
        self.daemon.sleep(&held, &entry, why)
    }

    pub(crate) fn set(&self, id: &str, policy: Policy) -> Result<(), Error> {
        let entry = self.entry(id);
        let held = self.daemon.lock(&entry, Wait::ForIt, Cause::Write(actor()))?;
        self.daemon.set(&held, &entry, policy)
    }

    /// Deletes a sandbox. Says whether it is gone already.
    pub(crate) fn destroy(&self, id: &str) -> Result<bool, Error> {
        let entry = self.entry(id);
        let mut deleted = Ok(());
        self.daemon.delete(&entry, &Cause::Rmdir(actor()), |result| deleted = result);
        deleted.map(|()| self.daemon.index.by_row(entry.row()).is_none())
    }

    /// Has the deletions finished that could not be, and waits until they are.
    pub(crate) fn finish_deletions(&self) {
        wait_for("the deletions to be finished", || {
            let next = self.daemon.operations.next_deletion();
            if let Some(next) = next {
                self.clock.advance(next.since(self.clock.now()));
            }
            resume_deletions(&self.daemon);
            self.daemon.operations.deletions_left() == 0
        });
    }

    /// Has the records brought up to date that could not be, and waits until they are.
    pub(crate) fn settle(&self) {
        wait_for("the records to be up to date", || {
            let next = self.daemon.unsettled.next_try();
            if let Some(next) = next {
                self.clock.advance(next.since(self.clock.now()));
            }
            settle_due(&self.daemon);
            self.daemon.unsettled.len() == 0
        });
    }

    /// What `error` reads as.
    pub(crate) fn error(&self, id: &str) -> String {
        self.daemon.notes.last_error(&self.entry(id)).map_or("ok".to_owned(), String::from)
    }

    /// How often the guest of a sandbox was let run, by the memory that it has now.
    pub(crate) fn runs(&self, id: &str) -> u64 {
        let record = self.entry(id).record();
        let running = record.process().and_then(|process| self.vmm.runs_of(process.pid));
        if let Some(runs) = running {
            return runs;
        }
        let home = self.daemon.store.home(&record);
        let survey = home.survey().unwrap();
        let dir = match (survey.committed, survey.live) {
            (Some(generation), _) => home.snapshot_dir(generation),
            (None, Some(generation)) => home.live_dir(generation),
            (None, None) => return 0,
        };
        runs_in(&dir.join(MEMORY))
    }

    /// Says whether the VMM that the record names runs its guest.
    pub(crate) fn guest_runs(&self, id: &str) -> bool {
        let record = self.entry(id).record();
        record.process().is_some_and(|process| self.vmm.runs(process.pid))
    }

    /// The sandbox is as it should be in the state that it says, and can be used.
    pub(crate) fn check(&self, id: &str) {
        let record = self.entry(id).record();
        let survey = self.daemon.store.home(&record).survey().unwrap();
        assert!(survey.partials.is_empty(), "{id} is {}", record.state());
        let sockets = self.daemon.store.runtime_dir(record.row);
        assert_eq!(
            sockets.exists(),
            record.state() == State::Running,
            "{id} is {}",
            record.state()
        );
        match record.state() {
            State::Running => {
                assert!(self.guest_runs(id));
                assert_eq!(survey.committed, None);
            }
            State::Snapshotted => {
                assert_eq!(record.process(), None);
                assert_eq!(survey.committed, record.snapshot().map(|facts| facts.generation));
                assert_eq!(survey.live, None);
            }
            State::Stopped => assert_eq!((record.process(), survey.live), (None, None)),
            State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                panic!("{id} is {}", record.state())
            }
        }
        let before = self.runs(id);
        self.wake(id).unwrap();
        self.sleep(id).unwrap();
        self.wake(id).unwrap();
        let more = match record.state() {
            State::Running => 1,
            State::Snapshotted => 2,
            // It was booted afresh.
            State::Stopped
            | State::Booting
            | State::Snapshotting
            | State::Restoring
            | State::Deleting => 2 - i64::try_from(before).unwrap(),
        };
        assert_eq!(i64::try_from(self.runs(id)).unwrap() - i64::try_from(before).unwrap(), more);
    }

    /// Nothing is left over: no lock, no partial file, no process.
    pub(crate) fn check_nothing_left(&self) {
        wait_for("locks to be free", || self.daemon.locks_in_use() == 0);
        for sub in ["sandboxes", "trash"] {
            wait_for(sub, || {
                self.dir.path().join("store").join(sub).read_dir().unwrap().count() == 0
            });
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (_, live) in self.daemon.machines.all() {
            live.process.kill();
        }
    }
}

/// Who does what a test asks for.
pub(crate) fn actor() -> Actor {
    Actor { pid: Some(7), command: Some("test".into()), uid: 1 }
}

pub(crate) fn name(id: &str) -> SandboxId {
    id.parse().unwrap()
}

fn index_name(cuts: usize) -> String {
    if cuts == 0 { "index.db".to_owned() } else { format!("index-{cuts}.db") }
}

pub(crate) fn start(
    dir: &Path,
    vmm: &Arc<FakeHost>,
    network: &Arc<FakeNetwork>,
    clock: &Arc<ManualClock>,
    memory_budget_bytes: Option<u64>,
) -> Arc<Lifecycle> {
    start_on(dir, &index_name(0), vmm, network, clock, memory_budget_bytes)
}

fn start_on(
    dir: &Path,
    index: &str,
    vmm: &Arc<FakeHost>,
    network: &Arc<FakeNetwork>,
    clock: &Arc<ManualClock>,
    memory_budget_bytes: Option<u64>,
) -> Arc<Lifecycle> {
    let store = dir.join("store");
    std::fs::create_dir_all(&store).unwrap();
    let parts = Parts {
        index: Index::open(&store.join(index)).unwrap(),
        vmms: vec![Arc::new(FakeVmm(Arc::clone(vmm)))],
        auto: VmmChoice::Qemu,
        network: Arc::clone(network) as Arc<dyn Network>,
        clock: Arc::clone(clock) as Arc<dyn Clock>,
        pool: Arc::new(Pool::new()),
        openers: Openers::new(opener::tests::program()).unwrap(),
    };
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, "\x7fELF").unwrap();
    let template = Spec { kernel: Some(kernel), memory_bytes: 16 << 20, ..Spec::default() };
    let settings = Settings {
        store,
        runtime: dir.join("run"),
        template: Arc::new(template),
        idle_after: Period::After(Duration::from_secs(60)),
        delete_after: Period::Never,
        sandboxes_max: 3,
        wakes_max: 2,
        sleeps_max: 2,
        holds_max: 3,
        memory_budget_bytes,
        activity: Activity::default(),
        users: Some("70000-70009".parse().unwrap()),
        addresses: AddressPlan::default(),
        linger: Period::After(LINGER),
        verify_memory: true,
    };
    Lifecycle::new(parts, settings).unwrap()
}

pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Deadline::after(PATIENCE);
    while !condition() {
        assert!(!deadline.passed(), "waited too long for: {what}");
        pause_for(Duration::from_millis(2));
    }
}

/// Runs an operation that crashes at `point`.
pub(crate) fn crash(host: &mut Host, point: CrashPoint, operation: impl FnOnce(&Host)) {
    *lock(&host.daemon.crash.at) = Some(point);
    let crashed = catch_unwind(AssertUnwindSafe(|| operation(host)));
    let payload = crashed.expect_err("it crashes before it ends");
    assert!(payload.is::<Crash>(), "it crashed by a bug");
}

/// Returns a text as a disk of one sector has it.
pub(crate) fn sector(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(512, 0);
    bytes
}

/// Returns the text that is at the beginning of a file.
pub(crate) fn content(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}
