//! Pages that name functions or show pictures say what the sources say.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::{assert_none, root};

/// Complains of functions that a page names and that are not where it says. After a path
/// such as `src/fuse/adapter.rs` in backquotes, `name()` in backquotes is a function there.
fn absent_functions(page: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut file: Option<(&str, String)> = None;
    for quoted in page.split('`').skip(1).step_by(2) {
        if quoted.starts_with("src/") && quoted.ends_with(".rs") {
            file = read(quoted).map(|text| (quoted, text));
            if file.is_none() {
                complaints.push(format!("there is no {quoted}"));
            }
        } else if let Some(name) = quoted.strip_suffix("()") {
            let is_there = |text: &str| {
                ["(", "<"].iter().any(|after| text.contains(&format!("fn {name}{after}")))
            };
            match &file {
                Some((_, text)) if is_there(text) => {}
                Some((path, _)) => complaints.push(format!("{path} has no function {name}")),
                None => complaints.push(format!("{name}() is in no file")),
            }
        }
    }
    complaints
}

/// Runs `scripts/pictures --check` in a tree.
#[allow(clippy::disallowed_methods, reason = "the test waits for the child before it goes on")]
fn check_pictures(tree: &Path) -> Output {
    let script = tree.join("scripts/pictures");
    Command::new("python3").arg(script).arg("--check").output().unwrap()
}

#[test]
fn the_architecture_page_names_functions_that_exist() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let complaints = absent_functions(&page, |path| fs::read_to_string(root().join(path)).ok());
    assert_none(&complaints);
    assert!(page.matches("()`").count() > 20, "the walks name their functions");
}

#[test]
fn a_function_that_is_gone_is_caught() {
    let read = |path: &str| (path == "src/a.rs").then(|| "fn here(\nfn generic<T>(".to_owned());
    assert_none(&absent_functions("`src/a.rs`: `here()`, `generic()`, `State`", read));
    for page in ["`src/a.rs` `gone()`", "`src/b.rs`", "`here()`", "`src/a.rs` `her()`"] {
        assert_eq!(absent_functions(page, read).len(), 1, "{page}");
    }
}

#[test]
fn the_pictures_are_what_their_text_says() {
    let output = check_pictures(&root());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_picture_that_differs_from_its_text_is_caught() {
    let tree = tempfile::tempdir().unwrap();
    for path in ["scripts/pictures", "tests/tidy/imports.rs"] {
        fs::create_dir_all(tree.path().join(path).parent().unwrap()).unwrap();
        fs::copy(root().join(path), tree.path().join(path)).unwrap();
    }
    let pictures = tree.path().join("docs/pictures");
    fs::create_dir_all(&pictures).unwrap();
    for file in fs::read_dir(root().join("docs/pictures")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), pictures.join(file.file_name())).unwrap();
    }
    assert!(check_pictures(tree.path()).status.success());
    let source = pictures.join("states.txt");
    let text = fs::read_to_string(&source).unwrap().replace("no process", "a process");
    fs::write(&source, text).unwrap();
    let output = check_pictures(tree.path());
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("states.svg"), "{output:?}");
}
