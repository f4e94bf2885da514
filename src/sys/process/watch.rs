//! A thread that waits for the exit of all processes.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, Ordering},
    thread::{self, JoinHandle},
};

use rustix::{
    buffer::spare_capacity,
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
};

use super::{Exit, Process};
use crate::sync::{Arc, Mutex, lock};

/// The key of the descriptor that stops the thread. The first process has the next.
const STOP: u64 = 0;
/// How many endings one look takes in; more are taken in by the next.
const EVENTS_AT_ONCE: usize = 64;

/// Reports exits of processes, within milliseconds.
pub struct ExitWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread shares with those who add processes.
///
/// # Locking
/// `watched` is a leaf: nothing else is locked while it is.
struct Shared {
    epoll: OwnedFd,
    stop: OwnedFd,
    next_key: AtomicU64,
    /// Each process with its tag, until it was told of.
    watched: Mutex<HashMap<u64, (u64, Arc<Process>)>>,
}

impl ExitWatch {
    /// Starts the thread, which calls `tell` with a process's tag and how it ended. What `tell`
    /// does holds up the news of other processes.
    pub fn start(tell: impl Fn(u64, Exit) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            next_key: AtomicU64::new(STOP + 1),
            watched: Mutex::default(),
        });
        epoll::add(
            &shared.epoll,
            &shared.stop,
            epoll::EventData::new_u64(STOP),
            epoll::EventFlags::IN,
        )?;
        let thread = thread::Builder::new().name("exit-watch".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(&tell)
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Has `process` told of when it ends, exactly once; at once if it has ended. Then it is
    /// forgotten. `tag` is the caller's own, and need not be unique.
    pub fn watch(&self, tag: u64, process: &Arc<Process>) -> io::Result<()> {
        let key = self.shared.next_key.fetch_add(1, Ordering::Relaxed);
        // The thread may be woken before `add` returns, and has to find it then.
        lock(&self.shared.watched).insert(key, (tag, Arc::clone(process)));
        epoll::add(
            &self.shared.epoll,
            process,
            epoll::EventData::new_u64(key),
            epoll::EventFlags::IN | epoll::EventFlags::ONESHOT,
        )
        .inspect_err(|_| {
            lock(&self.shared.watched).remove(&key);
        })?;
        Ok(())
    }
}

impl Shared {
    fn run(&self, tell: &dyn Fn(u64, Exit)) {
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "no longer notified of processes that exit");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return,
                    key => self.take_in(key, tell),
                }
            }
        }
    }

    fn take_in(&self, key: u64, tell: &dyn Fn(u64, Exit)) {
        let Some((tag, process)) = lock(&self.watched).remove(&key) else {
            return;
        };
        // Somebody else may hold the process for long, and its pidfd with it.
        if let Err(error) = epoll::delete(&self.epoll, &process) {
            tracing::warn!(%process, %error, "still listening to a process that has ended");
        }
        let exit = process.exited().unwrap_or(Exit::Unknown);
        // Whoever hears of it may count on its descriptor being closed.
        drop(process);
        tell(tag, exit);
    }
}

impl Drop for ExitWatch {
    fn drop(&mut self) {
        // It fails only if the eventfd is full, and so readable.
        let _written = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of `tell` was reported where it happened.
            let _ended = thread.join();
        }
    }
}

impl fmt::Debug for ExitWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExitWatch")
            .field("watched", &lock(&self.shared.watched).len())
            .finish_non_exhaustive()
    }
}
