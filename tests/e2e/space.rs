//! A store that is full.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::{fs::FallocateFlags, io::Errno};
use tempfile::TempDir;

use crate::support::{Host, Setup, command};

/// A small file system of its own, in a file.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn new(size: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = Self { dir };
        let image = disk.dir.path().join("image");
        File::create(&image).unwrap().set_len(size).unwrap();
        fs::create_dir(disk.store()).unwrap();
        let run = |program: &str, arguments: &[&Path]| {
            let output = command(program).args(arguments).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program}: {said}");
        };
        run("mkfs.ext4", &["-q".as_ref(), "-m0".as_ref(), &image]);
        run("mount", &["-o".as_ref(), "loop".as_ref(), &image, &disk.store()]);
        disk
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.store()).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Fills it so that no more than `left` bytes are free.
    fn fill(&self, left: u64) -> PathBuf {
        let path = self.store().join("filler");
        let file = File::create(&path).unwrap();
        let len = self.free() - left;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len).unwrap();
        file.sync_all().unwrap();
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        dozed::sys::mount::detach(&self.store()).unwrap();
    }
}

/// The sleep is refused for lack of space, and the guest runs on.
#[track_caller]
fn sleep_is_refused(host: &Host) {
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::NOSPC));
    assert_eq!(host.state("web-1"), "running");
    assert!(host.error("web-1").contains("are free"), "{}", host.error("web-1"));
    host.counts_on("web-1");
}

#[test]
fn a_sleep_that_would_not_fit_leaves_the_guest_running_until_there_is_room() {
    let disk = SmallDisk::new(192 << 20);
    let host = Setup::counter("touch=4").store(&disk.store()).start();
    host.boot("web-1");
    host.counts_on("web-1");
    let filler = disk.fill(4 << 20);
    for _ in 0..3 {
        sleep_is_refused(&host);
    }
    let status = host.bash("echo sleep > web-1/state");
    let said = String::from_utf8_lossy(&status.stderr);
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(host.counts_on("web-1").boots, 1);
    fs::remove_file(filler).unwrap();
    host.sleep("web-1");
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
}
