//! Why the last command on a sandbox was refused before it became an operation.

use std::collections::HashMap;

use super::{Entry, chain};
use crate::{
    sandbox::RowId,
    sync::{Mutex, lock},
};

/// Why the last command was refused, where it was. Kept only while the daemon runs, and
/// bounded by the count of sandboxes.
#[derive(Debug, Default)]
pub struct Notes {
    /// A leaf lock.
    by_row: Mutex<HashMap<RowId, Box<str>>>,
}

impl Notes {
    /// Notes why a command was refused before it became an operation.
    pub fn note(&self, entry: &Entry, error: &(dyn std::error::Error + 'static)) {
        self.set(entry.row(), chain(error));
    }

    /// Returns what `error` reads as: why the last command or operation failed.
    #[must_use]
    pub fn last_error(&self, entry: &Entry) -> Option<Box<str>> {
        let note = lock(&self.by_row).get(&entry.row()).cloned();
        note.or_else(|| entry.record().error.clone())
    }

    pub(super) fn set(&self, row: RowId, text: String) {
        lock(&self.by_row).insert(row, text.into_boxed_str());
    }

    pub(super) fn forget(&self, row: RowId) {
        lock(&self.by_row).remove(&row);
    }
}
