//! `dozed.error`: why the reader's own last mkdir or rmdir failed.

use std::collections::{HashMap, VecDeque};

use super::{Caller, Tree};
use crate::sync::{Mutex, lock};

/// Of how many users the last failure is kept; of more, the longest ago goes.
const USERS_MAX: usize = 256;
/// How long a reason may be, in bytes.
const REASON_MAX_BYTES: usize = 512;

/// Why the last mkdir or rmdir of each user failed, of those whose did.
#[derive(Debug, Default)]
pub(super) struct RootErrors {
    /// A leaf lock.
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    reasons: HashMap<u32, Box<str>>,
    /// The users in it, the longest ago first.
    order: VecDeque<u32>,
}

impl RootErrors {
    /// Notes how the last mkdir or rmdir of a user ended.
    pub(super) fn note(&self, uid: u32, reason: Option<&str>) {
        let mut table = lock(&self.table);
        if table.reasons.remove(&uid).is_some() {
            table.order.retain(|other| *other != uid);
        }
        let Some(reason) = reason else { return };
        if table.order.len() >= USERS_MAX
            && let Some(oldest) = table.order.pop_front()
        {
            table.reasons.remove(&oldest);
        }
        table.order.push_back(uid);
        table.reasons.insert(uid, one_line(reason).into());
    }
}

/// Returns a text as one line that no terminal takes for a command, and not too long a one.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let end = (0..=REASON_MAX_BYTES).rev().find(|end| line.is_char_boundary(*end));
    line.truncate(end.unwrap_or(0).min(line.len()));
    line
}

impl Tree {
    pub(super) fn root_error(&self, caller: Caller) -> String {
        let table = lock(&self.root_errors.table);
        format!("{}\n", table.reasons.get(&caller.uid).map_or("ok", |reason| reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_the_last_reason_which_a_success_takes_away() {
        let errors = RootErrors::default();
        let of = |uid| lock(&errors.table).reasons.get(&uid).map(ToString::to_string);
        errors.note(1, Some("a\nb\u{1b}"));
        errors.note(2, Some(&"é".repeat(400)));
        assert_eq!(of(1).as_deref(), Some("a?b?"));
        assert_eq!(of(2).map(|reason| reason.len()), Some(512));
        errors.note(1, None);
        assert_eq!(of(1), None);
        for uid in (3..).take(USERS_MAX) {
            errors.note(uid, Some("x"));
        }
        assert_eq!((of(2), lock(&errors.table).order.len()), (None, USERS_MAX));
    }
}
