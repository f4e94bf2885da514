//! No circles of files inside a room.
//!
//! The modules of one directory may use one another in one direction only. What a module and
//! those inside it use counts as its use. A module and the one that declares it may use each
//! other: the latter holds what its modules share.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Source, assert_none,
    imports::production,
    sources,
    tokens::{CodePath, below},
};

/// Which module uses which, with the line that shows it.
type Uses = BTreeMap<(String, String), String>;

/// The modules of the crate, and the names that each takes from those inside it.
struct Modules {
    all: BTreeSet<String>,
    /// By the module that has the name and the name: the module that it comes from.
    reexported: BTreeMap<(String, String), String>,
}

impl Modules {
    fn of(production: &[(&Source, Vec<CodePath>)]) -> Self {
        let all: BTreeSet<String> =
            production.iter().map(|(source, _)| source.module().to_owned()).collect();
        let mut reexported = BTreeMap::new();
        for (source, paths) in production {
            for path in paths {
                let parts = path.parts.strip_prefix(&["self".to_owned()]).unwrap_or(&path.parts);
                let [first, .., last] = parts else { continue };
                let inner = below(source.module(), first);
                if all.contains(&inner) {
                    reexported.insert((source.module().to_owned(), last.clone()), inner);
                }
            }
        }
        Self { all, reexported }
    }

    /// Returns the module that the thing is in which `path` names where it is written in
    /// `module`. None for what is not of this crate, or written without a `crate` or `super`.
    fn target(&self, module: &str, path: &CodePath) -> Option<String> {
        let (mut at, mut rest) = match path.parts.split_first()? {
            (first, rest) if first == "crate" => (String::new(), rest),
            (first, rest) if first == "super" => (parent(module).to_owned(), rest),
            _ => return None,
        };
        while let Some((first, behind)) = rest.split_first() {
            let inner = below(&at, first);
            if self.all.contains(&inner) {
                at = inner;
            } else if let Some(from) = self.reexported.get(&(at.clone(), first.clone())) {
                return Some(from.clone());
            } else {
                break;
            }
            rest = behind;
        }
        Some(at)
    }
}

fn parent(module: &str) -> &str {
    module.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Returns the two modules of one directory that lead to `one` and to `other`. None where one
/// is inside the other, or where their directory is that of the rooms.
fn siblings(one: &str, other: &str) -> Option<(String, String)> {
    let (one, other): (Vec<_>, Vec<_>) = (one.split('/').collect(), other.split('/').collect());
    let common = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    let is_apart = common > 0 && common < one.len() && common < other.len();
    is_apart.then(|| (one[..=common].join("/"), other[..=common].join("/")))
}

fn uses(sources: &[Source]) -> Uses {
    let production = production(sources);
    let modules = Modules::of(&production);
    let mut uses = Uses::new();
    for (source, paths) in &production {
        for path in paths {
            let target = modules.target(source.module(), path);
            if let Some(pair) = target.and_then(|target| siblings(source.module(), &target)) {
                uses.entry(pair).or_insert_with(|| format!("{}:{}", source.path, path.line));
            }
        }
    }
    uses
}

/// Complains of each use that is part of a circle.
fn circles(sources: &[Source]) -> Vec<String> {
    let mut left = uses(sources);
    // What uses nothing, and what nothing uses, is in no circle.
    loop {
        let users: BTreeSet<_> = left.keys().map(|(user, _)| user.clone()).collect();
        let used: BTreeSet<_> = left.keys().map(|(_, used)| used.clone()).collect();
        let before = left.len();
        left.retain(|(user, target), _| used.contains(user) && users.contains(target));
        if left.len() == before {
            break;
        }
    }
    let complaint = |((user, used), line): (&(String, String), &String)| {
        format!("{line}: `{user}` uses `{used}`, which is part of a circle")
    };
    left.iter().map(complaint).collect()
}

#[test]
fn no_files_of_a_room_use_one_another_in_a_circle() {
    assert_none(&circles(&sources()));
}

#[test]
fn a_circle_is_caught_however_it_is_written() {
    let parent = Source::made_up("src/a/mod.rs", "mod b; mod c; use b::B; pub use self::c::{C};");
    for (b, c, count) in [
        ("use super::c::C;", "use super::b::B;", 2),
        ("use super::{c::C, other};", "fn f() { crate::a::b::f() }", 2),
        ("use crate::a::C;", "use super::B;", 2),
        ("use super::c::C;", "use super::other;", 0),
        ("use super::other;", "use super::other;", 0),
        ("use super::c::C;", "#[cfg(test)] mod tests { use super::super::b::B; }", 0),
    ] {
        let tree = [
            Source::made_up(&parent.path, &parent.text),
            Source::made_up("src/a/b.rs", b),
            Source::made_up("src/a/c.rs", c),
        ];
        let caught = circles(&tree);
        assert_eq!(caught.len(), count, "{b} {c}: {caught:?}");
    }
}

#[test]
fn a_circle_of_three_and_one_through_a_directory_are_caught() {
    let file = |path: &str, text: &str| Source::made_up(path, text);
    let three = [
        file("src/a/mod.rs", ""),
        file("src/a/b.rs", "use super::c;"),
        file("src/a/c.rs", "use super::d;"),
        file("src/a/d.rs", "use super::b;"),
        file("src/a/e.rs", "use super::b;"),
    ];
    assert_eq!(circles(&three).len(), 3);
    let through = [
        file("src/a/mod.rs", ""),
        file("src/a/b/mod.rs", "mod inner;"),
        file("src/a/b/inner.rs", "use crate::a::c;"),
        file("src/a/c.rs", "use super::b;"),
    ];
    assert_eq!(circles(&through).len(), 2);
}
