//! A daemon of a run's own, and its sandboxes.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dozed::sys::{
    clock::Stopwatch,
    process::{Exit, Launch, Process},
};

use super::site::{Result, Site, clear_place, complain, unpin, wait_for};

/// The program, as built for this run.
const PROGRAM: &str = env!("CARGO_BIN_EXE_dozed");
/// How long a killed daemon may take to be gone.
const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// A daemon with a store, a mount and a runtime directory of its own.
#[derive(Debug)]
pub(crate) struct Daemon {
    site: Arc<Site>,
    dir: PathBuf,
    runtime: PathBuf,
    process: Option<Arc<Process>>,
}

impl Daemon {
    /// Makes the place for a daemon, which is not started yet. `more` is added to its
    /// configuration.
    pub(crate) fn place(site: &Arc<Site>, name: &str, more: &str) -> Result<Self> {
        let (dir, runtime) = site.place(name)?;
        let daemon = Self { site: Arc::clone(site), dir, runtime, process: None };
        fs::create_dir(daemon.store())?;
        let config = format!(
            "mount = {:?}\nstore = {:?}\nruntime = {:?}\n\
             [reaper]\ntick = \"1h\"\n[defaults]\nidle_after = \"never\"\n\
             [activity]\nawake_min = \"off\"\n{more}",
            daemon.mount(),
            daemon.store(),
            daemon.runtime,
        );
        fs::write(daemon.config(), config)?;
        Ok(daemon)
    }

    /// Makes a place, and starts a daemon in it.
    pub(crate) fn started(site: &Arc<Site>, name: &str, more: &str) -> Result<Self> {
        let mut daemon = Self::place(site, name, more)?;
        daemon.start()?;
        Ok(daemon)
    }

    /// Starts it, and returns how long it took until it said that it serves.
    pub(crate) fn start(&mut self) -> Result<Duration> {
        let path = self.dir.join("daemon.log");
        let log = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut said = File::open(&path)?;
        let args: Vec<OsString> = vec![
            "run".into(),
            "--log".into(),
            "warn".into(),
            "--config".into(),
            self.config().into(),
        ];
        let mut heard = usize::try_from(log.metadata()?.len())?;
        let watch = Stopwatch::start();
        let process = self.site.spawn(Launch::new(Path::new(PROGRAM), &args, log))?;
        let mut text = Vec::new();
        let took = wait_for("the daemon to serve", || {
            said.read_to_end(&mut text)?;
            let line = String::from_utf8_lossy(text.get(heard..).unwrap_or_default()).into_owned();
            if line.contains("dozed: serving ") {
                heard = text.len();
                return Ok(Some(watch.elapsed()));
            }
            match process.exited() {
                Some(exit) => Err(format!("the daemon ended: {exit}: {line}").into()),
                None => Ok(None),
            }
        })?;
        self.process = Some(process);
        Ok(took)
    }

    /// Kills it with SIGKILL, which its guests outlive.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let process = self.process.take().ok_or("the daemon is not started")?;
        process.kill();
        match process.wait(EXIT_LIMIT) {
            Some(Exit::Signal(_)) => Ok(()),
            Some(exit) => Err(format!("the daemon had ended by itself: {exit}").into()),
            None => Err("the daemon does not end".into()),
        }
    }

    /// Returns the bytes of its resident memory.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let process = self.process.as_ref().ok_or("the daemon is not started")?;
        let status = fs::read_to_string(format!("/proc/{}/status", process.identity().pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line.ok_or("no VmRSS")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    pub(crate) fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    pub(crate) fn runtime(&self) -> &Path {
        &self.runtime
    }

    fn config(&self) -> PathBuf {
        self.dir.join("dozed.toml")
    }

    pub(crate) fn file(&self, id: &str, name: &str) -> PathBuf {
        self.mount().join(id).join(name)
    }

    /// Makes a sandbox of `hardware` whose guest, once it runs, does as `cmdline` says.
    pub(crate) fn make(&self, id: &str, hardware: &Hardware<'_>) -> Result<()> {
        fs::create_dir(self.mount().join(id))?;
        let Hardware { kernel, memory, cmdline } = hardware;
        let config =
            format!("kernel = {kernel:?}\nmemory = \"{memory}\"\ncmdline = \"{cmdline}\"\n");
        self.write(id, "config", &config)
    }

    /// Boots a sandbox, and waits until its guest is ready.
    pub(crate) fn boot(&self, id: &str) -> Result<()> {
        self.write(id, "state", "wake")?;
        wait_for("the guest to be ready", || {
            let said = fs::read(self.file(id, "console"))?;
            Ok(String::from_utf8_lossy(&said).contains("ready sum").then_some(()))
        })
    }

    /// Writes as `echo` does, and says what `error` has where that fails.
    pub(crate) fn write(&self, id: &str, name: &str, text: &str) -> Result<()> {
        let written = OpenOptions::new()
            .write(true)
            .open(self.file(id, name))
            .and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| {
            let why = self.read(id, "error").unwrap_or_default();
            format!("writing `{text}` to {id}/{name}: {error}: {}", why.trim()).into()
        })
    }

    /// Writes as [`Daemon::write`], and returns how long it took.
    pub(crate) fn timed(&self, id: &str, verb: &str) -> Result<Duration> {
        let watch = Stopwatch::start();
        self.write(id, "state", verb)?;
        Ok(watch.elapsed())
    }

    pub(crate) fn read(&self, id: &str, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.file(id, name))?)
    }

    /// Returns the value of `key` in `status`.
    pub(crate) fn status(&self, id: &str, key: &str) -> Result<String> {
        let status = self.read(id, "status")?;
        let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        Ok(value.ok_or_else(|| format!("`status` of {id} has no `{key}`"))?.to_owned())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.process = None;
        // What cannot be cleared now is tried again at the end of the run.
        if let Err(error) = clear_place(&self.dir).and_then(|()| unpin(&self.runtime)) {
            complain(&format!("clearing {}: {error}", self.dir.display()));
            return;
        }
        for dir in [&self.dir, &self.runtime] {
            fs::remove_dir_all(dir).ok();
        }
    }
}

/// What a sandbox is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hardware<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) memory: &'a str,
    pub(crate) cmdline: &'a str,
}
