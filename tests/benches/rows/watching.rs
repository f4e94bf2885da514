//! The row of a watcher: how long after a change of the reaper's inotifywait says so.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use dozed::sys::{
    clock::{Stopwatch, pause_for},
    command::find,
    process::{Launch, Process},
};

use super::{
    Bench,
    daemon::{Daemon, Hardware},
    report::{Bound, Line, Samples},
    site::{Result, wait_for},
};

/// How much later than on a tmpfs it may be seen.
const MORE: Duration = Duration::from_millis(2);
/// How often we look for the change itself. A sample is too long by up to this and a look.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// So many changes are not counted: names and programs become warm.
const WARM_UP: usize = 2;

/// inotifywait on one file.
#[derive(Debug)]
struct Inotifywait {
    process: Arc<Process>,
    /// When it said that the file was modified, and what the file read then.
    said: Receiver<(Instant, String)>,
    hearing: Option<JoinHandle<()>>,
}

impl Inotifywait {
    fn start(bench: &Bench, file: &Path) -> Result<Self> {
        let program = find("inotifywait").ok_or("there is no inotifywait")?;
        let (lines, pipe) = std::io::pipe()?;
        let args: Vec<OsString> = ["-m", "-e", "modify"].map(OsString::from).into();
        let args = [args, vec![file.into()]].concat();
        let process =
            bench.site.spawn(Launch::new(&program, &args, File::from(OwnedFd::from(pipe))))?;
        let (tell, said) = channel();
        let (mut lines, file) = (BufReader::new(lines), file.to_owned());
        let mut first = String::new();
        while !first.contains("Watches established.") {
            first.clear();
            if lines.read_line(&mut first)? == 0 {
                return Err("inotifywait ended".into());
            }
        }
        let hearing = thread::Builder::new().name("hearing".to_owned()).spawn(move || {
            for _ in lines.lines().map_while(std::result::Result::ok) {
                let heard = now();
                let text = fs::read_to_string(&file).unwrap_or_default();
                if tell.send((heard, text)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { process, said, hearing: Some(hearing) })
    }

    /// Returns when it said that the file was modified, as soon as that reads `text`.
    fn heard(&self, text: &str) -> Result<Instant> {
        loop {
            let (heard, read) = self.said.recv_timeout(Duration::from_secs(60))?;
            if read.trim_end() == text {
                return Ok(heard);
            }
        }
    }

    /// Passes over what it has said so far.
    fn pass_over(&self) {
        while self.said.try_recv().is_ok() {}
    }
}

impl Drop for Inotifywait {
    fn drop(&mut self) {
        self.process.kill();
        // Its pipe is at its end then, and so is the thread.
        drop(self.hearing.take().map(JoinHandle::join));
    }
}

#[allow(clippy::disallowed_methods, reason = "two threads compare when they saw something")]
fn now() -> Instant {
    Instant::now()
}

/// The reaper puts a sandbox to sleep: from when that could not yet be read to when it is
/// said. So a sample is rather too long.
fn by_reaper(daemon: &Daemon, watcher: &Inotifywait) -> Result<Duration> {
    daemon.write("x", "state", "wake")?;
    daemon.write("x", "idle_after", "1s")?;
    watcher.pass_over();
    let limit = Stopwatch::start();
    // It has changed after the last look that did not show it began.
    let mut changed = now();
    loop {
        let begun = now();
        if daemon.read("x", "state")? == "snapshotted\n" {
            break;
        }
        changed = begun;
        if limit.elapsed() > Duration::from_secs(60) {
            return Err("the reaper does not put it to sleep".into());
        }
        pause_for(LOOK_EVERY);
    }
    let heard = watcher.heard("snapshotted")?;
    daemon.write("x", "idle_after", "never")?;
    Ok(heard.saturating_duration_since(changed))
}

/// A local write: from before it to when it is said.
fn by_write(file: &PathBuf, watcher: &Inotifywait, number: usize) -> Result<Duration> {
    watcher.pass_over();
    let text = number.to_string();
    let changed = now();
    fs::write(file, &text)?;
    Ok(watcher.heard(&text)?.saturating_duration_since(changed))
}

/// A change by the reaper seen by inotifywait, against a local write on a tmpfs.
pub(crate) fn watch(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "watch", "")?;
    daemon.make("x", &Hardware { kernel: &bench.kernel, memory: "24MiB", cmdline: "" })?;
    daemon.boot("x")?;
    let tmpfs = tempfile::Builder::new().prefix("dozed-rows-").tempdir_in("/dev/shm")?;
    let local = tmpfs.path().join("local");
    fs::write(&local, "")?;
    let on_mount = Inotifywait::start(bench, &daemon.file("x", "state"))?;
    let on_tmpfs = Inotifywait::start(bench, &local)?;
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds(40, 8) {
        let seen = by_reaper(&daemon, &on_mount)?;
        wait_for("the reaper to be done", || {
            Ok((daemon.read("x", "error")? == "ok\n").then_some(()))
        })?;
        let limit = by_write(&local, &on_tmpfs, round)?;
        if round >= WARM_UP {
            ours.add(seen);
            theirs.add(limit);
        }
    }
    Ok(vec![Line::held_against(
        "watch",
        "a change by the reaper, until inotifywait says so",
        &ours,
        ("a write on a tmpfs", &theirs),
        Bound::TimesPlus(1.0, MORE),
    )])
}
