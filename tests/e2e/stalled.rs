//! What others hold without an end: a disk that does not answer, and the memory of a process
//! that is served by nobody.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use dozed::sys::{bounded, files::drop_cache};

use crate::support::{Setup, StallingDisk, StallingFile, command, wait_for, wait_until};

/// More than there are threads that read requests.
const READERS: usize = 8;
/// How long a read has to have waited to be one that waits for ever.
const NEVER: Duration = Duration::from_secs(2);

#[test]
fn consoles_on_a_disk_that_does_not_answer_hold_up_who_reads_them_and_nobody_else() {
    let disk = StallingDisk::new(192 << 20);
    let host = Setup::counter("").store(disk.store()).start();
    for id in ["asleep", "awake"] {
        host.boot(id);
        host.counts_on(id);
    }
    host.sleep("asleep");
    let console = File::open(host.home("asleep").join("console.log")).unwrap();
    console.sync_all().unwrap();
    drop_cache(&console).unwrap();
    let stall = disk.stall();
    let reader = || {
        let mut cat = command("cat");
        cat.arg(host.path("asleep/console")).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut readers: Vec<_> = (0..READERS).map(|_| reader()).collect();
    for _ in 0..3 {
        assert_eq!(host.state("awake"), "running");
        assert_eq!(host.state("asleep"), "snapshotted");
        assert_eq!(host.list().len(), 2);
        for file in ["dozed.list", "dozed.status", "dozed.events", "dozed.metrics"] {
            assert!(!host.read(file).is_empty(), "{file}");
        }
        for file in ["status", "activity", "idle", "config", "error", "events"] {
            assert!(!host.read(&format!("awake/{file}")).is_empty(), "{file}");
        }
        host.bash_ok("stat . awake awake/* > /dev/null");
    }
    let mut waits = |reader: &mut Child| reader.try_wait().unwrap().is_none();
    assert!(readers.iter_mut().all(&mut waits), "nothing was read from the disk");
    drop(stall);
    for reader in &mut readers {
        let status = wait_for("a reader has its console", || reader.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
    host.wake("asleep");
    for id in ["asleep", "awake"] {
        assert_eq!(host.counts_on(id).boots, 1);
    }
}

/// A process whose arguments nobody can read while `file` stalls: it has its map of its memory
/// locked, and waits for a page of that file to be written.
struct Unreadable(Child);

const HIDE: &str = "
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
read_write, shared, private_fixed_anonymous = 3, 1, 0x32
page = os.sysconf('SC_PAGESIZE')
file = os.open(sys.argv[1], os.O_RDWR)
at = libc.mmap(None, page, read_write, shared, file, 0)
ctypes.memset(at, 1, 1)
print('mapped', flush=True)
sys.stdin.readline()
libc.mmap(at, page, read_write, private_fixed_anonymous, -1, 0)
sys.stdin.readline()
";

/// As above, but in execve(2), where it closes `file`. Until it has, the kernel lets nobody read
/// the numbers of its process, on some versions not even which program that runs.
const BECOME: &str = "
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
print('mapped', flush=True)
sys.stdin.readline()
os.execv('/bin/sleep', ['sleep', '1000'])
";

impl Unreadable {
    /// Starts one that runs `script` by the program `python` as the user `uid`. The file must
    /// answer yet.
    #[track_caller]
    fn start(script: &str, python: &Path, uid: u32, file: &StallingFile) -> Self {
        let mut child = command(python);
        child.args(["-c", script]).arg(file.path()).env("PYTHONHOME", "/usr").uid(uid);
        child.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = Self(child.spawn().unwrap());
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "mapped\n");
        child
    }

    /// Returns when this file of its `/proc` cannot be read any more.
    #[track_caller]
    fn hide(&mut self, name: &str) {
        writeln!(self.0.stdin.as_ref().unwrap()).unwrap();
        let path = format!("/proc/{}/{name}", self.0.id());
        wait_until("it cannot be read", || {
            let path = path.clone();
            bounded::within(NEVER, || fs::read(path)).is_err()
        });
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_process_whose_arguments_cannot_be_read_keeps_no_daemon_from_starting() {
    const STRANGER: u32 = 65_432;
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    host.counts_on("web-1");
    let vmm = host.vmm("web-1");
    host.kill_daemon();

    let programs = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let python = fs::canonicalize("/usr/bin/python3").unwrap();
    // One that is taken for a VMM, until it is asked for its name.
    let as_vmm = programs.path().join("qemu-system-x86_64");
    fs::copy(&python, &as_vmm).unwrap();
    let files = [StallingFile::cached(4096), StallingFile::cached(4096)];
    let mut hidden = [(&python, STRANGER, &files[0]), (&as_vmm, 0, &files[1])]
        .map(|(python, uid, file)| Unreadable::start(HIDE, python, uid, file));
    let stalls = files.each_ref().map(StallingFile::stall);
    hidden.iter_mut().for_each(|hidden| hidden.hide("cmdline"));
    host.restart();
    assert_eq!(host.vmm("web-1"), vmm);
    host.sleep("web-1");
    host.wake("web-1");
    host.rmdir("web-1").unwrap();
    host.boot("web-2");
    // They cannot be killed before.
    drop(stalls);
    drop(hidden);
    let log = host.log();
    let told = log.matches("the name of a process could not be read").count();
    assert!(told > 0, "the one that is taken for a VMM was not asked: {log}");
    assert_eq!(host.counts_on("web-2").boots, 1);
}

#[test]
fn a_process_that_cannot_become_another_program_keeps_no_daemon_from_starting() {
    const STRANGER: u32 = 65_432;
    let python = fs::canonicalize("/usr/bin/python3").unwrap();
    let files = [StallingFile::cached(4096), StallingFile::cached(4096)];
    let mut stuck = [(0, &files[0]), (STRANGER, &files[1])]
        .map(|(uid, file)| Unreadable::start(BECOME, &python, uid, file));
    let stalls = files.each_ref().map(StallingFile::stall_with_closes);
    stuck.iter_mut().for_each(|stuck| stuck.hide("io"));
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    host.kill_daemon();
    host.restart();
    host.sleep("web-1");
    host.wake("web-1");
    // They cannot be killed before.
    drop(stalls);
    drop(stuck);
    assert_eq!(host.counts_on("web-1").boots, 1);
}
