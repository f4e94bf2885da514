//! Text that somebody else may have made: an owner, a VMM, a guest.
//!
//! It is shown on terminals and kept in the index, so it has one line, no character that does
//! more than be seen, and an end.

use std::fmt::Write as _;

/// How long a line is at the most: long enough for an error with its causes, and far from
/// filling a terminal or the index.
const LINE_MAX_BYTES: usize = 512;
/// How much of the end of a longer one is kept: there is what caused it all.
const END_MAX_BYTES: usize = 192;
/// What stands for the middle of a longer one.
const CUT: &str = " … ";

/// Says whether a character is seen as itself: neither a control character nor one that
/// changes the direction, nor one without a width.
#[must_use]
pub fn is_plain(c: char) -> bool {
    // What is a printable character the standard library knows; it escapes these too.
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().len() == 1
}

/// Returns `text` as one line of at most 512 bytes, with escapes such as `\u{1b}` for what
/// is not plain.
#[must_use]
pub fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            if is_plain(c) {
                line.push(c);
            } else {
                write!(line, "{}", c.escape_unicode()).expect("writing to a string does not fail");
            }
        }
    }
    shorten(line)
}

/// Returns the whole chain of an error as one line, the outermost first. It is bounded, and
/// safe to be shown: VMMs, owners and file systems have a word in it.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    one_line(&line)
}

/// Cuts the middle of a line that is too long.
fn shorten(line: String) -> String {
    if line.len() <= LINE_MAX_BYTES {
        return line;
    }
    let start = line.floor_char_boundary(LINE_MAX_BYTES - END_MAX_BYTES - CUT.len());
    let end = line.ceil_char_boundary(line.len() - END_MAX_BYTES);
    [&line[..start], CUT, &line[end..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_more_than_be_seen_is_escaped() {
        for (text, line) in [
            ("a  b\n c\t", "a b c"),
            ("it's \"x\\y\" ä 漢", "it's \"x\\y\" ä 漢"),
            ("\x1b[31mred", "\\u{1b}[31mred"),
            ("abc\u{202e}fed\u{2066}", "abc\\u{202e}fed\\u{2066}"),
            ("\u{9b}0m\0\u{200b}\u{feff}", "\\u{9b}0m\\u{0}\\u{200b}\\u{feff}"),
        ] {
            assert_eq!(one_line(text), line);
        }
    }

    #[test]
    fn a_long_line_keeps_its_start_and_its_end() {
        for unit in ["x", "ä", "\x1b", "a "] {
            let text = format!("waking web-1: {}: no space left", unit.repeat(240_000));
            let line = one_line(&text);
            assert!(line.len() <= LINE_MAX_BYTES && line.len() > 500, "{}", line.len());
            assert!(line.starts_with("waking web-1: ") && line.ends_with(": no space left"));
        }
        let fits = "x".repeat(LINE_MAX_BYTES);
        assert_eq!(one_line(&fits), fits);
    }
}
