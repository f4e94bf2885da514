//! An event as a line of JSON. `docs/events.md` is its description, and a test holds the
//! page against this.

use std::time::Duration;

use serde::Serialize;

use crate::sandbox::{Cause, Owner, RowId, SandboxId, State};

/// The version of the lines. It changes when a key goes or comes to mean something else,
/// and not when one is added.
pub const VERSION: u32 = 1;
/// How much of an error a line has: enough for every chain of ours. It bounds the lines.
const ERROR_MAX_BYTES: usize = 512;

/// What happened to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// It was made.
    Created,
    /// It came from one state into another.
    Stepped {
        /// Where it was.
        from: State,
        /// Where it is.
        to: State,
        /// How long it had been where it was.
        lasted: Duration,
        /// How long the whole operation took, where this is the end of one.
        took: Option<Duration>,
        /// The bytes on disk of the snapshot that it sleeps on.
        snapshot_bytes: Option<u64>,
        /// Why it ended by itself, if it did.
        error: Option<Box<str>>,
    },
    /// An operation failed; it is in the state that it was in before.
    Failed {
        /// What `error` reads as.
        error: Box<str>,
    },
    /// It was deleted.
    Deleted,
}

/// What happened to which sandbox, when and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, by the wall clock.
    pub time: jiff::Timestamp,
    /// The sandbox's row, which tells it from others of the same name before and after.
    pub row: RowId,
    /// Its name.
    pub id: SandboxId,
    /// Whose it is.
    pub owner: Owner,
    /// The count of completed sleeps and wakes.
    pub generation: u64,
    /// What happened.
    pub what: What,
    /// Who or what did it.
    pub cause: Cause,
}

/// The keys of a line, in their order.
#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    time: String,
    event: &'static str,
    id: &'a str,
    row: u64,
    owner: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'static str>,
    cause: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    generation: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    lasted_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    took_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

/// The keys of the line that stands for those that a reader was too slow for.
#[derive(Serialize)]
struct Gap {
    v: u32,
    time: String,
    event: &'static str,
    missed: u64,
}

impl Event {
    /// Returns the event as a line, newline included.
    #[must_use]
    pub fn line(&self) -> String {
        let actor = self.cause.actor();
        let mut line = Line {
            v: VERSION,
            time: shown(self.time),
            event: self.what.word(),
            id: self.id.as_str(),
            row: self.row.0,
            owner: format!("{}:{}", self.owner.uid, self.owner.gid),
            from: None,
            to: None,
            cause: self.cause.to_string(),
            pid: actor.and_then(|actor| actor.pid),
            command: actor.and_then(|actor| actor.command.as_deref()),
            uid: actor.map(|actor| actor.uid),
            generation: self.generation,
            lasted_ms: None,
            took_ms: None,
            snapshot_bytes: None,
            error: None,
        };
        match &self.what {
            What::Created | What::Deleted => {}
            What::Failed { error } => line.error = Some(cut(error)),
            What::Stepped { from, to, lasted, took, snapshot_bytes, error } => {
                (line.from, line.to) = (Some(from.word()), Some(to.word()));
                line.lasted_ms = Some(millis(*lasted));
                line.took_ms = took.map(millis);
                line.snapshot_bytes = *snapshot_bytes;
                line.error = error.as_deref().map(cut);
            }
        }
        text(&line)
    }
}

impl What {
    /// Returns what `event` says in the line.
    fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Stepped { .. } => "state",
            Self::Failed { .. } => "failed",
            Self::Deleted => "deleted",
        }
    }
}

/// Returns the line that says how many events a reader missed.
pub(super) fn gap(time: jiff::Timestamp, missed: u64) -> String {
    text(&Gap { v: VERSION, time: shown(time), event: "missed", missed })
}

fn text(line: &impl Serialize) -> String {
    let mut text = serde_json::to_string(line).expect("a line is of strings and numbers");
    text.push('\n');
    text
}

fn shown(time: jiff::Timestamp) -> String {
    format!("{time:.3}")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn cut(error: &str) -> &str {
    &error[..error.floor_char_boundary(ERROR_MAX_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Actor;

    fn event(what: What, cause: Cause) -> Event {
        Event {
            time: jiff::Timestamp::from_millisecond(1_700_000_000_123).unwrap(),
            row: RowId(3),
            id: "web-1".parse().unwrap(),
            owner: Owner { uid: 1000, gid: 100 },
            generation: 7,
            what,
            cause,
        }
    }

    #[test]
    fn a_line_has_what_is_known_and_nothing_else() {
        let took = What::Stepped {
            from: State::Snapshotting,
            to: State::Snapshotted,
            lasted: Duration::from_millis(80),
            took: Some(Duration::from_millis(95)),
            snapshot_bytes: Some(4096),
            error: None,
        };
        assert_eq!(
            event(took, Cause::Idle).line(),
            "{\"v\":1,\"time\":\"2023-11-14T22:13:20.123Z\",\"event\":\"state\",\
             \"id\":\"web-1\",\"row\":3,\"owner\":\"1000:100\",\"from\":\"snapshotting\",\
             \"to\":\"snapshotted\",\"cause\":\"idle\",\"generation\":7,\"lasted_ms\":80,\
             \"took_ms\":95,\"snapshot_bytes\":4096}\n"
        );
        let by = Actor { pid: Some(12), command: Some("a \"b\"\n".into()), uid: 5 };
        assert_eq!(
            event(What::Created, Cause::Mkdir(by)).line(),
            "{\"v\":1,\"time\":\"2023-11-14T22:13:20.123Z\",\"event\":\"created\",\
             \"id\":\"web-1\",\"row\":3,\"owner\":\"1000:100\",\
             \"cause\":\"mkdir by pid 12 (a \\\"b\\\"\\n) uid 5\",\"pid\":12,\
             \"command\":\"a \\\"b\\\"\\n\",\"uid\":5,\"generation\":7}\n"
        );
    }

    #[test]
    fn a_long_error_is_cut_between_two_characters() {
        let error: Box<str> = "ä".repeat(ERROR_MAX_BYTES).into();
        let line = event(What::Failed { error }, Cause::Reconcile).line();
        assert!(line.contains(&"ä".repeat(ERROR_MAX_BYTES / 2)));
        assert!(line.len() < ERROR_MAX_BYTES + 256, "{}", line.len());
    }

    #[test]
    fn the_line_of_a_gap_is_shorter_than_any_that_it_stands_for() {
        let event = Event { id: "a".parse().unwrap(), ..event(What::Deleted, Cause::Idle) };
        let shortest = Event { owner: Owner { uid: 0, gid: 0 }, generation: 0, ..event };
        let gap = gap(shortest.time, u64::MAX);
        assert!(gap.len() < shortest.line().len(), "{gap}{}", shortest.line());
    }
}
