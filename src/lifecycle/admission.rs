//! Who may start: bounded concurrency of sleeps and of wakes, and the memory budget.

use std::{collections::HashMap, time::Duration};

use super::Error;
use crate::{
    sandbox::{RowId, SandboxId},
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::{cancel::Cancel, clock::Deadline},
};

/// How long an operation waits for a slot. Longer than any healthy operation takes,
/// short enough that a caller learns of an overload.
const SLOT_WAIT: Duration = Duration::from_secs(60);
/// How long one waits that is to copy disks: a copy of 100 GiB to a disk that writes 200 MB/s
/// takes nine minutes.
const COPY_WAIT: Duration = Duration::from_secs(600);
/// How soon who waits to copy notices that it is called off.
const CANCEL_LOOK: Duration = Duration::from_millis(200);

/// The gate that every sleep, wake and boot passes before it touches anything.
#[derive(Debug)]
pub(super) struct Admission {
    sleeps: Slots,
    wakes: Slots,
    copies: Slots,
    budget_bytes: Option<u64>,
    /// The memory that each awake sandbox was admitted with. A leaf lock.
    awake: Mutex<HashMap<RowId, u64>>,
}

/// A counted set of places.
#[derive(Debug)]
struct Slots {
    what: &'static str,
    /// Free places. A leaf lock; its guard is never held across anything.
    free: Mutex<usize>,
    freed: Condvar,
}

/// A place in one of the queues; free again when dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as it is dropped"]
pub(super) struct Slot {
    admission: Arc<Admission>,
    of: fn(&Admission) -> &Slots,
}

impl Admission {
    /// Makes a gate for so many at a time and so much memory in all.
    pub(super) fn new(sleeps: usize, wakes: usize, budget_bytes: Option<u64>) -> Arc<Self> {
        let slots = |what, count| Slots { what, free: Mutex::new(count), freed: Condvar::new() };
        Arc::new(Self {
            sleeps: slots("sleep", sleeps),
            wakes: slots("wake", wakes),
            copies: slots("copy the disks of", wakes),
            budget_bytes,
            awake: Mutex::new(HashMap::new()),
        })
    }

    /// Waits for a place among the sleeps.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long.
    pub(super) fn sleep(self: &Arc<Self>, id: &SandboxId) -> Result<Slot, Error> {
        self.take(id, SLOT_WAIT, |admission| &admission.sleeps)
    }

    /// Waits for a place among the wakes and boots.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long.
    pub(super) fn wake(self: &Arc<Self>, id: &SandboxId) -> Result<Slot, Error> {
        self.take(id, SLOT_WAIT, |admission| &admission.wakes)
    }

    /// Waits for a place among those that copy disks, of which there are as many as of wakes.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long, `Gone` when it is called off.
    pub(super) fn copy(self: &Arc<Self>, id: &SandboxId, cancel: &Cancel) -> Result<Slot, Error> {
        let deadline = Deadline::after(COPY_WAIT);
        loop {
            cancel.check().map_err(|_| Error::Gone { id: id.clone() })?;
            match self.take(id, CANCEL_LOOK, |admission| &admission.copies) {
                Err(Error::NoSlot { what, id, .. }) if deadline.passed() => {
                    return Err(Error::NoSlot { what, id, limit: COPY_WAIT });
                }
                Err(Error::NoSlot { .. }) => {}
                taken => return taken,
            }
        }
    }

    fn take(
        self: &Arc<Self>,
        id: &SandboxId,
        limit: Duration,
        of: fn(&Self) -> &Slots,
    ) -> Result<Slot, Error> {
        of(self).take(id, limit)?;
        Ok(Slot { admission: Arc::clone(self), of })
    }

    /// Books the memory of a sandbox that is about to be awake.
    ///
    /// # Errors
    /// `NoMemory` where that would exceed the budget.
    pub(super) fn book(&self, row: RowId, id: &SandboxId, bytes: u64) -> Result<(), Error> {
        let mut awake = lock(&self.awake);
        let used: u64 = awake.iter().filter(|(other, _)| **other != row).map(|(_, b)| b).sum();
        if let Some(budget) = self.budget_bytes {
            let left = budget.saturating_sub(used);
            if bytes > left {
                return Err(Error::NoMemory {
                    id: id.clone(),
                    needed_mib: bytes >> 20,
                    left_mib: left >> 20,
                });
            }
        }
        awake.insert(row, bytes);
        Ok(())
    }

    /// Books the memory of a sandbox that was awake before this daemon was.
    pub(super) fn book_adopted(&self, row: RowId, bytes: u64) {
        lock(&self.awake).insert(row, bytes);
    }

    /// Gives back the memory of a sandbox that is no longer awake.
    pub(super) fn give_back(&self, row: RowId) {
        lock(&self.awake).remove(&row);
    }

    /// Returns the memory that each awake sandbox was admitted with.
    pub(super) fn awake(&self) -> Vec<(RowId, u64)> {
        lock(&self.awake).iter().map(|(row, bytes)| (*row, *bytes)).collect()
    }

    /// Returns the memory booked and the budget, in bytes.
    pub(super) fn memory(&self) -> (u64, Option<u64>) {
        (lock(&self.awake).values().sum(), self.budget_bytes)
    }
}

impl Slots {
    fn take(&self, id: &SandboxId, limit: Duration) -> Result<(), Error> {
        let none = |free: &mut usize| *free == 0;
        let mut free = wait_while_within(&self.freed, lock(&self.free), limit, none);
        if *free == 0 {
            return Err(Error::NoSlot { what: self.what, id: id.clone(), limit });
        }
        *free -= 1;
        Ok(())
    }

    fn give_back(&self) {
        *lock(&self.free) += 1;
        self.freed.notify_one();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.of)(&self.admission).give_back();
    }
}
