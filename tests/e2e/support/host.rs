//! A daemon of the test's own, and the tree that it serves.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Output},
    thread,
};

use dozed::sys::{mount, netns};
use rustix::{
    io::Errno,
    mount::{MountPropagationFlags, mount_bind, mount_change},
    process::Signal,
};
use tempfile::TempDir;

use super::{
    Setup,
    console::{Counted, counted},
    footprint::Footprint,
    process::{self, command, is_alive},
    wait::{wait_for, wait_until},
};

/// How much of the daemon's log is shown when a test fails.
const LOG_LINES: usize = 150;

/// What gives a program a mount namespace of its own, which is this one to begin with.
const UNSHARE: [&str; 5] = ["unshare", "--mount", "--propagation", "unchanged", "--"];

/// A daemon. When it is dropped all its sandboxes are deleted, and nothing may be left.
#[derive(Debug)]
pub(crate) struct Host {
    /// On a disk, as a store is: where cargo builds.
    disk: TempDir,
    /// The mount and the sockets: short, and anybody may pass through.
    place: TempDir,
    mount: PathBuf,
    store: PathBuf,
    daemon: Option<Child>,
    /// What the daemon is started by, where a unit restricts it.
    service: Vec<OsString>,
    /// The mount namespace that it is then in, once it was started.
    mounts: Option<File>,
    /// What the daemon held when it had just started, without any sandbox.
    first: Option<Footprint>,
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or_else(|| panic!("not from the system: {error}"))
}

impl Host {
    #[track_caller]
    pub(super) fn start(setup: &Setup) -> Self {
        let named = |dir: &Path| {
            let mut builder = tempfile::Builder::new();
            builder.prefix("e2e-").tempdir_in(dir).unwrap()
        };
        let (disk, place) = (named(Path::new(env!("CARGO_TARGET_TMPDIR"))), named("/tmp".as_ref()));
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let store = setup.own_store().map_or_else(|| disk.path().join("store"), Path::to_owned);
        let mount = place.path().join(setup.mount_in(place.path()));
        let service = setup.unit().map(|unit| as_service(unit, place.path())).unwrap_or_default();
        let mut host =
            Self { disk, place, mount, store, daemon: None, service, mounts: None, first: None };
        let document = setup.document(&host.mount, &host.store, &host.runtime());
        fs::write(host.config_file(), document).unwrap();
        host.restart();
        host.first = Some(Footprint::at_start(host.daemon_pid()));
        host
    }

    /// Returns where the tree is.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// Returns where snapshots are.
    pub(crate) fn store(&self) -> &Path {
        &self.store
    }

    fn runtime(&self) -> PathBuf {
        self.place.path().join("r")
    }

    /// Returns the directory that network namespaces are pinned in.
    fn pins(&self) -> PathBuf {
        self.runtime().join("netns")
    }

    pub(super) fn config_file(&self) -> PathBuf {
        self.disk.path().join("dozed.toml")
    }

    fn log_file(&self) -> PathBuf {
        self.disk.path().join("dozed.log")
    }

    /// Returns all that the daemon has said.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    fn spawn(&self) -> Child {
        let log = OpenOptions::new().append(true).create(true).open(self.log_file()).unwrap();
        let mut words = self.service.clone();
        if let Some(mounts) = &self.mounts {
            // As with systemd, the next daemon has the mounts of the one before.
            let (own, number) = (std::process::id(), mounts.as_raw_fd());
            let enter = ["nsenter".into(), format!("--mount=/proc/{own}/fd/{number}"), "--".into()];
            words.splice(..UNSHARE.len(), enter.map(OsString::from));
        }
        words.push(env!("CARGO_BIN_EXE_dozed").into());
        let mut run = command(&words[0]);
        run.args(&words[1..]);
        run.args(["run", "--log", "debug", "--config"]).arg(self.config_file());
        run.stdin(std::process::Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        run.spawn().unwrap()
    }

    /// Starts the daemon, and returns when it serves. None may be running.
    #[track_caller]
    pub(crate) fn restart(&mut self) {
        if let Err(said) = self.try_restart() {
            panic!("the daemon did not start: {said}");
        }
    }

    /// Starts the daemon, and returns when it serves. Where it ends instead, returns what it
    /// said.
    #[track_caller]
    pub(crate) fn try_restart(&mut self) -> Result<(), String> {
        assert!(self.daemon.is_none(), "the daemon is still running");
        let before = self.log().len();
        let child = self.spawn();
        let pid = child.id();
        self.daemon = Some(child);
        let says_that_it_serves = || {
            let log = self.log();
            log.get(before..).unwrap_or_default().contains("dozed: serving ")
        };
        let serves = wait_for("the daemon serves or ends", || {
            let is_alive = is_alive(pid);
            says_that_it_serves().then_some(true).or((!is_alive).then_some(false))
        });
        if !serves {
            self.ended();
            return Err(self.log().get(before..).unwrap_or_default().to_owned());
        }
        if !self.service.is_empty() {
            self.mounts = Some(File::open(format!("/proc/{pid}/ns/mnt")).unwrap());
        }
        Ok(())
    }

    /// Returns the daemon's process.
    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// Kills the daemon as a crash would.
    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Tells the daemon to end.
    pub(crate) fn ask_to_end(&self) {
        process::signal(self.daemon.as_ref().expect("the daemon runs"), Signal::TERM);
    }

    /// Waits until the daemon has ended.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        wait_for("the daemon ends", || daemon.try_wait().unwrap())
    }

    /// Ends the daemon in order.
    #[track_caller]
    pub(crate) fn terminate(&mut self) {
        self.ask_to_end();
        assert_eq!(self.ended().code(), Some(0), "the exit code after SIGTERM");
    }

    /// Returns the path of something in the tree.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }

    /// Reads a file of the tree.
    pub(crate) fn try_read(&self, name: &str) -> Result<String, Errno> {
        let bytes = fs::read(self.path(name)).map_err(|error| errno(&error))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads a file of the tree.
    #[track_caller]
    pub(crate) fn read(&self, name: &str) -> String {
        self.try_read(name).unwrap_or_else(|error| panic!("reading {name}: {error}"))
    }

    /// Opens a file of the tree for writing, without touching its content.
    pub(crate) fn open(&self, name: &str) -> Result<File, Errno> {
        OpenOptions::new().write(true).open(self.path(name)).map_err(|error| errno(&error))
    }

    /// Types a line on the console of a sandbox.
    #[track_caller]
    pub(crate) fn types(&self, id: &str, line: &str) {
        let line = format!("{line}\n");
        let mut left = line.as_bytes();
        let console = self.open(&format!("{id}/console")).unwrap();
        wait_until("the console takes a line", || {
            // The guest's UART takes a few bytes at a time.
            left = &left[(&console).write(left).unwrap()..];
            left.is_empty()
        });
    }

    /// Writes to a file of the tree, by one write(2), and commits what is a document.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<(), Errno> {
        let file = self.open(name)?;
        write_once(&file, bytes.as_ref())?;
        rustix::fs::fsync(&file)
    }

    /// Makes a sandbox.
    pub(crate) fn mkdir(&self, id: &str) -> Result<(), Errno> {
        fs::create_dir(self.path(id)).map_err(|error| errno(&error))
    }

    /// Deletes a sandbox.
    pub(crate) fn rmdir(&self, id: &str) -> Result<(), Errno> {
        fs::remove_dir(self.path(id)).map_err(|error| errno(&error))
    }

    /// Makes a sandbox and boots its guest, up to where it says something.
    #[track_caller]
    pub(crate) fn boot(&self, id: &str) {
        self.mkdir(id).unwrap();
        self.wake(id);
        wait_until(&format!("{id} says something"), || {
            !self.read(&format!("{id}/console")).is_empty()
        });
    }

    /// Wakes a sandbox, which has to succeed.
    #[track_caller]
    pub(crate) fn wake(&self, id: &str) {
        self.verb(id, "wake", "running");
    }

    /// Puts a sandbox to sleep, which has to succeed.
    #[track_caller]
    pub(crate) fn sleep(&self, id: &str) {
        self.verb(id, "sleep", "snapshotted");
    }

    #[track_caller]
    fn verb(&self, id: &str, verb: &str, state: &str) {
        if let Err(error) = self.write(&format!("{id}/state"), verb) {
            panic!("{verb} of {id}: {error}; it says: {}", self.error(id));
        }
        assert_eq!(self.state(id), state, "after {verb} of {id}");
        assert_eq!(self.error(id), "ok");
    }

    /// Returns the state of a sandbox.
    #[track_caller]
    pub(crate) fn state(&self, id: &str) -> String {
        self.read(&format!("{id}/state")).trim_end().to_owned()
    }

    /// Returns what a sandbox says went wrong.
    #[track_caller]
    pub(crate) fn error(&self, id: &str) -> String {
        let text = self.read(&format!("{id}/error"));
        assert_eq!(text.matches('\n').count(), 1, "`error` is one line: {text:?}");
        text.trim_end().to_owned()
    }

    /// Returns a value of a flat-keyed file, such as `web-1/status`.
    #[track_caller]
    pub(crate) fn value(&self, name: &str, key: &str) -> String {
        let text = self.read(name);
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("{name} has no {key}: {text}")).to_owned()
    }

    /// Returns a number of a flat-keyed file.
    #[track_caller]
    pub(crate) fn number(&self, name: &str, key: &str) -> u64 {
        let value = self.value(name, key);
        value.parse().unwrap_or_else(|_| panic!("{key} of {name} is {value}"))
    }

    /// Returns the process of a sandbox's VMM.
    #[track_caller]
    pub(crate) fn vmm(&self, id: &str) -> u32 {
        u32::try_from(self.number(&format!("{id}/status"), "pid")).unwrap()
    }

    /// Sends a signal to a VMM of this daemon's.
    #[track_caller]
    pub(crate) fn signal_vmm(&self, pid: u32, signal: Signal) {
        assert!(process::signal_naming(pid, &self.store, signal), "{pid} is no VMM of ours");
    }

    /// Gives a sandbox's VMM the CPU that it wants, however busy the machine is.
    #[track_caller]
    pub(crate) fn prefer(&self, id: &str) {
        process::prefer(self.vmm(id));
    }

    /// Sends a signal to a process that names the mount. False where there is none.
    pub(crate) fn signal_naming_mount(&self, pid: u32, signal: Signal) -> bool {
        process::signal_naming(pid, &self.mount, signal)
    }

    /// Reads a counter guest's console, which has to be without a gap.
    #[track_caller]
    pub(crate) fn counted(&self, id: &str) -> Counted {
        counted(&self.read(&format!("{id}/console")))
    }

    /// Waits until a counter guest has counted on, and returns what it says.
    #[track_caller]
    pub(crate) fn counts_on(&self, id: &str) -> Counted {
        let before = self.counted(id);
        wait_for(&format!("{id} counts on"), || {
            Some(self.counted(id)).filter(|now| now.count > before.count)
        })
    }

    /// Runs a script by bash, in the tree.
    pub(crate) fn bash(&self, script: &str) -> Output {
        command("/bin/bash").args(["-c", script]).current_dir(&self.mount).output().unwrap()
    }

    /// Runs a script by bash, which has to succeed; returns what it printed.
    #[track_caller]
    pub(crate) fn bash_ok(&self, script: &str) -> String {
        let output = self.bash(script);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {} {said}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Returns the sandboxes that are seen.
    pub(crate) fn list(&self) -> Vec<String> {
        let names = fs::read_dir(&self.mount).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.contains('.')).collect()
    }

    /// Returns the directory of a sandbox's files in the store.
    #[track_caller]
    pub(crate) fn home(&self, id: &str) -> PathBuf {
        use std::os::unix::fs::MetadataExt as _;
        // An inode number is the row times 64, and the row names the directory.
        let row = fs::metadata(self.path(id)).unwrap().ino() / 64;
        self.store.join("sandboxes").join(row.to_string())
    }

    /// Deletes all sandboxes and ends the daemon, and fails if anything is left.
    fn finish(&mut self) {
        if self.daemon.is_none() {
            self.restart();
        }
        for id in self.list() {
            self.write(&format!("{id}/pinned"), "0").unwrap();
            self.rmdir(&id).unwrap();
        }
        wait_until("all sandboxes are gone", || self.list().is_empty());
        // One that the reaper deletes counts until that is done.
        wait_until("none is counted", || self.number("dozed.status", "sandboxes") == 0);
        let left = |dir: &Path| {
            let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name != "lock").collect::<Vec<_>>()
        };
        let nothing_is_left_in = |dir: &Path| {
            let what = format!("nothing is left in {}", dir.display());
            wait_until(&what, || left(dir).is_empty());
        };
        nothing_is_left_in(&self.store.join("sandboxes"));
        nothing_is_left_in(&self.store.join("trash"));
        if self.pins().exists() {
            // The directory stays, for the namespaces of the next sandboxes.
            nothing_is_left_in(&self.pins());
            mount::detach(&self.pins()).unwrap();
            fs::remove_dir(self.pins()).unwrap();
        }
        nothing_is_left_in(&self.runtime());
        wait_until("no VMM is left", || process::naming(&self.store).is_empty());
        assert_eq!(self.number("dozed.status", "memory_bytes"), 0);
        let first = self.first.take().expect("it was looked at after the start");
        Footprint::wait_for(self.daemon_pid(), &first);
        self.terminate();
        self.stop_sharing();
        for dir in [self.place.path(), self.disk.path()] {
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
        }
        assert!(process::naming(self.place.path()).is_empty(), "a process is left");
        let log = self.log();
        assert!(!log.contains("this is a bug in dozed"), "the daemon panicked");
    }

    /// Takes away what a failed test left, by force.
    fn wreck(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().ok();
            daemon.wait().ok();
        }
        for path in [&self.store, self.place.path()] {
            for pid in process::naming(path) {
                process::signal_naming(pid, path, Signal::KILL);
            }
        }
        mount::detach(&self.mount).ok();
        for pin in fs::read_dir(self.pins()).into_iter().flatten().flatten() {
            netns::unpin(&pin.path()).ok();
        }
        mount::detach(&self.pins()).ok();
        self.stop_sharing();
    }

    /// Undoes what [`as_service`] did to the mounts.
    fn stop_sharing(&self) {
        if !self.service.is_empty() {
            mount::detach(self.place.path()).ok();
        }
    }

    /// Shows the end of the daemon's log.
    #[allow(clippy::print_stdout, reason = "the test harness shows it with the failure")]
    fn tell(&self) {
        let log = self.log();
        // What came of an operation is not to be drowned in looks at it.
        let told = log.lines().filter(|line| !line.contains(" DEBUG FUSE("));
        let lines: Vec<_> = told.collect();
        let shown = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        println!("--- the daemon said:\n{shown}\n---");
    }
}

/// Returns what starts a program as the service of `unit`, in a mount namespace of its own.
/// What it mounts in `place` is mounted here too.
fn as_service(unit: &Path, place: &Path) -> Vec<OsString> {
    let program = process::example("as-service");
    mount_bind(place, place).unwrap();
    mount_change(place, MountPropagationFlags::SHARED).unwrap();
    UNSHARE
        .into_iter()
        .map(OsString::from)
        .chain([program.into(), unit.into(), place.into()])
        .collect()
}

/// Writes by one write(2).
pub(crate) fn write_once(mut file: &File, bytes: &[u8]) -> Result<(), Errno> {
    let count = file.write(bytes).map_err(|error| errno(&error))?;
    assert_eq!(count, bytes.len(), "a command is taken whole or not at all");
    Ok(())
}

impl Drop for Host {
    fn drop(&mut self) {
        let failed = thread::panicking();
        let finished = !failed && catch_unwind(AssertUnwindSafe(|| self.finish())).is_ok();
        if !finished {
            self.tell();
            self.wreck();
        }
        assert!(finished || failed, "something was left behind; see above");
    }
}
