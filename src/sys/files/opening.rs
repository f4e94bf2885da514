//! Opens kernel, initramfs and images.
//!
//! Users name them by paths that can change at any time, so each path is looked up once and the
//! open file is used from then on.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, SeekFrom, StatxFlags, fstat, openat,
    openat2, seek, statx,
};

use crate::{
    sync::Arc,
    sys::mount::{self, Device},
};

/// The limit for all openings of one operation. A disk that spins up takes seconds, a dead server
/// minutes.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Enough for the magic of any kernel or image.
pub const START_BYTES: usize = 1024;

/// A file that may be read, with what was found out about it by whoever opened it: to ask its
/// file system again could mean to wait.
#[derive(Debug)]
pub struct Opened {
    /// The file, by a descriptor that only leads to it (`O_PATH`). To close one that reads asks
    /// a FUSE file system, which may not answer.
    pub file: Arc<OwnedFd>,
    /// Whether it is a block device, not a regular file.
    pub is_device: bool,
    /// Its sizes.
    pub size: ImageSize,
    /// Its first bytes, at most [`START_BYTES`].
    pub start: Vec<u8>,
}

/// How large an image is, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSize {
    /// The number of the device that it is on.
    pub device: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// What it takes on that device, in bytes; of a block device this is its length.
    pub allocated_bytes: u64,
}

impl ImageSize {
    /// Reads them from the file system.
    fn of(file: &File, is_device: bool) -> io::Result<Self> {
        let found = fstat(file)?;
        let device = found.st_dev;
        if is_device {
            // Its inode has no length.
            let bytes = seek(file, SeekFrom::End(0))?;
            seek(file, SeekFrom::Start(0))?;
            return Ok(Self { device, bytes, allocated_bytes: bytes });
        }
        // The kernel gives none that is below zero.
        let [bytes, blocks] = [found.st_size, found.st_blocks].map(i64::cast_unsigned);
        Ok(Self { device, bytes, allocated_bytes: blocks.saturating_mul(512) })
    }
}

/// Whether a path may use links such as `/proc/self/fd/3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MagicLinks {
    /// It may.
    Followed,
    /// Not allowed: the user who named it does not have this process's files.
    Refused,
}

/// Opens a regular file or a block device, and reads its first bytes. Anything else, and files in
/// the tree of a dozed, are refused before they are opened, because opening them could block or
/// have effects.
pub fn open_machine_file(path: &Path, links: MagicLinks) -> io::Result<Opened> {
    let links = match links {
        MagicLinks::Followed => ResolveFlags::empty(),
        MagicLinks::Refused => ResolveFlags::NO_MAGICLINKS,
    };
    let found = openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), links)?;
    refuse_tree(&found)?;
    let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
    let why = match kind {
        FileType::RegularFile | FileType::BlockDevice => {
            // This checks the permission to read.
            let file = File::from(open_again(&found)?);
            let mut start = vec![0; START_BYTES];
            let length = file.read_at(&mut start, 0)?;
            start.truncate(length);
            let is_device = kind == FileType::BlockDevice;
            let size = ImageSize::of(&file, is_device)?;
            return Ok(Opened { file: Arc::new(found), is_device, size, start });
        }
        FileType::Directory => "it is a directory",
        FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::Unknown => "it is neither a regular file nor a block device",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// Returns the error of a file whose file system took longer than [`ANSWER_LIMIT`].
#[must_use]
pub fn no_answer() -> io::Error {
    let why = format!("its file system did not answer within {} s", ANSWER_LIMIT.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, why)
}

/// Opens for reading what a descriptor leads to.
pub fn open_found(found: &impl AsFd) -> io::Result<File> {
    Ok(open_again(found)?.into())
}

/// Returns a path to the open `file`, for this process and for a child that inherits it with the
/// same number.
#[must_use]
pub fn handle_path(file: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

/// Refuses files in the tree of a dozed: a daemon that opens one would wait for itself.
fn refuse_tree(found: &OwnedFd) -> io::Result<()> {
    // No request goes to the file system.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(found, "", flags, StatxFlags::empty())?;
    let device = Device { major: facts.stx_dev_major, minor: facts.stx_dev_minor };
    // A file on a disk cannot be in a tree.
    if device.major == 0 && mount::mount_of_device(device)?.is_some_and(|mount| mount.is_tree()) {
        let why = "it is in the tree of dozed, and no file there is one that a machine can use";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(())
}

/// Opens a found file for reading, without waiting for a lease.
fn open_again(found: &impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match openat(CWD, handle_path(found), flags, Mode::empty()) {
        Err(rustix::io::Errno::AGAIN) => {
            let why = "another process has a lease on it";
            Err(io::Error::new(io::ErrorKind::WouldBlock, why))
        }
        opened => Ok(opened?),
    }
}
