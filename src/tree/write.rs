//! Writing, making and removing. A command acts at `write`, never at open, truncate or close;
//! a document is committed when it is closed, see [`document`](super::document).

use super::{
    Answer, Attr, Caller, Errno, File, Node, Tree, Work,
    command::{self, BadCommand, Verb},
    errno,
    opened::OpenedBy,
};
use crate::{
    lifecycle::{Entry, Error, Lifecycle, Policy, Wait, Why, chain},
    sandbox::{Actor, Cause, IdError, Owner, RowId, SandboxId, Signal, State},
    sync::Arc,
    sys::{
        pool::PoolError,
        task::{command_of, process_of},
    },
};

/// A command that was written to a file of a sandbox.
#[derive(Debug, Clone, Copy)]
struct Command<'a> {
    entry: &'a Arc<Entry>,
    opened: Option<OpenedBy>,
    wait: Wait,
    len: usize,
    caller: Caller,
}

/// A change of attributes, as much of it as means anything here. Sizes mean nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttrChange {
    /// New permissions.
    pub mode: Option<u16>,
    /// A new user.
    pub uid: Option<u32>,
    /// A new group.
    pub gid: Option<u32>,
    /// Whether the modification time is set, to whatever.
    pub mtime: bool,
}

/// A sandbox that is to be removed. Nothing has happened to it yet.
#[derive(Debug)]
pub struct Removal {
    tree: Arc<Tree>,
    entry: Arc<Entry>,
    by: Actor,
}

impl Removal {
    /// Removes it, and calls `answer` when it is gone, or will be whatever happens. After an
    /// error nothing has changed.
    pub fn run(self, answer: impl FnOnce(Result<(), Errno>)) {
        let Self { tree, entry, by } = self;
        let (lifecycle, uid) = (&tree.lifecycle, by.uid);
        lifecycle.delete(&entry, &Cause::Rmdir(by), |deleted| {
            answer(match deleted {
                Ok(()) => {
                    tree.root_errors.note(uid, None);
                    tree.modes.forget(entry.row());
                    Ok(())
                }
                Err(Error::Gone { .. }) => Err(Errno::NoEnt),
                // Another removal of it does not come to an end.
                Err(error @ Error::Locked { .. }) => {
                    tree.root_errors.note(uid, Some(&chain(&error)));
                    Err(Errno::Busy)
                }
                Err(error) => {
                    tree.root_errors.note(uid, Some(&chain(&error)));
                    lifecycle.notes().note(&entry, &error);
                    Err(self::answer(lifecycle, &entry, "deleting", &error))
                }
            });
        });
    }
}

#[cfg(test)]
impl Removal {
    /// Removes it, and waits until that is done.
    pub(super) fn wait(self) -> Result<(), Errno> {
        let mut answer = Ok(());
        self.run(|result| answer = result);
        answer
    }
}

impl Tree {
    /// Writes `data` to an open file: one command, whatever the offset, or some of a document.
    pub fn write(
        &self,
        node: Node,
        handle: u64,
        offset: u64,
        data: &[u8],
        nonblocking: bool,
        caller: Caller,
    ) -> Answer<usize> {
        let Node::File(row, file) = node else {
            return Errno::Acces.into();
        };
        let entry = match self.open_entry(row) {
            Ok(entry) => entry,
            Err(errno) => return errno.into(),
        };
        let opened = self.handles.get(handle, node).opened;
        if let Err(errno) = check_opened(&self.lifecycle, &entry, opened) {
            return errno.into();
        }
        let wait = if nonblocking { Wait::Never } else { Wait::ForIt };
        let len = data.len();
        let of = Command { entry: &entry, opened, wait, len, caller };
        let set = |policy| self.write_policy(of, policy);
        let parsed = match file {
            File::State => {
                command::verb(data).map(|verb| verb.map(|verb| self.write_verb(of, verb)))
            }
            File::Activity if len > command::COMMAND_MAX_BYTES => {
                Err(BadCommand::TooLong { limit: command::COMMAND_MAX_BYTES })
            }
            File::Activity => Ok((len > 0).then(|| {
                self.lifecycle.activity().saw(&entry, Signal::Touch);
                Answer::Now(Ok(len))
            })),
            File::IdleAfter => command::period(data).map(|it| it.map(Policy::IdleAfter).map(set)),
            File::DeleteAfter => {
                command::period(data).map(|it| it.map(Policy::DeleteAfter).map(set))
            }
            File::Pinned => command::switch(data).map(|it| it.map(Policy::Pinned).map(set)),
            File::Config | File::Nameservers | File::Denied | File::Allowed => {
                let document = self.handles.get(handle, node).document;
                return self.write_document(&entry, document, offset, data, caller);
            }
            File::Console => Ok((len > 0).then(|| self.write_console(of, data.to_vec()))),
            File::Awake => Ok(None), // To hold it open is all that there is to do.
            File::Status
            | File::Error
            | File::Idle
            | File::Events
            | File::Address
            | File::Mac
            | File::Namespace
            | File::Counters => return Errno::Acces.into(),
        };
        match parsed {
            Ok(written) => written.unwrap_or(Answer::Now(Ok(len))),
            Err(bad) => refused(&self.lifecycle, &entry, &bad).into(),
        }
    }

    fn write_verb(&self, of: Command<'_>, verb: Verb) -> Answer<usize> {
        let Command { entry, opened, wait, len, caller } = of;
        if let Some(done) = self.already(entry, verb) {
            return Answer::Now(done.map(|()| len));
        }
        let lifecycle = Arc::clone(&self.lifecycle);
        let entry = Arc::clone(entry);
        let cause = Cause::Write(actor(caller));
        // A caller that does not wait gets its EAGAIN now, and its job the lock.
        let held = match wait {
            Wait::ForIt => None,
            Wait::Never => match lifecycle.lock(&entry, Wait::Never, cause.clone()) {
                Ok(held) => Some(held),
                Err(error) => return errno::of(&error).into(),
            },
        };
        let nonblocking = held.is_some();
        let job = move || {
            let held = match held {
                Some(held) => held,
                None => lifecycle
                    .lock(&entry, Wait::ForIt, cause)
                    .map_err(|error| answer(&lifecycle, &entry, "locking", &error))?,
            };
            check_opened(&lifecycle, &entry, opened)?;
            let (doing, result) = match verb {
                Verb::Wake => ("waking", lifecycle.wake(&held, &entry)),
                Verb::Sleep { count } => {
                    let why = count.map_or(Why::Asked, Why::AskedAt);
                    ("putting to sleep", lifecycle.sleep(&held, &entry, why))
                }
            };
            drop(held);
            result.map(|_| len).map_err(|error| answer(&lifecycle, &entry, doing, &error))
        };
        if nonblocking {
            Answer::Started(len, Box::new(move || job().map(drop)))
        } else {
            Answer::job(Work::Change, job)
        }
    }

    /// Answers at once where the sandbox is as wanted and nobody is at work on it.
    fn already(&self, entry: &Arc<Entry>, verb: Verb) -> Option<Result<(), Errno>> {
        let record = entry.record();
        let there = match verb {
            Verb::Wake => State::Running,
            Verb::Sleep { count: None } => State::Snapshotted,
            Verb::Sleep { count: Some(_) } => return None,
        };
        if record.state() != there || self.lifecycle.notes().last_error(entry).is_some() {
            return None;
        }
        if !self.lifecycle.rests_in(entry, there) {
            return None;
        }
        if there == State::Running {
            self.lifecycle.activity().saw(entry, Signal::Control);
        }
        Some(Ok(()))
    }

    fn write_policy(&self, of: Command<'_>, policy: Policy) -> Answer<usize> {
        let Command { entry, opened, wait, len, caller } = of;
        let (lifecycle, entry) = (Arc::clone(&self.lifecycle), Arc::clone(entry));
        let cause = Cause::Write(actor(caller));
        Answer::job(Work::Change, move || {
            let held = lifecycle.lock(&entry, wait, cause).map_err(|error| errno::of(&error))?;
            check_opened(&lifecycle, &entry, opened)?;
            lifecycle
                .set(&held, &entry, policy)
                .map(|()| len)
                .map_err(|error| answer(&lifecycle, &entry, "setting policy of", &error))
        })
    }

    fn write_console(&self, of: Command<'_>, bytes: Vec<u8>) -> Answer<usize> {
        let Command { entry, opened, .. } = of;
        let (lifecycle, entry) = (Arc::clone(&self.lifecycle), Arc::clone(entry));
        Answer::job(Work::Change, move || {
            check_opened(&lifecycle, &entry, opened)?;
            lifecycle.type_in(&entry, &bytes).map_err(|error| {
                lifecycle.notes().note(&entry, &error);
                answer(&lifecycle, &entry, "typing on the console of", &error)
            })
        })
    }

    /// Changes attributes: `touch activity` keeps alive, `chmod` and `chown` do what
    /// they say, and everything else, truncation above all, does nothing. Answered by `NoEnt` or
    /// `NoDev` where the sandbox is gone.
    pub fn set_attr(
        self: &Arc<Self>,
        node: Node,
        change: AttrChange,
        caller: Caller,
    ) -> Answer<Attr> {
        let attr = match self.attr(node) {
            Ok(attr) => attr,
            Err(errno) => return errno.into(),
        };
        if change.mtime
            && let Node::File(row, File::Activity) = node
        {
            match self.open_entry(row) {
                Ok(entry) => self.lifecycle.activity().saw(&entry, Signal::Touch),
                Err(errno) => return errno.into(),
            }
        }
        let mode = change.mode.filter(|mode| *mode != attr.mode);
        let owner =
            Owner { uid: change.uid.unwrap_or(attr.uid), gid: change.gid.unwrap_or(attr.gid) };
        let owner = Some(owner).filter(|owner| (owner.uid, owner.gid) != (attr.uid, attr.gid));
        // The owner of a sandbox is the owner of its directory and of all in it.
        if owner.is_some() && !matches!(node, Node::Dir(_)) {
            return Errno::Perm.into();
        }
        if mode.is_none() && owner.is_none() {
            return self.attr(node).into();
        }
        let this = Arc::clone(self);
        Answer::job(Work::Attributes, move || {
            if let Some(mode) = mode {
                this.change_mode(node, mode)?;
            }
            if let (Some(owner), Node::Dir(row)) = (owner, node) {
                this.change_owner(row, owner, actor(caller))?;
            }
            this.attr(node)
        })
    }

    fn change_mode(&self, node: Node, mode: u16) -> Result<(), Errno> {
        self.modes.set(self.lifecycle.index(), node, mode).map_err(|error| {
            tracing::error!(error = chain(&error), "changing a mode");
            Errno::Io
        })
    }

    fn change_owner(&self, row: RowId, owner: Owner, by: Actor) -> Result<(), Errno> {
        let entry = self.open_entry(row)?;
        let held = self
            .lifecycle
            .lock(&entry, Wait::ForIt, Cause::Write(by))
            .map_err(|error| errno::of(&error))?;
        let before = entry.record().owner;
        self.lifecycle
            .set(&held, &entry, Policy::Owner(owner))
            .map_err(|error| answer(&self.lifecycle, &entry, "changing the owner of", &error))?;
        drop(held);
        // What is open still is looked at when it is used; a hold is used all the time.
        self.lifecycle
            .activity()
            .release_those_of(&entry, |uid| OpenedBy { uid, owner: before }.has_ended(owner));
        Ok(())
    }

    /// Makes a sandbox: `mkdir` in the root. Answered by `Inval` or `NameTooLong` for what is no
    /// id, by `Perm` in a sandbox.
    pub fn make_dir(self: &Arc<Self>, parent: Node, name: &[u8], caller: Caller) -> Answer<Attr> {
        match parent {
            Node::Root => {}
            Node::Dir(_) | Node::NetDir(_) => return Errno::Perm.into(),
            Node::Daemon(_) | Node::File(..) => return Errno::NotDir.into(),
        }
        let id = match SandboxId::from_bytes(name) {
            Ok(id) => id,
            Err(error) => {
                let start: String = String::from_utf8_lossy(name).chars().take(64).collect();
                self.root_errors.note(caller.uid, Some(&format!("`{start}`: {error}")));
                return Answer::from(match error {
                    IdError::TooLong => Errno::NameTooLong,
                    IdError::Malformed => Errno::Inval,
                });
            }
        };
        let this = Arc::clone(self);
        let cause = Cause::Mkdir(actor(caller));
        Answer::job(Work::Attributes, move || {
            let owner = Owner { uid: caller.uid, gid: caller.gid };
            let created = this.lifecycle.create(&id, owner, cause);
            let reason = created.as_ref().err().map(|error| chain(error));
            this.root_errors.note(caller.uid, reason.as_deref());
            match created {
                Ok(entry) => Ok(this.dir_attr(&entry)),
                // The name is still held by the end of an earlier sandbox.
                Err(Error::Locked { .. }) => Err(Errno::Busy),
                Err(error) => {
                    tracing::info!(%id, error = chain(&error), "creating failed");
                    let errno = errno::of(&error);
                    this.lifecycle.records().metrics().failed(errno.word());
                    Err(errno)
                }
            }
        })
    }

    /// Removes a sandbox: `rmdir` in the root. What is returned does it, on a thread of
    /// [`Tree::queue_removal`].
    ///
    /// # Errors
    /// `NoEnt`, `NotDir` for a file.
    pub fn remove_dir(
        self: &Arc<Self>,
        parent: Node,
        name: &[u8],
        caller: Caller,
    ) -> Result<Removal, Errno> {
        let attr = self.lookup(parent, name)?;
        let row = match attr.node {
            Node::Dir(row) => row,
            // It goes with its sandbox.
            Node::NetDir(_) => return Err(Errno::Perm),
            Node::Root | Node::Daemon(_) | Node::File(..) => return Err(Errno::NotDir),
        };
        let entry = self.entry(row)?;
        Ok(Removal { tree: Arc::clone(self), entry, by: actor(caller) })
    }

    /// Runs a removal on a thread that no other request can take.
    ///
    /// # Errors
    /// Where there are too many, or no thread; nothing has happened then.
    pub fn queue_removal(&self, work: impl FnOnce() + Send + 'static) -> Result<(), PoolError> {
        self.lifecycle.queue_deletion(work)
    }
}

/// Refuses what is done by an open file whose sandbox was given to somebody else since.
pub(super) fn check_opened(
    lifecycle: &Lifecycle,
    entry: &Entry,
    opened: Option<OpenedBy>,
) -> Result<(), Errno> {
    match opened {
        Some(opened) if opened.has_ended(entry.record().owner) => {
            let error = Error::ChangedHands { id: entry.id().clone() };
            Err(answer(lifecycle, entry, "using an open file of", &error))
        }
        Some(_) | None => Ok(()),
    }
}

/// Says who `caller` is, as far as the kernel tells.
pub(super) fn actor(caller: Caller) -> Actor {
    let (pid, command) = (process_of(caller.tid), command_of(caller.tid));
    Actor { pid, command: command.map(String::into), uid: caller.uid }
}

/// Logs and counts a failure once, here at the edge, and returns its errno.
pub(super) fn answer(lifecycle: &Lifecycle, entry: &Entry, doing: &str, error: &Error) -> Errno {
    let errno = errno::of(error);
    lifecycle.records().metrics().failed(errno.word());
    let error = chain(error);
    if matches!(errno, Errno::Io | Errno::TimedOut | Errno::NoSpc) {
        tracing::error!(id = %entry.id(), ?errno, error, "{doing} failed");
    } else {
        tracing::info!(id = %entry.id(), ?errno, error, "{doing} failed");
    }
    errno
}

/// Notes and counts why something written was refused, and returns its errno.
pub(super) fn refused(lifecycle: &Lifecycle, entry: &Entry, bad: &BadCommand) -> Errno {
    lifecycle.notes().note(entry, bad);
    let errno = errno::of_command(bad);
    lifecycle.records().metrics().failed(errno.word());
    errno
}
