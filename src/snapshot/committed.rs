//! A committed snapshot, on its way to being woken.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::{
    Error, FileFacts, Home, MANIFEST, MEMORY, Manifest, SMALL_FILE_MAX_BYTES, digest,
    manifest::{MANIFEST_MAX_BYTES, Unreadable},
};
use crate::{
    sandbox::SandboxId,
    sys::{cancel::Cancel, files},
};

/// A committed snapshot whose manifest and small files have been checked.
#[derive(Debug)]
pub struct Snapshot {
    home: Home,
    /// Where it is: in its own directory, or in that of the run that was woken from it.
    dir: PathBuf,
    manifest: Manifest,
}

impl Snapshot {
    /// Reads and checks the snapshot that is in `dir`, all but its memory.
    pub(super) fn open(
        home: Home,
        dir: PathBuf,
        id: &SandboxId,
        generation: u64,
    ) -> Result<Self, Error> {
        let manifest = read_manifest(&dir)?;
        let snapshot = Self { home, dir, manifest };
        snapshot.check_identity(id, generation)?;
        snapshot.check_names()?;
        for file in &snapshot.manifest.files {
            snapshot.check_file(file)?;
        }
        Ok(snapshot)
    }

    /// Returns what the snapshot is of.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns its directory, for the VMM to load from.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Returns its memory file.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.dir().join(MEMORY)
    }

    /// Takes the room on the disk for all of the memory, where the file system can, before a
    /// VMM maps it. [`Home::give_back_room`] gives it back.
    ///
    /// # Errors
    /// Where the disk has less; some of it may be taken then.
    pub fn take_room(&self) -> Result<(), Error> {
        let path = self.memory();
        files::take_room(&path, self.manifest.hardware.memory_bytes)
            .map(drop)
            .map_err(Error::io(|| format!("reserving space for {}", path.display())))
    }

    /// Reads the whole memory and compares it with its digest. It may run while the VMM
    /// loads the snapshot, and must be through before the guest does.
    ///
    /// # Errors
    /// `Damaged` where they differ; `CalledOff`.
    pub fn check_memory(&self, cancel: &Cancel) -> Result<(), Error> {
        let path = self.memory();
        let reading = || format!("reading {}", path.display());
        let file = files::open_regular(&path).map_err(Error::io(reading))?;
        // One thread: the VMM starts at the same time.
        let found =
            digest::of_blocks(&file, &|| cancel.check(), 1).map_err(Error::piece(reading))?;
        let want = self.manifest.memory().map(|memory| memory.digest.as_str());
        if want == Some(found.as_str()) {
            return Ok(());
        }
        Err(self.damaged(format!(
            "its memory has the digest {found}, and had {} when it fell asleep",
            want.unwrap_or("none")
        )))
    }

    /// Marks the snapshot consumed, by making it the directory of a run, and returns that.
    /// When it returns this is on the disk: the guest may run, and nobody will ever wake
    /// it from here again. The directories of earlier lives are removed before.
    ///
    /// # Errors
    /// The snapshot is then still the truth.
    pub fn consume(self) -> Result<PathBuf, Error> {
        self.home.remove_lives()?;
        let dir = self.dir();
        let live = self.home.live_dir(self.manifest.generation);
        files::rename_durably(&dir, &live)
            .map_err(Error::io(|| format!("marking {} consumed", dir.display())))?;
        Ok(live)
    }

    fn damaged(&self, why: String) -> Error {
        let dir = self.dir();
        Error::Damaged { dir, why }
    }

    fn check_identity(&self, id: &SandboxId, generation: u64) -> Result<(), Error> {
        let found = &self.manifest;
        let row = self.home.row();
        if (&found.id, found.row, found.generation) == (id, row.0, generation) {
            return Ok(());
        }
        Err(Error::Foreign {
            dir: self.dir(),
            why: format!(
                "its manifest is of {} (row {}, generation {}), not of {id} (row {row}, \
                 generation {generation})",
                found.id, found.row, found.generation
            ),
        })
    }

    /// Looks that there is no file that the manifest does not know.
    fn check_names(&self) -> Result<(), Error> {
        let dir = self.dir();
        let reading = || Error::io(|| format!("reading {}", self.dir().display()));
        for entry in fs::read_dir(&dir).map_err(reading())? {
            let name = entry.map_err(reading())?.file_name();
            let known = |file: &FileFacts| name == *file.name;
            if name != MANIFEST && !self.manifest.files.iter().any(known) {
                let name = name.to_string_lossy();
                return Err(self.damaged(format!("it has a file `{name}` that is not its own")));
            }
        }
        Ok(())
    }

    /// Looks that a file is there with its size and, but for the memory, its content.
    fn check_file(&self, want: &FileFacts) -> Result<(), Error> {
        let name = &want.name;
        let path = self.dir().join(name);
        let reading = || Error::io(|| format!("reading {}", path.display()));
        let mut file = match files::open_regular(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.damaged(format!("`{name}` is missing")));
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Err(self.damaged(format!("`{name}` cannot be used: {error}")));
            }
            other => other.map_err(reading())?,
        };
        let meta = file.metadata().map_err(reading())?;
        if !meta.is_file() || meta.len() != want.bytes {
            let (bytes, found) = (want.bytes, meta.len());
            return Err(self.damaged(format!("`{name}` has {found} bytes, and had {bytes}")));
        }
        if name == MEMORY {
            return Ok(());
        }
        if want.bytes > SMALL_FILE_MAX_BYTES {
            return Err(self.damaged(format!("`{name}` is larger than any that we write")));
        }
        if digest::of_small(&mut file).map_err(reading())? != want.digest {
            return Err(self.damaged(format!("`{name}` does not match its digest")));
        }
        Ok(())
    }
}

impl Home {
    /// Reads and checks the snapshot `generation` of the sandbox `id`, all but its memory.
    ///
    /// # Errors
    /// `Absent`, `Damaged`, `Foreign` or `Newer`: the snapshot stays as it is.
    pub fn open(&self, id: &SandboxId, generation: u64) -> Result<Snapshot, Error> {
        Snapshot::open(self.clone(), self.snapshot_dir(generation), id, generation)
    }

    /// Makes the snapshot that the run `generation` was woken from the truth again, if its
    /// memory is as it was. The VMM must be gone.
    ///
    /// Memory that was mapped proves by this that the guest has not run: one that executes
    /// anything changes it. Memory that was copied is as it was whatever the guest did
    /// since, so the caller must know by other means.
    ///
    /// It is checked where the run has it, and only then named a snapshot: a crash in
    /// between leaves no snapshot whose guest may have run.
    ///
    /// # Errors
    /// As [`Home::open`] and [`Snapshot::check_memory`]; the run is then as it was. `Damaged`
    /// and `Absent` are final: the memory has changed, or is not there.
    pub fn unconsume(&self, id: &SandboxId, generation: u64, cancel: &Cancel) -> Result<(), Error> {
        let (live, dir) = (self.live_dir(generation), self.snapshot_dir(generation));
        self.check_unchanged(id, generation, cancel)?;
        files::rename_durably(&live, &dir)
            .map_err(Error::io(|| format!("restoring {}", live.display())))
    }

    /// Makes sure that the memory of the run `generation` is as in the snapshot that it was
    /// woken from.
    ///
    /// # Errors
    /// As [`Home::unconsume`].
    pub fn check_unchanged(
        &self,
        id: &SandboxId,
        generation: u64,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        Snapshot::open(self.clone(), self.live_dir(generation), id, generation)?
            .check_memory(cancel)
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let dir = dir.to_owned();
    let path = dir.join(MANIFEST);
    let reading = || Error::io(|| format!("reading {}", path.display()));
    let mut bytes = Vec::new();
    match files::open_regular(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(if dir.is_dir() {
                let why = "it has no manifest".to_owned();
                Error::Damaged { dir, why }
            } else {
                Error::Absent { dir }
            });
        }
        other => other
            .and_then(|file| file.take(MANIFEST_MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(reading())?,
    };
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MANIFEST_MAX_BYTES) {
        let why = format!("its manifest has more than {MANIFEST_MAX_BYTES} bytes");
        return Err(Error::Damaged { dir, why });
    }
    Manifest::decode(&bytes).map_err(|unreadable| match unreadable {
        Unreadable::Damaged(why) => Error::Damaged { dir, why },
        Unreadable::Foreign(why) => Error::Foreign { dir, why },
        Unreadable::Newer(found) => Error::Newer { dir, found, known: super::manifest::FORMAT },
    })
}
