//! A file system with one constant file, as fast as fuser is.
//!
//! It has the mount options, threads, times to live and flags of the daemon's own (see
//! `src/fuse`), so that what the daemon takes longer is the daemon's doing.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use dozed::sys::{
    mount,
    process::{Launch, Process},
};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};

use super::site::{Result, Site, clear_place, wait_for};

/// The argument that makes this program serve it.
pub(crate) const SERVE: &str = "--serve-empty";

const DIR: &str = "x";
const FILE: &str = "state";
const TEXT: &[u8] = b"stopped\n";
const DIR_INODE: INodeNo = INodeNo(64);
const FILE_INODE: INodeNo = INodeNo(65);
const TTL: Duration = Duration::from_secs(1);

/// An empty file system that is mounted.
#[derive(Debug)]
pub(crate) struct Empty {
    dir: PathBuf,
    _process: Arc<Process>,
}

impl Empty {
    /// Mounts it, served by another process as the daemon is.
    pub(crate) fn mount(site: &Site) -> Result<Self> {
        let (dir, _) = site.place("empty")?;
        let mounted = dir.join("mnt");
        std::fs::create_dir(&mounted)?;
        let args: Vec<OsString> = vec![SERVE.into(), mounted.clone().into()];
        let log = File::create(dir.join("log"))?;
        let process = site.spawn(Launch::new(&std::env::current_exe()?, &args, log))?;
        wait_for("the empty file system", || {
            if let Some(exit) = process.exited() {
                return Err(format!("the empty file system ended: {exit}").into());
            }
            Ok(mount::mounted_at(&mounted)?.map(drop))
        })?;
        Ok(Self { dir, _process: process })
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.join("mnt").join(DIR).join(FILE)
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        clear_place(&self.dir).ok();
    }
}

/// Serves it at `mount` until it is unmounted.
pub(crate) fn serve(mount: &Path) -> Result<()> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(2);
    config.mount_options = vec![
        MountOption::FSName("dozed-empty".to_owned()),
        MountOption::Subtype("dozed-empty".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
    ];
    let session = Session::new(EmptyFs, mount, &config)?.spawn()?;
    session.guard.join().map_err(|_| "a thread of the session panicked")??;
    Ok(())
}

#[derive(Debug)]
struct EmptyFs;

fn attr(ino: INodeNo) -> FileAttr {
    let (kind, perm, size, nlink) = match ino {
        FILE_INODE => (FileType::RegularFile, 0o660, 4096, 1),
        DIR_INODE => (FileType::Directory, 0o750, 0, 2),
        _ => (FileType::Directory, 0o755, 0, 2),
    };
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn attr_ttl(ino: INodeNo) -> Duration {
    if ino == FILE_INODE { Duration::ZERO } else { TTL }
}

impl Filesystem for EmptyFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_PARALLEL_DIROPS;
        if let Err(lacking) = config.add_capabilities(wanted) {
            config.add_capabilities(wanted - lacking).ok();
        }
        config.set_max_write(128 * 1024).ok();
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match (parent, name.to_str()) {
            (INodeNo::ROOT, Some(DIR)) => DIR_INODE,
            (DIR_INODE, Some(FILE)) => FILE_INODE,
            _ => return reply.error(Errno::ENOENT),
        };
        reply.entry_with_ttls(&attr_ttl(found), &TTL, &attr(found), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&attr_ttl(ino), &attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(
            FileHandle(1),
            FopenFlags::FOPEN_DIRECT_IO
                | FopenFlags::FOPEN_NOFLUSH
                | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        );
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(if offset == 0 { TEXT } else { &[] });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}
