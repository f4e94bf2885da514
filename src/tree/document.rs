//! Documents: `config` and the lists of `net/`, which commit when they are closed.
//!
//! What is written through one open file is one document, in however many writes it comes.
//! It is checked and put in force as a whole, or changes nothing:
//!
//! ```text
//! open ─ write … write ─┬─ close by a child of the opener: nothing
//!                       ├─ close by the opener, or fsync: commit; close returns the errno
//!                       └─ last close, if the opener's did not: commit; only `error` tells
//! ```
//!
//! A write fails itself where its complete lines can no longer become a valid document. That
//! document is refused from then on: nothing of it is committed.

use std::{cell::Cell, collections::HashMap, path::Path};

use super::{
    Caller, Errno, File, Job, Node, Tree,
    command::{self, BadCommand, DOCUMENT_MAX_BYTES},
    errno,
    opened::OpenedBy,
    write::{Written, actor, answer, check_opened, refused},
};
use crate::{
    lifecycle::{Entry, Error, Lifecycle, Policy, Wait},
    sandbox::{
        Actor, Cause, Spec, SpecError, State, Writer,
        network::{Destinations, Nameservers},
    },
    sync::{Arc, Mutex, lock},
    sys::task::{groups_of, has_open_for_writing, process_of, signal_that_killed},
};

/// How many bytes of documents that are being written a user may have at a time: sixteen of
/// the longest, or hundreds of the usual ones.
const DRAFTS_MAX_BYTES: usize = 16 * DOCUMENT_MAX_BYTES;

/// How the close of a file is answered.
pub enum Closed {
    /// At once.
    Now(Result<(), Errno>),
    /// By a job that may take long.
    Later(Job<()>),
}

impl std::fmt::Debug for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Now(result) => f.debug_tuple("Now").field(result).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}

/// How much memory the drafts of each user take.
#[derive(Debug, Default)]
pub(super) struct DraftBudget {
    /// Bytes by user. A leaf lock.
    used: Mutex<HashMap<u32, usize>>,
}

impl DraftBudget {
    fn charge(&self, uid: u32, bytes: usize) -> Result<(), BadCommand> {
        let mut table = lock(&self.used);
        let used = table.get(&uid).copied().unwrap_or(0) + bytes;
        if used > DRAFTS_MAX_BYTES {
            return Err(BadCommand::TooManyDrafts { uid, limit: DRAFTS_MAX_BYTES });
        }
        table.insert(uid, used);
        Ok(())
    }

    fn refund(&self, uid: u32, bytes: usize) {
        let mut table = lock(&self.used);
        if let Some(used) = table.get_mut(&uid) {
            *used = used.saturating_sub(bytes);
            if *used == 0 {
                table.remove(&uid);
            }
        }
    }
}

/// A document that is open for writing. It takes memory for its text only once something
/// is written to it.
#[derive(Debug)]
pub(super) struct Document {
    kind: DocumentKind,
    wait: Wait,
    /// Whether the old text is its beginning.
    is_appended: bool,
    opened: OpenedBy,
    /// The process that opened it, where that is known.
    opener: Option<u32>,
    uid: u32,
    budget: Arc<DraftBudget>,
    /// A leaf lock.
    draft: Mutex<Draft>,
    /// Held while it is committed, so that an older text never replaces a newer one. The
    /// sandbox's lock is taken under it.
    committing: Mutex<()>,
}

/// Who wrote a document: for the log, and with which rights.
type Author = (Actor, Writer);

#[derive(Debug, Default)]
struct Draft {
    /// `None` until something is written.
    text: Option<Vec<u8>>,
    /// How many bytes of it were in force when it was begun or, if it is a list, committed:
    /// what follows them is to be appended. `None` if all of it is the document.
    old_bytes: Option<usize>,
    status: DraftStatus,
    /// Who wrote to it: the first, or another after root. What root's open file is given to
    /// write has not root's rights.
    by: Option<Author>,
}

/// What is to be committed of a document.
#[derive(Debug)]
struct Changed {
    text: Vec<u8>,
    /// As in the draft.
    old_bytes: Option<usize>,
    by: Author,
}

impl Changed {
    /// Returns the document: what is appended follows what is in force now, which others may
    /// have changed since this was begun.
    fn onto(&self, in_force: &str) -> Vec<u8> {
        let Some(appended) = self.old_bytes.and_then(|len| self.text.get(len..)) else {
            return self.text.clone();
        };
        [in_force.as_bytes(), appended].concat()
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum DraftStatus {
    /// There is nothing to commit.
    #[default]
    Clean,
    /// It was written to since it was committed.
    Changed,
    /// It was committed as it is, in vain.
    Failed(Errno),
    /// It is never committed.
    Refused(Errno),
}

/// Why a write to a document fails.
#[derive(Debug)]
enum Refusal {
    /// An earlier write was refused with this.
    Before(Errno),
    /// It cannot become valid by this one.
    Now(BadCommand),
}

/// The files that are documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DocumentKind {
    Config,
    Nameservers,
    Denied,
    Allowed,
}

impl DocumentKind {
    const ALL: [Self; 4] = [Self::Config, Self::Nameservers, Self::Denied, Self::Allowed];

    /// Returns what kind of document a node is, if it is one.
    pub(super) fn of(node: Node) -> Option<Self> {
        let Node::File(_, file) = node else { return None };
        Self::ALL.into_iter().find(|kind| kind.file() == file)
    }

    fn file(self) -> File {
        match self {
            Self::Config => File::Config,
            Self::Nameservers => File::Nameservers,
            Self::Denied => File::Denied,
            Self::Allowed => File::Allowed,
        }
    }

    /// Returns what it reads as.
    pub(super) fn text(self, spec: &Spec) -> String {
        match self {
            Self::Config => spec.to_toml(),
            Self::Nameservers => spec.nameservers.to_string(),
            Self::Denied => spec.denied.to_string(),
            Self::Allowed => spec.allowed.to_string(),
        }
    }

    /// Reads a list of `net/`; `None` for a `config`, which is none.
    fn list(self, text: &[u8]) -> Option<Result<Policy, BadCommand>> {
        Some(match self {
            Self::Config => return None,
            Self::Nameservers => {
                command::list(text, |lines| Nameservers::read(lines)).map(Policy::Nameservers)
            }
            Self::Denied => {
                command::list(text, |lines| Destinations::denied(lines)).map(Policy::Denied)
            }
            Self::Allowed => {
                command::list(text, |lines| Destinations::allowed(lines)).map(Policy::Allowed)
            }
        })
    }
}

impl Document {
    pub(super) fn new(
        kind: DocumentKind,
        wait: Wait,
        is_appended: bool,
        opened: OpenedBy,
        caller: Caller,
        budget: &Arc<DraftBudget>,
    ) -> Self {
        Self {
            kind,
            wait,
            is_appended,
            opened,
            opener: process_of(caller.tid),
            uid: caller.uid,
            budget: Arc::clone(budget),
            draft: Mutex::default(),
            committing: Mutex::new(()),
        }
    }

    /// Writes to it. Returns its complete lines if this has completed one.
    ///
    /// `old` is the text that is in force, which an appended document begins with.
    fn write(
        &self,
        offset: u64,
        data: &[u8],
        by: impl FnOnce() -> Author,
        old: impl FnOnce() -> String,
    ) -> Result<Option<String>, Refusal> {
        let mut draft = lock(&self.draft);
        if let DraftStatus::Refused(errno) = draft.status {
            return Err(Refusal::Before(errno));
        }
        let before = draft.text.take();
        let charged = before.as_ref().map_or(0, Vec::len);
        let mut text = match before {
            Some(text) => text,
            None if self.is_appended => {
                let old = old().into_bytes();
                draft.old_bytes = Some(old.len());
                old
            }
            None => Vec::new(),
        };
        let at = if self.is_appended { text.len() } else { whole(offset) };
        let (len, end) = (text.len(), at.saturating_add(data.len()));
        let grown = end.max(len);
        let admitted = if at > len {
            Err(BadCommand::Hole { at, len })
        } else if grown > DOCUMENT_MAX_BYTES {
            Err(BadCommand::TooLong { limit: DOCUMENT_MAX_BYTES })
        } else {
            self.budget.charge(self.uid, grown - charged)
        };
        if let Err(bad) = admitted {
            self.budget.refund(self.uid, charged);
            return Err(Refusal::Now(bad));
        }
        text.resize(grown, 0);
        text[at..end].copy_from_slice(data);
        let completed = if data.contains(&b'\n') {
            let last = text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
            std::str::from_utf8(&text[..=last]).map(|lines| Some(lines.to_owned()))
        } else {
            Ok(None)
        };
        draft.text = Some(text);
        draft.status = DraftStatus::Changed;
        match &mut draft.by {
            Some((_, writer)) if writer.uid != 0 => {}
            earlier => *earlier = Some(by()),
        }
        completed.map_err(|_| Refusal::Now(BadCommand::NotText))
    }

    /// Cuts what was written off. To cut all of it off leaves nothing to commit.
    fn truncate(&self, size: u64) {
        let mut draft = lock(&self.draft);
        let size = whole(size);
        if size == 0 && (draft.text.is_some() || self.is_appended) {
            self.clear(&mut draft, DraftStatus::Clean);
            draft.text = Some(Vec::new());
        } else if let Some(text) = &mut draft.text
            && size < text.len()
        {
            let cut = text.len() - size;
            text.truncate(size);
            draft.old_bytes = draft.old_bytes.filter(|len| *len <= size);
            draft.status = match draft.status {
                refused @ DraftStatus::Refused(_) => refused,
                DraftStatus::Clean | DraftStatus::Changed | DraftStatus::Failed(_) => {
                    DraftStatus::Changed
                }
            };
            self.budget.refund(self.uid, cut);
        }
    }

    /// Nothing of it is committed any more.
    fn refuse(&self, errno: Errno) {
        self.clear(&mut lock(&self.draft), DraftStatus::Refused(errno));
    }

    fn clear(&self, draft: &mut Draft, status: DraftStatus) {
        let text = draft.text.take().unwrap_or_default();
        draft.old_bytes = None;
        self.budget.refund(self.uid, text.len());
        draft.status = status;
    }

    fn status(&self) -> DraftStatus {
        lock(&self.draft).status
    }

    /// Takes its text to commit it, if there is something to commit.
    fn take_changed(&self) -> Result<Option<Changed>, Errno> {
        let mut draft = lock(&self.draft);
        match draft.status {
            DraftStatus::Clean => Ok(None),
            DraftStatus::Failed(errno) | DraftStatus::Refused(errno) => Err(errno),
            DraftStatus::Changed => {
                draft.status = DraftStatus::Clean;
                let text = draft.text.clone().filter(|text| !text.is_empty());
                let (old_bytes, by) = (draft.old_bytes, draft.by.clone());
                Ok(text.zip(by).map(|(text, by)| Changed { text, old_bytes, by }))
            }
        }
    }

    /// What was written so far is in force. More lines of a list follow what is then in force
    /// again; of a `config`, which reads differently now, all is written again.
    fn committed(&self, changed: &Changed) {
        let is_whole = self.kind != DocumentKind::Config && changed.text.ends_with(b"\n");
        let mut draft = lock(&self.draft);
        draft.old_bytes = draft.old_bytes.filter(|_| is_whole).map(|_| changed.text.len());
    }

    fn failed(&self, errno: Errno) {
        let mut draft = lock(&self.draft);
        if draft.status == DraftStatus::Clean {
            draft.status = DraftStatus::Failed(errno);
        }
    }
}

impl Drop for Document {
    fn drop(&mut self) {
        let len = lock(&self.draft).text.as_ref().map_or(0, Vec::len);
        self.budget.refund(self.uid, len);
    }
}

fn whole(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl Tree {
    /// Says whether the close of a file that is open for writing is to be answered.
    #[must_use]
    pub fn commits_at_close(node: Node) -> bool {
        DocumentKind::of(node).is_some()
    }

    /// Closes a file for one of the processes that have it open: the document is committed
    /// if it is the process that opened it, and has no other file open for writing to it.
    pub fn flush(&self, node: Node, handle: u64, caller: Caller) -> Closed {
        let (Node::File(row, file), Some(document)) =
            (node, self.handles.get(handle, node).document)
        else {
            return Closed::Now(Ok(()));
        };
        if document.status() == DraftStatus::Clean {
            return Closed::Now(Ok(()));
        }
        if document.opener.is_some() && document.opener != process_of(caller.tid) {
            return Closed::Now(Ok(()));
        }
        let entry = match self.open_entry(row) {
            Ok(entry) => entry,
            Err(errno) => return Closed::Now(Err(errno)),
        };
        let path_end = format!("/{}/{}", entry.id(), file.path());
        let looked = signal_that_killed(caller.tid)
            .and_then(|signal| Ok((signal, has_open_for_writing(caller.tid, &path_end)?)));
        match looked {
            Ok((Some(signal), _)) => {
                document.refuse(Errno::Intr);
                self.lifecycle.note(&entry, &BadCommand::Killed { file: file.path(), signal });
                Closed::Now(Err(Errno::Intr))
            }
            // A shell that writes by `>&3` closes a copy of the file after each command.
            Ok((None, true)) => Closed::Now(Ok(())),
            Ok((None, false)) => self.commit(&entry, document),
            Err(error) => {
                // It may be half of one, of a writer that was killed.
                document.refuse(Errno::Io);
                let (file, why) = (file.path(), error.to_string());
                self.lifecycle.note(&entry, &BadCommand::Unseen { file, why });
                Closed::Now(Err(Errno::Io))
            }
        }
    }

    /// Commits a document that stays open.
    pub fn sync(&self, node: Node, handle: u64) -> Closed {
        let (Node::File(row, _), Some(document)) = (node, self.handles.get(handle, node).document)
        else {
            // What was written was durable when the write returned.
            return Closed::Now(Ok(()));
        };
        match self.open_entry(row) {
            Ok(entry) => self.commit(&entry, document),
            Err(errno) => Closed::Now(Err(errno)),
        }
    }

    /// Returns the job that commits a document which nobody has open any more, if there is
    /// something left to commit.
    pub(super) fn commit_released(&self, node: Node, document: Arc<Document>) -> Option<Job<()>> {
        let Node::File(row, _) = node else { return None };
        if document.status() != DraftStatus::Changed {
            return None;
        }
        match self.commit(&self.lifecycle.by_row(row)?, document) {
            Closed::Now(_) => None,
            Closed::Later(job) => Some(job),
        }
    }

    /// Cuts off what was written to a document. Other files have no length to change.
    pub fn truncate(&self, node: Node, handle: u64, size: u64) {
        if let Some(document) = self.handles.get(handle, node).document {
            document.truncate(size);
        }
    }

    fn commit(&self, entry: &Arc<Entry>, document: Arc<Document>) -> Closed {
        match document.status() {
            DraftStatus::Clean => return Closed::Now(Ok(())),
            DraftStatus::Failed(errno) | DraftStatus::Refused(errno) => {
                return Closed::Now(Err(errno));
            }
            DraftStatus::Changed => {}
        }
        let (lifecycle, entry) = (Arc::clone(&self.lifecycle), Arc::clone(entry));
        Closed::Later(Box::new(move || {
            let _turn = lock(&document.committing);
            let Some(changed) = document.take_changed()? else { return Ok(()) };
            commit(&lifecycle, &entry, &document, &changed)
                .inspect(|()| document.committed(&changed))
                .inspect_err(|errno| document.failed(*errno))
        }))
    }

    /// Writes to a document. Nothing is in force by it, and it fails only where the document
    /// can no longer become one.
    pub(super) fn write_document(
        &self,
        entry: &Arc<Entry>,
        document: Option<Arc<Document>>,
        offset: u64,
        data: &[u8],
        caller: Caller,
    ) -> Written {
        let Some(document) = document else {
            // The open file is an earlier daemon's.
            return Written::Now(Err(Errno::NoDev));
        };
        let old = || document.kind.text(&entry.record().spec);
        let by = || (actor(caller), writer(caller));
        let lines = match document.write(offset, data, by, old) {
            Ok(Some(lines)) => lines,
            Ok(None) => return Written::Now(Ok(data.len())),
            Err(Refusal::Before(errno)) => return Written::Now(Err(errno)),
            Err(Refusal::Now(bad)) => {
                let errno = refused(&self.lifecycle, entry, &bad);
                document.refuse(errno);
                return Written::Now(Err(errno));
            }
        };
        let (lifecycle, entry) = (Arc::clone(&self.lifecycle), Arc::clone(entry));
        let (kind, len) = (document.kind, data.len());
        let check = move || {
            let checked = check_beginning(&lifecycle, &entry, kind, &lines, &writer(caller));
            checked.map(|()| len).inspect_err(|errno| document.refuse(*errno))
        };
        // The lists name no files, so to check them waits for no disk.
        if kind == DocumentKind::Config {
            Written::Later(Box::new(check))
        } else {
            Written::Now(check())
        }
    }
}

/// Refuses the beginning of a document that no further lines can make valid.
fn check_beginning(
    lifecycle: &Lifecycle,
    entry: &Arc<Entry>,
    kind: DocumentKind,
    lines: &str,
    writer: &Writer,
) -> Result<(), Errno> {
    if let Some(list) = kind.list(lines.as_bytes()) {
        return list.map(drop).map_err(|bad| refused(lifecycle, entry, &bad));
    }
    let record = entry.record();
    let begun = read_config(lifecycle, entry, writer, |missing| {
        Spec::parse_beginning(lines, &record.spec, missing)
    })?;
    let Some(mut spec) = begun else { return Ok(()) };
    // There may be more disks to come.
    spec.disks.clone_from(&record.spec.disks);
    let is_other = !record.spec.is_same_machine(&spec);
    if is_other && matches!(record.state(), State::Running | State::Snapshotted) {
        let error = Error::NotStopped { id: entry.id().clone(), state: record.state() };
        lifecycle.note(entry, &error);
        return Err(answer(lifecycle, entry, "configuring", &error));
    }
    Ok(())
}

fn commit(
    lifecycle: &Lifecycle,
    entry: &Arc<Entry>,
    document: &Document,
    changed: &Changed,
) -> Result<(), Errno> {
    // What makes no sense does not wait to be told so.
    if read(lifecycle, entry, document.kind, changed)?.is_none() {
        return Ok(());
    }
    let cause = Cause::Write(changed.by.0.clone());
    let held = lifecycle.lock(entry, document.wait, cause).map_err(|error| errno::of(&error))?;
    let Some(policy) = read(lifecycle, entry, document.kind, changed)? else { return Ok(()) };
    check_opened(lifecycle, entry, Some(document.opened))?;
    lifecycle
        .set(&held, entry, policy)
        .map_err(|error| answer(lifecycle, entry, "configuring", &error))
}

/// Returns what a document makes of the sandbox as it is now; `None` for a blank `config`.
fn read(
    lifecycle: &Lifecycle,
    entry: &Arc<Entry>,
    kind: DocumentKind,
    changed: &Changed,
) -> Result<Option<Policy>, Errno> {
    let spec = Arc::clone(&entry.record().spec);
    let text = changed.onto(&kind.text(&spec));
    if let Some(list) = kind.list(&text) {
        return list.map(Some).map_err(|bad| refused(lifecycle, entry, &bad));
    }
    let text = command::document(&text).map_err(|bad| refused(lifecycle, entry, &bad))?;
    let Some(text) = text else { return Ok(None) };
    let writer = &changed.by.1;
    // What has a file of its own is as that says, not as the template.
    let mut base = Spec::clone(&lifecycle.settings().template);
    base.keep_policy(&spec);
    let spec = read_config(lifecycle, entry, writer, |missing| Spec::parse(text, &base, missing))?;
    Ok(Some(Policy::Config(Box::new(spec), writer.clone())))
}

/// Returns the caller as one whose rights are kept.
fn writer(caller: Caller) -> Writer {
    Writer::new(caller.uid, caller.gid, groups_of(caller.tid))
}

/// Reads a `config`, whose files have to be its writer's to use.
fn read_config<T>(
    lifecycle: &Lifecycle,
    entry: &Entry,
    writer: &Writer,
    read: impl FnOnce(&dyn Fn(&Path) -> Option<String>) -> Result<T, SpecError>,
) -> Result<T, Errno> {
    // The first file that is amiss ends it.
    let is_denied = Cell::new(false);
    let files = lifecycle.named_files(writer);
    let missing = |path: &Path| {
        let unusable = files.why_unusable(path)?;
        is_denied.set(unusable.is_denied);
        Some(unusable.why)
    };
    read(&missing).map_err(|error| {
        let errno = if is_denied.get() { Errno::Acces } else { Errno::Inval };
        lifecycle.note(entry, &error);
        lifecycle.metrics().failed(errno.word());
        errno
    })
}
