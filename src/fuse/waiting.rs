//! Writers that wait, and their signals.
//!
//! The kernel cannot interrupt a request that the daemon has read, except by the
//! daemon's answer, and fuser hands no interrupts on. So a thread looks a few times
//! a second whether a waiting writer has a signal pending that it does not ignore,
//! and answers it with EINTR. The operation goes on; its result has nobody to go to.

use std::{io, thread::JoinHandle, time::Duration};

use fuser::{Errno, ReplyWrite};

use super::translate::reply_written;
use crate::{
    events::ChangeFeed,
    sandbox::RowId,
    sync::{Arc, Condvar, Mutex, lock, wait, wait_while_within},
    sys::task::has_signal,
    tree::{File, Node},
};

/// How often writers are looked at. Half of what the contract allows, and then half.
const LOOK_EVERY: Duration = Duration::from_millis(100);

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
    tid: u32,
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
    pub(super) fn begin(node: Node, feed: &Arc<ChangeFeed>, reply: ReplyWrite) -> Self {
        let state_of = match node {
            Node::File(row, File::State) => Some(row),
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

    /// Has `interrupt` called if the thread `tid` is signalled before `leave`.
    pub(super) fn enter(&self, tid: u32, interrupt: impl FnOnce() + Send + 'static) -> u64 {
        let mut table = lock(&self.table);
        table.next += 1;
        let number = table.next;
        table.writers.push(Writer { number, tid, interrupt: Box::new(interrupt) });
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
        let mut table = lock(&self.table);
        while !table.stopped {
            if table.writers.is_empty() {
                table = wait(&self.changed, table);
            }
            table = wait_while_within(&self.changed, table, LOOK_EVERY, |table| !table.stopped);
            let waiting: Vec<_> =
                table.writers.iter().map(|writer| (writer.number, writer.tid)).collect();
            drop(table);
            let signalled: Vec<_> =
                waiting.into_iter().filter(|(_, tid)| has_signal(*tid)).collect();
            table = lock(&self.table);
            let mut interrupts = Vec::new();
            table.writers = std::mem::take(&mut table.writers)
                .into_iter()
                .filter_map(|writer| {
                    if signalled.iter().any(|(number, _)| *number == writer.number) {
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

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = lock(&self.table);
        f.debug_struct("Waiting").field("writers", &table.writers.len()).finish_non_exhaustive()
    }
}
