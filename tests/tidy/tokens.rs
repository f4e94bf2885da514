//! As much of Rust's grammar as the rules need: words, paths, and what is test code.

use std::collections::BTreeSet;

use crate::Source;

/// A word, a `::`, or a single other character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) line: usize,
}

/// A path with its groups resolved: `a::{b, c::d}` is `a::b` and `a::c::d`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CodePath {
    pub(crate) parts: Vec<String>,
    pub(crate) line: usize,
}

impl Token {
    fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

impl CodePath {
    /// Says whether the path begins with `prefix`, which is written with `::`.
    pub(crate) fn is_in(&self, prefix: &str) -> bool {
        let mut parts = self.parts.iter();
        prefix.split("::").all(|part| parts.next().is_some_and(|own| own == part))
    }
}

/// Returns the tokens of a source, without comments and without what is in quotes.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut line = 1;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = skipped(rest).unwrap_or_else(|| {
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let length = match word {
                0 if rest.starts_with("::") => 2,
                0 => first.len_utf8(),
                word => word,
            };
            found.push(Token { text: rest[..length].to_owned(), line });
            length
        });
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

/// Returns the length of the blank, comment or literal that `rest` starts with, if any.
fn skipped(rest: &str) -> Option<usize> {
    let through = |end: &str, from: usize| {
        rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len())
    };
    if rest.starts_with(char::is_whitespace) {
        return Some(rest.len() - rest.trim_start().len());
    }
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(through("*/", 2));
    }
    let unprefixed = rest.trim_start_matches(['b', 'c']);
    if let Some(raw) = unprefixed.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            return Some(through(&end, rest.len() - raw.len() + hashes + 1));
        }
    }
    let start = rest.len() - unprefixed.len();
    if start <= 1 && unprefixed.starts_with('"') {
        return Some(quoted(rest, start, '"'));
    }
    if start <= 1 && unprefixed.starts_with('\'') {
        let mut inside = unprefixed.chars().skip(1);
        let is_char = inside.next() == Some('\\') || inside.next() == Some('\'');
        // Otherwise it is a lifetime, whose name does no harm as a word.
        return Some(if is_char { quoted(rest, start, '\'') } else { start + 1 });
    }
    None
}

/// Returns where the literal ends whose opening quote is at `start`.
fn quoted(rest: &str, start: usize, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip_while(|(at, _)| *at <= start) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Returns all paths, those in `use` declarations and those in code.
pub(crate) fn paths(tokens: &[Token]) -> Vec<CodePath> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].is_word() {
            at = path(tokens, at, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads the path that starts at `at`, below `above`; returns where it ends.
fn path(tokens: &[Token], mut at: usize, above: &[String], found: &mut Vec<CodePath>) -> usize {
    let line = tokens[at].line;
    let mut parts = above.to_vec();
    loop {
        match tokens.get(at) {
            Some(token) if token.is_word() => parts.push(token.text.clone()),
            Some(token) if token.text == "{" => return group(tokens, at + 1, &parts, found),
            _ => {}
        }
        if tokens.get(at + 1).is_none_or(|next| next.text != "::") {
            found.push(CodePath { parts, line });
            return at + 1;
        }
        at += 2;
        if tokens.get(at).is_none_or(|next| !next.is_word() && next.text != "{") {
            // `a::*` has its star as a part, and `a::<T>` ends before its types.
            if tokens.get(at).is_some_and(|next| next.text == "*") {
                parts.push("*".to_owned());
            }
            found.push(CodePath { parts, line });
            return at;
        }
    }
}

/// Reads the group after its brace; returns where it ends.
fn group(tokens: &[Token], mut at: usize, above: &[String], found: &mut Vec<CodePath>) -> usize {
    while let Some(token) = tokens.get(at) {
        if token.text == "}" {
            return at + 1;
        }
        at = if token.is_word() { path(tokens, at, above, found) } else { at + 1 };
    }
    at
}

/// Returns the modules that a source declares with `mod name;`, and whether each is for
/// tests only.
pub(crate) fn declared(tokens: &[Token]) -> Vec<(String, bool)> {
    let mut found = Vec::new();
    let mut for_tests = false;
    let mut at = 0;
    while at < tokens.len() {
        if let Some(end) = attribute(tokens, at) {
            for_tests |= is_test_only(&tokens[at..end]);
            at = end;
            continue;
        }
        let text = |offset: usize| tokens.get(at + offset).map_or("", |token| &token.text);
        if text(0) == "mod" && text(2) == ";" {
            found.push((text(1).to_owned(), for_tests));
        }
        // Between the attributes and `mod` there is at most a `pub` or `pub(crate)`.
        if !["pub", "(", "crate", "super", ")"].contains(&text(0)) {
            for_tests = false;
        }
        at += 1;
    }
    found
}

/// Returns the tokens without the items that are for tests only.
pub(crate) fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match attribute(tokens, at) {
            Some(end) if is_test_only(&tokens[at..end]) => at = item_end(tokens, end),
            Some(end) => {
                kept.extend_from_slice(&tokens[at..end]);
                at = end;
            }
            None => {
                kept.push(tokens[at].clone());
                at += 1;
            }
        }
    }
    kept
}

/// Returns where the attribute ends that starts at `at`, if one does.
fn attribute(tokens: &[Token], at: usize) -> Option<usize> {
    let is = |at: usize, text: &str| tokens.get(at).is_some_and(|token| token.text == text);
    if !is(at, "#") || !is(at + 1, "[") {
        return None;
    }
    let length = tokens[at..].iter().position(|token| token.text == "]");
    Some(length.map_or(tokens.len(), |length| at + length + 1))
}

fn is_test_only(attribute: &[Token]) -> bool {
    let has = |text: &str| attribute.iter().any(|token| token.text == text);
    has("cfg") && has("test") && !has("not") && !has("any")
}

/// Returns where the item ends that starts at `at`: after its `;` or its braces.
fn item_end(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (offset, token) in tokens[at..].iter().enumerate() {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            ";" if depth == 0 => return at + offset + 1,
            _ => {}
        }
        if depth == 0 && token.text == "}" {
            return at + offset + 1;
        }
    }
    tokens.len()
}

/// Returns the modules that are for tests only.
pub(crate) fn test_modules(sources: &[Source]) -> BTreeSet<String> {
    let declarations = sources.iter().flat_map(|source| {
        declared(&tokens(&source.text))
            .into_iter()
            .filter(|(_, for_tests)| *for_tests)
            .map(|(name, _)| below(source.module(), &name))
    });
    declarations.collect()
}

/// Returns the path of module `name` in module `parent`.
pub(crate) fn below(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") }
}

fn words(text: &str) -> Vec<String> {
    tokens(text).into_iter().map(|token| token.text).collect()
}

#[test]
fn comments_and_literals_are_no_tokens() {
    for text in [
        "a // b\nc",
        "a /* b\n */ c",
        "a \"b \\\" b\" c",
        "a r#\"b\" b\"# c",
        "a b\"b\" c",
        "a 'b' c",
        "a '\\'' c",
        "a b'\\\\' c",
    ] {
        assert_eq!(words(text), ["a", "c"], "{text}");
    }
    assert_eq!(words("&'a b"), ["&", "a", "b"]);
    assert_eq!(words("brand::c"), ["brand", "::", "c"]);
    assert_eq!(tokens("a\n\n\"\n\"b").last().unwrap().line, 4);
}

#[test]
fn groups_are_resolved() {
    let text = "use crate::{a::{self, b as c}, d::*, e}; f(g::h::<i>())";
    let found: Vec<String> =
        paths(&tokens(text)).iter().map(|path| path.parts.join("::")).collect();
    for path in ["crate::a::self", "crate::a::b", "crate::d::*", "crate::e", "g::h", "i"] {
        assert!(found.iter().any(|found| found == path), "{path}: {found:?}");
    }
}

#[test]
fn test_code_is_told_from_the_rest() {
    let text = "mod a; #[cfg(test)] #[cfg(feature = \"x\")] pub mod b; pub(crate) mod c;\n\
                #[cfg(test)] mod tests { fn x() { y } } #[cfg(not(test))] mod d;";
    let all = tokens(text);
    let expected = [("a", false), ("b", true), ("c", false), ("d", false)];
    assert_eq!(declared(&all), expected.map(|(name, for_tests)| (name.to_owned(), for_tests)));
    let kept = without_tests(&all);
    for (word, is_kept) in [("a", true), ("b", false), ("x", false), ("y", false), ("d", true)] {
        assert_eq!(kept.iter().any(|token| token.text == word), is_kept, "{word}");
    }
}
