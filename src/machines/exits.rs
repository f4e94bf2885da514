//! VMMs that end: by themselves, or killed.

use std::{io, ops::ControlFlow, sync::mpsc, time::Duration};

use super::Error;
use crate::{
    sandbox::{RowId, SandboxId},
    sync::{Arc, Mutex, lock},
    sys::process::{Exit, ExitWatch, Process},
};

/// How long a killed VMM may take to exit. The kernel has to free its memory, which for
/// hundreds of GiB takes seconds.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// A VMM that ended by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) row: RowId,
    pub(crate) exit: Exit,
}

/// Watches the processes of all VMMs, and reports those that ended.
#[derive(Debug)]
pub(crate) struct Exits {
    watch: ExitWatch,
    /// `None` once a thread attends to them.
    ended: Mutex<Option<mpsc::Receiver<Ended>>>,
}

impl Exits {
    pub(super) fn new() -> io::Result<Self> {
        let (report, ended) = mpsc::channel();
        let watch = ExitWatch::start(move |row, exit| {
            // Without a receiver the daemon is ending.
            report.send(Ended { row: RowId(row), exit }).ok();
        })?;
        Ok(Self { watch, ended: Mutex::new(Some(ended)) })
    }

    pub(super) fn watch(&self, row: RowId, process: &Arc<Process>) -> io::Result<()> {
        self.watch.watch(row.0, process)
    }

    /// Starts the thread that calls `attend` for each VMM that ended, until it breaks. Only the
    /// first call does.
    ///
    /// # Errors
    /// Where the thread cannot be started.
    pub(crate) fn attend(
        &self,
        mut attend: impl FnMut(Ended) -> ControlFlow<()> + Send + 'static,
    ) -> io::Result<()> {
        let Some(ended) = lock(&self.ended).take() else { return Ok(()) };
        let named = std::thread::Builder::new().name("dozed-exits".to_owned());
        named.spawn(move || {
            while let Ok(ended) = ended.recv() {
                if attend(ended).is_break() {
                    break;
                }
            }
        })?;
        Ok(())
    }
}

/// Kills a VMM and waits until it has exited.
///
/// # Errors
/// `KillTimeout`.
pub(crate) fn end(id: &SandboxId, process: &Process) -> Result<Exit, Error> {
    process.kill();
    process.wait(KILL_LIMIT).ok_or_else(|| Error::KillTimeout { id: id.clone(), limit: KILL_LIMIT })
}
