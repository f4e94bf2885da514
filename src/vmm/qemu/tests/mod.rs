//! With the real QEMU, the counter guest and a Linux guest; and with a scripted QEMU for
//! what the real one does not do on demand. They need QEMU, and fail without it.

mod counter;
mod linux;
mod scripted;
mod wall_clock;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

use super::*;
use crate::{
    sync::Arc,
    sys::{
        cancel::Cancel,
        clock::{self, Deadline},
        process::{Exit, ExitWatch, Process, Search},
    },
    vmm::{log, peer::Peer},
};

/// No wait of these tests is as long on any machine.
const SOON: Duration = Duration::from_secs(180);

/// Waits for `found`, which looks at the world again each time.
fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(SOON);
    loop {
        if let Some(it) = found() {
            return it;
        }
        assert!(!deadline.passed(), "{what} does not come");
        clock::pause_for(Duration::from_millis(5));
    }
}

/// Where a sandbox has its files, and the plan that names them. Its directory has a comma
/// and a blank in its name. Whatever process has its token is killed at the end.
struct Host {
    dir: TempDir,
    plan: Plan,
}

impl Host {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new().prefix("a, b").tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("run")).unwrap();
        fs::write(path("memory"), b"").unwrap();
        let plan = Plan {
            id: "web-1".parse().unwrap(),
            token: format!("dozed-qemu-test-{}-{count}-", std::process::id()),
            user: None,
            vcpus: 1,
            memory_bytes: 256 << 20,
            memory_mode: MemoryMode::Auto,
            restore_mode: RestoreMode::Auto,
            kernel: None,
            initramfs: None,
            cmdline: String::new(),
            disks: Vec::new(),
            balloon: true,
            vsock: None,
            nic: None,
            memory: path("memory"),
            runtime_dir: path("run"),
            console_log: path("console.log"),
            vmm_log: path("vmm.log"),
            held: Vec::new(),
            cancel: Arc::new(Cancel::default()),
        };
        Self { dir, plan }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a new directory for a snapshot.
    fn snapshot_dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    }

    fn console(&self) -> String {
        let bytes = fs::read(&self.plan.console_log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn processes(&self) -> Vec<Arc<Process>> {
        let any = [String::new()];
        let search = Search { programs: &any, is_user: &|_| true, prefix: &self.plan.token };
        Process::find(&search).unwrap().into_iter().map(|(process, _)| process).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for process in self.processes() {
            process.kill();
        }
    }
}

/// Ends the machine as a sleep does.
fn end(machine: &dyn Machine) {
    machine.process().kill();
    assert_eq!(machine.process().wait(SOON), Some(Exit::Signal(9)));
}

/// Runs one of our scripts and returns what it made.
fn built(script: &str, made: PathBuf) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script);
    let args = [script.to_str().unwrap(), made.to_str().unwrap()];
    let output = command::output(Path::new("/bin/bash"), &args, 5 * SOON).unwrap();
    assert!(output.status.success(), "{}: {}", script.display(), output.stdout);
    made
}

fn target_dir() -> PathBuf {
    // The test's own program is target/debug/deps/dozed-…
    let program = std::env::current_exe().unwrap();
    program.ancestors().nth(3).unwrap().to_owned()
}

/// Returns the guest's memory.
fn memory(host: &Host) -> Vec<u8> {
    fs::read(&host.plan.memory).unwrap()
}

/// Returns the CPU's registers as QEMU prints them. They change with each instruction.
fn registers(host: &Host, process: &Arc<Process>) -> String {
    let peer = peer(host, process);
    let mut qmp = qmp::Qmp::open(&peer, "testing", SOON).unwrap();
    let line = serde_json::json!({ "command-line": "info registers" });
    let text = qmp.run("human-monitor-command", &line, SOON).unwrap();
    text.as_str().unwrap().to_owned()
}

fn peer(host: &Host, process: &Arc<Process>) -> Peer {
    Peer {
        process: Arc::clone(process),
        socket: host.plan.runtime_dir.join("qmp.sock"),
        last_words: log::LastWords::from_now_on(&host.plan.vmm_log),
    }
}

#[test]
fn the_version_is_told_from_what_qemu_says_around_it() {
    let said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c)";
    assert_eq!(parse_version(said), Some("7.2.22"));
    assert_eq!(parse_version("QEMU emulator version"), None);
    assert_eq!(parse_version("hello"), None);
}
