//! The style rules that a text can be checked for, run by plain `cargo test`.
//!
//! A rule is a function from the texts of the tree to complaints. Each has a test that
//! holds it against this tree, and one that shows that it catches what it is for.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod circles;
mod files;
mod imports;
mod pages;
mod tokens;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A text of the tree.
#[derive(Debug)]
struct Source {
    /// Relative to the root of the tree, such as `src/lib.rs`.
    path: String,
    text: String,
}

impl Source {
    /// Makes up a text, to try a rule on.
    fn made_up(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// Returns the path of the module in the crate, such as `lock/tests`; the root is "".
    fn module(&self) -> &str {
        let path = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let path = path.strip_suffix(".rs").unwrap_or(path);
        let path = path.strip_suffix("/mod").unwrap_or(path);
        if path == "lib" || path == "main" { "" } else { path }
    }
}

/// Returns the Rust sources of this tree, in the order of their paths.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    let root = root();
    for dir in ["src", "tests"] {
        collect(&root, &root.join(dir), &mut sources);
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    assert!(sources.iter().any(|source| source.path == "src/lib.rs"));
    sources
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn collect(root: &Path, dir: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(Source {
                path: path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
                text: fs::read_to_string(&path).unwrap(),
            });
        }
    }
}

/// Fails with all complaints, if there are any.
fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
