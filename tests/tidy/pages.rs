//! Pages that name functions, show pictures or link to other pages are true.

use std::{
    fs,
    path::{Path, PathBuf},
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

/// Returns the pages for users, by their paths: README.md and those of docs.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md")];
    for dir in ["docs", "docs/decisions"] {
        let files = fs::read_dir(root().join(dir)).unwrap().map(|file| file.unwrap().path());
        paths.extend(files.filter(|path| path.extension().is_some_and(|kind| kind == "md")));
    }
    let read = |path: PathBuf| fs::read_to_string(&path).map(|text| (path, text)).unwrap();
    paths.into_iter().map(read).collect()
}

/// Returns the anchors of the headings of a page, as GitHub makes them.
fn anchors(page: &str) -> Vec<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let titles = headings.map(|line| line.trim_start_matches('#').trim().to_lowercase());
    let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
    titles.map(|title| title.chars().filter(kept).collect::<String>().replace(' ', "-")).collect()
}

/// Complains of links of a page to a file or a heading that is not there.
fn dead_links(page: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    for link in page.split("](").skip(1).filter_map(|after| after.split(')').next()) {
        if link.contains("://") {
            continue;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = if path.is_empty() { Some(page.to_owned()) } else { read(path) };
        let is_there = |text: &String| {
            anchor.is_empty() || anchors(text).iter().any(|heading| heading == anchor)
        };
        if !target.as_ref().is_some_and(is_there) {
            complaints.push(format!("there is no {link}"));
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
fn links_lead_to_pages_and_headings_that_exist() {
    for (path, page) in pages() {
        let read = |link: &str| {
            let target = path.parent().unwrap().join(link);
            if target.is_dir() { Some(String::new()) } else { fs::read_to_string(target).ok() }
        };
        let complaints = dead_links(&page, read);
        assert!(complaints.is_empty(), "{}: {}", path.display(), complaints.join(", "));
    }
}

#[test]
fn a_link_to_nothing_is_caught() {
    let read = |path: &str| (path == "b.md").then(|| "# One page\n## What `x` is, now".to_owned());
    let page = "# Here\n[b](b.md) [h](#here) [x](b.md#what-x-is-now) [w](https://x.example/)";
    assert_none(&dead_links(page, read));
    for link in ["[c](c.md)", "[b](b.md#two)", "![p](p.svg)", "[h](#there)"] {
        assert_eq!(dead_links(link, read).len(), 1, "{link}");
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
