//! Documents: `config` and the lists of `net/`, which commit when they are closed.
//!
//! What is written through one open file is one document, in however many writes it comes.
//! It is checked and put in force as a whole, or changes nothing:
//!
//! ```text
//! open ─ write … write ─┬─ close by a child of the opener, or of a copy: nothing
//!                       ├─ close by the opener, or fsync: commit; close returns the errno
//!                       └─ last close, if the opener's did not: commit; only `error` tells
//! ```
//!
//! A process that has opened a file twice writes two documents: see [`opening`].
//!
//! A write fails itself where its complete lines can no longer become a valid document. That
//! document is refused from then on: nothing of it is committed.

mod draft;
mod kind;
mod opening;

use std::{cell::Cell, path::Path};

use draft::{Author, Changed, DraftStatus, Opened, Refusal};
pub(super) use draft::{Document, DraftBudget};
pub(super) use kind::DocumentKind;
use opening::Opening;
pub(super) use opening::Openings;

use super::{
    Answer, Caller, Errno, Job, Node, Tree, Work,
    command::{self, BadCommand},
    errno,
    opened::{Access, OpenedBy},
    write::{actor, answer, check_opened, refused},
};
use crate::{
    lifecycle::{Entry, Error, Lifecycle, NamedFiles, Policy},
    sandbox::{Cause, FileCheck, FileRole, Spec, SpecError, State, Writer},
    sync::{Arc, lock},
    sys::task::{count_open_for_writing, groups_of, process_of, signal_that_killed},
};

impl Tree {
    /// Opens a document for writing.
    pub(super) fn open_document(
        &self,
        node: Node,
        kind: DocumentKind,
        access: Access,
        by: OpenedBy,
        caller: Caller,
    ) -> Arc<Document> {
        let pid = process_of(caller.tid);
        let opening = pid.map(|pid| Opening::new(&self.openings, node, pid, caller.tid));
        let opened = Opened { wait: access.wait(), is_appended: access.is_append(), by, opening };
        Arc::new(Document::new(kind, opened, caller.uid, &self.drafts))
    }

    /// Closes a file for one of the processes that have it open: the document is committed
    /// if that opened it, and has no copy of what it closes.
    pub fn flush(&self, node: Node, handle: u64, caller: Caller) -> Answer<()> {
        let (Node::File(row, file), Some(document)) =
            (node, self.handles.get(handle, node).document)
        else {
            return Answer::Now(Ok(()));
        };
        let Some(opening) = &document.opening else {
            // Which process it is cannot be seen from here.
            return self
                .open_entry(row)
                .map_or_else(Answer::from, |entry| self.commit(&entry, document));
        };
        if process_of(caller.tid) != Some(opening.pid) {
            return Answer::Now(Ok(()));
        }
        opening.closing();
        let entry = match self.open_entry(row) {
            Ok(entry) => entry,
            Err(_) if document.status() == DraftStatus::Clean => return Answer::Now(Ok(())),
            Err(errno) => return errno.into(),
        };
        let device = self.device.get().copied();
        let lifecycle = Arc::clone(&self.lifecycle);
        // A process may have many files open.
        Answer::job(Work::Change, move || {
            // In this order: one that is killed has no files any more, and is seen to be killed.
            let left = device
                .map_or(Ok(0), |device| count_open_for_writing(caller.tid, device, node.inode()));
            let looked = left.and_then(|left| Ok((left, signal_that_killed(caller.tid)?)));
            let refused = match looked {
                Ok((left, killed)) => {
                    let is_closed = document
                        .opening
                        .as_ref()
                        .is_none_or(|opening| opening.is_closed(left, caller.tid));
                    match killed {
                        None if is_closed => return commit_now(&lifecycle, &entry, &document),
                        // A shell that writes by `>&3` closes a copy after each command.
                        None => return Ok(()),
                        Some(signal) => BadCommand::Killed { file: file.path(), signal },
                    }
                }
                // It may be half of one, of a writer that was killed.
                Err(error) => BadCommand::Unseen { file: file.path(), why: error.to_string() },
            };
            if document.status() == DraftStatus::Clean {
                return Ok(());
            }
            let errno = errno::of_command(&refused);
            document.refuse(errno);
            lifecycle.notes().note(&entry, &refused);
            Err(errno)
        })
    }

    /// Commits a document that stays open.
    pub fn sync(&self, node: Node, handle: u64) -> Answer<()> {
        let (Node::File(row, _), Some(document)) = (node, self.handles.get(handle, node).document)
        else {
            // What was written was durable when the write returned.
            return Answer::Now(Ok(()));
        };
        match self.open_entry(row) {
            Ok(entry) => self.commit(&entry, document),
            Err(errno) => errno.into(),
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
            Answer::Job(_, job) => Some(job),
            Answer::Now(_) | Answer::Started(..) => None,
        }
    }

    /// Cuts off what was written to a document. Other files have no length to change.
    pub fn truncate(&self, node: Node, handle: u64, size: u64) {
        if let Some(document) = self.handles.get(handle, node).document {
            document.truncate(size);
        }
    }

    fn commit(&self, entry: &Arc<Entry>, document: Arc<Document>) -> Answer<()> {
        match document.status() {
            DraftStatus::Clean => return Answer::Now(Ok(())),
            DraftStatus::Failed(errno) | DraftStatus::Refused(errno) => return errno.into(),
            DraftStatus::Changed => {}
        }
        let (lifecycle, entry) = (Arc::clone(&self.lifecycle), Arc::clone(entry));
        Answer::job(Work::Change, move || commit_now(&lifecycle, &entry, &document))
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
    ) -> Answer<usize> {
        let Some(document) = document else {
            // The open file is an earlier daemon's.
            return Errno::NoDev.into();
        };
        let lifecycle = Arc::clone(&self.lifecycle);
        let part = Part { offset, data: data.to_vec() };
        // The lists name no files, for which their writer's groups would matter.
        if document.kind != DocumentKind::Config {
            let author = (actor(caller), Writer::new(caller.uid, caller.gid, Vec::new()));
            return Answer::Now(part.write(&lifecycle, entry, &document, || author));
        }
        // A part of a line is not checked yet, and the groups of its writer may be known.
        if !data.contains(&b'\n') && (caller.uid == 0 || document.has_author(caller.uid)) {
            return Answer::Now(part.write(&lifecycle, entry, &document, || author_of(caller)));
        }
        let entry = Arc::clone(entry);
        Answer::job(Work::Change, move || {
            part.write(&lifecycle, &entry, &document, || author_of(caller))
        })
    }
}

/// A part of a document, as it is written.
struct Part {
    offset: u64,
    data: Vec<u8>,
}

impl Part {
    /// Writes it, and refuses the document if that can no longer become one.
    fn write(
        self,
        lifecycle: &Lifecycle,
        entry: &Arc<Entry>,
        document: &Document,
        by: impl FnOnce() -> Author,
    ) -> Result<usize, Errno> {
        if let Some(opening) = &document.opening {
            opening.used();
        }
        let old = || document.kind.text(&entry.record().spec);
        match document.write(self.offset, &self.data, by, old) {
            Ok(None) => {}
            Ok(Some((lines, writer))) => {
                check_beginning(lifecycle, entry, document.kind, &lines, &writer)
                    .inspect_err(|errno| document.refuse(*errno))?;
            }
            Err(Refusal::Before(errno)) => return Err(errno),
            Err(Refusal::Now(bad)) => {
                let errno = refused(lifecycle, entry, &bad);
                document.refuse(errno);
                return Err(errno);
            }
        }
        Ok(self.data.len())
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
    let begun = read_config(lifecycle, entry, writer, |check, _| {
        // Whether a disk is read-only may be on the next line.
        let so_far = |path: &Path, role| match role {
            FileRole::Disk { .. } => check(path, FileRole::Disk { readonly: true }),
            FileRole::Kernel | FileRole::Initramfs => check(path, role),
        };
        Spec::parse_beginning(lines, &record.spec, &so_far)
    })?;
    let Some(mut spec) = begun else { return Ok(()) };
    // There may be more disks to come.
    spec.disks.clone_from(&record.spec.disks);
    let is_other = !record.spec.is_same_machine(&spec);
    if is_other && matches!(record.state(), State::Running | State::Snapshotted) {
        let error = Error::NotStopped { id: entry.id().clone(), state: record.state() };
        lifecycle.notes().note(entry, &error);
        return Err(answer(lifecycle, entry, "configuring", &error));
    }
    Ok(())
}

/// Commits a document, if there is something to commit.
fn commit_now(lifecycle: &Lifecycle, entry: &Arc<Entry>, document: &Document) -> Result<(), Errno> {
    let _turn = lock(&document.committing);
    let Some(changed) = document.take_changed()? else { return Ok(()) };
    commit(lifecycle, entry, document, &changed)
        .inspect(|()| document.committed(&changed))
        .inspect_err(|errno| document.failed(*errno))
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
    let spec = read_config(lifecycle, entry, writer, |check, files| {
        let spec = Spec::parse(text, &base, check)?;
        match files.why_too_large(&spec) {
            None => Ok(spec),
            Some(message) => Err(SpecError { line: None, message }),
        }
    })?;
    Ok(Some(Policy::Config(Box::new(spec), writer.clone())))
}

/// Returns the caller as one whose rights are kept. Called by a job.
fn author_of(caller: Caller) -> Author {
    let Caller { uid, gid, tid } = caller;
    // Root may use any file.
    let groups = if uid == 0 { Vec::new() } else { groups_of(tid, uid, gid) };
    (actor(caller), Writer::new(uid, gid, groups))
}

/// Reads a `config`, whose files have to be its writer's to use, and fit for a machine.
fn read_config<T>(
    lifecycle: &Lifecycle,
    entry: &Entry,
    writer: &Writer,
    read: impl FnOnce(&FileCheck<'_>, &NamedFiles<'_>) -> Result<T, SpecError>,
) -> Result<T, Errno> {
    // The first file that is amiss ends it.
    let is_denied = Cell::new(false);
    let files = lifecycle.named_files(writer);
    let check = |path: &Path, role| {
        let unusable = files.why_unusable(path, role)?;
        is_denied.set(unusable.is_denied);
        Some(unusable.why)
    };
    read(&check, &files).map_err(|error| {
        let errno = if is_denied.get() { Errno::Acces } else { Errno::Inval };
        lifecycle.notes().note(entry, &error);
        lifecycle.records().metrics().failed(errno.word());
        errno
    })
}
