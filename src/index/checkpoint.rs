//! Moving the log into the file, by a thread with a connection of its own.
//!
//! SQLite would do it within a commit, with two syncs, while the connection that writes is
//! locked. This way a writer waits for none of it.

use std::{
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

use rusqlite::Connection;

use super::{Error, schema};

/// After how many changed rows the log is moved. Each is up to six pages of 4 KiB, of the
/// table and its indexes, so the log has some 16 MiB then.
const ROWS: usize = 700;

/// How many pages the log may have when all but what was written meanwhile has been moved;
/// 32 MiB.
const PAGES_MAX: i64 = 8192;

/// The thread, and how much there is for it to do. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Checkpoints {
    rows: AtomicUsize,
    /// `None` once it is over.
    due: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpoints {
    /// Starts the thread.
    pub(super) fn start(path: &Path) -> Result<Self, Error> {
        let connection = schema::open_for_checkpoints(path)?;
        let (due, is_due) = sync_channel(1);
        let checkpoints = thread::Builder::new().name("dozed-checkpt".to_owned());
        let thread = checkpoints
            .spawn(move || {
                while is_due.recv().is_ok() {
                    run(&connection);
                }
            })
            .map_err(|source| Error::Make { path: path.to_owned(), source })?;
        Ok(Self { rows: AtomicUsize::new(0), due: Some(due), thread: Some(thread) })
    }

    /// Notes that so many rows were written.
    pub(super) fn wrote(&self, rows: usize) {
        if self.rows.fetch_add(rows, Ordering::SeqCst) + rows >= ROWS {
            self.rows.store(0, Ordering::SeqCst);
            // One that is due already has these too.
            self.due.as_ref().map(|due| due.try_send(()));
        }
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        drop(self.due.take());
        // Its connection is closed before the files may go.
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Moves as much as can be moved while others read and write.
fn run(connection: &Connection) {
    if let Err(error) = schema::checkpoint(connection, PAGES_MAX) {
        // The log goes on growing, and the next one moves all of it.
        tracing::warn!(%error, "checkpointing the index");
    }
}
