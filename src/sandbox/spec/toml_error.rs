//! The errors of the TOML reader, as sentences that name the key and what it accepts.

use super::{SpecError, line_of};

impl SpecError {
    /// Translates an error of the TOML reader, which names neither the key of a value nor, in
    /// plain words, what is accepted.
    #[must_use]
    pub fn from_toml(error: &toml::de::Error, text: &str) -> Self {
        let start = error.span().map(|span| span.start);
        let said = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        let message = sentence(&said, start.and_then(|start| key_at(text, start)));
        Self { line: start.map(|start| line_of(text, start)), message }
    }
}

fn sentence(said: &str, key: Option<&str>) -> String {
    // It is about a key, and names it.
    if let Some(rest) = said.strip_prefix("unknown field ") {
        return format!("unknown key {rest}");
    }
    let message = if let Some(rest) = said.strip_prefix("unknown variant ") {
        format!("unknown value {rest}")
    } else if said == "wanted string or table" {
        "a value without quotes is not accepted; write a word in quotes".to_owned()
    } else if let Some((found, expected)) =
        said.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "))
    {
        format!("{} is not accepted; write {}", found_kind(found), accepted(expected))
    } else {
        said.to_owned()
    };
    match key {
        Some(key) if !message.contains(&format!("`{key}`")) => format!("`{key}`: {message}"),
        _ => message,
    }
}

/// Renames what serde calls by the names of its own data model.
fn found_kind(found: &str) -> &str {
    match found {
        "map" => "a table",
        "sequence" => "a list",
        other => other,
    }
}

fn accepted(expected: &str) -> &str {
    match expected {
        "path string" => "an absolute path in quotes",
        "a string" => "a text in quotes",
        "a sequence" => "a list, such as [\"…\"]",
        "a boolean" => "true or false",
        "i64" => "a whole number",
        _ => "a table",
    }
}

/// Returns the key whose value is at `offset`, or the name of the table that begins there.
fn key_at(text: &str, offset: usize) -> Option<&str> {
    let line_end = text.get(offset..)?.find('\n').map_or(text.len(), |length| offset + length);
    // A list goes on over several lines, and its key is on the first.
    text.get(..line_end)?.lines().rev().find_map(|line| {
        let line = line.trim();
        let is_table = line.starts_with('[') && line.ends_with(']') && !line.contains(['"', ',']);
        let key =
            if is_table { line.trim_matches(['[', ']']) } else { line.split_once('=')?.0.trim() };
        let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        (!key.is_empty() && key.chars().all(is_bare)).then_some(key)
    })
}
