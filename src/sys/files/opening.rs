//! Opening the files that a machine is made of: kernel, initial RAM file system and images.
//!
//! Somebody else names them, by a path that may lead to anything, and that may mean something
//! else at each look. So a path is looked up once, and what was found is used from then on.

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

/// How long a file system may take to open all that one operation needs. A disk that spins up
/// takes some seconds, and a server that is gone takes minutes.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How many bytes of a file are read to tell what it is: more than up to the magic of any kind
/// of kernel or image.
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
    /// Asks the file system.
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

/// Whether a path may lead through links such as `/proc/self/fd/3`, to what a process has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MagicLinks {
    /// It may.
    Followed,
    /// It may not: whoever named it does not have the files of the process that opens it.
    Refused,
}

/// Opens a regular file or a block device, and reads its first bytes. What is neither, and what
/// is in the tree of a daemon, is refused, and not opened: to open some is to wait, or to do
/// something.
///
/// # Errors
/// Those of open(2) and read(2), and `InvalidInput` with a clause that says what it is.
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
            // It was found already; this asks the kernel whether it may be read.
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
///
/// # Errors
/// Those of open(2).
pub fn open_found(found: &impl AsFd) -> io::Result<File> {
    Ok(open_again(found)?.into())
}

/// Returns a path that leads to what is open as `file`, whatever is at its own path by now:
/// for us as long as it is open, and for a child that inherits it by the same number.
#[must_use]
pub fn handle_path(file: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

/// Refuses what is in the tree of a daemon. A daemon that opened a file of its own tree would
/// wait for itself, and after a kill for good.
fn refuse_tree(found: &OwnedFd) -> io::Result<()> {
    // Neither the number nor its not being fresh is asked of the file system.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(found, "", flags, StatxFlags::empty())?;
    let device = Device { major: facts.stx_dev_major, minor: facts.stx_dev_minor };
    // What is on a disk need not be looked for in the list.
    if device.major == 0 && mount::mount_of_device(device)?.is_some_and(|mount| mount.is_tree()) {
        let why = "it is in the tree of dozed, whose files a machine cannot use";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(())
}

/// Opens for reading what was found. Where another holds a lease of it we do not wait.
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
