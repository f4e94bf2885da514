//! What every file has to have, and that none is forgotten.

use std::{collections::BTreeSet, fs};

use crate::{Source, assert_none, root, sources, tokens};

/// As `rustfmt.toml` has it, which leaves comments and texts in quotes alone.
const LINE_MAX_CHARS: usize = 100;
/// Words for what is left to be done, put together so that this file has none.
const REMINDERS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Complains of files that are part of no crate, so that nobody compiles or runs them.
fn forgotten_files(sources: &[Source]) -> Vec<String> {
    let declared: BTreeSet<String> = sources
        .iter()
        .flat_map(|source| {
            let parent = home_of(source);
            tokens::declared(&tokens::tokens(&source.text))
                .into_iter()
                .map(move |(name, _)| tokens::below(&parent, &name))
        })
        .collect();
    sources
        .iter()
        .filter(|source| !is_crate_root(&source.path))
        .filter(|source| !declared.contains(source.module()))
        .map(|source| format!("{}: no `mod` declares it", source.path))
        .collect()
}

/// Returns the module whose directory the declared modules of `source` are in.
fn home_of(source: &Source) -> String {
    let module = source.module();
    if !is_crate_root(&source.path) {
        return module.to_owned();
    }
    // `tests/e2e/main.rs` has its modules beside it, and so has `tests/e2e.rs`.
    match module.rsplit_once('/') {
        Some((dir, _)) => dir.to_owned(),
        None => String::new(),
    }
}

fn is_crate_root(path: &str) -> bool {
    let depth = path.matches('/').count();
    match path.split('/').next() {
        Some("src") => path == "src/lib.rs" || path == "src/main.rs",
        _ => depth == 1 || (depth >= 2 && path.ends_with("/main.rs")),
    }
}

/// Complains of files that do not begin with what they are for.
fn undocumented_files(sources: &[Source]) -> Vec<String> {
    sources
        .iter()
        .filter(|source| !source.text.starts_with("//! "))
        .map(|source| format!("{}: begin with `//!` and what it is for", source.path))
        .collect()
}

/// Complains of lines that are too long, or that put off work without an issue.
fn bad_lines(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        for (number, line) in source.text.lines().enumerate() {
            let place = format!("{}:{}", source.path, number + 1);
            if line.chars().count() > LINE_MAX_CHARS {
                complaints.push(format!("{place}: longer than {LINE_MAX_CHARS} characters"));
            }
            if REMINDERS.iter().any(|word| puts_off(line, word)) {
                complaints.push(format!("{place}: name the issue, as {}(#12)", REMINDERS[0]));
            }
        }
        for pair in tokens::tokens(&source.text).windows(2) {
            let is_todo = ["todo", "unimplemented"].contains(&pair[0].text.as_str());
            if is_todo && pair[1].text == "!" {
                complaints.push(format!("{}:{}: unfinished", source.path, pair[0].line));
            }
        }
    }
    complaints
}

/// Says whether `line` has `word` without the number of an issue right after it.
fn puts_off(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let issue = line[at + word.len()..].strip_prefix("(#");
        !issue.is_some_and(|number| number.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// Complains of decisions that the list of decisions does not have.
fn unlisted_decisions(list: Option<&str>, pages: &[String]) -> Vec<String> {
    pages
        .iter()
        .filter(|page| *page != "README.md")
        .filter(|page| !list.is_some_and(|list| list.contains(&format!("({page})"))))
        .map(|page| format!("docs/decisions/README.md: does not link to {page}"))
        .collect()
}

#[test]
fn no_file_is_forgotten() {
    assert_none(&forgotten_files(&sources()));
}

#[test]
fn every_file_says_what_it_is_for() {
    assert_none(&undocumented_files(&sources()));
}

#[test]
fn every_line_is_short_and_done() {
    assert_none(&bad_lines(&sources()));
}

#[test]
fn every_decision_is_listed() {
    let dir = root().join("docs/decisions");
    let Ok(entries) = fs::read_dir(&dir) else {
        return;
    };
    let pages: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let list = fs::read_to_string(dir.join("README.md")).ok();
    assert_none(&unlisted_decisions(list.as_deref(), &pages));
}

#[test]
fn a_forgotten_file_is_caught() {
    let tree = |forgotten: &str| {
        forgotten_files(&[
            Source::made_up("src/lib.rs", "pub mod a;"),
            Source::made_up("src/main.rs", ""),
            Source::made_up("src/a/mod.rs", "mod b; // mod c;"),
            Source::made_up("src/a/b.rs", ""),
            Source::made_up("tests/one.rs", "mod support;"),
            Source::made_up("tests/e2e/main.rs", "mod sleep;"),
            Source::made_up("tests/e2e/sleep.rs", ""),
            Source::made_up("tests/support/mod.rs", "mod host;"),
            Source::made_up("tests/support/host.rs", ""),
            Source::made_up(forgotten, ""),
        ])
    };
    assert!(tree("tests/two.rs").is_empty());
    for forgotten in [
        "src/c.rs",
        "src/a/c.rs",
        "src/a/c/mod.rs",
        "src/b.rs",
        "tests/e2e/wake.rs",
        "tests/other/mod.rs",
        "tests/support/guest.rs",
    ] {
        let want = format!("{forgotten}: no `mod` declares it");
        assert_eq!(tree(forgotten), [want]);
    }
}

#[test]
fn a_file_without_a_word_about_itself_is_caught() {
    for (text, count) in [("//! A.\n", 0), ("use a;\n//! A.", 1), ("/// A.", 1), ("", 1)] {
        let caught = undocumented_files(&[Source::made_up("src/a.rs", text)]);
        assert_eq!(caught.len(), count, "{text}");
    }
}

#[test]
fn a_long_line_and_a_put_off_task_are_caught() {
    let reminder = REMINDERS[0];
    for (text, count) in [
        ("x".repeat(100), 0),
        ("é".repeat(100), 0),
        ("x".repeat(101), 1),
        (format!("// {reminder}: later"), 1),
        (format!("// {reminder}(me): later"), 1),
        (format!("// {reminder}(#12): later"), 0),
        ("todo!()".to_owned(), 1),
        ("unimplemented! {}".to_owned(), 1),
        ("// todo!() is banned".to_owned(), 0),
    ] {
        let caught = bad_lines(&[Source::made_up("src/a.rs", &text)]);
        assert_eq!(caught.len(), count, "{text}");
    }
}

#[test]
fn an_unlisted_decision_is_caught() {
    let pages = ["README.md", "0001-fuse.md", "0002-sqlite.md"].map(str::to_owned);
    let list = "- [FUSE](0001-fuse.md)\n";
    assert_eq!(unlisted_decisions(Some(list), &pages).len(), 1);
    assert_eq!(unlisted_decisions(None, &pages).len(), 2);
}
