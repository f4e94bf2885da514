//! Writers that wait, and their signals.
//!
//! The kernel cannot interrupt a request that the daemon has read, except by the
//! daemon's answer, and fuser hands no interrupts on. So a thread looks a few times
//! a second whether a waiting writer has a signal pending that it does not ignore,
//! and answers it with EINTR. The operation goes on; its result has nobody to go to.
//!
//! A look at a thread that is in many groups takes the kernel long. So each look around gives
//! a user so much of it, and goes on with the rest of theirs the next time.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    thread::JoinHandle,
    time::Duration,
};

use fuser::{Errno, ReplyWrite};

use super::translate::reply_written;
use crate::{
    events::ChangeFeed,
    sandbox::RowId,
    sync::{Arc, Condvar, Mutex, lock, wait, wait_while_within},
    sys::task::{SignalLook, look_for_signal},
    tree::{Caller, File, Node},
};

/// How often writers are looked at. Half of what the contract allows, and then half.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How much of `/proc` is read for the writers of one user in a look around: of some 700, or of
/// two that are in as many groups as one may be. It takes the kernel up to 40 ms.
const LOOK_MAX_BYTES: usize = 1 << 20;

/// How a request is answered that nobody waits for any longer.
type Interrupt = Box<dyn FnOnce() + Send>;

/// The writers that wait.
#[derive(Default)]
pub(super) struct Waiting {
    /// A leaf lock.
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    writers: Vec<Writer>,
    next: u64,
    stopped: bool,
}

struct Writer {
    number: u64,
    caller: Caller,
    interrupt: Interrupt,
}

/// The answer of a write that the announcer knows of, if it is to a `state`.
#[derive(Debug)]
pub(super) struct AnnouncedWrite {
    state_of: Option<RowId>,
    feed: Arc<ChangeFeed>,
    reply: ReplyWrite,
}

impl AnnouncedWrite {
    /// From now on the announcer leaves the file alone.
    /// It need not know of one that is answered at once.
    pub(super) fn begin(
        node: Node,
        is_later: bool,
        feed: &Arc<ChangeFeed>,
        reply: ReplyWrite,
    ) -> Self {
        let state_of = match node {
            Node::File(row, File::State) if is_later => Some(row),
            Node::File(..) | Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) => None,
        };
        if let Some(row) = state_of {
            feed.writing(row);
        }
        Self { state_of, feed: Arc::clone(feed), reply }
    }

    /// Answers, after which it is known who tells of what has changed meanwhile.
    pub(super) fn give(self, result: Result<usize, Errno>) {
        if let Some(row) = self.state_of {
            self.feed.wrote(row, result.is_ok());
        }
        reply_written(self.reply, result);
    }
}

impl Waiting {
    /// Starts the thread that looks.
    pub(super) fn start() -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let waiting = Arc::new(Self::default());
        let this = Arc::clone(&waiting);
        let thread = std::thread::Builder::new()
            .name("dozed-signals".to_owned())
            .spawn(move || this.look())?;
        Ok((waiting, thread))
    }

    /// Has `interrupt` called if the caller is signalled before `leave`.
    pub(super) fn enter(&self, caller: Caller, interrupt: impl FnOnce() + Send + 'static) -> u64 {
        let mut table = lock(&self.table);
        table.next += 1;
        let number = table.next;
        table.writers.push(Writer { number, caller, interrupt: Box::new(interrupt) });
        if table.writers.len() == 1 {
            self.changed.notify_all();
        }
        number
    }

    /// The writer has its answer.
    pub(super) fn leave(&self, number: u64) {
        lock(&self.table).writers.retain(|writer| writer.number != number);
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        lock(&self.table).stopped = true;
        self.changed.notify_all();
    }

    fn look(&self) {
        let mut turns = Turns::default();
        let mut table = lock(&self.table);
        while !table.stopped {
            if table.writers.is_empty() {
                table = wait(&self.changed, table);
            }
            table = wait_while_within(&self.changed, table, LOOK_EVERY, |table| !table.stopped);
            let waiting: Vec<_> =
                table.writers.iter().map(|writer| (writer.number, writer.caller)).collect();
            drop(table);
            let signalled = turns.signalled(&waiting, look_for_signal);
            table = lock(&self.table);
            let mut interrupts = Vec::new();
            table.writers = std::mem::take(&mut table.writers)
                .into_iter()
                .filter_map(|writer| {
                    if signalled.contains(&writer.number) {
                        interrupts.push(writer.interrupt);
                        None
                    } else {
                        Some(writer)
                    }
                })
                .collect();
            drop(table);
            for interrupt in interrupts {
                interrupt();
            }
            table = lock(&self.table);
        }
    }
}

/// Whose turn it is to be looked at.
#[derive(Debug, Default)]
struct Turns {
    /// By user: the last one that was looked at, where some were left for the next time.
    left_off: HashMap<u32, u64>,
}

impl Turns {
    /// Looks at writers, in the order of their numbers, and returns those that are signalled.
    fn signalled(
        &mut self,
        writers: &[(u64, Caller)],
        look: impl Fn(u32) -> SignalLook,
    ) -> Vec<u64> {
        let mut by_user: BTreeMap<u32, Vec<(u64, u32)>> = BTreeMap::new();
        for (number, Caller { uid, tid, .. }) in writers {
            by_user.entry(*uid).or_default().push((*number, *tid));
        }
        let mut signalled = Vec::new();
        let left_off = std::mem::take(&mut self.left_off);
        for (uid, mut theirs) in by_user {
            let last = left_off.get(&uid).copied().unwrap_or(0);
            let first = theirs.partition_point(|(number, _)| *number <= last);
            theirs.rotate_left(first);
            let mut spent = 0;
            for (number, tid) in theirs {
                let SignalLook { has_signal, cost_bytes } = look(tid);
                if has_signal {
                    signalled.push(number);
                }
                spent += cost_bytes;
                if spent >= LOOK_MAX_BYTES {
                    self.left_off.insert(uid, number);
                    break;
                }
            }
        }
        signalled
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = lock(&self.table);
        f.debug_struct("Waiting").field("writers", &table.writers.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_in_many_groups_is_looked_at_in_turns_and_others_each_time() {
        const MANY: usize = LOOK_MAX_BYTES / 2;
        let caller = |uid, tid| Caller { uid, gid: uid, tid };
        let writers: Vec<_> =
            (1..=5).map(|n| (n, caller(1, 100))).chain([(6, caller(2, 200))]).collect();
        let looked_at = std::cell::RefCell::new(Vec::new());
        let look = |tid: u32| {
            looked_at.borrow_mut().push(tid);
            SignalLook { has_signal: true, cost_bytes: if tid == 100 { MANY } else { 1500 } }
        };
        let mut turns = Turns::default();
        let rounds: Vec<_> = (0..4).map(|_| turns.signalled(&writers, look)).collect();
        assert_eq!(rounds, [vec![1, 2, 6], vec![3, 4, 6], vec![5, 1, 6], vec![2, 3, 6]]);
        assert_eq!(looked_at.borrow().len(), 12);
        // Those that are gone leave nothing behind.
        assert_eq!(turns.signalled(&writers[5..], look), [6]);
        assert_eq!(turns.left_off, HashMap::new());
    }
}
