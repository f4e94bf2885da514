//! Creating, waking, putting to sleep and destroying: the only owner of the order of steps.
//!
//! Whoever changes a sandbox (a writer, the reaper, start-up, a guest that ends)
//! takes its lock and comes through here. Each operation reads down the page: look
//! again, intent, act, commit, record, tell. Nothing here knows what a file or an
//! errno is, nor a VMM's language, nor SQL.
//!
//! ```text
//! sleep: space → snapshotting → pause → save → COMMIT → kill → snapshotted → tell
//! wake:  admit → manifest → restoring → network → restore paused → CONSUME → resume
//!        → running → tell
//! boot:  admit → booting → disks → network → VMM, inert → its identity recorded → resume
//!        → running → tell
//! ```
//!
//! A word in small letters is a change of the record. What announces an operation is on
//! the disk before the word in capitals, which is the operation's commit point, and gets
//! there while the acts in between are under way. What records a sleep or a wake that is
//! done is not waited for: it is proven by the files. `recover` has the reasons.
//!
//! An operation that fails before its commit point is taken back. One that is cut
//! off, by a crash of the daemon or a panic, leaves one of the three states in the
//! middle, and `recover` brings that to an end from what is on disk and what runs.

mod boot;
mod chores;
mod configure;
mod create;
mod delete;
mod disks;
mod error;
mod evidence;
mod exits;
mod files;
mod held;
mod images;
mod kernel;
mod metrics;
mod network;
mod notes;
mod operate;
mod operation;
mod packet;
mod page_cache;
mod plan;
mod records;
mod recover;
mod resume;
mod room;
mod sampling;
mod sleep;
mod stale;
mod start;
mod store;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trash;
mod trouble;
mod undo;
mod unsettled;
mod upkeep;
mod wake;

use std::{borrow::Cow, fmt, io, path::PathBuf, time::Duration};

pub use configure::Policy;
use delete::resume_deletions;
use error::vmm_failed;
pub use error::{Error, Fault};
pub use evidence::{Contradicted, check_index_file};
use exits::attend_exits;
pub use files::{NamedFiles, Unusable};
pub use held::Held;
pub use metrics::{Gauges, Metrics};
use network::NetworkParts;
pub use network::Networks;
pub use notes::Notes;
use operation::Operations;
use page_cache::PageCache;
pub use records::Records;
use recover::is_unsettled;
pub use sampling::Guests;
pub use stale::{CLOCK_KEY, Stale};
pub use store::Store;
use trash::Trash;
use unsettled::{Unsettled, settle_due};

pub use crate::machines::Error as MachineError;
use crate::{
    activity::{Activities, HoldId, Holder},
    events::Wakeup,
    lock::Locks,
    machines::{Admission, Table, Vmms},
    net::Network,
    sandbox::{
        Activity, Cause, Period, Record, RowId, SandboxId, Signal, Spec, State, Timestamp, Users,
        VmmChoice, network::AddressPlan,
    },
    snapshot,
    sync::{Arc, lock},
    sys::{clock::Clock, files::Reserve, opener::Openers, pool::Pool},
    vmm::Vmm,
};
pub use crate::{
    events::{ChangeFeed, Reader, View, Viewer},
    index::{Commit, Due, Entry, Error as IndexError, Index, keys_of_row},
    net::Counters,
    sandbox::text::chain,
};

/// What the operations have to know of the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where sandboxes are kept.
    pub store: PathBuf,
    /// Where their sockets are; a tmpfs.
    pub runtime: PathBuf,
    /// The hardware of a new sandbox.
    pub template: Arc<Spec>,
    /// `idle_after` of a new sandbox.
    pub idle_after: Period,
    /// `delete_after` of a new sandbox.
    pub delete_after: Period,
    /// How many sandboxes there may be.
    pub sandboxes_max: u64,
    /// How many may be waking or booting at once.
    pub wakes_max: usize,
    /// How many may be going to sleep at once.
    pub sleeps_max: usize,
    /// How many holds a user may have at a time.
    pub holds_max: usize,
    /// How much memory all that are awake may have together.
    pub memory_budget_bytes: Option<u64>,
    /// What counts as activity of a sandbox whose spec does not say it.
    pub activity: Activity,
    /// The user ids that VMMs run as, one for each sandbox; ours if there are none.
    pub users: Option<Users>,
    /// The addresses of all sandboxes.
    pub addresses: AddressPlan,
    /// How long the network of a sandbox stays when that falls asleep.
    pub linger: Period,
    /// Whether a wake checks the whole memory against its digest.
    pub verify_memory: bool,
}

/// Why a sandbox is put to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Somebody asked for it.
    Asked,
    /// Somebody asked for it, if this is still the count of its activity.
    AskedAt(u64),
    /// It has been idle for too long, which is looked at again under the lock.
    Idle,
}

/// How an operation that succeeded went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was so already.
    Already,
    /// The reason had gone by the time the lock was had.
    Skipped,
}

/// All sandboxes, and all that can be done with them.
pub struct Lifecycle {
    index: Arc<Index>,
    locks: Arc<Locks>,
    vmms: Arc<Vmms>,
    networks: Networks,
    clock: Arc<dyn Clock>,
    settings: Settings,
    machines: Table,
    operations: Operations,
    admission: Arc<Admission>,
    activity: Arc<Activities>,
    notes: Notes,
    page_cache: PageCache,
    unsettled: Unsettled,
    /// For the work that nobody waits for: guests that end, trash.
    pool: Arc<Pool>,
    /// Opens what a `config` names.
    openers: Openers,
    trash: Trash,
    /// For deletions, which other operations must not keep from having a thread.
    deletions: Pool,
    /// Rung when something may be due earlier than the reaper thinks.
    reaper_wakeup: Arc<Wakeup>,
    records: Records,
    store: Store,
    #[cfg(test)]
    crash: testing::CrashPlan,
}

/// What the operations stand on.
#[derive(Debug)]
pub struct Parts {
    /// The index, open.
    pub index: Index,
    /// The VMMs of this host.
    pub vmms: Vec<Arc<dyn Vmm>>,
    /// The one that `auto` means, which this host may have or not.
    pub auto: VmmChoice,
    /// The networks of this host.
    pub network: Arc<dyn Network>,
    /// The time line of the index.
    pub clock: Arc<dyn Clock>,
    /// Threads for what nobody waits for.
    pub pool: Arc<Pool>,
    /// Processes that open what a `config` names.
    pub openers: Openers,
}

impl Lifecycle {
    /// Puts the parts together. Nothing is looked at or changed yet: see `reconcile`.
    ///
    /// # Errors
    /// Where directories of the store cannot be made, or the index not be read.
    pub fn new(parts: Parts, settings: Settings) -> Result<Arc<Self>, io::Error> {
        let (store, runtime) = (settings.store.clone(), settings.runtime.clone());
        let store = Store::open(store, runtime, &parts.index)?;
        let index = Arc::new(parts.index);
        let activity = Arc::new(Activities::new(
            Arc::clone(&index),
            Arc::clone(&parts.clock),
            settings.activity,
            settings.holds_max,
        ));
        let vmms = Arc::new(Vmms::new(parts.vmms, parts.auto, settings.users));
        let reaper_wakeup = Arc::<Wakeup>::default();
        let networks = Networks::new(NetworkParts {
            host: parts.network,
            index: Arc::clone(&index),
            vmms: Arc::clone(&vmms),
            clock: Arc::clone(&parts.clock),
            addresses: settings.addresses,
            linger: settings.linger,
            reaper_wakeup: Arc::clone(&reaper_wakeup),
        });
        let Settings { sleeps_max, wakes_max, memory_budget_bytes, .. } = settings;
        let admission = Admission::new(sleeps_max, wakes_max, memory_budget_bytes);
        let records = Records {
            index: Arc::clone(&index),
            clock: Arc::clone(&parts.clock),
            activity: Arc::clone(&activity),
            reaper_wakeup: Arc::clone(&reaper_wakeup),
            feed: Arc::default(),
            metrics: Metrics::default(),
            reserve: Reserve::new(&settings.store),
        };
        let lifecycle = Arc::new(Self {
            index,
            locks: Locks::new(),
            vmms,
            networks,
            clock: Arc::clone(&parts.clock),
            settings,
            machines: Table::new()?,
            operations: Operations::default(),
            admission,
            activity,
            notes: Notes::default(),
            page_cache: PageCache::default(),
            unsettled: Unsettled::new(Arc::clone(&parts.clock), Arc::clone(&reaper_wakeup)),
            trash: Trash::new(store.trash(), Arc::clone(&parts.pool)),
            pool: parts.pool,
            openers: parts.openers,
            deletions: Pool::with_limit(delete::DELETIONS_MAX),
            reaper_wakeup,
            records,
            store,
            #[cfg(test)]
            crash: testing::CrashPlan::default(),
        });
        attend_exits(&lifecycle)?;
        Ok(lifecycle)
    }

    /// Returns the sandbox of that name, unless it is being deleted.
    #[must_use]
    pub fn by_id(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        self.index.by_id(id).filter(|entry| !self.operations.is_deleting(entry.row()))
    }

    /// Returns the sandbox of that row, unless it is being deleted.
    #[must_use]
    pub fn by_row(&self, row: RowId) -> Option<Arc<Entry>> {
        self.index.by_row(row).filter(|entry| !self.operations.is_deleting(entry.row()))
    }

    /// Walks over all sandboxes whose rows come after `row`, in their order, but for those
    /// that are being deleted.
    pub fn entries_after(&self, row: RowId) -> impl Iterator<Item = Arc<Entry>> {
        self.index.entries_after(row).filter(|entry| !self.operations.is_deleting(entry.row()))
    }

    /// Waits for the sandbox's lock, or only looks whether it is free. What is done under
    /// it is told with `cause`.
    ///
    /// # Errors
    /// `Locked` where it is taken and `wait` is `Wait::Never`.
    pub fn lock(&self, entry: &Entry, wait: Wait, cause: Cause) -> Result<Held, Error> {
        let lock = match wait {
            Wait::ForIt => Some(self.locks.lock(entry.id())),
            Wait::Never => self.locks.try_lock(entry.id()),
        };
        let lock = lock.ok_or_else(|| Error::Locked { id: entry.id().clone() })?;
        Ok(Held::new(lock, cause))
    }

    /// Says whether the sandbox is `state`, as it should be, and nobody is at work on it.
    #[must_use]
    pub fn rests_in(&self, entry: &Entry, state: State) -> bool {
        let lock = self.locks.try_lock(entry.id());
        lock.is_some() && entry.record().state() == state && !is_unsettled(self, entry)
    }

    /// Returns how many ids are locked or waited for.
    #[cfg(test)]
    pub(crate) fn locks_in_use(&self) -> usize {
        self.locks.len()
    }

    /// Returns the activity of all sandboxes.
    #[must_use]
    pub fn activity(&self) -> &Activities {
        &self.activity
    }

    /// Returns the networks of all sandboxes.
    #[must_use]
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// Returns what changes and publishes the records.
    #[must_use]
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Returns the directories of all sandboxes.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns why the last commands were refused.
    #[must_use]
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Returns the index, for queries.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Returns the daemon's time line.
    #[must_use]
    pub fn clock(&self) -> &dyn Clock {
        self.clock.as_ref()
    }

    /// Returns the settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the memory of all that are awake, and the budget for it, in bytes.
    #[must_use]
    pub fn memory(&self) -> (u64, Option<u64>) {
        self.admission.memory()
    }

    /// Holds a sandbox awake. This does not wake it.
    ///
    /// # Errors
    /// `Gone`, and `HoldError::TooMany`.
    pub fn hold(&self, entry: &Entry, holder: Holder) -> Result<HoldId, Error> {
        let is_deleted = || self.operations.is_claimed(entry.row());
        Ok(self.activity.hold(entry, holder, is_deleted)?)
    }

    /// Returns when the next deletion or record that could not be brought to an end is to be
    /// tried again.
    #[must_use]
    pub fn next_retry(&self) -> Option<Timestamp> {
        let next = [self.operations.next_deletion(), self.unsettled.next_try()];
        next.into_iter().flatten().min()
    }

    /// Tries again to bring those to an end that are due for it, on threads of their own.
    pub fn retry_due(self: &Arc<Self>) {
        resume_deletions(self);
        settle_due(self);
    }

    /// Returns the threads for what nobody waits for.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Takes no more operations, and waits until those under way have ended.
    ///
    /// Returns how many had not ended within `limit`; the next start finishes them.
    pub fn close(&self, limit: Duration) -> usize {
        self.operations.close(limit)
    }

    /// Returns a sentence for each thing that the VMM of `record` lacks: the one that runs it,
    /// or that it sleeps by, and each that only this machine does without.
    #[must_use]
    pub fn lacks(&self, record: &Record) -> Vec<Cow<'static, str>> {
        let of_all = self.vmms.lacks(record);
        let live = self.machines.get(record.row);
        let own = live.iter().flat_map(|live| live.lacks.iter().cloned().map(Cow::Owned));
        let network = self.networks.lacks(record);
        of_all.into_iter().map(Cow::Borrowed).chain(own).chain(network).collect()
    }

    /// Types on a sandbox's console. Returns how many bytes its guest's UART took.
    ///
    /// # Errors
    /// `NotRunning`, or what the VMM says.
    pub fn type_in(&self, entry: &Entry, bytes: &[u8]) -> Result<usize, Error> {
        let record = entry.record();
        let live = self
            .machines
            .get(record.row)
            .ok_or_else(|| Error::NotRunning { id: record.id.clone(), state: record.state() })?;
        let mut machine = lock(&live.machine);
        let typed =
            machine.type_in(bytes).map_err(vmm_failed(entry, "typing on the console of"))?;
        // Before the guest can be paused, else a sleep would not know of it.
        self.activity.saw(entry, Signal::Console);
        Ok(typed)
    }
}

/// Marks a crash point: a test may have the daemon crash here.
#[cfg(not(test))]
#[inline]
fn crash_point(_: &Lifecycle, _: CrashPoint) {}

#[cfg(test)]
fn crash_point(lifecycle: &Lifecycle, point: CrashPoint) {
    lifecycle.crash.reached(point);
}

/// Returns where the guest of a sandbox has its memory, that runs or ran on `vmm`. It is so
/// for as long as the sandbox is not stopped, since neither of the two changes before.
fn memory_of(vmm: &dyn Vmm, record: &Record) -> snapshot::Memory {
    if vmm.keeps_memory_in_file(record.spec.memory_mode) {
        snapshot::Memory::Mapped
    } else {
        snapshot::Memory::Copied
    }
}

/// Whether a caller waits for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// As long as it takes.
    ForIt,
    /// Not at all.
    Never,
}

/// The crash points: between any two steps of the operations, as the diagrams above show them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests crash at them"))]
pub(crate) enum CrashPoint {
    SleepIntended,
    SleepInflated,
    SleepPaused,
    SleepStaged,
    SleepSaved,
    SleepCommitted,
    SleepKilled,
    WakeIntended,
    WakeConnected,
    WakeRestored,
    WakeRecorded,
    WakeConsumed,
    WakeResumed,
    BootIntended,
    BootConnected,
    BootSpawned,
    BootRecorded,
    BootResumed,
    DeleteIntended,
    DeleteKilled,
    DeleteTrashed,
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle").field("store", &self.settings.store).finish_non_exhaustive()
    }
}
