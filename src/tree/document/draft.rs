//! The text of a document while it is being written.

use std::collections::HashMap;

use super::{kind::DocumentKind, opening::Opening};
use crate::{
    lifecycle::Wait,
    sandbox::{Actor, Writer},
    sync::{Arc, Mutex, lock},
    tree::{
        Errno,
        command::{BadCommand, DOCUMENT_MAX_BYTES},
        opened::OpenedBy,
    },
};

/// How many bytes of documents that are being written a user may have at a time: sixteen of
/// the longest, or hundreds of the usual ones.
const DRAFTS_MAX_BYTES: usize = 16 * DOCUMENT_MAX_BYTES;

/// How much memory the drafts of each user take.
#[derive(Debug, Default)]
pub(in crate::tree) struct DraftBudget {
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
pub(in crate::tree) struct Document {
    pub(super) kind: DocumentKind,
    pub(super) wait: Wait,
    /// Whether the old text is its beginning.
    is_appended: bool,
    pub(super) opened: OpenedBy,
    /// Where the process that opened it is known.
    pub(super) opening: Option<Opening>,
    uid: u32,
    budget: Arc<DraftBudget>,
    /// A leaf lock.
    draft: Mutex<Draft>,
    /// Held while it is committed, so that an older text never replaces a newer one. The
    /// sandbox's lock is taken under it.
    pub(super) committing: Mutex<()>,
}

/// How a document is opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) wait: Wait,
    /// Whether the old text is its beginning.
    pub(super) is_appended: bool,
    pub(super) by: OpenedBy,
    /// Where the process that opens it is known.
    pub(super) opening: Option<Opening>,
}

/// Who wrote a document: for the log, and with which rights.
pub(super) type Author = (Actor, Writer);

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
pub(super) struct Changed {
    text: Vec<u8>,
    /// As in the draft.
    old_bytes: Option<usize>,
    pub(super) by: Author,
}

impl Changed {
    /// Returns the document: what is appended follows what is in force now, which others may
    /// have changed since this was begun.
    pub(super) fn onto(&self, in_force: &str) -> Vec<u8> {
        let Some(appended) = self.old_bytes.and_then(|len| self.text.get(len..)) else {
            return self.text.clone();
        };
        [in_force.as_bytes(), appended].concat()
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum DraftStatus {
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
pub(super) enum Refusal {
    /// An earlier write was refused with this.
    Before(Errno),
    /// It cannot become valid by this one.
    Now(BadCommand),
}

impl Document {
    pub(super) fn new(
        kind: DocumentKind,
        opened: Opened,
        uid: u32,
        budget: &Arc<DraftBudget>,
    ) -> Self {
        let Opened { wait, is_appended, by, opening } = opened;
        Self {
            kind,
            wait,
            is_appended,
            opened: by,
            opening,
            uid,
            budget: Arc::clone(budget),
            draft: Mutex::default(),
            committing: Mutex::new(()),
        }
    }

    /// Says whether it is known with whose rights it is committed if the user `uid` writes to
    /// it now.
    pub(super) fn has_author(&self, uid: u32) -> bool {
        match &lock(&self.draft).by {
            Some((_, writer)) => uid == 0 || writer.uid != 0,
            None => false,
        }
    }

    /// Writes to it. Returns its complete lines if this has completed one, and who wrote them.
    ///
    /// `old` is the text that is in force, which an appended document begins with.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        by: impl FnOnce() -> Author,
        old: impl FnOnce() -> String,
    ) -> Result<Option<(String, Writer)>, Refusal> {
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
        let author = match draft.by.take() {
            Some(earlier) if earlier.1.uid != 0 => earlier,
            Some(_) | None => by(),
        };
        let (_, writer) = draft.by.insert(author);
        let lines = completed.map_err(|_| Refusal::Now(BadCommand::NotText))?;
        Ok(lines.map(|lines| (lines, writer.clone())))
    }

    /// Cuts what was written off. To cut all of it off leaves nothing to commit.
    pub(super) fn truncate(&self, size: u64) {
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
    pub(super) fn refuse(&self, errno: Errno) {
        self.clear(&mut lock(&self.draft), DraftStatus::Refused(errno));
    }

    fn clear(&self, draft: &mut Draft, status: DraftStatus) {
        let text = draft.text.take().unwrap_or_default();
        draft.old_bytes = None;
        self.budget.refund(self.uid, text.len());
        draft.status = status;
    }

    pub(super) fn status(&self) -> DraftStatus {
        lock(&self.draft).status
    }

    /// Takes its text to commit it, if there is something to commit.
    pub(super) fn take_changed(&self) -> Result<Option<Changed>, Errno> {
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
    pub(super) fn committed(&self, changed: &Changed) {
        let is_whole = self.kind != DocumentKind::Config && changed.text.ends_with(b"\n");
        let mut draft = lock(&self.draft);
        draft.old_bytes = draft.old_bytes.filter(|_| is_whole).map(|_| changed.text.len());
    }

    pub(super) fn failed(&self, errno: Errno) {
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
