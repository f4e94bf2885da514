//! Values of the tree's in the words of fuser's.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, SystemTime},
};

use fuser::{
    Errno as Number, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, OpenAccMode,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyPoll, ReplyWrite,
    Request,
};
use rustix::fs::OFlags;

use super::polls;
use crate::{
    sys::pool::PoolError,
    tree::{Access, Attr, Caller, Errno, Node, Opened, Readiness},
};

/// How long the kernel may remember a name. All names come and go through the mount,
/// but for those that the reaper deletes, which it forgets after this.
const NAME_TTL: Duration = Duration::from_secs(1);
/// How long it may remember the attributes of a directory; those of files, whose
/// owner, mode and times change behind its back, not at all.
const DIR_TTL: Duration = Duration::from_secs(1);
/// What `stat` calls the preferred size of a read.
pub(super) const BLOCK_BYTES: u32 = 4096;

/// Runs `work`, and turns a panic into EIO.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Errno::Io))
}

/// Returns the number of an errno that a request is answered with.
pub(super) fn number(errno: Errno) -> Number {
    tracing::debug!(errno = errno.word(), "answered");
    Number::from_i32(errno.number())
}

/// Logs why a job was not taken, and returns what its caller is answered.
pub(super) fn not_taken(error: &PoolError) -> Number {
    match error {
        PoolError::Full { .. } => {
            tracing::warn!("{error}; one more is refused");
            Number::EBUSY
        }
        PoolError::NoThread { source } => {
            tracing::warn!(error = %source, "{error}; it is refused");
            Number::ENOMEM
        }
    }
}

pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), tid: request.pid() }
}

pub(super) fn node(inode: INodeNo) -> Result<Node, Errno> {
    Node::from_inode(inode.0).ok_or(Errno::NoEnt)
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    let is_dir = attr.node.is_dir();
    FileAttr {
        ino: INodeNo(attr.node.inode()),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: attr.mtime,
        mtime: attr.mtime,
        ctime: attr.mtime,
        crtime: SystemTime::UNIX_EPOCH,
        kind: if is_dir { FileType::Directory } else { FileType::RegularFile },
        perm: attr.mode,
        nlink: if is_dir { 2 } else { 1 },
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub(super) fn attr_ttl(attr: &Attr) -> Duration {
    if attr.node.is_dir() { DIR_TTL } else { Duration::ZERO }
}

pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Attr, Number>) {
    match result {
        Ok(attr) => {
            reply.entry_with_ttls(&attr_ttl(&attr), &NAME_TTL, &file_attr(&attr), Generation(0));
        }
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, result: Result<Attr, Number>) {
    match result {
        Ok(attr) => reply.attr(&attr_ttl(&attr), &file_attr(&attr)),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn is_nonblocking(flags: OpenFlags) -> bool {
    OFlags::from_bits_retain(flags.0.cast_unsigned()).contains(OFlags::NONBLOCK)
}

fn is_append(flags: OpenFlags) -> bool {
    OFlags::from_bits_retain(flags.0.cast_unsigned()).contains(OFlags::APPEND)
}

/// Returns what a file is opened for.
pub(super) fn access(flags: OpenFlags) -> Access {
    match (flags.acc_mode(), is_append(flags), is_nonblocking(flags)) {
        (OpenAccMode::O_RDONLY, _, _) => Access::Read,
        (OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR, false, false) => Access::Write,
        (OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR, false, true) => Access::WriteNonblocking,
        (OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR, true, false) => Access::Append,
        (OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR, true, true) => Access::AppendNonblocking,
    }
}

pub(super) fn reply_opened(reply: ReplyOpen, result: Result<Opened, Number>) {
    let Opened { handle, commits_at_close } = match result {
        Ok(opened) => opened,
        Err(errno) => return reply.error(errno),
    };
    let flags = if commits_at_close {
        FopenFlags::FOPEN_DIRECT_IO
    } else {
        // Verdicts come from write, so nobody has to ask again at close.
        FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_NOFLUSH
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
    };
    reply.opened(FileHandle(handle), flags);
}

pub(super) fn reply_ready(reply: ReplyPoll, result: Result<Readiness, Number>) {
    match result {
        Ok(ready) => reply.poll(polls::events(ready)),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_written(reply: ReplyWrite, result: Result<usize, Number>) {
    match result {
        Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, result: Result<(), Number>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_data(reply: ReplyData, result: Result<Vec<u8>, Number>) {
    match result {
        Ok(data) => reply.data(&data),
        Err(errno) => reply.error(errno),
    }
}
