//! fuser's requests and replies, translated.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt, path::PathBuf, time::SystemTime};

use fuser::{
    BsdFileFlags, Errno as Number, FileHandle, Filesystem, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use tracing::{Span, field::Empty};

use super::{
    jobs::{Give, Jobs},
    once::Once,
    polls::Polls,
    tombstone,
    translate::{
        BLOCK_BYTES, access, attr_ttl, caller, caught, file_attr, is_nonblocking, node, not_taken,
        number, reply_attr, reply_data, reply_empty, reply_entry, reply_opened, reply_ready,
    },
    waiting::{AnnouncedWrite, Waiting},
};
use crate::{
    events::ChangeFeed,
    sandbox::{RowId, text::one_line},
    sync::Arc,
    sys::{growth::GrowthWatch, pool::Pool},
    tree::{Answer, AttrChange, Caller, Errno, File, Node, Tree},
};

/// The largest write. A document is smaller; a larger one arrives whole, to be refused.
const WRITE_MAX_BYTES: u32 = 128 * 1024;

/// The file system that fuser serves.
#[derive(Debug)]
pub(super) struct Adapter {
    tree: Arc<Tree>,
    feed: Arc<ChangeFeed>,
    jobs: Jobs,
    polls: Arc<Polls>,
    consoles: Arc<GrowthWatch>,
}

impl Adapter {
    pub(super) fn new(
        tree: Arc<Tree>,
        pool: Arc<Pool>,
        waiting: Arc<Waiting>,
        polls: Arc<Polls>,
    ) -> io::Result<Self> {
        let feed = Arc::clone(tree.feed());
        let woken = Arc::clone(&polls);
        let consoles =
            GrowthWatch::start(move |row| woken.wake(Node::File(RowId(row), File::Console)))?;
        let consoles = Arc::new(consoles);
        let jobs = Jobs::new(pool, waiting);
        Ok(Self { tree, feed, jobs, polls, consoles })
    }

    /// Returns the span of a request, which its job takes over.
    fn span(&self, operation: &'static str, request: &Request, inode: INodeNo) -> Span {
        self.span_of_name(operation, request, inode, OsStr::new(""))
    }

    /// As [`Self::span`], of what has `name` in the directory `parent`.
    fn span_of_name(
        &self,
        operation: &'static str,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
    ) -> Span {
        let (pid, path) = (request.pid(), Empty);
        let span = tracing::debug_span!("request", operation, pid, path);
        // A path is made only for a request that is logged.
        if !span.is_disabled()
            && let Ok(parent) = node(parent)
        {
            let mut path = PathBuf::from(self.tree.path(parent));
            if !name.is_empty() {
                path.push(name);
            }
            span.record("path", one_line(&path.to_string_lossy()));
        }
        span
    }

    /// Runs a call of the tree's; a panic in it is an EIO for this caller only.
    fn call<T>(&self, work: impl FnOnce(&Arc<Tree>) -> Result<T, Errno>) -> Result<T, Number> {
        caught(|| work(&self.tree)).map_err(number)
    }

    /// Gives the answer of a call of the tree's.
    fn answer<T: Send + 'static, R: Send + 'static>(
        &self,
        request: &Request,
        reply: R,
        give: Give<R, T>,
        work: impl FnOnce(&Arc<Tree>, Caller) -> Result<Answer<T>, Errno>,
    ) {
        let caller = caller(request);
        let answer = self.call(|tree| work(tree, caller));
        self.jobs.give(answer, caller, reply, give, drop);
    }
}

/// Answers an `rmdir`, unless that has been done.
fn answer_removal(reply: &Once<ReplyEmpty>, result: Result<(), Number>) {
    let Some(reply) = reply.take() else { return };
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_PARALLEL_DIROPS;
        // An older kernel lists a little slower without them.
        if let Err(lacking) = config.add_capabilities(wanted) {
            tracing::debug!(?lacking, "the kernel's FUSE lacks a feature");
            config.add_capabilities(wanted - lacking).ok();
        }
        if let Err(nearest) = config.set_max_write(WRITE_MAX_BYTES) {
            tracing::debug!(nearest, "the kernel's FUSE uses another write size");
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _in = self.span_of_name("lookup", request, parent, name).entered();
        let name = name.as_bytes();
        let found = self.call(|tree| tree.lookup(node(parent)?, name));
        if found.as_ref().err().map(|errno| errno.code()) != Some(Number::ENOENT.code()) {
            return reply_entry(reply, found);
        }
        let tid = request.pid();
        if parent == INodeNo::ROOT && self.feed.register(name, tid) {
            return reply.error(Number::EALREADY);
        }
        let tombstone = self.call(|tree| tombstone::lookup(tree, tid, node(parent)?, name));
        reply_entry(reply, tombstone);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _in = self.span("getattr", request, ino).entered();
        self.answer(request, reply, reply_attr, |tree, caller| {
            let node = node(ino)?;
            Ok(match tree.attr_for(node, caller) {
                Answer::Now(Err(errno)) => {
                    tombstone::attr(tree, caller.tid, node).map_err(|_| errno).into()
                }
                answer @ (Answer::Now(_) | Answer::Job(..) | Answer::Started(..)) => answer,
            })
        });
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _in = self.span("setattr", request, ino).entered();
        let mode = mode.and_then(|mode| u16::try_from(mode & 0o7777).ok());
        let change = AttrChange { mode, uid, gid, mtime: mtime.is_some() };
        self.answer(request, reply, reply_attr, |tree, caller| {
            let node = node(ino)?;
            if let (Some(size), Some(handle)) = (size, handle) {
                tree.truncate(node, handle.0, size);
            }
            Ok(tree.set_attr(node, change, caller))
        });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _in = self.span_of_name("mkdir", request, parent, name).entered();
        self.answer(request, reply, reply_entry, |tree, caller| {
            Ok(tree.make_dir(node(parent)?, name.as_bytes(), caller))
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _in = self.span_of_name("rmdir", request, parent, name).entered();
        let caller = caller(request);
        if self.feed.is_announcer(caller.tid) {
            // It must never be taken for a user, whatever the name means by now.
            let removed = self.call(|tree| tombstone::remove_dir(tree, node(parent)?, name));
            return match removed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            };
        }
        let removed = self.call(|tree| tree.remove_dir(node(parent)?, name.as_bytes(), caller));
        let removal = match removed {
            Ok(removal) => removal,
            Err(errno) => return reply.error(errno),
        };
        // First the thread, and then whatever cannot be taken back.
        let reply = Once::new(reply);
        let mine = reply.clone();
        let queued = self.tree.queue_removal(move || {
            let answered = mine.clone();
            let removed = caught(move || {
                removal.run(|result| answer_removal(&answered, result.map_err(number)));
                Ok(())
            });
            // Only after a panic is there nobody who has answered.
            answer_removal(&mine, removed.map_err(number));
        });
        if let Err(error) = queued {
            answer_removal(&reply, Err(not_taken(&error)));
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _in = self.span("open", request, ino).entered();
        let caller = caller(request);
        let opened = self.call(|tree| Ok(tree.open(node(ino)?, access(flags), caller)));
        let tree = Arc::clone(&self.tree);
        self.jobs.give(opened, caller, reply, reply_opened, move |opened| {
            drop(tree.close(opened.handle));
        });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _in = self.span("read", request, ino).entered();
        self.answer(request, reply, reply_data, |tree, caller| {
            Ok(tree.read(node(ino)?, handle.0, offset, size as usize, caller))
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _in = self.span("write", request, ino).entered();
        let (nonblocking, caller) = (is_nonblocking(flags), caller(request));
        let written = self.call(|tree| {
            let node = node(ino)?;
            Ok((node, tree.write(node, handle.0, offset, data, nonblocking, caller)))
        });
        let (node, written) = match written {
            Ok((node, written)) => (node, written),
            Err(errno) => return reply.error(errno),
        };
        let is_later = matches!(written, Answer::Job(..));
        let reply = AnnouncedWrite::begin(node, is_later, &self.feed, reply);
        self.jobs.give(Ok(written), caller, reply, AnnouncedWrite::give, drop);
    }

    fn flush(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        let _in = self.span("flush", request, ino).entered();
        self.answer(request, reply, reply_empty, |tree, caller| {
            Ok(tree.flush(node(ino)?, handle.0, caller))
        });
    }

    fn fsync(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _in = self.span("fsync", request, ino).entered();
        self.answer(request, reply, reply_empty, |tree, _| Ok(tree.sync(node(ino)?, handle.0)));
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _in = self.span("release", request, ino).entered();
        if let Ok(node) = node(ino) {
            self.polls.leave(node, handle.0);
        }
        let left = self.call(|tree| Ok(tree.close(handle.0)));
        reply.ok();
        // Whoever wrote it has closed it, so it takes no share of theirs.
        if let Ok(Some(job)) = left
            && self.jobs.start(0, job).is_err()
        {
            tracing::error!("a document was lost: too many operations are running");
        }
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _in = self.span("readdir", request, ino).entered();
        let listed = self.call(|tree| {
            tree.list(node(ino)?, offset, &mut |entry| {
                let attr = file_attr(&entry.attr);
                !reply.add(attr.ino, entry.next, attr.kind, entry.name)
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _in = self.span("readdirplus", request, ino).entered();
        let listed = self.call(|tree| {
            tree.list(node(ino)?, offset, &mut |entry| {
                let attr = file_attr(&entry.attr);
                // One time serves for name and attributes here, so a file gets none.
                let ttl = attr_ttl(&entry.attr);
                !reply.add(attr.ino, entry.next, entry.name, &ttl, &attr, Generation(0))
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, BLOCK_BYTES, 255, 0);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // The kernel then asks no more, which is what we want: there are none.
        reply.error(Number::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Number::ENOSYS);
    }

    /// The kernel then seeks by itself, as we want it to.
    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Number::ENOSYS);
    }

    fn poll(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        notifier: PollNotifier,
        _: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let _in = self.span("poll", request, ino).entered();
        self.answer(request, reply, reply_ready, |tree, _| {
            let node = node(ino)?;
            let is_scheduled = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY);
            if is_scheduled {
                // First this, and then the look: what changes between them is not missed.
                self.polls.enter(node, handle.0, notifier);
            }
            Ok(tree.poll(node, handle.0, is_scheduled.then_some(&self.consoles)))
        });
    }

    /// Programs that ask whether a file is a terminal come with this.
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _cmd: u32,
        _in: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Number::ENOTTY);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Number::EACCES);
    }

    fn mknod(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // Without `create` an open with O_CREAT comes as this, for a regular file.
        let regular = rustix::fs::FileType::from_raw_mode(mode).is_file();
        reply.error(if regular { Number::EACCES } else { Number::EPERM });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _in = self.span_of_name("unlink", request, parent, name).entered();
        let tid = request.pid();
        let file = self.call(|tree| tombstone::lookup(tree, tid, node(parent)?, name.as_bytes()));
        match file {
            Ok(_) => reply.ok(),
            Err(_) => reply.error(Number::EPERM),
        }
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(Number::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Number::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Number::EPERM);
    }
}
