//! What is wrong with networks, so that it is logged once.

use std::collections::{HashMap, HashSet};

use super::chain;
use crate::{
    net,
    sandbox::RowId,
    sync::{Mutex, lock},
};

/// What is wrong with networks and was told. Bounded by the count of those that run.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    /// With the host. A leaf lock.
    host: Mutex<Option<String>>,
    /// With one's own. A leaf lock.
    own: Mutex<HashMap<RowId, String>>,
}

impl Troubles {
    /// Returns a sentence for each that a sandbox which runs has with its network.
    pub(super) fn of(&self, row: RowId) -> impl Iterator<Item = String> {
        let host = lock(&self.host).clone();
        let own = lock(&self.own).get(&row).cloned();
        host.into_iter().chain(own)
    }

    /// Keeps those of the sandboxes that run, and returns which have any.
    pub(super) fn keep(&self, running: &HashSet<RowId>) -> HashSet<RowId> {
        let mut own = lock(&self.own);
        own.retain(|row, _| running.contains(row));
        own.keys().copied().collect()
    }

    /// Records one of a sandbox. Says whether it is another than before.
    pub(super) fn record(&self, row: RowId, text: &str) -> bool {
        lock(&self.own).insert(row, text.to_owned()).as_deref() != Some(text)
    }

    /// Logs what is wrong with the host, once.
    pub(super) fn log_host(&self, error: Option<&net::Error>) {
        let text = error.map(|error| format!("the host's network: {}", chain(error)));
        let before = std::mem::replace(&mut *lock(&self.host), text.clone());
        match text {
            Some(text) if before.as_ref() != Some(&text) => {
                tracing::error!(error = text, "checking networks");
            }
            None if before.is_some() => tracing::info!(
                "the host's part of networks is complete \
                                                        again"
            ),
            Some(_) | None => {}
        }
    }

    /// Forgets those of a sandbox. Returns what was told.
    pub(super) fn forget(&self, row: RowId) -> Option<String> {
        lock(&self.own).remove(&row)
    }
}
