//! Where the files, the sockets and the processes of sandboxes are found.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    index::Index,
    machines::ConsoleLog,
    sandbox::{Record, RowId, State},
    snapshot::{self, Home},
    sys::{
        files::{free_bytes, ids_below, keeps_room, let_through, make_private_dir, rename_durably},
        host::random_name,
        process::{Exit, Process},
    },
    vmm::PlannedVsock,
};

/// The key of the store's name in the index.
const NAME_KEY: &str = "store_name";
/// How deep the files of a sandbox are in its directory: those of a snapshot are in their own.
const HOME_DEPTH: usize = 2;

/// The directories of all sandboxes.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Where their sockets are; a tmpfs.
    runtime: PathBuf,
    /// Names this store in the command line of its VMMs.
    name: String,
}

impl Store {
    /// Opens the store at `dir`, and makes what it lacks.
    pub(super) fn open(dir: PathBuf, runtime: PathBuf, index: &Index) -> io::Result<Self> {
        for sub in ["sandboxes", "trash"] {
            make_private_dir(&dir.join(sub))?;
        }
        make_private_dir(&runtime)?;
        let name = match index.meta(NAME_KEY).map_err(io::Error::other)? {
            Some(name) => name,
            None => {
                let name = random_name()?;
                index.set_meta(NAME_KEY, &name).map_err(io::Error::other)?;
                name
            }
        };
        Ok(Self { dir, runtime, name })
    }

    /// Returns the directory that has one for each sandbox.
    pub(super) fn sandboxes(&self) -> PathBuf {
        self.dir.join("sandboxes")
    }

    /// Returns where the files of deleted sandboxes are until they are removed.
    pub(super) fn trash(&self) -> PathBuf {
        self.dir.join("trash")
    }

    /// Makes the directory for the sockets of a sandbox. With a vsock its owner has to get there;
    /// the rest of the way is the driver's to open.
    pub(super) fn make_runtime_dir(&self, record: &Record) -> io::Result<PathBuf> {
        let dir = self.runtime_dir(record.row);
        make_private_dir(&dir)?;
        if record.spec.vsock {
            let_through(&self.runtime)?;
        }
        Ok(dir)
    }

    /// Returns the directory of a sandbox in the store.
    #[must_use]
    pub fn home(&self, record: &Record) -> Home {
        Home::new(&self.dir, record.row)
    }

    /// Returns the socket by which the host reaches the guest of a sandbox that runs, if it
    /// has one.
    #[must_use]
    pub fn vsock(&self, record: &Record) -> Option<PathBuf> {
        let has = record.spec.vsock && record.state() == State::Running;
        has.then(|| PlannedVsock::new(&self.runtime_dir(record.row), record.owner).socket())
    }

    /// Returns the log of a sandbox's console.
    #[must_use]
    pub fn console(&self, record: &Record) -> ConsoleLog {
        ConsoleLog::at(self.home(record).console_log())
    }

    /// Returns the directory for a sandbox's sockets.
    pub(super) fn runtime_dir(&self, row: RowId) -> PathBuf {
        self.runtime.join(row.to_string())
    }

    /// Returns the word by which the processes of this sandbox are found.
    pub(super) fn token(&self, row: RowId) -> String {
        format!("{}{row}:", self.token_prefix())
    }

    /// Returns what the tokens of all sandboxes of this store begin with.
    pub(super) fn token_prefix(&self) -> String {
        format!("dozed:{}:", self.name)
    }

    /// Moves away what already has the directory of a new row. The rows of one index are
    /// never used twice, so it is from before the index was lost or replaced: somebody's
    /// disks and snapshots, which must neither be lost nor become another's.
    pub(super) fn keep_strangers_files(&self, row: RowId) -> io::Result<()> {
        let dir = self.sandboxes().join(row.to_string());
        if !dir.try_exists()? {
            return Ok(());
        }
        let lost = self.dir.join("lost");
        make_private_dir(&lost)?;
        let kept = free_name(&lost.join(row.to_string()));
        tracing::warn!(kept = %kept.display(), "kept the files of a sandbox that no index knows");
        rename_durably(&dir, &kept)
    }

    /// Says whether a process has files of a sandbox open. The VMM of a sandbox always has; one
    /// of the same name has not where this store is a copy of another, or the other of this.
    pub(super) fn uses_files_of(&self, row: RowId, process: &Process) -> io::Result<bool> {
        let dir = Home::new(&self.dir, row).dir().to_owned();
        match ids_below(&dir, HOME_DEPTH) {
            Ok(files) => process.has_open(&files),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn keeps_room(&self) -> bool {
        keeps_room(&self.dir).unwrap_or(false)
    }

    /// Says in one line how the VMM of a sandbox came to end by a signal.
    pub(super) fn reason_of_signal(&self, signal: i32) -> String {
        let killed = format!("the VMM was killed by signal {signal}");
        if !Exit::Signal(signal).is_bus_error() {
            return killed;
        }
        let store = self.dir.display();
        let free = free_bytes(&self.dir).unwrap_or(u64::MAX);
        if free < snapshot::SLEEP_RESERVE_BYTES {
            format!(
                "{killed} (SIGBUS): its guest used memory for which the disk had no space; {free} \
                 bytes are free in {store}; free some"
            )
        } else {
            format!(
                "{killed} (SIGBUS): memory of its guest could not be read from or written to the \
                 disk of {store}; the kernel's log may say why"
            )
        }
    }
}

/// Returns the first of `PATH.1`, `PATH.2`, … that does not exist.
pub(super) fn free_name(path: &Path) -> PathBuf {
    (1u64..)
        .map(|number| path.with_added_extension(number.to_string()))
        .find(|candidate| !candidate.exists())
        .expect("no directory has 2^64 files")
}
