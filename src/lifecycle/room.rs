//! Room on the disk for the memory of guests, where that is a file.
//!
//! A guest that touches a page which the disk has no block for is killed by the kernel
//! (SIGBUS), and its work with it. So all of its memory has its blocks before its first
//! instruction. They are given back when it sleeps. Where the file system cannot do that
//! (tmpfs, btrfs) the room that all who are awake may still want is counted.

use super::{Entry, Error, Lifecycle, chain, error::snapshot_failed, memory_of};
use crate::{
    machines::Live,
    sandbox::{Record, RowId, State, Step},
    snapshot::{self, Home, Memory},
    sync::Arc,
    sys::{
        files::{allocated_bytes, free_bytes, keeps_room, take_room},
        process::Exit,
    },
};

impl Lifecycle {
    /// Sees to it that the end of an operation or of a sandbox can be recorded on a full disk.
    /// What begins something is refused there.
    pub(super) fn make_room_for(&self, step: &Step) {
        match step {
            Step::Delete
            | Step::Lost
            | Step::Undo
            | Step::Slept(_)
            | Step::Woken(_)
            | Step::Booted(_) => {
                self.reserve.give_up_if_full();
            }
            Step::Boot | Step::Wake | Step::Sleep => {}
        }
    }

    /// Makes the reserve anew that was given up, when there is room again. Called at each tick.
    pub fn keep_reserve(&self) {
        self.reserve.keep();
    }

    /// Makes sure that the disk has room for all of the memory that the guest has not yet
    /// touched, so that nothing is begun that would fail for want of it.
    pub(super) fn check_room(
        &self,
        entry: &Entry,
        memory: Memory,
        allocated_bytes: u64,
    ) -> Result<(), Error> {
        if memory == Memory::Copied {
            return Ok(());
        }
        let record = entry.record();
        let untouched = record.spec.memory_bytes.saturating_sub(allocated_bytes);
        let promised = if self.store_keeps_room() { 0 } else { self.promised_bytes(record.row) };
        self.home(&record)
            .check_space(untouched + promised + snapshot::SLEEP_RESERVE_BYTES)
            .map_err(snapshot_failed(entry, "finding space for the memory of"))
    }

    /// Gives back the room that a sleeper does not need, and returns how many bytes its
    /// snapshot takes then. That it cannot be given back is no reason to fail.
    pub(super) fn give_back_room(&self, record: &Record, generation: u64) -> Option<u64> {
        match self.home(record).give_back_room(generation) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(id = %record.id, error, "releasing unused disk space");
                None
            }
        }
    }

    /// Takes the room again that guests gave back while they ran: what a guest reports as free
    /// is a hole in its memory from then on. Called at each tick.
    pub fn keep_room(&self) {
        if !self.store_keeps_room() {
            return;
        }
        for (row, live) in self.machines.all() {
            if let Some(entry) = self.by_row(row) {
                self.keep_room_of(&entry, &live);
            }
        }
    }

    fn keep_room_of(&self, entry: &Entry, live: &Arc<Live>) {
        let record = entry.record();
        let is_mapped = self
            .vmms
            .of(&record)
            .is_ok_and(|vmm| memory_of(vmm.as_ref(), &record) == Memory::Mapped);
        let bytes = record.spec.memory_bytes;
        if record.state() != State::Running
            || !is_mapped
            || memory_taken(&self.home(&record)) >= bytes
        {
            return;
        }
        // Who is at work on it knows better, and may be about to give it back.
        let Some(_lock) = self.locks.try_lock(entry.id()) else { return };
        let still = self.machines.get(record.row).is_some_and(|now| Arc::ptr_eq(&now, live));
        let run = self.home(&record).survey().ok().and_then(|survey| survey.live);
        if let (true, Some(run)) = (still && entry.record().state() == State::Running, run)
            && let Err(error) = take_room(&self.home(&record).live_memory(run), bytes)
        {
            tracing::warn!(
                id = %record.id, %error,
                "no disk space for memory that its guest freed; if the guest uses it again before \
                 there is space, it is killed"
            );
        }
    }

    fn store_keeps_room(&self) -> bool {
        keeps_room(&self.settings.store).unwrap_or(false)
    }

    /// Returns how many bytes of the disk all who are awake may still want, but for `row`.
    fn promised_bytes(&self, row: RowId) -> u64 {
        let others = self.admission.awake().into_iter().filter(|(other, _)| *other != row);
        let wants = others.filter_map(|(other, bytes)| {
            let record = self.by_row(other)?.record();
            let memory = memory_of(self.vmms.of(&record).ok()?.as_ref(), &record);
            let taken = || memory_taken(&self.home(&record));
            (memory == Memory::Mapped).then(|| bytes.saturating_sub(taken()))
        });
        wants.sum()
    }

    /// Says in one line how the VMM of a sandbox came to end by a signal.
    pub(super) fn reason_of_signal(&self, signal: i32) -> String {
        let killed = format!("the VMM was killed by signal {signal}");
        if !Exit::Signal(signal).is_bus_error() {
            return killed;
        }
        let store = self.settings.store.display();
        let free = free_bytes(&self.settings.store).unwrap_or(u64::MAX);
        if free < snapshot::SLEEP_RESERVE_BYTES {
            format!(
                "{killed} (SIGBUS): its guest used memory for which the disk had no space; {free} \
                 bytes are free in {store}; free some"
            )
        } else {
            format!(
                "{killed} (SIGBUS): memory of its guest could not be read from or written to the \
                 disk of {store}; the kernel's log may say why"
            )
        }
    }
}

/// Returns how many bytes of the disk the memory of a sandbox takes.
fn memory_taken(home: &Home) -> u64 {
    let Ok(survey) = home.survey() else { return 0 };
    let dir = match (survey.live, survey.committed) {
        (Some(run), _) => home.live_dir(run),
        (None, Some(generation)) => home.snapshot_dir(generation),
        (None, None) => return 0,
    };
    allocated_bytes(&dir.join(snapshot::MEMORY)).unwrap_or(0)
}
