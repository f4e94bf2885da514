//! A sleep under way, up to its commit point.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    thread::{self, Scope, ScopedJoinHandle},
};

use super::{
    Error, FileFacts, Home, MANIFEST, MEMORY, Manifest, ManifestFacts, Memory,
    SMALL_FILE_MAX_BYTES, digest,
    reading::{DIGEST_THREADS, Reading},
};
use crate::{
    sync::Arc,
    sys::{cancel::Cancel, files},
};

/// The directory of a sleep under way. It ends by `commit` or by `discard`; one that is
/// dropped is found by [`Home::survey`], as after a crash.
#[must_use = "a sleep is committed or discarded"]
#[derive(Debug)]
pub struct Staged {
    home: Home,
    generation: u64,
    /// The run that the memory was taken from, while it is here.
    taken_from: Option<u64>,
    /// The memory, if it is read already.
    reading: Option<Box<Reading>>,
    /// Whether an earlier sync of the same files failed, or was cut off.
    rewrites: bool,
}

/// A snapshot that is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Its number.
    pub generation: u64,
    /// The bytes that it takes on disk.
    pub bytes: u64,
}

/// Why a snapshot was not committed. It is as staged as before.
#[derive(Debug, thiserror::Error)]
#[error("committing the snapshot {}", .staged.generation)]
pub struct CommitError {
    /// To be discarded, or committed once more.
    pub staged: Box<Staged>,
    /// What went wrong.
    pub source: Error,
}

impl Staged {
    pub(super) fn new(home: Home, generation: u64, rewrites: bool) -> Self {
        Self { home, generation, taken_from: None, reading: None, rewrites }
    }

    /// Says whether an earlier sync of the machine's files failed, or was cut off. What the
    /// machine has beside its memory then has to be written anew (`files::write_anew`) before
    /// it is synced; the memory is written anew by `commit`.
    #[must_use]
    pub fn follows_failed_sync(&self) -> bool {
        self.rewrites
    }

    /// Notes that files of the machine are about to be synced. The note goes with the run of
    /// the machine, and so stays if this sleep fails or the daemon dies: the kernel reports a
    /// page that it could not write once, and to whoever syncs next it says that all is well.
    /// It is made before the first sync, as afterwards the disk may refuse it, and need not
    /// be durable, as no machine outlasts a power cut.
    ///
    /// # Errors
    /// Where the note cannot be made; then nothing may be synced.
    pub fn begin_sync(&self) -> Result<(), Error> {
        let mark = self.home.unsynced_mark();
        files::create_private(&mark)
            .map(drop)
            .map_err(Error::io(|| format!("making {}", mark.display())))
    }

    /// Returns the directory, for the VMM to save into.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.home.partial_dir(self.generation)
    }

    /// Begins to read the memory that is mapped by the machine of the run `live`, which is
    /// paused, so that the commit has less to do. It need not work.
    pub fn read_memory(&mut self, live: u64, cancel: &Arc<Cancel>) {
        if self.rewrites {
            return; // It is going to be written, and read after that.
        }
        self.reading = Reading::begin(&self.home.live_memory(live), cancel).ok().map(Box::new);
    }

    /// Moves the memory here from the run that began at `live`. The VMM keeps its mapping.
    ///
    /// # Errors
    /// Where it is not there; it then stays where it was.
    pub fn take_memory(&mut self, live: u64) -> Result<(), Error> {
        let from = self.home.live_memory(live);
        files::rename(&from, &self.dir().join(MEMORY))
            .map_err(Error::io(|| format!("moving {}", from.display())))?;
        self.taken_from = Some(live);
        Ok(())
    }

    /// Moves the memory back to where it was taken from, if it was.
    ///
    /// # Errors
    /// Where it cannot be moved; it then stays here.
    pub fn give_back_memory(&mut self) -> Result<(), Error> {
        if let Some(live) = self.taken_from {
            let from = self.dir().join(MEMORY);
            files::rename(&from, &self.home.live_memory(live))
                .map_err(Error::io(|| format!("moving {} back", from.display())))?;
            self.taken_from = None;
        }
        Ok(())
    }

    /// Takes the sleep back: the memory goes home and the rest is removed.
    ///
    /// # Errors
    /// Where that cannot be done. [`Home::recover_partials`] does what is left to do.
    pub fn discard(mut self) -> Result<(), Error> {
        self.give_back_memory()?;
        self.home.remove_partial(self.generation)
    }

    /// Makes the snapshot the truth: when it returns, it is on the disk, whole. The
    /// machine must not run, nor anything write to the files. The run that the memory was
    /// taken from is empty then, and goes with [`Home::end_run`] or at the next wake.
    ///
    /// # Errors
    /// Before the commit point, for whatever reason or because it was called off: the
    /// staged sleep is handed back. After the commit point there is no error.
    pub fn commit(
        mut self,
        facts: ManifestFacts,
        cancel: &Cancel,
    ) -> Result<Committed, CommitError> {
        match self.seal(facts, cancel) {
            Ok(bytes) => Ok(Committed { generation: self.generation, bytes }),
            Err(source) => {
                self.rewrites = true;
                Err(CommitError { staged: Box::new(self), source })
            }
        }
    }

    /// Does everything up to and with the commit point; returns the bytes on disk.
    fn seal(&mut self, facts: ManifestFacts, cancel: &Cancel) -> Result<u64, Error> {
        let dir = self.dir();
        let small = self.small_files(facts.hardware.memory_bytes)?;
        self.begin_sync()?;
        if self.rewrites {
            self.reading = None;
            for name in small.iter().map(String::as_str).chain([MEMORY]) {
                let path = dir.join(name);
                files::write_anew(&path, cancel)
                    .map_err(Error::piece(|| format!("rewriting {}", path.display())))?;
            }
        }
        let reading = self.reading.take();
        // While these threads wait for the disk, this one reads what is in the page cache.
        // All is on the disk when the last of them has ended.
        let bytes = thread::scope(|scope| {
            let memory = begin(scope, || sync_memory(&dir, cancel))?;
            let others = begin(scope, || small.iter().try_for_each(|name| sync_small(&dir, name)))?;
            let files = describe(&dir, &small, reading, cancel)?;
            let bytes: u64 = files.iter().map(|file| file.stored_bytes).sum();
            let bytes = bytes + self.write_manifest(facts, files)?;
            let manifest = begin(scope, || sync_small(&dir, MANIFEST))?;
            files::sync_dir(&dir).map_err(Error::io(|| format!("syncing {}", dir.display())))?;
            for sync in [memory, others, manifest] {
                sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok::<u64, Error>(bytes)
        })?;
        cancel.check()?;
        // The commit point. If the disk does not confirm it the rename is taken back. Should
        // the host lose power before the disk has even that, and the guest have run
        // on, then the memory's digest tells that this is no snapshot any more.
        let target = self.home.snapshot_dir(self.generation);
        files::rename_durably(&dir, &target)
            .map_err(Error::io(|| format!("renaming {} into place", dir.display())))?;
        Ok(bytes)
    }

    /// Writes the manifest, and returns the bytes that it takes. Nobody reads it before the
    /// directory has its new name, so there is no draft of it.
    fn write_manifest(&self, facts: ManifestFacts, files: Vec<FileFacts>) -> Result<u64, Error> {
        let manifest = Manifest {
            id: facts.id,
            row: self.home.row().0,
            generation: self.generation,
            created_at: facts.created_at,
            vmm: facts.vmm,
            hardware: facts.hardware,
            host: facts.host,
            files,
        };
        let path = self.dir().join(MANIFEST);
        files::create_private(&path)
            .and_then(|mut file| file.write_all(&manifest.encode()))
            .and_then(|()| files::allocated_bytes(&path))
            .map_err(Error::io(|| format!("writing {}", path.display())))
    }

    /// Lists the files beside the memory, having looked that all is there that must be.
    fn small_files(&self, memory_bytes: u64) -> Result<Vec<String>, Error> {
        let dir = self.dir();
        let incomplete = |why: String| Error::Incomplete { dir: dir.clone(), why };
        let reading = || Error::io(|| format!("reading {}", self.dir().display()));
        let (mut small, mut memory) = (Vec::new(), None);
        for entry in fs::read_dir(&dir).map_err(reading())? {
            let entry = entry.map_err(reading())?;
            let meta = entry.metadata().map_err(reading())?;
            let Ok(name) = entry.file_name().into_string() else {
                return Err(incomplete("the VMM left a file whose name is not UTF-8".to_owned()));
            };
            if !meta.is_file() {
                return Err(incomplete(format!("`{name}` is not a file")));
            } else if name == MEMORY {
                memory = Some(meta.len());
            } else if meta.len() > SMALL_FILE_MAX_BYTES {
                return Err(incomplete(format!(
                    "`{name}` has {} bytes, more than the limit of {SMALL_FILE_MAX_BYTES}",
                    meta.len()
                )));
            } else if !name.starts_with(MANIFEST) {
                // A manifest is what an earlier try to commit has left.
                small.push(name);
            }
        }
        match memory {
            None => Err(incomplete("it has no memory".to_owned())),
            Some(bytes) if bytes != memory_bytes => Err(incomplete(format!(
                "its memory has {bytes} bytes, and the machine has {memory_bytes}"
            ))),
            Some(_) if small.is_empty() => Err(incomplete("the VMM saved nothing".to_owned())),
            Some(_) => {
                small.sort_unstable();
                Ok(small)
            }
        }
    }
}

impl Home {
    /// Makes the directory that a sleep collects the snapshot `generation` in. What an
    /// earlier sleep left behind is taken back as by [`Home::recover_partials`].
    ///
    /// # Errors
    /// `Ambiguous` while there is a snapshot that nobody consumed, since this one would
    /// be a second truth; otherwise where the store cannot be written.
    pub fn stage(&self, generation: u64, memory: Memory) -> Result<Staged, Error> {
        let survey = self.survey()?;
        if let Some(committed) = survey.committed {
            return Err(Error::Ambiguous {
                dir: self.dir().to_owned(),
                names: format!("{committed} and soon {generation}"),
            });
        }
        for partial in survey.partials {
            self.clear_partial(partial, survey.live, memory)?;
        }
        let dir = self.partial_dir(generation);
        files::make_private_dir(&dir).map_err(Error::io(|| format!("making {}", dir.display())))?;
        let mark = self.unsynced_mark();
        let rewrites =
            mark.try_exists().map_err(Error::io(|| format!("looking for {}", mark.display())))?;
        Ok(Staged::new(self.clone(), generation, rewrites))
    }
}

/// Begins a part of the work beside the rest.
fn begin<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    part: impl FnOnce() -> Result<(), Error> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<(), Error>>, Error> {
    thread::Builder::new()
        .name("snapshot-sync".to_owned())
        .spawn_scoped(scope, part)
        .map_err(Error::io(|| "starting a thread".to_owned()))
}

/// Says what the files are.
fn describe(
    dir: &Path,
    small: &[String],
    reading: Option<Box<Reading>>,
    cancel: &Cancel,
) -> Result<Vec<FileFacts>, Error> {
    let mut facts = Vec::with_capacity(small.len() + 1);
    for name in small {
        let path = dir.join(name);
        let described = files::open_regular(&path)
            .and_then(|mut file| digest::of_small(&mut file))
            .and_then(|digest| facts_of(&path, name, digest));
        facts.push(described.map_err(Error::io(|| format!("reading {}", path.display())))?);
    }
    let path = dir.join(MEMORY);
    let reading_it = || format!("reading {}", path.display());
    let early =
        reading.map_or(Ok(None), |reading| reading.end()).map_err(Error::piece(reading_it))?;
    let digest = match early {
        Some(digest) => digest,
        None => {
            let memory = files::open_regular(&path).map_err(Error::io(reading_it))?;
            digest::of_blocks(&memory, &|| cancel.check(), DIGEST_THREADS)
                .map_err(Error::piece(reading_it))?
        }
    };
    let mut memory = facts_of(&path, MEMORY, digest).map_err(Error::io(reading_it))?;
    // Room that nobody wrote to is given back.
    let data = files::data_bytes(&path).map_err(Error::io(reading_it))?;
    memory.stored_bytes = memory.stored_bytes.min(data);
    facts.push(memory);
    Ok(facts)
}

fn sync_memory(dir: &Path, cancel: &Cancel) -> Result<(), Error> {
    let path = dir.join(MEMORY);
    let syncing = || format!("syncing {}", path.display());
    let memory = files::open_regular(&path).map_err(Error::io(syncing))?;
    files::sync_in_pieces(&memory, cancel).map_err(Error::piece(syncing))
}

fn sync_small(dir: &Path, name: &str) -> Result<(), Error> {
    let path = dir.join(name);
    files::sync_file(&path).map_err(Error::io(|| format!("syncing {}", path.display())))
}

fn facts_of(path: &Path, name: &str, digest: String) -> std::io::Result<FileFacts> {
    Ok(FileFacts {
        name: name.to_owned(),
        bytes: fs::symlink_metadata(path)?.len(),
        stored_bytes: files::allocated_bytes(path)?,
        digest,
    })
}
