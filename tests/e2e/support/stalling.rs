//! A file, and a disk, that can stop to answer: they are served by a FUSE of the test's own.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use dozed::sys::{
    fuse_mount::Unmounted,
    mount::{abort, detach},
};
use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use super::{disk::run, process::command};

const NAME: &str = "file";
const INODE: INodeNo = INodeNo(2);
/// How long the kernel keeps names and attributes: for as long as the test takes.
const TTL: Duration = Duration::from_secs(3600);

/// Whether reads and writes are answered.
#[derive(Debug, Default)]
struct Gate {
    /// Up to where reads are answered, where some are not.
    shut_from: Mutex<Option<u64>>,
    shuts_closes: AtomicBool,
    opened: Condvar,
}

impl Gate {
    fn shut(&self, from: u64) {
        *self.shut_from.lock().unwrap() = Some(from);
    }

    fn open(&self) {
        *self.shut_from.lock().unwrap() = None;
        self.opened.notify_all();
    }

    /// Waits until all up to `end` is answered.
    fn pass(&self, end: u64) {
        let is_shut = |from: &mut Option<u64>| from.is_some_and(|from| end > from);
        drop(self.opened.wait_while(self.shut_from.lock().unwrap(), is_shut).unwrap());
    }
}

/// Has a file answer again when it is dropped.
pub(crate) struct Stall<'a>(&'a Gate);

impl Drop for Stall<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// A file of a FUSE, for everybody. Reads and writes of it are not answered while it stalls.
pub(crate) struct StallingFile {
    /// Where it is mounted. It is below `/tmp`, so that everybody gets there.
    dir: TempDir,
    gate: Arc<Gate>,
    session: Option<BackgroundSession>,
}

impl StallingFile {
    /// Makes a file of so many bytes, all zeros, whose pages the kernel caches.
    #[track_caller]
    pub(crate) fn cached(len: u64) -> Self {
        Self::new(len, FopenFlags::empty())
    }

    /// Makes a file of so many bytes, all zeros, that is asked for each read.
    #[track_caller]
    pub(crate) fn uncached(len: u64) -> Self {
        Self::new(len, FopenFlags::FOPEN_DIRECT_IO)
    }

    #[track_caller]
    fn new(len: u64, flags: FopenFlags) -> Self {
        let dir = tempfile::Builder::new().prefix("e2e-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let content = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        content.set_len(len).unwrap();
        let gate = Arc::new(Gate::default());
        let server = Server { content, len, flags, gate: Arc::clone(&gate) };
        let (connection, unmounted) = Unmounted::create("dozed-test").unwrap();
        let config = fuser::Config::default();
        let session = Session::from_fd(server, connection, SessionACL::All, config).unwrap();
        let session = Some(session.spawn().unwrap());
        unmounted.mount(dir.path()).unwrap();
        Self { dir, gate, session }
    }

    /// Returns the file.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    /// Answers no read and no write until what is returned is dropped.
    pub(crate) fn stall(&self) -> Stall<'_> {
        self.stall_from(0)
    }

    /// As `stall`, and answers no close either.
    pub(crate) fn stall_with_closes(&self) -> Stall<'_> {
        self.gate.shuts_closes.store(true, Ordering::Relaxed);
        self.stall()
    }

    /// Answers no write, and no read of more than the first so many bytes.
    pub(crate) fn stall_from(&self, bytes: u64) -> Stall<'_> {
        self.gate.shut(bytes);
        Stall(&self.gate)
    }
}

impl Drop for StallingFile {
    fn drop(&mut self) {
        // Whoever still uses the file gets errors.
        abort(self.dir.path()).ok();
        self.gate.open();
        if let Some(session) = self.session.take() {
            // That its connection was cut is what ends it.
            session.join().ok();
        }
    }
}

/// A disk in such a file, with an ext4 on it.
pub(crate) struct StallingDisk {
    file: StallingFile,
    dir: TempDir,
}

impl StallingDisk {
    /// Makes a disk of so many bytes that answers.
    #[track_caller]
    pub(crate) fn new(len: u64) -> Self {
        let file = StallingFile::uncached(len);
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        run(command("mkfs.ext4").args(["-q", "-m0"]).arg(file.path()));
        run(command("mount").args(["-o", "loop"]).arg(file.path()).arg(dir.path()));
        Self { file, dir }
    }

    /// Returns the root of its file system.
    pub(crate) fn store(&self) -> &Path {
        self.dir.path()
    }

    /// Has the disk answer nothing until what is returned is dropped.
    pub(crate) fn stall(&self) -> Stall<'_> {
        self.file.stall()
    }
}

impl Drop for StallingDisk {
    fn drop(&mut self) {
        detach(self.dir.path()).unwrap();
    }
}

struct Server {
    content: File,
    len: u64,
    flags: FopenFlags,
    gate: Arc<Gate>,
}

impl Server {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let is_dir = ino == INodeNo::ROOT;
        FileAttr {
            ino,
            size: if is_dir { 0 } else { self.len },
            blocks: self.len / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_dir { FileType::Directory } else { FileType::RegularFile },
            perm: if is_dir { 0o755 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &std::ffi::OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.attr(INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), self.flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.len.saturating_sub(offset).min(size.into());
        self.gate.pass(offset + left);
        let mut bytes = vec![0; usize::try_from(left).unwrap()];
        match self.content.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.gate.pass(u64::MAX);
        match self.content.write_all_at(data, offset) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap()),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        if self.gate.shuts_closes.load(Ordering::Relaxed) {
            self.gate.pass(u64::MAX);
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
