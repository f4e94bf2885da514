//! Processes: starting them, looking at them, and ending those that are ours.

use std::{
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Makes ready to run `program`. Whoever starts it waits for it.
#[allow(clippy::disallowed_methods, reason = "a test waits for what it starts")]
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_remove("JOURNAL_STREAM");
    command
}

/// Builds an example of this crate, which a test runs; returns its program.
pub(crate) fn example(name: &str) -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The test's own program is target/debug/deps/e2e-…
    let own = std::env::current_exe().unwrap();
    let profile = own.ancestors().nth(2).unwrap();
    let mut cargo = command(env!("CARGO"));
    cargo.args(["build", "--quiet", "--offline", "--example", name, "--target-dir"]);
    cargo.arg(profile.parent().unwrap()).current_dir(manifest);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let output = cargo.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{cargo:?}: {} {said}", output.status);
    profile.join("examples").join(name)
}

/// Returns the processes that have `path` in their command line.
pub(super) fn naming(path: &Path) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != std::process::id() && names(*pid, path)).collect()
}

fn names(pid: u32, path: &Path) -> bool {
    let path = path.as_os_str().as_bytes();
    // A process that is gone meanwhile names nothing.
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    cmdline.windows(path.len()).any(|window| window == path)
}

/// Says whether the process is there and not just waiting to be reaped.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Sends a signal to the process `pid` if it names `path`, so that the number of a
/// process that is gone hits nobody else. False where there is no such process.
pub(super) fn signal_naming(pid: u32, path: &Path, signal: Signal) -> bool {
    let pid_of = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let Ok(pidfd) = pidfd_open(pid_of, PidfdFlags::empty()) else { return false };
    // From here on the descriptor means one process, whatever the number comes to mean.
    names(pid, path) && pidfd_send_signal(&pidfd, signal).is_ok()
}

/// Has the kernel prefer all threads of a process to those of others, so that it has the CPU
/// that it wants on a machine that is busy.
pub(super) fn prefer(pid: u32) {
    // A nice value is worth something among those of one session only (autogroup, sched(7)).
    let mut chrt = command("chrt");
    chrt.args(["--all-tasks", "--rr", "--pid", "1", &pid.to_string()]);
    let output = chrt.output().unwrap();
    assert!(output.status.success(), "{chrt:?}: {output:?}");
}

/// Sends a signal to a child that has not been waited for.
pub(crate) fn signal(child: &std::process::Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
