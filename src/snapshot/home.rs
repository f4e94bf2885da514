//! The directory of one sandbox in the store.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use super::{Error, MEMORY, Memory};
use crate::{
    sandbox::{Disk, RowId, SandboxId},
    sys::files,
};

/// How much of the hash of an image's path is in the name of a disk that is kept: 64 bits.
const KEPT_DISK_HASH_CHARS: usize = 16;

/// The directory of one sandbox, `STORE/sandboxes/ROW`. It may not be there yet.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
    row: RowId,
}

/// What a sandbox has on disk, by the names of its directories.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// The generation at which the machine was booted or woken. Beside a committed
    /// snapshot that is not older it is what a sleep had no time to clear away.
    pub live: Option<u64>,
    /// The generations of sleeps that came to no end, ascending.
    pub partials: Vec<u64>,
    /// The generation of the snapshot.
    pub committed: Option<u64>,
}

/// The numbers of the directories of each kind, ascending.
#[derive(Default)]
struct Listing {
    lives: Vec<u64>,
    partials: Vec<u64>,
    committed: Vec<u64>,
}

impl Home {
    /// Names the directory of the sandbox `row`.
    #[must_use]
    pub fn new(store: &Path, row: RowId) -> Self {
        let dir = store.join("sandboxes").join(row.to_string());
        Self { dir, row }
    }

    /// Makes it, durably. It may be there.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn create(&self) -> Result<(), Error> {
        let above = self.dir.parent().unwrap_or(&self.dir);
        files::make_private_dir(&self.dir)
            .and_then(|()| files::sync_dir(above))
            .map_err(Error::io(|| format!("making {}", self.dir.display())))
    }

    /// Returns its path.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the row that it is named by.
    #[must_use]
    pub fn row(&self) -> RowId {
        self.row
    }

    /// Returns the directory of the machine whose run began at `generation`.
    #[must_use]
    pub fn live_dir(&self, generation: u64) -> PathBuf {
        self.dir.join(format!("{generation}.live"))
    }

    /// Returns the memory file of that machine.
    #[must_use]
    pub fn live_memory(&self, generation: u64) -> PathBuf {
        self.live_dir(generation).join(MEMORY)
    }

    /// Returns the directory of the committed snapshot `generation`.
    #[must_use]
    pub fn snapshot_dir(&self, generation: u64) -> PathBuf {
        self.dir.join(generation.to_string())
    }

    /// Returns the sandbox's own copy of the disk with this number, from 0.
    #[must_use]
    pub fn disk(&self, number: usize) -> PathBuf {
        self.dir.join(format!("disk-{number}.img"))
    }

    /// Returns where the copy of the disk with this number, made from `image`, is kept while
    /// the config does not name it.
    #[must_use]
    pub fn kept_disk(&self, number: usize, image: &Path) -> PathBuf {
        let hash = blake3::hash(image.as_os_str().as_bytes()).to_hex();
        self.disk(number).with_added_extension(&hash[..KEPT_DISK_HASH_CHARS])
    }

    /// Returns the file that is there if a sync of the files of the living machine failed, or
    /// was cut off: see [`super::Staged::begin_sync`].
    pub(super) fn unsynced_mark(&self) -> PathBuf {
        self.dir.join("unsynced")
    }

    /// Returns the log of the guest's serial console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Returns the log of the VMM's own messages.
    #[must_use]
    pub fn vmm_log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    /// Tells what is there. No directory at all is nothing.
    ///
    /// # Errors
    /// `Ambiguous` where there are two lives or two snapshots, which no crash leaves.
    pub fn survey(&self) -> Result<Survey, Error> {
        let listing = self.list()?;
        Ok(Survey {
            live: self.only(&listing.lives, ".live")?,
            committed: self.only(&listing.committed, "")?,
            partials: listing.partials,
        })
    }

    /// Makes the directory of a new run, with a memory file of zeros if its VMM is to map
    /// one, and returns it. The file has all the room that it needs, where the file system can
    /// do that. Every earlier run is over and its directory is removed.
    ///
    /// # Errors
    /// Where the store cannot be written, or has no room. Then there is no run.
    pub fn begin_run(
        &self,
        generation: u64,
        memory: Memory,
        memory_bytes: u64,
    ) -> Result<PathBuf, Error> {
        self.remove_lives()?;
        let dir = self.live_dir(generation);
        let file = dir.join(MEMORY);
        let made = files::make_private_dir(&dir).and_then(|()| {
            if memory == Memory::Copied {
                return Ok(());
            }
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
            files::take_room(&file, memory_bytes).map(drop)
        });
        if let Err(error) = made {
            // It may have taken all that there was.
            files::remove_tree(&dir).ok();
            return Err(Error::io(|| format!("making {}", dir.display()))(error));
        }
        Ok(dir)
    }

    /// Gives back the room of the snapshot `generation` that nobody wrote to, and returns how
    /// many bytes it takes then. No VMM may have its memory.
    ///
    /// # Errors
    /// What the system says. The snapshot is as good as before.
    pub fn give_back_room(&self, generation: u64) -> Result<u64, Error> {
        let dir = self.snapshot_dir(generation);
        let given_back = || {
            files::give_back_room(&dir.join(MEMORY))?;
            let mut bytes = 0;
            for entry in fs::read_dir(&dir)? {
                bytes += files::allocated_bytes(&entry?.path())?;
            }
            Ok(bytes)
        };
        given_back().map_err(Error::io(|| format!("releasing space of {}", dir.display())))
    }

    /// Returns how many bytes of the memory of the snapshot `generation` are in the page cache,
    /// where the kernel tells.
    #[must_use]
    pub fn page_cache_bytes(&self, generation: u64) -> Option<u64> {
        let memory = files::open_regular(&self.snapshot_dir(generation).join(MEMORY)).ok()?;
        files::cached_bytes(&memory)
    }

    /// Asks the kernel to drop the memory of the snapshot `generation` from the page cache.
    ///
    /// # Errors
    /// What the system says. A snapshot without memory is none.
    pub fn drop_page_cache(&self, generation: u64) -> Result<(), Error> {
        let path = self.snapshot_dir(generation).join(MEMORY);
        let Ok(memory) = files::open_regular(&path) else { return Ok(()) };
        let dropping = || format!("dropping the page cache of {}", path.display());
        files::drop_cache(&memory).map_err(Error::io(dropping))
    }

    /// Returns the bytes on disk of the sandbox's own copies of `disks`.
    #[must_use]
    pub fn disk_bytes(&self, disks: &[Disk]) -> u64 {
        let own = disks.iter().enumerate().filter(|(_, disk)| !disk.readonly);
        own.filter_map(|(number, _)| fs::symlink_metadata(self.disk(number)).ok())
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    }

    /// Takes back each sleep that was cut before its commit point while the VMM is alive:
    /// memory that it maps goes back to where its run has it, and the rest is removed.
    ///
    /// # Errors
    /// Where the store cannot be written, or where there is no run that the memory
    /// could belong to; memory that is mapped is never removed.
    pub fn recover_partials(&self, memory: Memory) -> Result<(), Error> {
        let survey = self.survey()?;
        for generation in survey.partials {
            self.clear_partial(generation, survey.live, memory)?;
        }
        Ok(())
    }

    /// Gives the memory in the partial `generation` back to `live`, and removes the rest.
    pub(super) fn clear_partial(
        &self,
        generation: u64,
        live: Option<u64>,
        kind: Memory,
    ) -> Result<(), Error> {
        if kind == Memory::Copied {
            return self.remove_partial(generation);
        }
        let dir = self.partial_dir(generation);
        let memory = dir.join(MEMORY);
        let is_there = |path: &Path| {
            path.try_exists().map_err(Error::io(|| format!("looking for {}", path.display())))
        };
        if is_there(&memory)? {
            let Some(live) = live else {
                let why = "it holds the memory of a run that has no directory".to_owned();
                return Err(Error::Damaged { dir, why });
            };
            // Where the run still has its memory this one is a copy.
            let home = self.live_memory(live);
            if !is_there(&home)? {
                files::rename(&memory, &home)
                    .map_err(Error::io(|| format!("moving {} back", memory.display())))?;
            }
        }
        self.remove_partial(generation)
    }

    pub(super) fn remove_partial(&self, generation: u64) -> Result<(), Error> {
        let dir = self.partial_dir(generation);
        // The VMM may have it still, and whoever has it can go on filling it.
        let removed = match files::take_back(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            taken => taken.and_then(|()| files::remove_tree(&dir)),
        };
        removed.map_err(Error::io(|| format!("removing {}", dir.display())))
    }

    /// Removes the files of the snapshot that the run `generation` was woken from, when
    /// they are copies of what the VMM has and the guest runs. The run stays. It may be
    /// over already, or its sandbox deleted.
    ///
    /// # Errors
    /// Where something cannot be removed. It is then removed with the run.
    pub fn drop_copy(&self, generation: u64) -> Result<(), Error> {
        let dir = self.live_dir(generation);
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let emptied = fs::read_dir(&dir).and_then(|entries| {
            entries.into_iter().try_for_each(|entry| match fs::remove_file(entry?.path()) {
                Err(error) if !gone(&error) => Err(error),
                Ok(()) | Err(_) => Ok(()),
            })
        });
        match emptied {
            Err(error) if !gone(&error) => {
                Err(Error::io(|| format!("emptying {}", dir.display()))(error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Returns the bytes that the snapshot `generation` takes on disk.
    ///
    /// # Errors
    /// As [`Home::open`].
    pub fn snapshot_bytes(&self, id: &SandboxId, generation: u64) -> Result<u64, Error> {
        let snapshot = self.open(id, generation)?;
        Ok(snapshot.manifest().files.iter().map(|file| file.stored_bytes).sum())
    }

    /// Removes the directories of lives and of sleeps that came to no end. Its VMM is gone
    /// for good. A committed snapshot stays.
    ///
    /// # Errors
    /// Where something cannot be removed.
    pub fn end_run(&self) -> Result<(), Error> {
        self.remove_lives()?;
        for generation in self.list()?.partials {
            self.remove_partial(generation)?;
        }
        Ok(())
    }

    /// Makes sure that a sleep can be written, before the guest is paused for it.
    /// `reserve_bytes` is [`super::SLEEP_RESERVE_BYTES`], and more where memory is copied.
    ///
    /// # Errors
    /// `NoSpace` where it cannot.
    pub fn check_space(&self, reserve_bytes: u64) -> Result<(), Error> {
        let free = files::free_bytes(&self.dir)
            .map_err(Error::io(|| format!("measuring {}", self.dir.display())))?;
        if free < reserve_bytes {
            let dir = self.dir.clone();
            let needed = reserve_bytes;
            return Err(Error::NoSpace { dir, needed, free });
        }
        Ok(())
    }

    pub(super) fn partial_dir(&self, generation: u64) -> PathBuf {
        self.dir.join(format!("{generation}.partial"))
    }

    pub(super) fn remove_lives(&self) -> Result<(), Error> {
        for generation in self.list()?.lives {
            let dir = self.live_dir(generation);
            files::remove_tree(&dir)
                .map_err(Error::io(|| format!("removing {}", dir.display())))?;
        }
        // It is of files that are gone.
        let mark = self.unsynced_mark();
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(|| format!("removing {}", mark.display()))(error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn list(&self) -> Result<Listing, Error> {
        let doing = || Error::io(|| format!("reading {}", self.dir.display()));
        let mut listing = Listing::default();
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
            other => other.map_err(doing())?,
        };
        for entry in entries {
            let name = entry.map_err(doing())?.file_name();
            let Some(name) = name.to_str() else { continue };
            let (number, kind) = match name.split_once('.') {
                None => (name, &mut listing.committed),
                Some((number, "live")) => (number, &mut listing.lives),
                Some((number, "partial")) => (number, &mut listing.partials),
                Some(_) => continue,
            };
            // Only the form that we write is ours: `7`, and neither `07` nor `+7`.
            match number.parse::<u64>() {
                Ok(generation) if generation.to_string() == number => kind.push(generation),
                Ok(_) | Err(_) => {}
            }
        }
        for kind in [&mut listing.lives, &mut listing.partials, &mut listing.committed] {
            kind.sort_unstable();
        }
        Ok(listing)
    }

    fn only(&self, generations: &[u64], suffix: &str) -> Result<Option<u64>, Error> {
        match generations {
            [] => Ok(None),
            [only] => Ok(Some(*only)),
            several => {
                let names: Vec<_> = several.iter().map(|n| format!("{n}{suffix}")).collect();
                Err(Error::Ambiguous { dir: self.dir.clone(), names: names.join(" and ") })
            }
        }
    }
}
