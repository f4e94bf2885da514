//! The guests: built by the scripts of this tree, once, however many tests need them.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::process::command;

/// Where cargo builds; the guests are beside what it built.
fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_owned()
}

/// Runs a script that makes `out`, while no other process does.
fn build(script: &str, out: &Path) {
    let dir = target();
    let lock = File::create(dir.join(format!(".{script}.lock"))).unwrap();
    lock.lock().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script);
    fs::create_dir_all(out.parent().unwrap()).unwrap();
    let built = command(&script).arg(out).output().unwrap();
    assert!(
        built.status.success(),
        "{}: {}",
        script.display(),
        String::from_utf8_lossy(&built.stderr)
    );
}

/// Returns the kernel of the counter guest (see `tests/guest/counter.S`).
pub(crate) fn counter_kernel() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let out = target().join("counter-guest").join("counter.elf");
        build("counter-guest", &out);
        out
    };
    BUILT.get_or_init(build).clone()
}

/// Returns the directory of the Linux guest (see `scripts/guest-image`).
pub(super) fn linux_dir() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let out = target().join("guest-image");
        build("guest-image", &out);
        out
    };
    BUILT.get_or_init(build).clone()
}

/// The command line that the Linux guest wants: its script says why.
pub(super) fn linux_cmdline() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpus.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(": ").nth(1));
    let khz = mhz.unwrap().trim().replace('.', "");
    format!("console=ttyS0 reboot=t panic=-1 quiet tsc_early_khz={khz}")
}
