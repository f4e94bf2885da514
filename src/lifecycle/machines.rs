//! The machines that live, and the thread that sees them die.

use std::{
    collections::HashMap,
    io,
    sync::{OnceLock, mpsc},
};

use super::usage::Usage;
use crate::{
    sandbox::RowId,
    sync::{Arc, Mutex, lock},
    sys::process::{Exit, ExitWatch, Process},
    vmm::{self, DiskTraffic, Machine, VmmIdentity},
};

/// A machine that lives.
#[derive(Debug)]
pub(super) struct Live {
    /// Held for the length of a VMM command. Taken inside the sandbox's own lock or,
    /// by typing on the console, without it; nothing is locked inside.
    pub(super) machine: Mutex<Box<dyn Machine>>,
    pub(super) process: Arc<Process>,
    /// A sentence for each thing that it lacks of what its VMM can give.
    pub(super) lacks: Vec<String>,
    /// What tells of its disks.
    pub(super) disk_traffic: DiskTraffic,
    /// What it was seen to use. A leaf lock.
    pub(super) usage: Mutex<Usage>,
    /// What its VMM is, which an upgrade of the program leaves as it was.
    pub(super) identity: OnceLock<Arc<VmmIdentity>>,
    /// Why it could not be woken if it were put to sleep, by the last look. A leaf lock.
    pub(super) unwakeable: Mutex<Option<String>>,
}

/// A machine whose commands need no descriptor for as long as this is there. It is locked when
/// this is made and when it is dropped.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub(super) struct Connected<'a>(&'a Live);

impl Live {
    /// Has what commands are sent by opened before an act, for it and for what takes it back.
    ///
    /// # Errors
    /// As `Machine::connect`.
    pub(super) fn connect(&self) -> Result<Connected<'_>, vmm::Error> {
        // Also where it fails, half of it may be open.
        let connected = Connected(self);
        lock(&self.machine).connect()?;
        Ok(connected)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        lock(&self.0.machine).disconnect();
    }
}

/// A VMM that ended by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    pub(super) row: RowId,
    pub(super) exit: Exit,
}

/// The table of machines.
#[derive(Debug)]
pub(super) struct Machines {
    /// A leaf lock.
    table: Mutex<HashMap<RowId, Arc<Live>>>,
    watch: ExitWatch,
    ended: Mutex<Option<mpsc::Receiver<Ended>>>,
}

impl Machines {
    /// Starts with no machines.
    pub(super) fn start() -> io::Result<Self> {
        let (tell, ended) = mpsc::channel();
        let watch = ExitWatch::start(move |row, exit| {
            // With nobody left to hear it, the daemon is ending.
            tell.send(Ended { row: RowId(row), exit }).ok();
        })?;
        Ok(Self { table: Mutex::default(), watch, ended: Mutex::new(Some(ended)) })
    }

    /// Returns where ends are told. Only the first caller gets it.
    pub(super) fn ended(&self) -> Option<mpsc::Receiver<Ended>> {
        lock(&self.ended).take()
    }

    /// Enters a machine, and has its end watched.
    pub(super) fn enter(&self, row: RowId, machine: Box<dyn Machine>) -> io::Result<Arc<Live>> {
        let process = Arc::clone(machine.process());
        let live = Arc::new(Live {
            lacks: machine.lacks(),
            disk_traffic: machine.disk_traffic(),
            machine: Mutex::new(machine),
            process: Arc::clone(&process),
            usage: Mutex::default(),
            identity: OnceLock::new(),
            unwakeable: Mutex::default(),
        });
        lock(&self.table).insert(row, Arc::clone(&live));
        self.watch.watch(row.0, &process)?;
        Ok(live)
    }

    /// Returns the machine of a sandbox.
    pub(super) fn get(&self, row: RowId) -> Option<Arc<Live>> {
        lock(&self.table).get(&row).map(Arc::clone)
    }

    /// Removes a machine from the table. Its end is no longer reported.
    pub(super) fn remove(&self, row: RowId) -> Option<Arc<Live>> {
        lock(&self.table).remove(&row)
    }

    /// Returns all of them.
    pub(super) fn all(&self) -> Vec<(RowId, Arc<Live>)> {
        lock(&self.table).iter().map(|(row, live)| (*row, Arc::clone(live))).collect()
    }
}
