//! Where a run has its files and processes, and how all of them are cleared away.
//!
//! Every process that is started has the site's directory in its arguments, as have the
//! guests that a daemon starts with QEMU; those that it starts with Cloud Hypervisor have
//! their log there. So they are found, whoever started them and whatever became of that,
//! and nothing else is.

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use dozed::sys::{
    clock::{Deadline, pause_for},
    mount,
    process::{Launch, Process, Search},
};
use tempfile::{Builder, TempDir};

/// What can go wrong is told to whoever runs it, and nothing depends on what it was.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long a killed process may take to be gone.
const EXIT_LIMIT: Duration = Duration::from_secs(30);
/// How long whatever is waited for may take on a busy host.
const WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// The kinds of mounts that a run makes: with the subtype where the mounter gives it.
const MOUNT_TYPES: [&str; 4] = ["fuse", "fuse.dozed", "fuse.dozed-empty", "nsfs"];
/// Where namespaces are pinned, which is mounted on itself.
const PINS: &str = "netns";

/// What the program of that VMM is called.
const CLOUD: &str = "cloud-hypervisor";

/// The site of one run.
#[derive(Debug)]
pub(crate) struct Site {
    /// On a disk, as a store is.
    dir: TempDir,
    /// On a tmpfs, for sockets.
    runtime: TempDir,
    /// Whether it is being cleared, so that nothing may be started any more.
    cleared: RwLock<bool>,
}

impl Site {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            dir: Builder::new().prefix("rows-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?,
            runtime: Builder::new().prefix("dozed-rows-").tempdir_in("/run")?,
            cleared: RwLock::new(false),
        }))
    }

    /// Makes a directory for `name`, and returns it with one for its sockets.
    pub(crate) fn place(&self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let (dir, runtime) = (self.dir.path().join(name), self.runtime.path().join(name));
        fs::create_dir(&dir)?;
        fs::create_dir(&runtime)?;
        Ok((dir, runtime))
    }

    /// Starts a process that has this site's directory in its arguments.
    pub(crate) fn spawn(&self, launch: Launch<'_>) -> Result<Arc<Process>> {
        // Held until the process is there, so that whoever clears finds it.
        let cleared = self.cleared.read().unwrap_or_else(PoisonError::into_inner);
        if *cleared {
            return Err("the run was called off".into());
        }
        Ok(Process::spawn(launch)?)
    }

    /// Ends all that was started and removes all that was made.
    pub(crate) fn clear(&self) {
        *self.cleared.write().unwrap_or_else(PoisonError::into_inner) = true;
        if let Err(error) = clear_place(self.dir.path()) {
            complain(&format!("clearing {}: {error}", self.dir.path().display()));
        }
        let places = [self.dir.path(), self.runtime.path()].map(fs::read_dir);
        for place in places.into_iter().flatten().flatten().flatten() {
            if let Err(error) = unpin(&place.path()) {
                complain(&format!("clearing {}: {error}", place.path().display()));
            }
        }
        for dir in [self.dir.path(), self.runtime.path()] {
            if let Err(error) = fs::remove_dir_all(dir)
                && error.kind() != io::ErrorKind::NotFound
            {
                complain(&format!("removing {}: {error}", dir.display()));
            }
        }
    }
}

/// Tells what went wrong while nobody waits for a result.
#[allow(clippy::print_stderr, reason = "a run is watched by whoever started it")]
pub(crate) fn complain(what: &str) {
    eprintln!("bench: {what}");
}

/// Ends what runs in `dir`, and takes away what is mounted there.
pub(crate) fn clear_place(dir: &Path) -> Result<()> {
    let deadline = Deadline::after(EXIT_LIMIT);
    // A daemon that is killed may just have started one more.
    loop {
        let found = processes_of(dir)?;
        for process in &found {
            process.kill();
        }
        for process in &found {
            process.wait(deadline.left());
        }
        if found.is_empty() {
            break;
        }
        if deadline.passed() {
            return Err("processes do not end".into());
        }
    }
    for mounted in MOUNT_TYPES.map(mount::mounts_of_type) {
        for path in mounted?.iter().filter(|path| path.starts_with(dir)) {
            mount::detach(path)?;
        }
    }
    Ok(())
}

/// Takes away the namespaces that are pinned in a runtime directory.
pub(crate) fn unpin(runtime: &Path) -> Result<()> {
    let pins = runtime.join(PINS);
    if mount::mounted_at(&pins)?.is_some() {
        mount::detach(&pins)?;
    }
    Ok(())
}

/// Returns what runs of the programs that a run starts and has `dir` in its arguments, or, of
/// Cloud Hypervisor, its log in it.
fn processes_of(dir: &Path) -> Result<Vec<Arc<Process>>> {
    let programs = ["dozed", "rows-", "qemu-system", CLOUD].map(str::to_owned);
    let search = Search { programs: &programs, is_user: &|_| true, prefix: "" };
    let dir_bytes = dir.as_os_str().as_encoded_bytes();
    let is_of_dir = |process: &Process| {
        let pid = process.identity().pid;
        // It may end at any moment, and then it is not found any more.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(dir_bytes.len()).any(|part| part == dir_bytes)
            || fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(dir))
    };
    let found = Process::find(&search)?.into_iter().map(|(process, _)| process);
    Ok(found.filter(|process| is_of_dir(process)).collect())
}

/// Waits until `look` finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Deadline::after(WAIT_LIMIT);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if deadline.passed() {
            return Err(format!("waited in vain for {what}").into());
        }
        pause_for(LOOK_EVERY);
    }
}
