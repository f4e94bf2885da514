//! The keyed lock: one lock for each sandbox id, there only while it is used.
//!
//! Whoever changes a sandbox holds its lock, from the first look to the last word, I/O
//! included. The lock is handed over in the order of arrival, so nobody starves, and a
//! holder of one id never stops another id. It never times out a holder, knows no
//! states, and does not notice a thread that asks for an id that it holds already: that
//! thread waits for itself.
//!
//! ```text
//!   table            an entry is there only while its id is held
//!   ┌───────┬──────────────────────────┐
//!   │ web-1 │ held, waiting: B → C     │  the holder lets go: B holds, nobody gets between
//!   │ web-2 │ held, waiting: none      │  the holder lets go: the entry goes
//!   └───────┴──────────────────────────┘  web-3 is free: no entry, no memory
//! ```
//!
//! # The lock order of the whole crate
//!
//! 1. **The lock of an id** ([`Held`]) is the outermost. It alone is made to be held for
//!    seconds. No thread takes a second one while it holds one.
//! 2. **The index's connection** is taken with or without the lock of an id, and is held
//!    for one transaction, which waits for the disk.
//! 3. **Every other lock is a leaf**: it is held for memory, never for I/O and never
//!    while another is taken, and its field says what it guards.
//!
//! In here the table's lock and a waiter's own are such leaves.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use crate::{
    sandbox::SandboxId,
    sync::{Arc, Condvar, Mutex, lock, wait, wait_while_within},
};

#[cfg(test)]
#[cfg(feature = "shuttle")]
mod checked;
#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod tests;

/// The locks of all sandboxes.
#[derive(Debug, Default)]
pub struct Locks {
    /// Who waits for each id that is held, the longest waiter first. Every waiter is a
    /// thread of ours, and their count is bounded where they are started. A leaf.
    table: Mutex<HashMap<SandboxId, VecDeque<Arc<Turn>>>>,
}

/// The lock of one sandbox, held. Whoever has it may change that sandbox; dropping it,
/// on any thread and also by a panic, hands it to the longest waiter.
#[must_use = "the lock is let go where this is dropped"]
#[derive(Debug)]
pub struct Held {
    locks: Arc<Locks>,
    id: SandboxId,
}

impl Locks {
    /// Makes the locks, all free.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Takes the lock of `id`, after everyone who asked before.
    ///
    /// # Locking
    /// The thread must hold the lock of no id, and no leaf.
    pub fn lock(self: &Arc<Self>, id: &SandboxId) -> Held {
        if let Some(turn) = self.queue_up(id) {
            turn.wait();
        }
        self.held(id)
    }

    /// Takes the lock of `id` if it is free.
    pub fn try_lock(self: &Arc<Self>, id: &SandboxId) -> Option<Held> {
        let mut table = lock(&self.table);
        if table.contains_key(id) {
            return None;
        }
        table.insert(id.clone(), VecDeque::new());
        Some(self.held(id))
    }

    /// Takes the lock of `id`, or gives up after `limit`.
    ///
    /// # Locking
    /// As for [`Locks::lock`].
    pub fn lock_within(self: &Arc<Self>, id: &SandboxId, limit: Duration) -> Option<Held> {
        let Some(turn) = self.queue_up(id) else {
            return Some(self.held(id));
        };
        if turn.wait_within(limit) || !self.leave_queue(id, &turn) {
            Some(self.held(id))
        } else {
            None
        }
    }

    /// Returns how many ids are held.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.table).len()
    }

    /// Says whether no id is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the lock of `id`, or else a place in its queue.
    fn queue_up(&self, id: &SandboxId) -> Option<Arc<Turn>> {
        let mut table = lock(&self.table);
        if let Some(queue) = table.get_mut(id) {
            let turn = Arc::new(Turn::default());
            queue.push_back(Arc::clone(&turn));
            Some(turn)
        } else {
            table.insert(id.clone(), VecDeque::new());
            None
        }
    }

    /// Gives up the place in the queue, and says whether there still was one: a turn that
    /// comes just as its waiter's time runs out has come.
    fn leave_queue(&self, id: &SandboxId, turn: &Arc<Turn>) -> bool {
        let mut table = lock(&self.table);
        let queue = table
            .get_mut(id)
            .expect("an id has an entry as long as somebody holds it or waits for it");
        let place = queue.iter().position(|other| Arc::ptr_eq(other, turn));
        if let Some(place) = place {
            queue.remove(place);
        }
        place.is_some()
    }

    fn held(self: &Arc<Self>, id: &SandboxId) -> Held {
        Held { locks: Arc::clone(self), id: id.clone() }
    }

    fn unlock(&self, id: &SandboxId) {
        let mut table = lock(&self.table);
        let queue = table.get_mut(id).expect("an id that is held has an entry");
        let next = queue.pop_front();
        if next.is_none() {
            table.remove(id);
        }
        drop(table);
        if let Some(turn) = next {
            turn.come();
        }
    }
}

impl Held {
    /// Returns the id whose lock this is.
    #[must_use]
    pub fn id(&self) -> &SandboxId {
        &self.id
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.locks.unlock(&self.id);
    }
}

/// One waiter's turn to hold.
#[derive(Debug, Default)]
struct Turn {
    /// Whether it has come. A leaf.
    has_come: Mutex<bool>,
    changed: Condvar,
}

impl Turn {
    fn come(&self) {
        *lock(&self.has_come) = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut has_come = lock(&self.has_come);
        while !*has_come {
            has_come = wait(&self.changed, has_come);
        }
    }

    /// Waits until it has come, for at most `limit`, and says whether it has come.
    fn wait_within(&self, limit: Duration) -> bool {
        let has_come = lock(&self.has_come);
        *wait_while_within(&self.changed, has_come, limit, |has_come| !*has_come)
    }
}
