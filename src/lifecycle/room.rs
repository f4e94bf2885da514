//! Room on the disk for the memory of guests, where that is a file.
//!
//! A guest that touches a page which the disk has no block for is killed by the kernel
//! (SIGBUS), and its work with it. So all of its memory has its blocks before its first
//! instruction. They are given back when it sleeps. Where the file system cannot do that
//! (tmpfs, btrfs) the room that all who are awake may still want is counted.

use super::{Entry, Error, Lifecycle, chain, error::snapshot_failed, memory_of};
use crate::{
    machines::Live,
    sandbox::{Record, RowId, State},
    snapshot::{self, Home, Memory},
    sync::Arc,
    sys::files::{allocated_bytes, take_room},
};

/// Makes sure that the disk has room for all of the memory that the guest has not yet
/// touched, so that nothing is begun that would fail for want of it.
pub(super) fn check_room(
    lifecycle: &Lifecycle,
    entry: &Entry,
    memory: Memory,
    allocated_bytes: u64,
) -> Result<(), Error> {
    if memory == Memory::Copied {
        return Ok(());
    }
    let record = entry.record();
    let untouched = record.spec.memory_bytes.saturating_sub(allocated_bytes);
    let promised =
        if lifecycle.store.keeps_room() { 0 } else { promised_bytes(lifecycle, record.row) };
    lifecycle
        .store
        .home(&record)
        .check_space(untouched + promised + snapshot::SLEEP_RESERVE_BYTES)
        .map_err(snapshot_failed(entry, "finding space for the memory of"))
}

/// Gives back the room that a sleeper does not need, and returns how many bytes its
/// snapshot takes then. That it cannot be given back is no reason to fail.
pub(super) fn give_back_room(
    lifecycle: &Lifecycle,
    record: &Record,
    generation: u64,
) -> Option<u64> {
    match lifecycle.store.home(record).give_back_room(generation) {
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
pub(super) fn keep_room(lifecycle: &Lifecycle) {
    if !lifecycle.store.keeps_room() {
        return;
    }
    for (row, live) in lifecycle.machines.all() {
        if let Some(entry) = lifecycle.by_row(row) {
            keep_room_of(lifecycle, &entry, &live);
        }
    }
}

fn keep_room_of(lifecycle: &Lifecycle, entry: &Entry, live: &Arc<Live>) {
    let record = entry.record();
    let is_mapped = lifecycle
        .vmms
        .of(&record)
        .is_ok_and(|vmm| memory_of(vmm.as_ref(), &record) == Memory::Mapped);
    let bytes = record.spec.memory_bytes;
    if record.state() != State::Running
        || !is_mapped
        || memory_taken(&lifecycle.store.home(&record)) >= bytes
    {
        return;
    }
    // Who is at work on it knows better, and may be about to give it back.
    let Some(_lock) = lifecycle.locks.try_lock(entry.id()) else { return };
    let still = lifecycle.machines.get(record.row).is_some_and(|now| Arc::ptr_eq(&now, live));
    let run = lifecycle.store.home(&record).survey().ok().and_then(|survey| survey.live);
    if let (true, Some(run)) = (still && entry.record().state() == State::Running, run)
        && let Err(error) = take_room(&lifecycle.store.home(&record).live_memory(run), bytes)
    {
        tracing::warn!(
            id = %record.id, %error,
            "no disk space for memory that its guest freed; if the guest uses it again before \
             there is space, it is killed"
        );
    }
}

/// Returns how many bytes of the disk all who are awake may still want, but for `row`.
fn promised_bytes(lifecycle: &Lifecycle, row: RowId) -> u64 {
    let others = lifecycle.admission.awake().into_iter().filter(|(other, _)| *other != row);
    let wants = others.filter_map(|(other, bytes)| {
        let record = lifecycle.by_row(other)?.record();
        let memory = memory_of(lifecycle.vmms.of(&record).ok()?.as_ref(), &record);
        let taken = || memory_taken(&lifecycle.store.home(&record));
        (memory == Memory::Mapped).then(|| bytes.saturating_sub(taken()))
    });
    wants.sum()
}

/// Has what a guest was woken from removed, where it is a copy: the VMM has the memory,
/// and the guest runs. It may be many GiB, so the wake does not wait for it.
///
/// `record` is of before the wake.
pub(super) fn drop_copy_later(lifecycle: &Lifecycle, record: &Record, memory: Memory) {
    let Some(facts) = record.snapshot().filter(|_| memory == Memory::Copied) else {
        return;
    };
    let (home, id) = (lifecycle.store.home(record), record.id.clone());
    let dropping = lifecycle.pool.run(move || {
        if let Err(error) = home.drop_copy(facts.generation) {
            tracing::warn!(%id, error = super::chain(&error), "dropping a used snapshot");
        }
    });
    if dropping.is_err() {
        tracing::debug!(id = %record.id, "a used snapshot stays until the next sleep");
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
