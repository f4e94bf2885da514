//! Which operations may start: bounded concurrency of sleeps and of wakes, and the memory budget.

use std::{collections::HashMap, time::Duration};

use super::Error;
use crate::{
    sandbox::{RowId, SandboxId},
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::{
        cancel::Cancel,
        clock::{Deadline, Stopwatch},
    },
};

/// How long an operation waits for a slot. Longer than any healthy operation takes,
/// short enough that a caller learns of an overload.
const SLOT_WAIT: Duration = Duration::from_secs(60);
/// How long one waits that is to copy disks: a copy of 100 GiB to a disk that writes 200 MB/s
/// takes nine minutes.
const COPY_WAIT: Duration = Duration::from_secs(600);
/// How often a wait to copy checks whether it was cancelled.
const CANCEL_LOOK: Duration = Duration::from_millis(200);

/// How long a VMM, or whoever copies, may take to answer before its place is another's too. A
/// pause or a piece of a copy takes milliseconds, and seconds on a host that is overloaded.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// How often those who wait for a place look for such a VMM.
const ANSWER_LOOK: Duration = Duration::from_millis(250);

/// The gate that every sleep, wake and boot passes before it touches anything.
#[derive(Debug)]
pub(crate) struct Admission {
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
    count: usize,
    /// A leaf lock; its guard is never held across anything.
    taken: Mutex<Taken>,
    freed: Condvar,
}

/// The places that are taken. For as long as a VMM, or whoever copies, has not answered it has
/// since when.
#[derive(Debug, Default)]
struct Taken {
    places: HashMap<u64, Option<Stopwatch>>,
    last: u64,
}

impl Taken {
    /// Returns how many places count. A VMM that does not answer needs none: it reads and
    /// writes nothing, and others must not wait for it.
    fn counted(&self) -> usize {
        let counts = |since: &&Option<Stopwatch>| {
            since.as_ref().is_none_or(|since| since.elapsed() < ANSWER_WAIT)
        };
        self.places.values().filter(counts).count()
    }
}

/// A place in one of the queues; free again when dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as it is dropped"]
pub(crate) struct Slot {
    admission: Arc<Admission>,
    of: fn(&Admission) -> &Slots,
    number: u64,
}

impl Slot {
    /// Notes that its VMM answers, so that the place counts for as long as it is taken.
    pub(crate) fn answered(&self) {
        self.waits_since(None);
    }

    /// Notes that somebody is asked who may not answer, so that the place counts for a moment.
    pub(crate) fn asked(&self) {
        self.waits_since(Some(Stopwatch::start()));
    }

    fn waits_since(&self, asked: Option<Stopwatch>) {
        let slots = (self.of)(&self.admission);
        if let Some(since) = lock(&slots.taken).places.get_mut(&self.number) {
            *since = asked;
        }
    }
}

impl Admission {
    /// Makes a gate for so many at a time and so much memory in all.
    pub(crate) fn new(sleeps: usize, wakes: usize, budget_bytes: Option<u64>) -> Arc<Self> {
        let slots =
            |what, count| Slots { what, count, taken: Mutex::default(), freed: Condvar::new() };
        Arc::new(Self {
            sleeps: slots("sleep", sleeps),
            wakes: slots("wake", wakes),
            copies: slots("copy the disks of", wakes),
            budget_bytes,
            awake: Mutex::new(HashMap::new()),
        })
    }

    /// Waits for a place among the sleeps. It counts for a moment, and from when its VMM
    /// answers.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long.
    pub(crate) fn sleep(self: &Arc<Self>, id: &SandboxId) -> Result<Slot, Error> {
        self.take(id, SLOT_WAIT, Some(Stopwatch::start), |admission| &admission.sleeps)
    }

    /// Waits for a place among the wakes and boots.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long.
    pub(crate) fn wake(self: &Arc<Self>, id: &SandboxId) -> Result<Slot, Error> {
        self.take(id, SLOT_WAIT, None, |admission| &admission.wakes)
    }

    /// Waits for a place among those that copy disks, of which there are as many as of wakes.
    ///
    /// # Errors
    /// `NoSlot` when none is free for too long, `CalledOff` when it is cancelled.
    pub(crate) fn copy(self: &Arc<Self>, id: &SandboxId, cancel: &Cancel) -> Result<Slot, Error> {
        let deadline = Deadline::after(COPY_WAIT);
        loop {
            cancel.check().map_err(|_| Error::CalledOff { id: id.clone() })?;
            match self.take(id, CANCEL_LOOK, None, |admission| &admission.copies) {
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
        asked: Option<fn() -> Stopwatch>,
        of: fn(&Self) -> &Slots,
    ) -> Result<Slot, Error> {
        let number = of(self).take(id, limit, asked)?;
        Ok(Slot { admission: Arc::clone(self), of, number })
    }

    /// Books the memory of a sandbox that is about to be awake.
    ///
    /// # Errors
    /// `NoMemory` where that would exceed the budget.
    pub(crate) fn book(&self, row: RowId, id: &SandboxId, bytes: u64) -> Result<(), Error> {
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
    pub(crate) fn book_adopted(&self, row: RowId, bytes: u64) {
        lock(&self.awake).insert(row, bytes);
    }

    /// Gives back the memory of a sandbox that is no longer awake.
    pub(crate) fn give_back(&self, row: RowId) {
        lock(&self.awake).remove(&row);
    }

    /// Returns the memory that each awake sandbox was admitted with.
    pub(crate) fn awake(&self) -> Vec<(RowId, u64)> {
        lock(&self.awake).iter().map(|(row, bytes)| (*row, *bytes)).collect()
    }

    /// Returns the memory booked and the budget, in bytes.
    pub(crate) fn memory(&self) -> (u64, Option<u64>) {
        (lock(&self.awake).values().sum(), self.budget_bytes)
    }
}

impl Slots {
    /// Takes a place, and returns its number. `asked` is when its VMM was asked first.
    fn take(
        &self,
        id: &SandboxId,
        limit: Duration,
        asked: Option<fn() -> Stopwatch>,
    ) -> Result<u64, Error> {
        let deadline = Deadline::after(limit);
        let mut taken = lock(&self.taken);
        while taken.counted() >= self.count {
            if deadline.passed() {
                return Err(Error::NoSlot { what: self.what, id: id.clone(), limit });
            }
            // It is free also when somebody has waited in vain for an answer.
            let wait = deadline.left().min(ANSWER_LOOK);
            let none = |taken: &mut Taken| taken.counted() >= self.count;
            taken = wait_while_within(&self.freed, taken, wait, none);
        }
        taken.last += 1;
        let number = taken.last;
        taken.places.insert(number, asked.map(|start| start()));
        Ok(number)
    }

    fn give_back(&self, number: u64) {
        lock(&self.taken).places.remove(&number);
        self.freed.notify_one();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.of)(&self.admission).give_back(self.number);
    }
}
