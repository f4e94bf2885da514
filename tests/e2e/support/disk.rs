//! A small file system of the test's own, in a file, which can be full and can fail.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use tempfile::TempDir;

use super::process::command;

/// What a disk is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
    /// It keeps no room for a mapping.
    Btrfs,
    /// It is in memory, and keeps no room either.
    Tmpfs,
}

impl FileSystem {
    /// Returns what formats it. It must not discard, as what is on the disk is to stay there.
    fn format(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["mkfs.ext4", "-q", "-m0", "-E", "nodiscard"],
            Self::Xfs => &["mkfs.xfs", "-q", "-K"],
            Self::Btrfs => &["mkfs.btrfs", "-q", "-K"],
            Self::Tmpfs => &[],
        }
    }

    /// Returns the smallest size that its tools make, about.
    pub(crate) fn least_bytes(self) -> u64 {
        match self {
            Self::Ext4 => 96 << 20,
            Self::Xfs => 304 << 20,
            Self::Btrfs => 128 << 20,
            Self::Tmpfs => 1 << 20,
        }
    }
}

/// Room beside the image for what the disk needs to be made.
const SPARE_BYTES: u64 = 8 << 20;

/// A file system in a file in a file system of its own. It is unmounted when it is dropped.
#[derive(Debug)]
pub(crate) struct Disk {
    dir: TempDir,
}

impl Disk {
    #[track_caller]
    pub(crate) fn new(system: FileSystem, bytes: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = Self { dir };
        fs::create_dir(disk.store()).unwrap();
        fs::create_dir(disk.below()).unwrap();
        mount_memory(&disk.below(), bytes + SPARE_BYTES);
        let [program, options @ ..] = system.format() else {
            mount_memory(&disk.store(), bytes);
            return disk;
        };
        let image = File::create(disk.image()).unwrap();
        image.set_len(bytes).unwrap();
        run(command(program).args(options).arg(disk.image()));
        run(command("mount").args(["-o", "loop"]).arg(disk.image()).arg(disk.store()));
        disk
    }

    /// Returns the root of the file system.
    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn below(&self) -> PathBuf {
        self.dir.path().join("below")
    }

    fn image(&self) -> PathBuf {
        self.below().join("image")
    }

    fn ballast(&self) -> PathBuf {
        self.below().join("ballast")
    }

    /// Returns how many bytes are free.
    pub(crate) fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.store()).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Fills it so that no more than `left` bytes are free, with the file that it returns.
    pub(crate) fn fill(&self, left: u64) -> PathBuf {
        let path = self.store().join("filler");
        let file = File::create(&path).unwrap();
        let len = self.free().saturating_sub(left);
        fallocate(&file, FallocateFlags::empty(), 0, len).unwrap();
        file.sync_all().unwrap();
        path
    }

    /// Takes what room is left, to the last byte that anybody gets.
    pub(crate) fn fill_to_the_byte(&self) {
        let file = File::create(self.last()).unwrap();
        // Most of it at once.
        let len = self.free().saturating_sub(8 << 20);
        fallocate(&file, FallocateFlags::empty(), 0, len).unwrap();
        write_all_there_is(&file);
        file.sync_all().unwrap();
        write_all_there_is(&file);
    }

    /// Gives that room back.
    pub(crate) fn make_room(&self) {
        fs::remove_file(self.last()).unwrap();
    }

    fn last(&self) -> PathBuf {
        self.store().join("last")
    }

    /// Has every write of the content of `file` fail from now on, and no other write.
    /// What it has on the disk is lost. It must be larger than 0 and have all its blocks.
    #[track_caller]
    pub(crate) fn lose_writes_of(&self, file: &Path) {
        // All of the image has room, but for the blocks of this file.
        let image = File::options().write(true).open(self.image()).unwrap();
        let len = image.metadata().unwrap().len();
        fallocate(&image, FallocateFlags::empty(), 0, len).unwrap();
        let listed = command("filefrag").args(["-e", "-v", "-b4096"]).arg(file).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let mut lost = 0;
        for (start, count) in listed.lines().filter_map(blocks) {
            fallocate(&image, punch, start * 4096, count * 4096).unwrap();
            lost += count;
        }
        assert!(lost > 0, "it has no blocks: {listed}");
        let ballast = File::create(self.ballast()).unwrap();
        write_all_there_is(&ballast);
    }

    /// Has all writes succeed again.
    pub(crate) fn mend(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

/// Appends to a file until the disk is full.
fn write_all_there_is(file: &File) {
    let mut at = file.metadata().unwrap().len();
    loop {
        match file.write_at(&[1; 4096], at) {
            Ok(written) => at += u64::try_from(written).unwrap(),
            Err(error) => {
                assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC));
                return;
            }
        }
    }
}

/// Reads a line of filefrag(8): where an extent begins on the disk, and how long it is.
fn blocks(line: &str) -> Option<(u64, u64)> {
    let mut columns = line.split(':');
    let _number: u64 = columns.next()?.trim().parse().ok()?;
    let (start, _) = columns.nth(1)?.split_once("..")?;
    Some((start.trim().parse().ok()?, columns.next()?.trim().parse().ok()?))
}

#[track_caller]
fn mount_memory(dir: &Path, bytes: u64) {
    let size = format!("size={bytes}");
    run(command("mount").args(["-t", "tmpfs", "-o", &size, "dozed-test"]).arg(dir));
}

/// A block device whose content is that of a file, for as long as this lives.
#[derive(Debug)]
pub(crate) struct LoopDevice(PathBuf);

impl LoopDevice {
    #[track_caller]
    pub(crate) fn over(file: &Path) -> Self {
        let said = run(command("losetup").args(["--find", "--show"]).arg(file));
        Self(said.trim_end().into())
    }

    /// Returns its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run(command("losetup").arg("--detach").arg(&self.0));
    }
}

/// Runs a program, which has to succeed, and returns what it wrote.
#[track_caller]
pub(super) fn run(command: &mut std::process::Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

impl Drop for Disk {
    fn drop(&mut self) {
        for dir in [self.store(), self.below()] {
            dozed::sys::mount::detach(&dir).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blocks_of_a_file_are_read() {
        let line = "   0:        0..    1023:      34816..     35839:   1024:             last,eof";
        assert_eq!(blocks(line), Some((34816, 1024)));
        assert_eq!(blocks("/f: 1 extent found"), None);
        assert_eq!(blocks(" ext:     logical_offset:        physical_offset: length:"), None);
    }
}
