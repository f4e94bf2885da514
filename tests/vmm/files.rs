//! Where a sandbox has its files in these tests, and what its guest printed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use dozed::{
    sandbox::{MemoryMode, RestoreMode},
    sys::{
        cancel::Cancel,
        process::{Exit, Process, Search},
    },
    vmm::{Machine, Plan},
};
use tempfile::TempDir;

use crate::support::{SOON, eventually, open_dir};

/// The first of the users that machines here run as, each as one of its own.
const FIRST_USER: u32 = 2_147_100_000;
/// Enough for the guest that counts, and for what it is told to touch.
pub(crate) const MEMORY_BYTES: u64 = 128 << 20;

/// A sandbox's files, and the plan that names them. Its directory has a comma and a blank
/// in its name. Whatever process has its token is killed at the end.
#[derive(Debug)]
pub(crate) struct Host {
    dir: TempDir,
    pub(crate) plan: Plan,
}

impl Host {
    pub(crate) fn new(kernel: &Path, cmdline: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = open_dir("a, b");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("run")).unwrap();
        fs::write(path("memory"), b"").unwrap();
        let plan = Plan {
            id: "web-1".parse().unwrap(),
            token: format!("dozed-contract-{}-{count}-", std::process::id()),
            user: Some(FIRST_USER + count),
            vcpus: 1,
            memory_bytes: MEMORY_BYTES,
            memory_mode: MemoryMode::Auto,
            restore_mode: RestoreMode::Auto,
            kernel: Some(kernel.to_owned()),
            initramfs: None,
            cmdline: cmdline.to_owned(),
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a new directory for a snapshot.
    pub(crate) fn snapshot_dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    }

    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(&self.plan.console_log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let any = [String::new()];
        let search = Search { programs: &any, is_user: &|_| true, prefix: &self.plan.token };
        Process::find(&search).unwrap().into_iter().map(|(process, _)| process).collect()
    }

    /// The lines `count N sum S`, as pairs. An unfinished line at the end is left out.
    pub(crate) fn counts(&self) -> Vec<(u32, String)> {
        counts_in(&self.console())
    }

    pub(crate) fn last_count(&self) -> u32 {
        self.counts().last().map_or(0, |(count, _)| *count)
    }

    pub(crate) fn wait_for_count(&self, wanted: u32) {
        eventually("the count", || (self.last_count() >= wanted).then_some(()));
    }

    /// Claims that the guest counted from one without a gap or a repeat, always to one
    /// sum, and booted once.
    pub(crate) fn assert_whole(&self) {
        assert_whole(&self.console());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for process in self.processes() {
            process.kill();
        }
    }
}

/// Returns what a guest counted, as pairs of count and sum.
pub(crate) fn counts_in(console: &str) -> Vec<(u32, String)> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("count ")?.split_once(" sum "))
        .map(|(count, sum)| (u32::from_str_radix(count, 16).unwrap(), sum.to_owned()))
        .collect()
}

/// Claims that a guest counted from one without a gap or a repeat, always to one sum,
/// and booted once.
pub(crate) fn assert_whole(console: &str) {
    let counts = counts_in(console);
    for (index, (count, sum)) in counts.iter().enumerate() {
        assert_eq!(u32::try_from(index + 1), Ok(*count), "{console}");
        assert_eq!(sum, &counts[0].1, "{console}");
    }
    assert_eq!(console.matches("counter guest ready").count(), 1, "it booted once: {console}");
    assert!(!console.contains("torn") && !console.contains("faults"), "{console}");
}

/// Ends the machine as a sleep does.
pub(crate) fn end(machine: &dyn Machine) {
    machine.process().kill();
    assert_eq!(machine.process().wait(SOON), Some(Exit::Signal(9)));
}
