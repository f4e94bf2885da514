//! fuser's requests and replies, translated.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt, path::PathBuf, time::SystemTime};

use fuser::{
    BsdFileFlags, Errno as Number, FileHandle, Filesystem, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tracing::{Span, field::Empty};

use super::{
    lanes::{Lanes, Share},
    once::{Once, give},
    polls::{self, Polls},
    tombstone,
    translate::{
        BLOCK_BYTES, attr_ttl, caller, caught, file_attr, is_append, is_nonblocking, node,
        not_taken, number, reply_attr, reply_data, reply_empty, reply_entry, reply_opened,
        reply_opened_document, reply_written,
    },
    waiting::{AnnouncedWrite, Waiting},
};
use crate::{
    events::ChangeFeed,
    sandbox::{RowId, text::one_line},
    sync::Arc,
    sys::{growth::GrowthWatch, pool::Pool},
    tree::{
        Access, Answer, AttrChange, Caller, Closed, Errno, File, Job, Node, Opened, Tree, Written,
    },
};

/// The largest write. A document is smaller; a larger one arrives whole, to be refused.
const WRITE_MAX_BYTES: u32 = 128 * 1024;

/// How many questions may wait for a disk or the kernel at a time. A crawler has one.
const LOOKS_MAX: usize = 512;
/// How many of those are one user's. They may be long work for the kernel, so they are few;
/// those that hang on a stalled disk keep only their user from asking more.
const LOOKS_OF_USER: Share = Share { threads: 8, queue: 1024 };
/// How many operations a user may have under way or waiting for a lock. A thread for each
/// is there or the request is refused: one that waited here would hold its caller's file.
const OPERATIONS_OF_USER: Share = Share { threads: 256, queue: 0 };

/// The file system that fuser serves.
#[derive(Debug)]
pub(super) struct Adapter {
    tree: Arc<Tree>,
    feed: Arc<ChangeFeed>,
    operations: Lanes,
    /// For questions that wait for a disk or the kernel: those that hang leave the threads
    /// of `operations` to those who write.
    looks: Lanes,
    waiting: Arc<Waiting>,
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
        let looks = Lanes::new(Arc::new(Pool::with_limit(LOOKS_MAX)), LOOKS_OF_USER);
        let operations = Lanes::new(pool, OPERATIONS_OF_USER);
        Ok(Self { tree, feed, operations, looks, waiting, polls, consoles })
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

    /// Answers `reply` by a job; where there are too many already, with EBUSY.
    fn later<T: Send + 'static, R: Send + 'static>(
        &self,
        job: Job<T>,
        uid: u32,
        reply: R,
        answer: impl FnOnce(R, Result<T, Number>) + Send + 'static,
    ) {
        let reply = Once::new(reply);
        let mine = reply.clone();
        let answer = Arc::new(crate::sync::Mutex::new(Some(answer)));
        let by_job = Arc::clone(&answer);
        let queued = self.operations.run(uid, move || {
            let result = caught(job).map_err(number);
            give(&mine, &by_job, result);
        });
        if let Err(error) = queued {
            give(&reply, &answer, Err(not_taken(&error)));
        }
    }
}

/// Has the pollers of a console woken when its guest prints. Before its first boot there
/// is nothing to watch; they are woken when it boots.
fn watch_console(tree: &Tree, consoles: &GrowthWatch, row: RowId) {
    let Some(log) = tree.console_log(row) else { return };
    if let Err(error) = consoles.watch(row.0, &log)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "watching a console for a program that polls");
    }
}

impl Adapter {
    /// Answers a request by a job that it can be interrupted in. Whoever
    /// is not there any more for the answer has `unwanted` called with what the job made.
    fn later_unless_signalled<T: Send + 'static, R: Send + 'static>(
        &self,
        job: Job<T>,
        caller: Caller,
        reply: R,
        answer: fn(R, Result<T, Number>),
        unwanted: impl FnOnce(T) + Send + 'static,
    ) {
        self.run_unless_signalled(&self.operations, job, caller, reply, answer, unwanted);
    }

    fn run_unless_signalled<T: Send + 'static, R: Send + 'static>(
        &self,
        lanes: &Lanes,
        job: Job<T>,
        caller: Caller,
        reply: R,
        answer: fn(R, Result<T, Number>),
        unwanted: impl FnOnce(T) + Send + 'static,
    ) {
        let is_look = std::ptr::eq(lanes, &raw const self.looks);
        let reply = Once::new(reply);
        let (interrupted, mine) = (reply.clone(), reply.clone());
        let waiting = Arc::clone(&self.waiting);
        let place = waiting.enter(caller, move || {
            if let Some(reply) = interrupted.take() {
                answer(reply, Err(Number::EINTR));
            }
        });
        let queued = lanes.run(caller.uid, move || {
            if is_look && mine.is_given() {
                return;
            }
            let result = caught(job).map_err(number);
            waiting.leave(place);
            match (mine.take(), result) {
                (Some(reply), result) => answer(reply, result),
                (None, Ok(made)) => unwanted(made),
                (None, Err(_)) => {}
            }
        });
        if let Err(error) = queued {
            self.waiting.leave(place);
            if let Some(reply) = reply.take() {
                answer(reply, Err(not_taken(&error)));
            }
        }
    }

    fn write_later(&self, job: Job<usize>, node: Node, caller: Caller, reply: ReplyWrite) {
        let reply = AnnouncedWrite::begin(node, &self.feed, reply);
        self.later_unless_signalled(job, caller, reply, AnnouncedWrite::give, drop);
    }

    /// Answers a question. One that waits for a disk ends, for a caller that is signalled,
    /// without an answer.
    fn reply<T: Send + 'static, R: Send + 'static>(
        &self,
        answer: Result<Answer<T>, Number>,
        caller: Caller,
        reply: R,
        give: fn(R, Result<T, Number>),
    ) {
        match answer {
            Ok(Answer::Now(now)) => give(reply, Ok(now)),
            Ok(Answer::Failed(errno)) => give(reply, Err(number(errno))),
            Ok(Answer::Later(job)) => {
                self.run_unless_signalled(&self.looks, job, caller, reply, give, drop);
            }
            Err(errno) => give(reply, Err(errno)),
        }
    }

    /// Answers a close or an fsync.
    fn reply_closed(&self, closed: Result<Closed, Number>, caller: Caller, reply: ReplyEmpty) {
        match closed {
            Ok(Closed::Now(result)) => reply_empty(reply, result.map_err(number)),
            // Whoever is signalled need not wait, and the document is committed all the same.
            Ok(Closed::Later(job)) => {
                self.later_unless_signalled(job, caller, reply, reply_empty, drop);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn open_later(&self, lanes: &Lanes, job: Job<u64>, caller: Caller, reply: ReplyOpen) {
        let tree = Arc::clone(&self.tree);
        self.run_unless_signalled(lanes, job, caller, reply, reply_opened, move |handle| {
            drop(tree.close(handle));
        });
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
            tracing::debug!(?lacking, "the kernel's FUSE lacks something");
            config.add_capabilities(wanted - lacking).ok();
        }
        if let Err(nearest) = config.set_max_write(WRITE_MAX_BYTES) {
            tracing::debug!(nearest, "the kernel's FUSE takes another size of writes");
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
        let caller = caller(request);
        let attr = self.call(|tree| {
            let node = node(ino)?;
            Ok(match tree.attr_for(node, caller) {
                Answer::Failed(errno) => {
                    tombstone::attr(tree, caller.tid, node).map_err(|_| errno).into()
                }
                answer @ (Answer::Now(_) | Answer::Later(_)) => answer,
            })
        });
        self.reply(attr, caller, reply, reply_attr);
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
        let caller = caller(request);
        let mode = mode.and_then(|mode| u16::try_from(mode & 0o7777).ok());
        let change = AttrChange { mode, uid, gid, mtime: mtime.is_some() };
        match self.call(|tree| {
            let node = node(ino)?;
            if let (Some(size), Some(handle)) = (size, handle) {
                tree.truncate(node, handle.0, size);
            }
            let job = tree.set_attr(node, change, caller)?;
            Ok((job, tree.attr(node)?))
        }) {
            Ok((None, attr)) => reply_attr(reply, Ok(attr)),
            Ok((Some(job), _)) => self.later(job, caller.uid, reply, reply_attr),
            Err(errno) => reply.error(errno),
        }
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
        let caller = caller(request);
        match self.call(|tree| tree.make_dir(node(parent)?, name.as_bytes(), caller)) {
            Ok(job) => self.later(job, caller.uid, reply, reply_entry),
            Err(errno) => reply.error(errno),
        }
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
        let access = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => Access::Read,
            OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR => {
                match (is_append(flags), is_nonblocking(flags)) {
                    (false, false) => Access::Write,
                    (false, true) => Access::WriteNonblocking,
                    (true, false) => Access::Append,
                    (true, true) => Access::AppendNonblocking,
                }
            }
        };
        let caller = caller(request);
        let is_document = node(ino).is_ok_and(Tree::commits_at_close);
        match self.call(|tree| tree.open(node(ino)?, access, caller)) {
            Ok(Opened::Now(handle)) if is_document && access != Access::Read => {
                reply_opened_document(reply, handle);
            }
            Ok(Opened::Now(handle)) => reply_opened(reply, Ok(handle)),
            Ok(Opened::Later(job)) => self.open_later(&self.operations, job, caller, reply),
            Ok(Opened::Look(job)) => self.open_later(&self.looks, job, caller, reply),
            Ok(Opened::Started(handle, job)) => {
                let started = self.operations.run(caller.uid, move || {
                    // Nobody waits for the result; `error` has it.
                    caught(job).ok();
                });
                if started.is_err() {
                    drop(self.tree.close(handle));
                }
                reply_opened(reply, started.map(|()| handle).map_err(|error| not_taken(&error)));
            }
            Err(errno) => reply.error(errno),
        }
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
        let caller = caller(request);
        let read =
            self.call(|tree| Ok(tree.read(node(ino)?, handle.0, offset, size as usize, caller)));
        self.reply(read, caller, reply, reply_data);
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
        let nonblocking = is_nonblocking(flags);
        let caller = caller(request);
        let written = self.call(|tree| {
            let node = node(ino)?;
            Ok((node, tree.write(node, handle.0, offset, data, nonblocking, caller)))
        });
        match written {
            Ok((_, Written::Now(result))) => reply_written(reply, result.map_err(number)),
            Ok((node, Written::Later(job))) => self.write_later(job, node, caller, reply),
            Ok((_, Written::Started(len, job))) => {
                let started = self.operations.run(caller.uid, move || {
                    // Nobody waits for the result; `error` has it.
                    caught(job).ok();
                });
                let started = started.map_err(|error| not_taken(&error));
                reply_written(reply, started.map(|()| len));
            }
            Err(errno) => reply.error(errno),
        }
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
        let caller = caller(request);
        let closed = self.call(|tree| Ok(tree.flush(node(ino)?, handle.0, caller)));
        self.reply_closed(closed, caller, reply);
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
        let synced = self.call(|tree| Ok(tree.sync(node(ino)?, handle.0)));
        self.reply_closed(synced, caller(request), reply);
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
        if let Ok(Some(job)) = left
            // Nobody waits for the result; `error` has it.
            && self.operations.run(0, move || {
                caught(job).ok();
            }).is_err()
        {
            tracing::error!("a document is lost, as too many operations are under way");
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
        let ready = self.call(|tree| {
            let node = node(ino)?;
            // First this, and then the look: what changes between them is not missed.
            let is_scheduled = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY);
            if is_scheduled {
                self.polls.enter(node, handle.0, notifier);
            }
            Ok(match (tree.poll(node, handle.0), node) {
                (Answer::Later(look), Node::File(row, File::Console)) if is_scheduled => {
                    let (tree, consoles) = (Arc::clone(tree), Arc::clone(&self.consoles));
                    Answer::Later(Box::new(move || {
                        watch_console(&tree, &consoles, row);
                        look()
                    }))
                }
                (answer, _) => answer,
            })
        });
        self.reply(ready, caller(request), reply, |reply, ready| match ready {
            Ok(ready) => reply.poll(polls::events(ready)),
            Err(errno) => reply.error(errno),
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
