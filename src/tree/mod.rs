//! What the tree means: names, attributes, reads and writes, without a kernel in sight.
//!
//! `fuse` turns requests into calls of [`Tree`] and its answers into replies; tests
//! call it directly. Nothing here blocks: what may take long is returned as a job.
//!
//! Looking is free: no call but `write`, `set_attr`, `make_dir` and `remove_dir`
//! reaches anything of `lifecycle` that changes a sandbox or counts as activity.

mod answer;
mod command;
mod console;
mod document;
mod errno;
mod glance;
mod handle;
mod idle;
#[cfg(test)]
mod model;
mod modes;
mod node;
mod open;
mod opened;
mod read;
mod root_error;
mod seeing;
#[cfg(test)]
mod tests;
mod view;
mod write;

use std::{
    fmt,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

pub use answer::{Answer, Job, Work};
pub use command::{BadCommand, Verb, verb};
use console::Consoles;
use document::{DraftBudget, Openings};
pub use errno::Errno;
use glance::Glances;
use handle::Handles;
use modes::Modes;
pub use node::{DaemonFile, File, Node};
pub use open::Opened;
pub use opened::Access;
pub use read::Readiness;
use root_error::RootErrors;
use seeing::viewer;
pub use view::{DaemonFacts, Facts};
pub use write::{AttrChange, Removal};

use crate::{
    lifecycle::{ChangeFeed, Entry, Lifecycle, View},
    sandbox::{Owner, RowId, SandboxId, Timestamp},
    sync::Arc,
    sys::{host::own_ids, mount::Device},
};

/// The size that `state` reports, as sysfs does: a page, so that writes within it
/// share the kernel's lock of the file (see docs/SEMANTICS.md).
const STATE_SIZE: u64 = 4096;
/// The name of the directory of a sandbox's network.
const NET_DIR: &str = "net";
/// A sandbox's directories: its owner and its group.
const DIR_MODE: u16 = 0o750;
/// Offsets of a listing of the root: below are the daemon's files, above the rows.
const ROWS_FROM: u64 = 64;

/// The whole tree.
pub struct Tree {
    lifecycle: Arc<Lifecycle>,
    handles: Handles,
    consoles: Arc<Consoles>,
    drafts: Arc<DraftBudget>,
    openings: Arc<Openings>,
    glances: Glances,
    root_errors: RootErrors,
    modes: Modes,
    started: Timestamp,
    root_owner: (u32, u32),
    /// Of the file system that it is mounted as.
    device: OnceLock<Device>,
    /// What this daemon is forbidden and needs.
    lacks: Vec<String>,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The thread, in the daemon's pid namespace; 0 where it cannot be seen from there.
    pub tid: u32,
}

/// The attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Which node.
    pub node: Node,
    /// Permissions, without the type.
    pub mode: u16,
    /// Whose it is.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
    /// Its size.
    pub size: u64,
    /// When it last changed.
    pub mtime: SystemTime,
}

/// One entry of a directory.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its attributes.
    pub attr: Attr,
    /// Its name.
    pub name: String,
    /// The offset at which a listing goes on after it.
    pub next: u64,
}

impl Tree {
    /// Makes the tree of `lifecycle`.
    ///
    /// # Errors
    /// Where the index cannot be read.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Result<Self, crate::lifecycle::IndexError> {
        let modes = Modes::load(lifecycle.index())?;
        let started = lifecycle.clock().now();
        let root_owner = own_ids();
        let lacks = Vec::new();
        let (consoles, drafts, openings) = Default::default();
        let (glances, root_errors) = Default::default();
        Ok(Self {
            lifecycle,
            handles: Handles::new(),
            consoles,
            drafts,
            openings,
            glances,
            root_errors,
            modes,
            started,
            root_owner,
            device: OnceLock::new(),
            lacks,
        })
    }

    /// Has `dozed.status` tell that the daemon lacks these.
    #[must_use]
    pub fn lacking(self, lacks: Vec<String>) -> Self {
        Self { lacks, ..self }
    }

    /// Notes which file system it is mounted as.
    pub fn mounted_as(&self, device: Device) {
        // It is mounted once.
        self.device.get_or_init(|| device);
    }

    /// Returns the path of a node below the mount, for logs. Its sandbox may be gone.
    #[must_use]
    pub fn path(&self, node: Node) -> String {
        let of = |row| {
            let entry = self.lifecycle.by_row(row);
            entry.map_or_else(|| format!("#{row}"), |entry| entry.id().to_string())
        };
        match node {
            Node::Root => String::new(),
            Node::Daemon(file) => file.name().to_owned(),
            Node::Dir(row) => of(row),
            Node::NetDir(row) => format!("{}/net", of(row)),
            Node::File(row, file) => format!("{}/{}", of(row), file.path()),
        }
    }

    /// Returns the attributes of what `name` is in `parent`.
    ///
    /// # Errors
    /// `NoEnt`, or `NotDir` where `parent` is a file.
    pub fn lookup(&self, parent: Node, name: &[u8]) -> Result<Attr, Errno> {
        match parent {
            Node::Root => {
                let daemon = DaemonFile::ALL.into_iter().find(|f| f.name().as_bytes() == name);
                if let Some(file) = daemon {
                    return self.attr(Node::Daemon(file));
                }
                // That there can be none is said to who makes one, in `dozed.error`.
                let id = SandboxId::from_bytes(name).map_err(|_| Errno::NoEnt)?;
                let entry = self.lifecycle.by_id(&id).ok_or(Errno::NoEnt)?;
                Ok(self.dir_attr(&entry))
            }
            Node::Dir(row) => {
                let entry = self.lifecycle.by_row(row).ok_or(Errno::NoEnt)?;
                if name == NET_DIR.as_bytes() {
                    return Ok(self.net_dir_attr(&entry));
                }
                self.file_among(&File::ALL, &entry, name)
            }
            Node::NetDir(row) => {
                let entry = self.lifecycle.by_row(row).ok_or(Errno::NoEnt)?;
                self.file_among(&File::NET, &entry, name)
            }
            Node::Daemon(_) | Node::File(..) => Err(Errno::NotDir),
        }
    }

    fn file_among(&self, files: &[File], entry: &Entry, name: &[u8]) -> Result<Attr, Errno> {
        let found = files.iter().find(|file| file.name().as_bytes() == name);
        found.map(|file| self.file_attr(entry, *file)).ok_or(Errno::NoEnt)
    }

    /// Returns the attributes of a node as `caller` sees them, who may see a part of it only.
    /// The size is the length of what a read right after it gives.
    pub fn attr_for(self: &Arc<Self>, node: Node, caller: Caller) -> Answer<Attr> {
        let this = Arc::clone(self);
        match node {
            Node::Daemon(DaemonFile::List) => Answer::job(Work::Read, move || {
                Ok(Attr { size: this.daemon_list_len(caller), ..this.attr(node)? })
            }),
            Node::Daemon(DaemonFile::Events) => {
                let events_attr = move || {
                    let attr = this.attr(node)?;
                    let view = View::Viewer(viewer(caller));
                    let (size, mtime) = this.events_facts(&view, attr.mtime);
                    Ok(Attr { size, mtime, ..attr })
                };
                if caller.uid == 0 {
                    events_attr().into()
                } else {
                    Answer::job(Work::Read, events_attr)
                }
            }
            Node::Daemon(DaemonFile::Error) => {
                let size = self.root_error(caller).len() as u64;
                self.attr(node).map(|attr| Attr { size, ..attr }).into()
            }
            Node::File(row, File::Console) => Answer::job(Work::Read, move || {
                let (size, mtime) = this.console_facts(&this.entry(row)?.record());
                Ok(Attr { size, mtime, ..this.attr(node)? })
            }),
            Node::File(row, file) if Self::is_slow(file) => Answer::job(Work::Read, move || {
                let size = this.told_len(&*this.entry(row)?, file);
                Ok(Attr { size, ..this.attr(node)? })
            }),
            Node::File(row, file) if Self::changes_by_itself(file) => {
                let attr = self.entry(row).map(|entry| {
                    let size = self.told_len(&entry, file);
                    Attr { size, ..self.file_attr(&entry, file) }
                });
                attr.into()
            }
            Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) | Node::File(..) => {
                self.attr(node).into()
            }
        }
    }

    /// Returns the attributes of a node, from memory: the size may be the one that was told
    /// last. The kernel asks again before it opens a file.
    ///
    /// # Errors
    /// `NoEnt` where its sandbox is gone.
    pub fn attr(&self, node: Node) -> Result<Attr, Errno> {
        match node {
            Node::Root => Ok(self.root_attr(node, self.modes.get(node).unwrap_or(0o755))),
            // Strangers see their own in the list, so anybody may read it.
            Node::Daemon(file) => {
                let attr = self.root_attr(node, self.modes.get(node).unwrap_or(0o444));
                Ok(Attr { size: self.daemon_len(file), ..attr })
            }
            Node::Dir(row) => self.entry(row).map(|entry| self.dir_attr(&entry)),
            Node::NetDir(row) => self.entry(row).map(|entry| self.net_dir_attr(&entry)),
            Node::File(row, file) => self.entry(row).map(|entry| self.file_attr(&entry, file)),
        }
    }

    /// Returns the attributes that a node of a deleted sandbox had.
    ///
    /// # Errors
    /// `NoEnt` for what is no node of a sandbox.
    pub fn tombstone_attr(&self, node: Node, owner: Owner) -> Result<Attr, Errno> {
        let mode = match node {
            Node::Dir(_) | Node::NetDir(_) => DIR_MODE,
            Node::File(_, file) => file.mode(),
            Node::Root | Node::Daemon(_) => return Err(Errno::NoEnt),
        };
        let mtime = self.system_time(self.lifecycle.clock().now());
        Ok(Attr { node, mode, uid: owner.uid, gid: owner.gid, size: 0, mtime })
    }

    /// Returns where changes are told.
    #[must_use]
    pub fn feed(&self) -> &Arc<ChangeFeed> {
        self.lifecycle.records().feed()
    }

    fn entry(&self, row: RowId) -> Result<Arc<Entry>, Errno> {
        self.lifecycle.by_row(row).ok_or(Errno::NoEnt)
    }

    /// An open file whose sandbox is gone answers ENODEV, as cgroup's do.
    fn open_entry(&self, row: RowId) -> Result<Arc<Entry>, Errno> {
        self.lifecycle.by_row(row).ok_or(Errno::NoDev)
    }

    fn root_attr(&self, node: Node, mode: u16) -> Attr {
        let (uid, gid) = self.root_owner;
        Attr { node, mode, uid, gid, size: 0, mtime: self.system_time(self.started) }
    }

    fn dir_attr(&self, entry: &Entry) -> Attr {
        self.attr_of_dir(entry, Node::Dir(entry.row()))
    }

    fn net_dir_attr(&self, entry: &Entry) -> Attr {
        self.attr_of_dir(entry, Node::NetDir(entry.row()))
    }

    fn attr_of_dir(&self, entry: &Entry, node: Node) -> Attr {
        let record = entry.record();
        Attr {
            node,
            mode: self.modes.get(node).unwrap_or(DIR_MODE),
            uid: record.owner.uid,
            gid: record.owner.gid,
            size: 0,
            mtime: self.system_time(record.created_at),
        }
    }

    fn file_attr(&self, entry: &Entry, file: File) -> Attr {
        let record = entry.record();
        let node = Node::File(entry.row(), file);
        let (size, mtime) = match file {
            File::State => (STATE_SIZE, self.system_time(record.since)),
            File::Console => (0, self.system_time(record.since)),
            File::Activity => {
                (self.known_len(entry, file), self.system_time(entry.last_activity()))
            }
            File::Events => {
                let created = self.system_time(record.created_at);
                self.events_facts(&View::Sandbox(entry.row()), created)
            }
            File::Status
            | File::Error
            | File::Config
            | File::Awake
            | File::Idle
            | File::IdleAfter
            | File::DeleteAfter
            | File::Pinned
            | File::Address
            | File::Mac
            | File::Namespace
            | File::Nameservers
            | File::Denied
            | File::Allowed
            | File::Counters => (self.known_len(entry, file), self.system_time(record.since)),
        };
        Attr {
            node,
            mode: self.modes.get(node).unwrap_or(file.mode()),
            uid: record.owner.uid,
            gid: record.owner.gid,
            size,
            mtime,
        }
    }

    fn system_time(&self, at: Timestamp) -> SystemTime {
        shown(self.lifecycle.clock().wall(at))
    }

    /// Lists a directory from `offset` on, and calls `add` with each entry until it
    /// says that its buffer is full.
    ///
    /// # Errors
    /// `NotDir`; `NoEnt` where the sandbox is gone.
    pub fn list(
        &self,
        node: Node,
        offset: u64,
        add: &mut dyn FnMut(Listed) -> bool,
    ) -> Result<(), Errno> {
        let this = self.attr(node)?;
        let parent = match node {
            Node::Root => this,
            Node::Dir(_) => self.attr(Node::Root)?,
            Node::NetDir(row) => self.attr(Node::Dir(row))?,
            Node::Daemon(_) | Node::File(..) => return Err(Errno::NotDir),
        };
        let mut fixed = vec![(this, ".".to_owned()), (parent, "..".to_owned())];
        match node {
            Node::Dir(row) => {
                let entry = self.entry(row)?;
                let files = File::ALL.into_iter();
                fixed.extend(files.map(|f| (self.file_attr(&entry, f), f.name().to_owned())));
                fixed.push((self.net_dir_attr(&entry), NET_DIR.to_owned()));
            }
            Node::NetDir(row) => {
                let entry = self.entry(row)?;
                let files = File::NET.into_iter();
                fixed.extend(files.map(|f| (self.file_attr(&entry, f), f.name().to_owned())));
            }
            Node::Root | Node::Daemon(_) | Node::File(..) => {
                for file in DaemonFile::ALL {
                    fixed.push((self.attr(Node::Daemon(file))?, file.name().to_owned()));
                }
            }
        }
        for (next, (attr, name)) in (1u64..).zip(fixed) {
            if next > offset && !add(Listed { attr, name, next }) {
                return Ok(());
            }
        }
        if node == Node::Root {
            self.list_sandboxes(offset, add);
        }
        Ok(())
    }

    fn list_sandboxes(&self, offset: u64, add: &mut dyn FnMut(Listed) -> bool) {
        for entry in self.lifecycle.entries_after(RowId(offset.saturating_sub(ROWS_FROM))) {
            let attr = self.dir_attr(&entry);
            let (name, next) = (entry.id().to_string(), ROWS_FROM + entry.row().0);
            if !add(Listed { attr, name, next }) {
                return;
            }
        }
    }
}

fn shown(at: jiff::Timestamp) -> SystemTime {
    let millis = u64::try_from(at.as_millisecond()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").field("lifecycle", &self.lifecycle).finish_non_exhaustive()
    }
}
