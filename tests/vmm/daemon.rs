//! A whole daemon whose VMM is the stand-in, driven as a user does: through its tree.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use dozed::sys::process::{Launch, Process};
use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

use crate::support::{SOON, Standin, eventually, open_dir};

/// What a template has whose memory does not matter.
const MEMORY: &str = "memory = \"64MiB\"\n";

/// A daemon that runs. It is ended at the end, with its guests.
#[derive(Debug)]
pub(crate) struct Daemon {
    dir: TempDir,
    pub(crate) standin: Standin,
    process: Arc<Process>,
}

/// What is special about a daemon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup<'a> {
    /// The stand-in's version.
    pub(crate) version: &'a str,
    /// More lines for `[vmm]`.
    pub(crate) vmm: &'a str,
    /// The size of the memory, as a line for `[template]`.
    pub(crate) memory: &'a str,
    /// More lines for `[template]`, in which `DIR` is the daemon's directory.
    pub(crate) template: &'a str,
    /// Whether only root can enter the directories, and read the files in them. There are
    /// two images of disks then, `own.img` and `base.img`.
    pub(crate) closed: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self { version: "53.0", vmm: "", memory: MEMORY, template: "", closed: false }
    }
}

impl Daemon {
    /// Starts a daemon on a host that has the stand-in at `version`.
    pub(crate) fn start(version: &str) -> Self {
        Self::with(Setup { version, ..Setup::default() })
    }

    /// Starts one whose template has `keys` in place of the size of its memory.
    pub(crate) fn start_with(version: &str, keys: &str) -> Self {
        Self::with(Setup { version, memory: keys, ..Setup::default() })
    }

    /// Starts a daemon on a host as described.
    pub(crate) fn with(setup: Setup<'_>) -> Self {
        Self::begin(setup, spawn)
    }

    /// Starts one as [`Daemon::start`] does, by `spawn`, which gets its directory.
    pub(crate) fn start_by(version: &str, spawn: impl FnOnce(&Path) -> Arc<Process>) -> Self {
        Self::begin(Setup { version, ..Setup::default() }, spawn)
    }

    fn begin(setup: Setup<'_>, spawn: impl FnOnce(&Path) -> Arc<Process>) -> Self {
        let standin = Standin::new(setup.version);
        let dir = open_dir("dozed");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("kernel"), b"\x7fELF").unwrap();
        fs::create_dir(path("mount")).unwrap();
        if setup.closed {
            for name in ["own.img", "base.img"] {
                fs::write(path(name), vec![0; 1 << 20]).unwrap();
            }
            for name in ["own.img", "base.img", "kernel"] {
                fs::set_permissions(path(name), Permissions::from_mode(0o600)).unwrap();
            }
            for dir in [dir.path(), standin.program().parent().unwrap()] {
                fs::set_permissions(dir, Permissions::from_mode(0o700)).unwrap();
            }
        }
        let template = setup.template.replace("DIR", dir.path().to_str().unwrap());
        let memory = setup.memory;
        let settings = format!(
            "mount = {:?}\nstore = {:?}\nruntime = {:?}\n\
             [defaults]\nidle_after = \"never\"\n\
             [vmm]\ncloud_hypervisor = {:?}\n{}\n\
             [template]\nvmm = \"cloud-hypervisor\"\nkernel = {:?}\n\
             cmdline = \"touch=2\"\n{memory}{template}",
            path("mount"),
            path("store"),
            path("run"),
            standin.program(),
            setup.vmm,
            path("kernel"),
        );
        fs::write(path("dozed.toml"), settings).unwrap();
        let process = spawn(dir.path());
        let daemon = Self { dir, standin, process };
        daemon.wait_for_tree();
        daemon
    }

    /// Kills the daemon, as a crash does.
    pub(crate) fn kill(&self) {
        self.process.kill();
        self.process.wait(SOON).unwrap();
        unmount(self.path("mount"), UnmountFlags::DETACH).unwrap();
    }

    /// Has the next daemon read other lines in `[vmm]`.
    pub(crate) fn set_vmm(&self, lines: &str) {
        let file = self.path("dozed.toml");
        let settings = fs::read_to_string(&file).unwrap();
        let (before, rest) = settings.split_once("cloud_hypervisor = ").unwrap();
        let (program, rest) = rest.split_once('\n').unwrap();
        let (_, after) = rest.split_once("[template]").unwrap();
        let settings = format!("{before}cloud_hypervisor = {program}\n{lines}\n[template]{after}");
        fs::write(&file, settings).unwrap();
    }

    /// Starts another after a crash.
    pub(crate) fn start_again(&mut self) {
        self.process = spawn(self.dir.path());
        self.wait_for_tree();
    }

    fn wait_for_tree(&self) {
        eventually("the tree", || self.path("mount/dozed.status").exists().then_some(()));
    }

    /// Returns the daemon's own process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.identity().pid
    }

    /// Returns a path of the daemon's files, such as `store`.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn make(&self, id: &str) {
        fs::create_dir(self.sandbox(id)).unwrap();
    }

    pub(crate) fn remove(&self, id: &str) {
        fs::remove_dir(self.sandbox(id)).unwrap();
        assert!(!self.sandbox(id).exists());
    }

    /// Writes a verb, and returns once it is done.
    pub(crate) fn write(&self, id: &str, verb: &str) -> io::Result<()> {
        fs::write(self.sandbox(id).join("state"), verb)
    }

    /// Writes the `config` of a sandbox, which is stopped.
    pub(crate) fn configure(&self, id: &str, text: &str) -> io::Result<()> {
        let mut file = fs::File::options().write(true).open(self.sandbox(id).join("config"))?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        // It is a document, which is committed by this or by its close.
        file.sync_all()
    }

    /// Reads a file of a sandbox.
    pub(crate) fn read(&self, id: &str, name: &str) -> String {
        let text = fs::read(self.sandbox(id).join(name)).unwrap();
        String::from_utf8_lossy(&text).trim_end().to_owned()
    }

    pub(crate) fn state(&self, id: &str) -> String {
        self.read(id, "state")
    }

    fn sandbox(&self, id: &str) -> PathBuf {
        self.path("mount").join(id)
    }

    /// Returns the processes that run the stand-in's program, whoever knows of them.
    pub(crate) fn vmms(&self) -> Vec<u32> {
        let program = fs::metadata(self.standin.program()).unwrap();
        let is_it = |pid: &u32| {
            // Hard links to one program are one inode, and their paths are not.
            let exe = PathBuf::from(format!("/proc/{pid}/exe"));
            let same = fs::metadata(&exe).is_ok_and(|meta| meta.ino() == program.ino());
            same && fs::read_link(&exe).is_ok_and(|path| path == self.standin.program())
        };
        let entries = fs::read_dir("/proc").unwrap();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter_map(|name| name.parse().ok()).filter(is_it).collect()
    }

    /// Returns the names of all there is below `name`, with their directories, without the
    /// index and without logs.
    pub(crate) fn files(&self, name: &str) -> Vec<PathBuf> {
        let root = self.path(name);
        let mut found = Vec::new();
        collect(&root, &mut found);
        found.retain(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            let is_log = path.extension().is_some_and(|extension| extension == "log");
            !is_log && !name.starts_with("index") && !name.starts_with("console")
        });
        let mut names: Vec<_> =
            found.iter().map(|path| path.strip_prefix(&root).unwrap().to_owned()).collect();
        names.sort();
        names
    }

    /// Returns what the daemon logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("dozed.err")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.process.identity().pid).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).ok();
        if self.process.wait(SOON).is_none() {
            self.process.kill();
        }
        unmount(self.path("mount"), UnmountFlags::DETACH).ok();
        for pid in self.vmms() {
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).ok();
        }
    }
}

/// Starts the program on the settings in `dir`.
pub(crate) fn spawn(dir: &Path) -> Arc<Process> {
    let program = Path::new(env!("CARGO_BIN_EXE_dozed"));
    let settings = dir.join("dozed.toml").into_os_string();
    let args = ["run".into(), "--config".into(), settings];
    let log = File::create(dir.join("dozed.err")).unwrap();
    Process::spawn(Launch::new(program, &args, log)).unwrap()
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    // What is removed while we look was nothing left over.
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&path, found);
        }
        found.push(path);
    }
}
