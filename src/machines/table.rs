//! The VMMs that are alive, by the row of their sandbox.

use std::{collections::HashMap, io, path::Path, sync::OnceLock};

use super::{
    Error,
    exits::{Exits, end},
};
use crate::{
    sandbox::{RowId, SandboxId},
    sync::{Arc, Mutex, lock},
    sys::{files::remove_tree, process::Process},
    vmm::{self, DiskTraffic, Machine, Vmm, VmmIdentity},
};

/// A VMM that is alive.
#[derive(Debug)]
pub(crate) struct Live {
    /// Locked for the length of a VMM command. Taken inside the sandbox's own lock or,
    /// by typing on the console, without it; nothing is locked inside.
    pub(crate) machine: Mutex<Box<dyn Machine>>,
    pub(crate) process: Arc<Process>,
    /// A sentence for each feature of its VMM that it does without.
    pub(crate) lacks: Vec<String>,
    /// Which counters show the traffic of its disks.
    pub(crate) disk_traffic: DiskTraffic,
    /// Which build runs it. An upgrade of the program does not change it.
    identity: OnceLock<Arc<VmmIdentity>>,
    /// Why it could not be woken after a sleep, by the last check. A leaf lock.
    pub(crate) unwakeable: Mutex<Option<String>>,
}

/// Keeps the connection to a VMM open, so that its commands need no new descriptor. The machine
/// is locked only while this is made and dropped.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub(crate) struct Connected<'a>(&'a Live);

impl Live {
    /// Opens the connection before an act, for the act and for its undo.
    ///
    /// # Errors
    /// As `Machine::connect`.
    pub(crate) fn connect(&self) -> Result<Connected<'_>, vmm::Error> {
        // Also where it fails, half of it may be open.
        let connected = Connected(self);
        lock(&self.machine).connect()?;
        Ok(connected)
    }

    /// Returns which build of `vmm` runs the guest. The process is asked once.
    ///
    /// # Errors
    /// As `Vmm::identity_of`.
    pub(crate) fn identity(&self, vmm: &dyn Vmm) -> Result<Arc<VmmIdentity>, vmm::Error> {
        if let Some(identity) = self.identity.get() {
            return Ok(Arc::clone(identity));
        }
        let identity = vmm.identity_of(&self.process)?;
        Ok(Arc::clone(self.identity.get_or_init(|| identity)))
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        lock(&self.0.machine).disconnect();
    }
}

/// The VMMs that are alive.
#[derive(Debug)]
pub(crate) struct Table {
    /// A leaf lock.
    by_row: Mutex<HashMap<RowId, Arc<Live>>>,
    exits: Exits,
}

impl Table {
    /// Creates an empty table.
    ///
    /// # Errors
    /// Where the ends of processes cannot be watched.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { by_row: Mutex::default(), exits: Exits::new()? })
    }

    /// Returns the watch over the ends of all VMMs.
    pub(crate) fn exits(&self) -> &Exits {
        &self.exits
    }

    /// Adds a VMM, and watches for its end. Where that fails the VMM is killed.
    ///
    /// # Errors
    /// Where its end cannot be watched.
    pub(crate) fn add(&self, row: RowId, machine: Box<dyn Machine>) -> io::Result<Arc<Live>> {
        let process = Arc::clone(machine.process());
        let live = Arc::new(Live {
            lacks: machine.lacks(),
            disk_traffic: machine.disk_traffic(),
            machine: Mutex::new(machine),
            process: Arc::clone(&process),
            identity: OnceLock::new(),
            unwakeable: Mutex::default(),
        });
        lock(&self.by_row).insert(row, Arc::clone(&live));
        self.exits.watch(row, &process).inspect_err(|_| process.kill())?;
        Ok(live)
    }

    /// Returns the VMM of a sandbox.
    pub(crate) fn get(&self, row: RowId) -> Option<Arc<Live>> {
        lock(&self.by_row).get(&row).map(Arc::clone)
    }

    /// Returns the process of a sandbox's VMM.
    pub(crate) fn pid(&self, row: RowId) -> Option<u32> {
        self.get(row).map(|live| live.process.identity().pid)
    }

    /// Removes a VMM. Its end is no longer reported.
    pub(crate) fn remove(&self, row: RowId) -> Option<Arc<Live>> {
        lock(&self.by_row).remove(&row)
    }

    /// Returns all of them.
    pub(crate) fn all(&self) -> Vec<(RowId, Arc<Live>)> {
        lock(&self.by_row).iter().map(|(row, live)| (*row, Arc::clone(live))).collect()
    }

    /// Removes and kills the VMM of a sandbox, if it has one, and removes its sockets.
    ///
    /// # Errors
    /// `KillTimeout`.
    pub(crate) fn kill(&self, row: RowId, id: &SandboxId, sockets: &Path) -> Result<(), Error> {
        let live = self.remove(row);
        if let Some(live) = &live {
            live.process.kill();
        }
        // The process takes a moment to exit, and no longer needs its sockets.
        remove_sockets(id, sockets);
        live.map_or(Ok(()), |live| end(id, &live.process).map(drop))
    }
}

/// Removes the sockets of a VMM. The next VMM replaces those that stay.
pub(crate) fn remove_sockets(id: &SandboxId, dir: &Path) {
    if let Err(error) = remove_tree(dir) {
        tracing::warn!(%id, %error, "removing the sockets of a VMM");
    }
}
