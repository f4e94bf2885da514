//! QEMU alone, put to sleep and woken by a script that does the least that can be done.
//!
//! It runs the command line of a sandbox's own VMM on its own copy of the snapshot. It
//! checks nothing, records nothing, and does not survive a crash.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::{ffi::OsStringExt, fs::FileTypeExt, net::UnixListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dozed::{
    snapshot::MEMORY,
    sys::{
        cancel::Cancel,
        clock::Stopwatch,
        files::{copy_image, sync_file},
        process::{Launch, Process},
    },
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use super::{
    daemon::Daemon,
    qmp::Qmp,
    site::{Result, Site},
};

/// What QEMU's state is called in a snapshot of the daemon's.
const STATE: &str = "vmstate";
pub(crate) const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// A VMM that is driven by the least of scripts.
pub(crate) trait Script: Send {
    /// Restores and resumes the machine; returns how long that took.
    fn wake(&mut self) -> Result<Duration>;

    /// Pauses, saves, syncs and kills it; returns how long that took.
    fn sleep(&mut self) -> Result<Duration>;
}

/// A machine that sleeps, or runs.
#[derive(Debug)]
pub(crate) struct Bare {
    site: Arc<Site>,
    program: PathBuf,
    args: Vec<OsString>,
    dir: PathBuf,
    socket: PathBuf,
    awake: Option<(Qmp, Arc<Process>)>,
}

impl Bare {
    /// Copies the sandbox `id`, which runs and was woken before, and puts it to sleep.
    pub(crate) fn copy(site: &Arc<Site>, daemon: &Daemon, id: &str) -> Result<Self> {
        let (dir, runtime) = site.place(&format!("bare-{id}"))?;
        let pid: u32 = daemon.status(id, "pid")?.parse()?;
        let program = fs::read_link(format!("/proc/{pid}/exe"))?;
        let line = fs::read(format!("/proc/{pid}/cmdline"))?;
        let home = home_in(&line)?;
        let row = home.file_name().ok_or("a sandbox's directory has a name")?;
        let their_runtime = daemon.runtime().join(row);
        let args =
            arguments(&line, [(&home, &dir), (&their_runtime, &runtime)], &dir.join(MEMORY))?;
        copy_pipes(&their_runtime, &runtime)?;

        daemon.write(id, "state", "sleep")?;
        let snapshot = snapshot_in(&home)?;
        for name in [STATE, MEMORY] {
            copy_image(&File::open(snapshot.join(name))?, &dir.join(name), &Cancel::default())?;
            sync_file(&dir.join(name))?;
        }
        let (site, socket) = (Arc::clone(site), runtime.join("qmp.sock"));
        Ok(Self { site, program, args, dir, socket, awake: None })
    }
}

impl Script for Bare {
    fn wake(&mut self) -> Result<Duration> {
        let log = File::create(self.dir.join("log"))?;
        let watch = Stopwatch::start();
        fs::remove_file(&self.socket).ok();
        let socket = UnixListener::bind(&self.socket)?;
        let process = self.site.spawn(Launch {
            stdin: Some(socket.into()),
            ..Launch::new(&self.program, &self.args, log)
        })?;
        let state = File::open(self.dir.join(STATE))?;
        let woken = Qmp::connect(&self.socket).and_then(|mut qmp| {
            qmp.migrate("migrate-incoming", &state)?;
            qmp.run("cont", &json!({}))?;
            Ok(qmp)
        });
        let took = watch.elapsed();
        let qmp = woken.map_err(|error| {
            let said = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            format!("waking a bare machine: {error}: {said}")
        })?;
        self.awake = Some((qmp, process));
        Ok(took)
    }

    fn sleep(&mut self) -> Result<Duration> {
        let (mut qmp, process) = self.awake.take().ok_or("the bare machine sleeps")?;
        let watch = Stopwatch::start();
        qmp.run("stop", &json!({}))?;
        let state = File::create(self.dir.join(STATE))?;
        qmp.migrate("migrate", &state)?;
        state.sync_all()?;
        sync_file(&self.dir.join(MEMORY))?;
        process.kill();
        process.wait(EXIT_LIMIT).ok_or("QEMU does not end")?;
        Ok(watch.elapsed())
    }
}

/// Returns the directory of the sandbox that the command line is of: its memory is two
/// levels below.
fn home_in(line: &[u8]) -> Result<PathBuf> {
    let line = std::str::from_utf8(line)?;
    let (_, after) = line.split_once("mem-path=").ok_or("no `mem-path` in the command line")?;
    let memory = after.split([',', '\0']).next().unwrap_or_default();
    Ok(Path::new(memory).ancestors().nth(2).ok_or("the memory is nowhere")?.to_owned())
}

/// Returns the arguments with other directories, another memory and another name.
fn arguments(
    line: &[u8],
    directories: [(&Path, &Path); 2],
    memory: &Path,
) -> Result<Vec<OsString>> {
    let text = |path: &Path| path.to_str().map(str::to_owned).ok_or("a path is not in UTF-8");
    let line = std::str::from_utf8(line)?.trim_end_matches('\0');
    if !line.contains("\0-incoming\0defer") {
        return Err("the sandbox's VMM was not started to restore".into());
    }
    let mut args = Vec::new();
    let mut before = "";
    for arg in line.split('\0').skip(1) {
        let mut new = arg.to_owned();
        for (from, to) in directories {
            new = new.replace(&text(from)?, &text(to)?);
        }
        if let Some((start, rest)) = new.split_once("mem-path=") {
            let rest = rest.split_once(',').map(|(_, rest)| format!(",{rest}")).unwrap_or_default();
            new = format!("{start}mem-path={}{rest}", text(memory)?);
        }
        if before == "-name" {
            // A daemon kills what has its name and is not its own.
            "guest=bare".clone_into(&mut new);
        }
        args.push(OsString::from_vec(new.into_bytes()));
        before = arg;
    }
    Ok(args)
}

/// Makes the ends of the console as the daemon made its own.
fn copy_pipes(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, copy) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_fifo() {
            mknodat(CWD, &copy, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, &copy)?;
        }
    }
    Ok(())
}

/// Returns the directory of the snapshot that a sandbox sleeps on.
pub(crate) fn snapshot_in(home: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(home)? {
        let path = entry?.path();
        let is_number = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
        if path.file_name().and_then(|name| name.to_str()).is_some_and(is_number) {
            return Ok(path);
        }
    }
    Err(format!("there is no snapshot in {}", home.display()).into())
}
