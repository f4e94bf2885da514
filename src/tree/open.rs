//! Opening and closing. Only `awake` that is opened for writing does something by it.

use super::{
    Caller, DaemonFile, Errno, File, Job, Node, Tree,
    document::DocumentKind,
    errno,
    handle::Handle,
    opened::{Access, OpenedBy},
    write::{actor, answer, check_opened},
};
use crate::{
    activity::{HoldId, Holder},
    lifecycle::{Entry, Wait},
    sandbox::{Cause, Owner, RowId},
    sync::Arc,
};

/// How an open is answered; each number is to be closed by [`Tree::close`].
pub enum Opened {
    /// At once.
    Now(u64),
    /// By a job that may take long.
    Later(Job<u64>),
    /// By a job that may wait for a disk, and changes nothing.
    Look(Job<u64>),
    /// At once; the job that was started goes on.
    Started(u64, Job<()>),
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Now(handle) => f.debug_tuple("Now").field(handle).finish(),
            Self::Later(_) => f.write_str("Later"),
            Self::Look(_) => f.write_str("Look"),
            Self::Started(handle, _) => f.debug_tuple("Started").field(handle).finish(),
        }
    }
}

impl Tree {
    /// Opens a file. Nothing happens to the sandbox by it, but by `awake` for writing: that
    /// wakes it, and holds it awake until it is closed.
    ///
    /// # Errors
    /// `Acces` for writing what is only read; `NoEnt` where the sandbox is gone; of a hold
    /// those of a wake, and `Dquot`.
    pub fn open(
        self: &Arc<Self>,
        node: Node,
        access: Access,
        caller: Caller,
    ) -> Result<Opened, Errno> {
        let owner = match node {
            // Nobody changes the owner of these.
            Node::Root | Node::Daemon(_) => Owner { uid: 0, gid: 0 },
            Node::Dir(row) | Node::NetDir(row) | Node::File(row, _) => {
                self.entry(row)?.record().owner
            }
        };
        // The kernel has checked the caller's permissions; root passes all of them.
        let read_only = match node {
            Node::Root | Node::Daemon(_) => true,
            Node::Dir(_) | Node::NetDir(_) => true,
            Node::File(_, file) => file.mode() & 0o222 == 0,
        };
        if access != Access::Read && read_only {
            return Err(Errno::Acces);
        }
        let opened = OpenedBy { uid: caller.uid, owner };
        let mut handle = Handle::new(node, caller.uid);
        handle.opened = matches!(node, Node::File(..)).then_some(opened);
        match node {
            Node::File(row, File::Awake) if access != Access::Read => {
                return self.open_hold(row, access, opened, caller);
            }
            Node::File(row, File::Console) => {
                let this = Arc::clone(self);
                return Ok(Opened::Look(Box::new(move || {
                    handle.console = Some(Arc::new(this.open_console(row)));
                    this.handles.open(handle)
                })));
            }
            Node::Daemon(DaemonFile::Events) if caller.uid != 0 => {
                let this = Arc::clone(self);
                return Ok(Opened::Look(Box::new(move || {
                    handle.events = Some(this.open_events(node, caller));
                    this.handles.open(handle)
                })));
            }
            Node::Daemon(DaemonFile::Events) | Node::File(_, File::Events) => {
                handle.events = Some(self.open_events(node, caller));
            }
            Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) | Node::File(..) => {}
        }
        if let Some(kind) = DocumentKind::of(node).filter(|_| access != Access::Read) {
            handle.document = Some(self.open_document(node, kind, access, opened, caller));
        }
        Ok(Opened::Now(self.handles.open(handle)?))
    }

    /// Closes an open file that nobody has open any more, and ends the hold that it is.
    /// Returns the job that commits what was written to a document and is not in force yet.
    #[must_use]
    pub fn close(&self, handle: u64) -> Option<Job<()>> {
        let closed = self.handles.close(handle)?;
        if let Some(hold) = closed.hold {
            self.lifecycle.activity().release(hold);
        }
        self.commit_released(closed.node, closed.document?)
    }

    fn open_hold(
        self: &Arc<Self>,
        row: RowId,
        access: Access,
        opened: OpenedBy,
        caller: Caller,
    ) -> Result<Opened, Errno> {
        let entry = self.entry(row)?;
        let by = actor(caller);
        let holder = Holder {
            pid: by.pid.unwrap_or(caller.tid),
            uid: by.uid,
            command: by.command.clone().unwrap_or_else(|| "?".into()),
        };
        let cause = Cause::Hold(by);
        let node = Node::File(row, File::Awake);
        // It is held from now on, so that nobody puts it to sleep before it is awake.
        let enter = move |this: &Self, entry: &Entry| -> Result<HoldId, Errno> {
            let hold = this.lifecycle.hold(entry, holder).map_err(|error| {
                this.lifecycle.note(entry, &error);
                answer(&this.lifecycle, entry, "holding", &error)
            })?;
            // A change of owners ends the holds that it finds, and this one may be later.
            check_opened(&this.lifecycle, entry, Some(opened))
                .inspect_err(|_| this.lifecycle.activity().release(hold))?;
            Ok(hold)
        };
        let this = Arc::clone(self);
        if access.wait() == Wait::Never {
            let hold = enter(self, &entry)?;
            let handle = self.handles.open_hold(node, opened, hold);
            let handle = handle.inspect_err(|_| self.lifecycle.activity().release(hold))?;
            return Ok(Opened::Started(handle, Box::new(move || this.wake_held(&entry, cause))));
        }
        Ok(Opened::Later(Box::new(move || {
            let hold = enter(&this, &entry)?;
            this.wake_held(&entry, cause)
                .inspect_err(|_| this.lifecycle.activity().release(hold))?;
            let handle = this.handles.open_hold(node, opened, hold);
            handle.inspect_err(|_| this.lifecycle.activity().release(hold))
        })))
    }

    fn wake_held(&self, entry: &Arc<Entry>, cause: Cause) -> Result<(), Errno> {
        self.lifecycle.activity().record_hold(entry);
        let held = self.lifecycle.lock(entry, Wait::ForIt, cause);
        let held = held.map_err(|error| errno::of(&error))?;
        let woken = self.lifecycle.wake(&held, entry);
        drop(held);
        woken.map(drop).map_err(|error| answer(&self.lifecycle, entry, "waking to hold", &error))
    }
}
