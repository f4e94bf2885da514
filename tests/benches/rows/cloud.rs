//! A bare Cloud Hypervisor, as a script would drive it: the fewest calls that wake a
//! machine and put it to sleep.
//!
//! It has the command line of a sandbox's own VMM and a copy of its snapshot. It checks
//! nothing, records nothing, and does not survive a crash.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dozed::{
    snapshot::MEMORY,
    sys::{
        cancel::Cancel,
        clock::Stopwatch,
        command,
        files::{copy_image, sync_dir, sync_file},
        process::{Launch, Privileges, Process},
    },
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use serde_json::{Value, json};

use super::{
    bare::{EXIT_LIMIT, Script, snapshot_in},
    daemon::Daemon,
    site::{Result, Site},
};

/// The name of the program.
const PROGRAM: &str = "cloud-hypervisor";
/// Its own name for the memory in a snapshot.
const MEMORY_FILE: &str = "memory-ranges";
/// The rest of a snapshot.
const STATE_FILES: [&str; 2] = ["config.json", "state.json"];
/// From this release on it can be told to copy the memory.
const FIRST_WITH_MODES: u32 = 52;
/// Longer than anything takes, so that a run does not hang.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const KVM: &str = "/dev/kvm";

/// Returns the program to measure, which is `named` or one of the system's, or why there
/// is nothing to measure.
pub(crate) fn find(named: Option<PathBuf>) -> std::result::Result<PathBuf, String> {
    let program = named
        .or_else(|| command::find(PROGRAM))
        .ok_or_else(|| format!("there is no {PROGRAM}, and none was named"))?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map_err(|error| format!("{KVM} cannot be used: {error}"))?;
    Ok(program)
}

/// A machine that sleeps, or runs.
#[derive(Debug)]
pub(crate) struct BareCloud {
    site: Arc<Site>,
    program: PathBuf,
    args: Vec<String>,
    dir: PathBuf,
    socket: PathBuf,
    /// How many snapshots there were.
    count: u64,
    awake: Option<(Api, Arc<Process>)>,
}

impl BareCloud {
    /// Copies the sandbox `id`, which runs, and puts it to sleep.
    pub(crate) fn copy(site: &Arc<Site>, daemon: &Daemon, id: &str) -> Result<Self> {
        let (dir, runtime) = site.place(&format!("bare-cloud-{id}"))?;
        let pid: u32 = daemon.status(id, "pid")?.parse()?;
        let program = fs::read_link(format!("/proc/{pid}/exe"))?;
        let line = String::from_utf8(fs::read(format!("/proc/{pid}/cmdline"))?)?;
        let args = line.trim_end_matches('\0').split('\0').skip(1).map(str::to_owned).collect();
        let log = fs::read_link(format!("/proc/{pid}/fd/2"))?;
        let home = log.parent().ok_or("the log is nowhere")?.to_owned();

        daemon.write(id, "state", "sleep")?;
        let (from, to) = (snapshot_in(&home)?, snapshot(&dir, 0));
        fs::create_dir(&to)?;
        for name in STATE_FILES {
            fs::copy(from.join(name), to.join(name))?;
        }
        shut_in(&to.join(STATE_FILES[0]), &[&dir, &runtime])?;
        copy_image(&File::open(from.join(MEMORY))?, &to.join(MEMORY_FILE), &Cancel::default())?;
        let (site, socket) = (Arc::clone(site), runtime.join("api.sock"));
        Ok(Self { site, program, args, dir, socket, count: 0, awake: None })
    }

    fn spawn(&self) -> Result<Arc<Process>> {
        fs::remove_file(&self.socket).ok();
        let listener = OwnedFd::from(UnixListener::bind(&self.socket)?);
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let terminal = ioctl_tiocgptpeer(&master, flags)?;
        let args: Vec<OsString> = self
            .args
            .iter()
            .map(|arg| if arg.starts_with("fd=") { socket_of(&listener) } else { arg.into() })
            .collect();
        // Its arguments have no room for a word of ours, and it has to be found by one.
        let name = format!("bare:{}", self.dir.display());
        self.site.spawn(Launch {
            name: Some(OsStr::new(&name)),
            stdin: Some(master),
            stdout: Some(File::create(self.dir.join("console"))?),
            inherited: vec![terminal, listener],
            privileges: Privileges::None,
            ..Launch::new(&self.program, &args, File::create(self.dir.join("log"))?)
        })
    }

    fn load(&self) -> Result<Api> {
        let mut api = Api::connect(&self.socket)?;
        let version = api.call("GET", "vmm.ping", &Value::Null)?;
        let major = version["version"].as_str().and_then(|text| text.split('.').next());
        let mut source = json!({
            "source_url": url(&snapshot(&self.dir, self.count)),
            "prefault": false,
        });
        if major.and_then(|major| major.parse().ok()).unwrap_or(0) >= FIRST_WITH_MODES {
            source["memory_restore_mode"] = json!("Copy");
        }
        api.call("PUT", "vm.restore", &source)?;
        api.call("PUT", "vm.resume", &Value::Null)?;
        Ok(api)
    }
}

impl Script for BareCloud {
    fn wake(&mut self) -> Result<Duration> {
        let watch = Stopwatch::start();
        let process = self.spawn()?;
        let loaded = self.load();
        let took = watch.elapsed();
        let api = loaded.map_err(|error| {
            let said = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            format!("waking a bare machine: {error}: {said}")
        })?;
        // Of no use to a guest that runs; nobody waits for its removal.
        fs::remove_dir_all(snapshot(&self.dir, self.count))?;
        self.awake = Some((api, process));
        Ok(took)
    }

    fn sleep(&mut self) -> Result<Duration> {
        let (mut api, process) = self.awake.take().ok_or("the bare machine sleeps")?;
        self.count += 1;
        let watch = Stopwatch::start();
        let dir = snapshot(&self.dir, self.count);
        fs::create_dir(&dir)?;
        api.call("PUT", "vm.pause", &Value::Null)?;
        api.call("PUT", "vm.snapshot", &json!({ "destination_url": url(&dir) }))?;
        for name in STATE_FILES.into_iter().chain([MEMORY_FILE]) {
            sync_file(&dir.join(name))?;
        }
        sync_dir(&dir)?;
        process.kill();
        process.wait(EXIT_LIMIT).ok_or("Cloud Hypervisor does not end")?;
        Ok(watch.elapsed())
    }
}

/// Has the machine of the configuration `file` shut itself in to `dirs`, if it does so.
fn shut_in(file: &Path, dirs: &[&Path]) -> Result<()> {
    let mut config: Value = serde_json::from_slice(&fs::read(file)?)?;
    if config["landlock_enable"] == true {
        let rule = |dir: &&Path| json!({ "path": dir, "access": "rw" });
        config["landlock_rules"] = dirs.iter().map(rule).collect();
    }
    fs::write(file, config.to_string())?;
    Ok(())
}

fn snapshot(dir: &Path, count: u64) -> PathBuf {
    dir.join(format!("snapshot-{count}"))
}

fn url(dir: &Path) -> String {
    format!("file://{}", dir.display())
}

fn socket_of(listener: &OwnedFd) -> OsString {
    format!("fd={}", listener.as_raw_fd()).into()
}

/// A connection to a Cloud Hypervisor, by which it is told everything.
#[derive(Debug)]
struct Api(BufReader<UnixStream>);

impl Api {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request and returns the body of the answer.
    fn call(&mut self, method: &str, name: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let mut len = 0;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                len = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; len];
        self.0.read_exact(&mut answer)?;
        if !status.starts_with("HTTP/1.1 2") {
            return Err(format!("{name}: {status}: {}", String::from_utf8_lossy(&answer)).into());
        }
        Ok(serde_json::from_slice(&answer).unwrap_or(Value::Null))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err("Cloud Hypervisor closed the connection".into());
        }
        Ok(line.trim_end().to_owned())
    }
}
