//! What is written to control files: bytes in, a command or a refusal out. Pure.

use crate::sandbox::{Period, PeriodError, network::PolicyError};

/// The longest command: as much as sysfs takes.
pub(super) const COMMAND_MAX_BYTES: usize = 4096;
/// The longest document: `config` and lists.
pub(super) const DOCUMENT_MAX_BYTES: usize = 64 * 1024;

/// A verb written to `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Make it `running`.
    Wake,
    /// Make it `snapshotted`.
    Sleep {
        /// Only if this is still the count of its activity.
        count: Option<u64>,
    },
}

/// Why some bytes are no command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCommand {
    /// Longer than any command or document.
    #[error("a write, and a document as a whole, has at most {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
    /// Not text.
    #[error("the text is not UTF-8")]
    NotText,
    /// No word that we know.
    #[error("`{word}` is not a verb; write `sleep` or `wake`")]
    UnknownVerb {
        /// The start of what was written.
        word: String,
    },
    /// `sleep` with something that is no count.
    #[error("`{word}` is not a count; write `sleep`, or `sleep N` with N from `activity`")]
    BadCount {
        /// What followed the verb.
        word: String,
    },
    /// More than one command in one write.
    #[error("one write is one command: write `sleep` or `wake`, one at a time")]
    TwoCommands,
    /// A document that was written from somewhere in its middle.
    #[error(
        "a document is written from its beginning: this write is at byte {at}, after {len} bytes \
         so far; open it again, or open it to append"
    )]
    Hole {
        /// Where it was written.
        at: usize,
        /// How much of it there was.
        len: usize,
    },
    /// The user has as much of documents unfinished as anybody may.
    #[error(
        "user {uid} has {limit} bytes of documents open that are not closed yet, which is the \
         limit; close some"
    )]
    TooManyDrafts {
        /// Whose they are.
        uid: u32,
        /// The limit, in bytes.
        limit: usize,
    },
    /// Whoever wrote a document did not come to its end.
    #[error(
        "the program that wrote `{file}` was killed by signal {signal} before it closed the file, \
         so nothing was changed; write it again"
    )]
    Killed {
        /// The file, below the sandbox's directory.
        file: String,
        /// The signal.
        signal: u32,
    },
    /// Whoever wrote a document could not be looked at, so that it may have been killed.
    #[error(
        "the program that wrote `{file}` could not be checked ({why}), so nothing was changed; \
         write it again"
    )]
    Unseen {
        /// The file, below the sandbox's directory.
        file: String,
        /// What the system said.
        why: String,
    },
    /// Neither 0 nor 1.
    #[error("`{word}` is neither `0` nor `1`")]
    NotASwitch {
        /// What was written.
        word: String,
    },
    /// No period.
    #[error(transparent)]
    Period(#[from] PeriodError),
    /// No list of nameservers or networks.
    #[error(transparent)]
    List(#[from] PolicyError),
}

/// Reads a verb. Blanks alone are no command and do nothing.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn verb(bytes: &[u8]) -> Result<Option<Verb>, BadCommand> {
    let text = trimmed(bytes, COMMAND_MAX_BYTES)?;
    if text.contains('\n') {
        return Err(BadCommand::TwoCommands);
    }
    let mut words = text.split_ascii_whitespace();
    let verb = match (words.next(), words.next()) {
        (None, _) => return Ok(None),
        (Some("wake"), None) => Verb::Wake,
        (Some("sleep"), None) => Verb::Sleep { count: None },
        (Some("wake" | "sleep"), Some("wake" | "sleep")) => return Err(BadCommand::TwoCommands),
        (Some("sleep"), Some(count)) => {
            // `parse` would take a sign, which no count has.
            let digits = count.bytes().all(|byte| byte.is_ascii_digit());
            let count = count.parse().ok().filter(|_| digits);
            Verb::Sleep {
                count: Some(count.ok_or_else(|| BadCommand::BadCount { word: start_of(text) })?),
            }
        }
        (Some(_), _) => {
            return Err(BadCommand::UnknownVerb { word: start_of(text) });
        }
    };
    match words.next() {
        None => Ok(Some(verb)),
        Some(_) => Err(BadCommand::TwoCommands),
    }
}

/// Reads a period, for `idle_after` and `delete_after`.
///
/// # Errors
/// A sentence that says what is accepted.
pub(super) fn period(bytes: &[u8]) -> Result<Option<Period>, BadCommand> {
    let text = trimmed(bytes, COMMAND_MAX_BYTES)?;
    if text.is_empty() { Ok(None) } else { Ok(Some(text.parse()?)) }
}

/// Reads a switch, for `pinned`.
///
/// # Errors
/// A sentence that says what is accepted.
pub(super) fn switch(bytes: &[u8]) -> Result<Option<bool>, BadCommand> {
    match trimmed(bytes, COMMAND_MAX_BYTES)? {
        "" => Ok(None),
        "0" => Ok(Some(false)),
        "1" => Ok(Some(true)),
        text => Err(BadCommand::NotASwitch { word: start_of(text) }),
    }
}

/// Reads a document, for `config`. Blanks alone are no document and do nothing.
///
/// # Errors
/// A sentence that says what is accepted.
pub(super) fn document(bytes: &[u8]) -> Result<Option<&str>, BadCommand> {
    let text = text_of(bytes, DOCUMENT_MAX_BYTES)?;
    if text.trim().is_empty() { Ok(None) } else { Ok(Some(text)) }
}

/// Reads a list with one entry a line. Blanks alone are one without entries.
///
/// # Errors
/// A sentence that says what is accepted.
pub(super) fn list<T>(
    bytes: &[u8],
    read: impl FnOnce(std::str::Lines<'_>) -> Result<T, PolicyError>,
) -> Result<T, BadCommand> {
    Ok(read(text_of(bytes, DOCUMENT_MAX_BYTES)?.lines())?)
}

fn trimmed(bytes: &[u8], limit: usize) -> Result<&str, BadCommand> {
    Ok(text_of(bytes, limit)?.trim_matches([' ', '\t', '\r', '\n']))
}

fn text_of(bytes: &[u8], limit: usize) -> Result<&str, BadCommand> {
    if bytes.len() > limit {
        return Err(BadCommand::TooLong { limit });
    }
    std::str::from_utf8(bytes).map_err(|_| BadCommand::NotText)
}

/// Returns the start of `text`, fit for a message of one line.
fn start_of(text: &str) -> String {
    text.chars().take(32).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_verb_may_have_blanks_around_it_and_a_newline() {
        for text in ["wake", "wake\n", "  wake  \n", "\twake\r\n", "\n\nwake\n\n"] {
            assert_eq!(verb(text.as_bytes()), Ok(Some(Verb::Wake)), "{text:?}");
        }
        assert_eq!(verb(b"sleep 17\n"), Ok(Some(Verb::Sleep { count: Some(17) })));
        assert_eq!(verb(b"sleep\n"), Ok(Some(Verb::Sleep { count: None })));
    }

    #[test]
    fn blanks_alone_do_nothing() {
        for text in ["", "\n", "  ", " \n \n"] {
            assert_eq!(verb(text.as_bytes()), Ok(None));
            assert_eq!(period(text.as_bytes()), Ok(None));
            assert_eq!(switch(text.as_bytes()), Ok(None));
            assert_eq!(document(text.as_bytes()), Ok(None));
        }
    }

    #[test]
    fn two_commands_in_one_write_are_refused() {
        for text in ["sleep\nwake\n", "sleep wake", "wake wake", "sleep 1 2", "wake\n\nwake"] {
            assert_eq!(verb(text.as_bytes()), Err(BadCommand::TwoCommands), "{text:?}");
        }
    }

    #[test]
    fn other_words_are_refused_with_the_accepted_ones() {
        for text in ["Wake", "wakeup", "s\0leep", "running", "wake up", "wake 1"] {
            let says = verb(text.as_bytes()).expect_err(text).to_string();
            assert!(says.contains("`sleep` or `wake`"), "{says}");
            assert!(!says.contains('\0'));
        }
        for text in ["sleep now", "sleep -1", "sleep +1", "sleep 99999999999999999999"] {
            let says = verb(text.as_bytes()).expect_err(text).to_string();
            assert!(says.contains("`sleep N` with N from `activity`"), "{says}");
        }
        assert_eq!(verb(b"\xff\xfe"), Err(BadCommand::NotText));
        assert!(switch(b"yes").is_err() && switch(b"01").is_err());
    }

    #[test]
    fn length_has_a_limit() {
        let mut long = vec![b' '; COMMAND_MAX_BYTES - 4];
        long.extend(b"wake");
        assert_eq!(verb(&long), Ok(Some(Verb::Wake)));
        long.push(b'\n');
        assert_eq!(verb(&long), Err(BadCommand::TooLong { limit: COMMAND_MAX_BYTES }));
        assert!(document(&vec![b'#'; DOCUMENT_MAX_BYTES]).is_ok());
        assert!(document(&vec![b'#'; DOCUMENT_MAX_BYTES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_whatever_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let refused = [
                verb(&bytes).err(),
                period(&bytes).err(),
                switch(&bytes).err(),
                document(&bytes).err(),
            ];
            for error in refused.into_iter().flatten() {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
