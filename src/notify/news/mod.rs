//! What has changed and who is still to be told.
//!
//! Whoever changes a sandbox says so here, after the change can be seen, and is not held
//! up: an event goes into the log and *spots* of the tree become stale. Two are told of a
//! stale spot: programs that poll it, by whoever serves the tree, and programs that watch
//! it by inotify, by the announcer. A spot is in each queue at most once, however often it
//! changes, so the queues are bounded by the count of sandboxes and the latest state is
//! never lost.
//!
//! While somebody's write to a `state` is under way the announcer leaves that file alone:
//! the kernel has its inode locked until the write is answered, and tells of a write that
//! succeeds by itself.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

use super::{event::Event, log::Log};
use crate::{
    sandbox::{Owner, RowId, SandboxId},
    sync::{Arc, Condvar, Mutex, lock, wait},
};

/// How many announcements are on their way at once. They fit into a socket's buffer, so
/// that sending never waits.
const ON_WAY_MAX: usize = 64;

/// A place in the tree that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spot {
    /// A sandbox's `state`.
    State(RowId),
    /// A sandbox's `events`.
    Events(RowId),
    /// `dozed.events`.
    AllEvents,
    /// A sandbox's directory, which the daemon itself has deleted.
    Gone(RowId),
}

/// Something that the announcer is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) number: u64,
    pub(super) spot: Spot,
    /// The sandbox's name; none for the daemon's own files.
    pub(super) id: Option<SandboxId>,
}

/// A sandbox that the daemon has deleted and that is still in the kernel's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ghost {
    /// Its row.
    pub row: RowId,
    /// Whose it was.
    pub owner: Owner,
}

/// All news.
#[derive(Debug, Default)]
pub struct News {
    log: Arc<Log>,
    /// A leaf lock.
    desk: Mutex<Desk>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Desk {
    /// Whether the tree is served; before that nobody can be told.
    open: bool,
    closed: bool,
    /// What pollers are to be woken for.
    to_wake: HashSet<Spot>,
    announcing: Announcing,
}

/// What the announcer has to do and does.
#[derive(Debug, Default)]
struct Announcing {
    /// Whether there is an announcer.
    listening: bool,
    /// What has changed and was not announced.
    stale: HashMap<Spot, Option<SandboxId>>,
    /// Those of them that can be announced, in the order in which they changed.
    queue: VecDeque<Spot>,
    /// What is in the queue, so that nothing is twice.
    queued: HashSet<Spot>,
    /// What the announcer was told and has not done yet.
    on_way: HashMap<u64, (Spot, Option<SandboxId>)>,
    next: u64,
    /// How many writes to each `state` are under way.
    writing: HashMap<RowId, usize>,
    /// What the announcer is to make the kernel forget.
    ghosts: HashMap<SandboxId, Ghost>,
    /// The name that the announcer's threads look up, so that we get to know them.
    greeting: Option<String>,
    /// The announcer's threads.
    threads: Vec<u32>,
}

impl News {
    /// Returns the log of events.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Tells of an event. What it is about can be seen already.
    pub fn tell(&self, event: &Event) {
        self.log.append(event);
        self.mark(&[
            (Spot::State(event.row), Some(&event.id)),
            (Spot::Events(event.row), Some(&event.id)),
            (Spot::AllEvents, None),
        ]);
    }

    /// Tells that a sandbox was made. Whoever made it tells the kernel, which thereby
    /// forgets an earlier one of that name.
    pub fn tell_created(&self, event: &Event) {
        self.lay(&event.id);
        self.tell_log(event);
    }

    /// Tells of an event that is no change of a state.
    pub fn tell_log(&self, event: &Event) {
        self.log.append(event);
        self.mark(&[(Spot::Events(event.row), Some(&event.id)), (Spot::AllEvents, None)]);
    }

    /// Tells that a sandbox is gone. If the kernel has not been told by whoever removed
    /// it, the announcer does that.
    pub fn tell_gone(&self, event: &Event, kernel_knows: bool) {
        self.log.append(event);
        let mut desk = lock(&self.desk);
        if !desk.open {
            return;
        }
        desk.to_wake.extend([Spot::State(event.row), Spot::Events(event.row), Spot::AllEvents]);
        desk.announcing.forget(Spot::State(event.row));
        desk.announcing.forget(Spot::Events(event.row));
        desk.announcing.mark(Spot::AllEvents, None);
        if !kernel_knows && desk.announcing.listening {
            let ghost = Ghost { row: event.row, owner: event.owner };
            desk.announcing.ghosts.insert(event.id.clone(), ghost);
            desk.announcing.mark(Spot::Gone(event.row), Some(&event.id));
        }
        drop(desk);
        self.changed.notify_all();
    }

    fn mark(&self, spots: &[(Spot, Option<&SandboxId>)]) {
        let mut desk = lock(&self.desk);
        if !desk.open {
            return;
        }
        for (spot, id) in spots {
            desk.to_wake.insert(*spot);
            desk.announcing.mark(*spot, *id);
        }
        drop(desk);
        self.changed.notify_all();
    }

    /// A write to the `state` of a sandbox begins. `wrote` must follow.
    pub fn writing(&self, row: RowId) {
        *lock(&self.desk).announcing.writing.entry(row).or_insert(0) += 1;
    }

    /// A write to `state` is about to be answered. Of one that succeeds the kernel tells.
    pub fn wrote(&self, row: RowId, succeeded: bool) {
        let mut desk = lock(&self.desk);
        let announcing = &mut desk.announcing;
        if let Some(count) = announcing.writing.get_mut(&row) {
            *count -= 1;
            if *count == 0 {
                announcing.writing.remove(&row);
            }
        }
        if succeeded {
            announcing.forget(Spot::State(row));
        } else {
            announcing.enqueue(Spot::State(row));
        }
        drop(desk);
        self.changed.notify_all();
    }

    /// Returns the ghost of that name, if there is one.
    #[must_use]
    pub fn ghost(&self, id: &SandboxId) -> Option<Ghost> {
        lock(&self.desk).announcing.ghosts.get(id).cloned()
    }

    /// Returns the ghost of that row, if there is one.
    #[must_use]
    pub fn ghost_of(&self, row: RowId) -> Option<Ghost> {
        let desk = lock(&self.desk);
        desk.announcing.ghosts.values().find(|ghost| ghost.row == row).cloned()
    }

    /// Lets a ghost go: the kernel forgets it. Says whether there was one.
    pub fn lay(&self, id: &SandboxId) -> bool {
        let mut desk = lock(&self.desk);
        let ghost = desk.announcing.ghosts.remove(id);
        if let Some(ghost) = &ghost {
            desk.announcing.forget(Spot::Gone(ghost.row));
        }
        ghost.is_some()
    }

    /// From now on the tree is served.
    pub(super) fn open(&self) {
        lock(&self.desk).open = true;
    }

    /// Nobody is told any more.
    pub(super) fn close(&self) {
        lock(&self.desk).closed = true;
        self.changed.notify_all();
    }

    /// Says whether nobody is told any more.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.desk).closed
    }

    /// Waits until there is something to tell; `None` once it is closed.
    pub(super) fn wait(&self) -> Option<(Vec<Spot>, Vec<Task>)> {
        let mut desk = lock(&self.desk);
        loop {
            if desk.closed {
                return None;
            }
            let wakes: Vec<Spot> = desk.to_wake.drain().collect();
            let tasks = desk.announcing.take();
            if !wakes.is_empty() || !tasks.is_empty() {
                return Some((wakes, tasks));
            }
            desk = wait(&self.changed, desk);
        }
    }

    /// Whoever looks up `greeting` from now on is a thread of the announcer.
    pub(super) fn expect_announcer(&self, greeting: String) {
        lock(&self.desk).announcing.greeting = Some(greeting);
    }

    /// Notes the thread `tid` as the announcer's if it looks up what only that knows.
    pub fn greet(&self, name: &[u8], tid: u32) -> bool {
        let mut desk = lock(&self.desk);
        let expected = desk.announcing.greeting.as_ref().map(String::as_bytes);
        let is_ours = expected == Some(name) && tid != 0;
        if is_ours {
            desk.announcing.threads.push(tid);
        }
        is_ours
    }

    /// Says whether the thread `tid` is the announcer's.
    #[must_use]
    pub fn is_announcer(&self, tid: u32) -> bool {
        lock(&self.desk).announcing.threads.contains(&tid)
    }

    /// There is an announcer, and its threads are known.
    pub(super) fn announcer_listens(&self) {
        let mut desk = lock(&self.desk);
        desk.announcing.greeting = None;
        desk.announcing.listening = true;
        drop(desk);
        self.changed.notify_all();
    }

    /// There is no announcer any more; the next one gets what this one had not done.
    pub(super) fn announcer_died(&self) {
        let mut desk = lock(&self.desk);
        let announcing = &mut desk.announcing;
        announcing.listening = false;
        announcing.greeting = None;
        announcing.threads.clear();
        for (_, (spot, id)) in std::mem::take(&mut announcing.on_way) {
            announcing.mark(spot, id.as_ref());
        }
    }

    /// The announcer has done a task.
    pub(super) fn done(&self, number: u64) {
        let mut desk = lock(&self.desk);
        let announcing = &mut desk.announcing;
        if let Some((spot, _)) = announcing.on_way.remove(&number) {
            if let Spot::Gone(row) = spot {
                announcing.ghosts.retain(|_, ghost| ghost.row != row);
            }
            announcing.enqueue(spot);
        }
        drop(desk);
        self.changed.notify_all();
    }

    /// Returns how much is still to be announced.
    pub(super) fn unannounced(&self) -> usize {
        let desk = lock(&self.desk);
        desk.announcing.stale.len() + desk.announcing.on_way.len()
    }
}

impl Announcing {
    fn mark(&mut self, spot: Spot, id: Option<&SandboxId>) {
        self.stale.insert(spot, id.cloned());
        self.enqueue(spot);
    }

    fn forget(&mut self, spot: Spot) {
        self.stale.remove(&spot);
    }

    /// Enters a stale spot into the queue if nothing stands against it.
    fn enqueue(&mut self, spot: Spot) {
        if self.stale.contains_key(&spot) && self.may_go(spot) && self.queued.insert(spot) {
            self.queue.push_back(spot);
        }
    }

    /// A file is left alone while it is written, and until the last touch has ended.
    fn may_go(&self, spot: Spot) -> bool {
        let written = matches!(spot, Spot::State(row) if self.writing.contains_key(&row));
        !written && !self.on_way.values().any(|(on_way, _)| *on_way == spot)
    }

    /// Takes as many tasks as the announcer may have.
    fn take(&mut self) -> Vec<Task> {
        let mut tasks = Vec::new();
        while self.listening && self.on_way.len() < ON_WAY_MAX {
            let Some(spot) = self.queue.pop_front() else { break };
            self.queued.remove(&spot);
            // It may have been told by others since, or a write have begun. Whatever ends
            // what stands against it enters it again.
            if !self.may_go(spot) {
                continue;
            }
            let Some(id) = self.stale.remove(&spot) else { continue };
            self.next += 1;
            self.on_way.insert(self.next, (spot, id.clone()));
            tasks.push(Task { number: self.next, spot, id });
        }
        tasks
    }
}
