//! The change feed: which files of the tree have changed, and which programs still have to be
//! notified.
//!
//! A change is published after it is visible, and publishing does not wait: it appends an event
//! to the log and marks *watch targets* of the tree as stale. For each stale target, the FUSE
//! adapter wakes the programs that poll it, and the announcer notifies the programs that watch it
//! by inotify. Each queue holds a target at most once, however often it changes, so the queues
//! are bounded by the number of sandboxes and the latest state is never lost.
//!
//! While a write to `state` is in progress, the announcer skips that file: the kernel holds its
//! inode lock until the write is answered, and generates the inotify event of a successful write
//! itself.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

use super::{event::Event, log::EventLog};
use crate::{
    sandbox::{Owner, RowId, SandboxId},
    sync::{Arc, Condvar, Mutex, lock, wait},
};

/// How many tasks the announcer has at once. They fit into a socket's buffer, so that
/// sending never waits.
const ON_WAY_MAX: usize = 64;

/// A file or directory of the tree that programs watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WatchTarget {
    /// A sandbox's `state`.
    State(RowId),
    /// A sandbox's `events`.
    Events(RowId),
    /// `dozed.events`.
    AllEvents,
    /// The directory of a sandbox that the daemon deleted.
    Gone(RowId),
}

/// A task for the announcer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) number: u64,
    pub(super) target: WatchTarget,
    /// The sandbox's name; none for the daemon's own files.
    pub(super) id: Option<SandboxId>,
}

/// A sandbox that the daemon deleted and that the kernel still caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// Its row.
    pub row: RowId,
    /// Its owner.
    pub owner: Owner,
}

/// The changes that programs have yet to be notified of.
#[derive(Debug, Default)]
pub struct ChangeFeed {
    log: Arc<EventLog>,
    /// A leaf lock.
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Whether the tree is served. Before that there is no program to notify.
    open: bool,
    closed: bool,
    /// The targets whose pollers are to be woken.
    to_wake: HashSet<WatchTarget>,
    announcing: Announcing,
}

/// The announcer's queue.
#[derive(Debug, Default)]
struct Announcing {
    /// Whether an announcer is ready.
    listening: bool,
    /// The targets that have changed and were not announced.
    stale: HashMap<WatchTarget, Option<SandboxId>>,
    /// The stale targets that can be announced, in the order in which they changed.
    queue: VecDeque<WatchTarget>,
    /// The members of `queue`.
    queued: HashSet<WatchTarget>,
    /// The tasks that the announcer has and has not finished.
    on_way: HashMap<u64, (WatchTarget, Option<SandboxId>)>,
    next: u64,
    /// How many writes to each `state` are in progress.
    writing: HashMap<RowId, usize>,
    /// What the announcer is to make the kernel drop from its caches.
    tombstones: HashMap<SandboxId, Tombstone>,
    /// The name that the announcer's threads look up to identify themselves.
    registration: Option<String>,
    /// The announcer's threads.
    threads: Vec<u32>,
}

impl ChangeFeed {
    /// Returns the log of events.
    #[must_use]
    pub fn log(&self) -> &Arc<EventLog> {
        &self.log
    }

    /// Publishes an event. The change is already visible.
    pub fn publish(&self, event: &Event) {
        self.log.append(event);
        self.mark(&[
            (WatchTarget::State(event.row), Some(&event.id)),
            (WatchTarget::Events(event.row), Some(&event.id)),
            (WatchTarget::AllEvents, None),
        ]);
    }

    /// Publishes that a sandbox was created. The kernel learns it from the `mkdir`, and drops an
    /// earlier sandbox of that name from its caches.
    pub fn publish_created(&self, event: &Event) {
        self.clear_tombstone(&event.id);
        self.publish_to_log(event);
    }

    /// Publishes an event that does not change `state`.
    pub fn publish_to_log(&self, event: &Event) {
        self.log.append(event);
        self.mark(&[
            (WatchTarget::Events(event.row), Some(&event.id)),
            (WatchTarget::AllEvents, None),
        ]);
    }

    /// Publishes that a sandbox was deleted. Unless it was deleted by an `rmdir`, of which the
    /// kernel knows, the announcer tells the kernel.
    pub fn publish_gone(&self, event: &Event, kernel_knows: bool) {
        self.log.append(event);
        let mut inner = lock(&self.inner);
        if !inner.open {
            return;
        }
        inner.to_wake.extend([
            WatchTarget::State(event.row),
            WatchTarget::Events(event.row),
            WatchTarget::AllEvents,
        ]);
        inner.announcing.forget(WatchTarget::State(event.row));
        inner.announcing.forget(WatchTarget::Events(event.row));
        inner.announcing.mark(WatchTarget::AllEvents, None);
        if !kernel_knows && inner.announcing.listening {
            let tombstone = Tombstone { row: event.row, owner: event.owner };
            inner.announcing.tombstones.insert(event.id.clone(), tombstone);
            inner.announcing.mark(WatchTarget::Gone(event.row), Some(&event.id));
        }
        drop(inner);
        self.changed.notify_all();
    }

    fn mark(&self, targets: &[(WatchTarget, Option<&SandboxId>)]) {
        let mut inner = lock(&self.inner);
        if !inner.open {
            return;
        }
        for (target, id) in targets {
            inner.to_wake.insert(*target);
            inner.announcing.mark(*target, *id);
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Notes that a write to `state` begins. The caller must call `wrote` when it ends.
    pub fn writing(&self, row: RowId) {
        *lock(&self.inner).announcing.writing.entry(row).or_insert(0) += 1;
    }

    /// Notes that a write to `state` is about to be answered. The kernel generates the inotify
    /// event of a write that succeeds.
    pub fn wrote(&self, row: RowId, succeeded: bool) {
        let mut inner = lock(&self.inner);
        let announcing = &mut inner.announcing;
        if let Some(count) = announcing.writing.get_mut(&row) {
            *count -= 1;
            if *count == 0 {
                announcing.writing.remove(&row);
            }
        }
        if succeeded {
            announcing.forget(WatchTarget::State(row));
        } else {
            announcing.enqueue(WatchTarget::State(row));
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Returns the tombstone of that name, if there is one.
    #[must_use]
    pub fn tombstone(&self, id: &SandboxId) -> Option<Tombstone> {
        lock(&self.inner).announcing.tombstones.get(id).cloned()
    }

    /// Returns the tombstone of that row, if there is one.
    #[must_use]
    pub fn tombstone_of_row(&self, row: RowId) -> Option<Tombstone> {
        let inner = lock(&self.inner);
        inner.announcing.tombstones.values().find(|tombstone| tombstone.row == row).cloned()
    }

    /// Clears a tombstone. Returns whether there was one.
    pub fn clear_tombstone(&self, id: &SandboxId) -> bool {
        let mut inner = lock(&self.inner);
        let tombstone = inner.announcing.tombstones.remove(id);
        if let Some(tombstone) = &tombstone {
            inner.announcing.forget(WatchTarget::Gone(tombstone.row));
        }
        tombstone.is_some()
    }

    /// Notes that the tree is served.
    pub(super) fn open(&self) {
        lock(&self.inner).open = true;
    }

    /// Stops all notifications.
    pub(super) fn close(&self) {
        lock(&self.inner).closed = true;
        self.changed.notify_all();
    }

    /// Returns whether notifications have stopped.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.inner).closed
    }

    /// Waits for stale targets: those whose pollers to wake, and tasks for the announcer. `None`
    /// once it is closed.
    pub(super) fn wait(&self) -> Option<(Vec<WatchTarget>, Vec<Task>)> {
        let mut inner = lock(&self.inner);
        loop {
            if inner.closed {
                return None;
            }
            let wakes: Vec<WatchTarget> = inner.to_wake.drain().collect();
            let tasks = inner.announcing.take();
            if !wakes.is_empty() || !tasks.is_empty() {
                return Some((wakes, tasks));
            }
            inner = wait(&self.changed, inner);
        }
    }

    /// Takes each thread that looks up `registration` as one of the announcer's.
    pub(super) fn expect_announcer(&self, registration: String) {
        lock(&self.inner).announcing.registration = Some(registration);
    }

    /// Registers the thread `tid` as one of the announcer's if it looks up the name that only the
    /// announcer knows. Returns whether it did.
    pub fn register(&self, name: &[u8], tid: u32) -> bool {
        let mut inner = lock(&self.inner);
        let expected = inner.announcing.registration.as_ref().map(String::as_bytes);
        let is_ours = expected == Some(name) && tid != 0;
        if is_ours {
            inner.announcing.threads.push(tid);
        }
        is_ours
    }

    /// Returns whether the thread `tid` is one of the announcer's.
    #[must_use]
    pub fn is_announcer(&self, tid: u32) -> bool {
        lock(&self.inner).announcing.threads.contains(&tid)
    }

    /// Notes that an announcer is ready: all its threads are registered.
    pub(super) fn announcer_listens(&self) {
        let mut inner = lock(&self.inner);
        inner.announcing.registration = None;
        inner.announcing.listening = true;
        drop(inner);
        self.changed.notify_all();
    }

    /// Notes that the announcer ended. Its unfinished tasks go to the next one.
    pub(super) fn announcer_died(&self) {
        let mut inner = lock(&self.inner);
        let announcing = &mut inner.announcing;
        announcing.listening = false;
        announcing.registration = None;
        announcing.threads.clear();
        for (_, (target, id)) in std::mem::take(&mut announcing.on_way) {
            announcing.mark(target, id.as_ref());
        }
    }

    /// Notes that the announcer finished a task.
    pub(super) fn done(&self, number: u64) {
        let mut inner = lock(&self.inner);
        let announcing = &mut inner.announcing;
        if let Some((target, _)) = announcing.on_way.remove(&number) {
            if let WatchTarget::Gone(row) = target {
                announcing.tombstones.retain(|_, tombstone| tombstone.row != row);
            }
            announcing.enqueue(target);
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Returns how many targets are still to be announced.
    pub(super) fn unannounced(&self) -> usize {
        let inner = lock(&self.inner);
        inner.announcing.stale.len() + inner.announcing.on_way.len()
    }
}

impl Announcing {
    fn mark(&mut self, target: WatchTarget, id: Option<&SandboxId>) {
        self.stale.insert(target, id.cloned());
        self.enqueue(target);
    }

    fn forget(&mut self, target: WatchTarget) {
        self.stale.remove(&target);
    }

    /// Queues a stale target, if it can be announced now.
    fn enqueue(&mut self, target: WatchTarget) {
        if self.stale.contains_key(&target) && self.may_go(target) && self.queued.insert(target) {
            self.queue.push_back(target);
        }
    }

    /// Returns whether a target can be announced: no write to it and no task for it is in
    /// progress.
    fn may_go(&self, target: WatchTarget) -> bool {
        let written = matches!(target, WatchTarget::State(row) if self.writing.contains_key(&row));
        !written && !self.on_way.values().any(|(on_way, _)| *on_way == target)
    }

    /// Takes as many tasks as the announcer may have at once.
    fn take(&mut self) -> Vec<Task> {
        let mut tasks = Vec::new();
        while self.listening && self.on_way.len() < ON_WAY_MAX {
            let Some(target) = self.queue.pop_front() else { break };
            self.queued.remove(&target);
            // A write may have begun since it was queued. The end of that queues it again.
            if !self.may_go(target) {
                continue;
            }
            let Some(id) = self.stale.remove(&target) else { continue };
            self.next += 1;
            self.on_way.insert(self.next, (target, id.clone()));
            tasks.push(Task { number: self.next, target, id });
        }
        tasks
    }
}
