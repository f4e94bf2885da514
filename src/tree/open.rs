//! Opening and closing. Only `awake` that is opened for writing does something by it.

use super::{
    Answer, Caller, DaemonFile, Errno, File, Job, Node, Tree, Work,
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

/// An open file, to be closed by [`Tree::close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// Its number.
    pub handle: u64,
    /// Whether it commits when it is closed, so that each close is to be answered.
    pub commits_at_close: bool,
}

impl Tree {
    /// Opens a file. Nothing happens to the sandbox by it, but by `awake` for writing: that
    /// wakes it, and holds it awake until it is closed.
    ///
    /// `Acces` answers who writes what is only read, and `NoEnt` where the sandbox is gone; a
    /// hold is answered as a wake is, and by `Dquot`.
    pub fn open(self: &Arc<Self>, node: Node, access: Access, caller: Caller) -> Answer<Opened> {
        let owner = match node {
            // Nobody changes the owner of these.
            Node::Root | Node::Daemon(_) => Owner { uid: 0, gid: 0 },
            Node::Dir(row) | Node::NetDir(row) | Node::File(row, _) => match self.entry(row) {
                Ok(entry) => entry.record().owner,
                Err(errno) => return errno.into(),
            },
        };
        // The kernel has checked the caller's permissions; root passes all of them.
        let read_only = match node {
            Node::Root | Node::Daemon(_) => true,
            Node::Dir(_) | Node::NetDir(_) => true,
            Node::File(_, file) => file.mode() & 0o222 == 0,
        };
        if access != Access::Read && read_only {
            return Errno::Acces.into();
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
                return Answer::job(Work::Read, move || {
                    handle.console = Some(Arc::new(this.open_console(row)));
                    this.enter(handle)
                });
            }
            Node::Daemon(DaemonFile::Events) if caller.uid != 0 => {
                let this = Arc::clone(self);
                return Answer::job(Work::Read, move || {
                    handle.events = Some(this.open_events(node, caller));
                    this.enter(handle)
                });
            }
            Node::Daemon(DaemonFile::Events) | Node::File(_, File::Events) => {
                handle.events = Some(self.open_events(node, caller));
            }
            Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) | Node::File(..) => {}
        }
        if let Some(kind) = DocumentKind::of(node).filter(|_| access != Access::Read) {
            handle.document = Some(self.open_document(node, kind, access, opened, caller));
        }
        self.enter(handle).into()
    }

    /// Enters an open file.
    fn enter(&self, handle: Handle) -> Result<Opened, Errno> {
        let commits_at_close = handle.document.is_some();
        Ok(Opened { handle: self.handles.open(handle)?, commits_at_close })
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
    ) -> Answer<Opened> {
        let entry = match self.entry(row) {
            Ok(entry) => entry,
            Err(errno) => return errno.into(),
        };
        let by = actor(caller);
        let holder = Holder {
            pid: by.pid.unwrap_or(caller.tid),
            uid: by.uid,
            command: by.command.clone().unwrap_or_else(|| "?".into()),
        };
        let cause = Cause::Hold(by);
        let node = Node::File(row, File::Awake);
        // It is held from now on, so that nobody puts it to sleep before it is awake.
        let hold = move |this: &Self, entry: &Entry| -> Result<HoldId, Errno> {
            let hold = this.lifecycle.hold(entry, holder).map_err(|error| {
                this.lifecycle.notes().note(entry, &error);
                answer(&this.lifecycle, entry, "holding", &error)
            })?;
            // A change of owners ends the holds that it finds, and this one may be later.
            check_opened(&this.lifecycle, entry, Some(opened))
                .inspect_err(|_| this.lifecycle.activity().release(hold))?;
            Ok(hold)
        };
        let open = move |this: &Self, hold: HoldId| {
            let handle = this.handles.open_hold(node, opened, hold);
            let handle = handle.inspect_err(|_| this.lifecycle.activity().release(hold))?;
            Ok(Opened { handle, commits_at_close: false })
        };
        let this = Arc::clone(self);
        if access.wait() == Wait::Never {
            return match hold(self, &entry).and_then(|hold| open(self, hold)) {
                Ok(opened) => {
                    Answer::Started(opened, Box::new(move || this.wake_held(&entry, cause)))
                }
                Err(errno) => errno.into(),
            };
        }
        Answer::job(Work::Change, move || {
            let hold = hold(&this, &entry)?;
            this.wake_held(&entry, cause)
                .inspect_err(|_| this.lifecycle.activity().release(hold))?;
            open(&this, hold)
        })
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
