//! Who may use what: the rooms one another, and each library.

use crate::{
    Source, assert_none, sources,
    tokens::{self, CodePath},
};

/// What each room may import. The pure types, the locks and the system are below all that
/// is not listed without them.
const ROOMS: [(&str, &[&str]); 20] = [
    ("main", &["cli", "daemon", "doctor"]),
    ("cli", &["config", "sys"]),
    (
        "daemon",
        &[
            "config",
            "fuse",
            "index",
            "lifecycle",
            "net",
            "lock",
            "events",
            "reaper",
            "sandbox",
            "snapshot",
            "sync",
            "sys",
            "tree",
            "vmm",
        ],
    ),
    ("doctor", &["config", "net", "sandbox", "sys", "vmm"]),
    ("fuse", &["events", "sandbox", "sync", "sys", "tree"]),
    ("tree", &["activity", "events", "lifecycle", "sandbox", "sync", "sys"]),
    ("reaper", &["activity", "events", "lifecycle", "sandbox", "sync", "sys"]),
    (
        "lifecycle",
        &[
            "activity", "events", "index", "lock", "machines", "net", "sandbox", "snapshot",
            "sync", "sys", "vmm",
        ],
    ),
    ("activity", &["events", "index", "sandbox", "sync", "sys"]),
    ("machines", &["events", "sandbox", "sync", "sys", "vmm"]),
    ("index", &["lock", "sandbox", "sync", "sys"]),
    ("snapshot", &["sandbox", "sync", "sys"]),
    ("vmm", &["sandbox", "sync", "sys"]),
    ("net", &["sandbox", "sync", "sys"]),
    ("lock", &["sandbox", "sync"]),
    ("events", &["sandbox", "sync", "sys"]),
    ("config", &["sandbox", "sync", "sys"]),
    ("sys", &["sandbox", "sync"]),
    ("sandbox", &[]),
    ("sync", &[]),
];

/// Which paths only some places may use, and which places.
const LIBRARIES: [(&str, &[&str]); 21] = [
    ("fuser", &["src/fuse/"]),
    ("rusqlite", &["src/index/"]),
    ("clap", &["src/cli.rs"]),
    ("prometheus", &["src/lifecycle/metrics.rs"]),
    ("std::env", &["src/cli.rs"]),
    ("serde_json", &["src/vmm/", "src/snapshot/", "src/sys/", "src/index/", "src/events/"]),
    ("hyper", &["src/vmm/cloud_hypervisor/"]),
    ("hyper_util", &["src/vmm/cloud_hypervisor/"]),
    ("http_body_util", &["src/vmm/cloud_hypervisor/"]),
    ("tokio::runtime", &["src/sys/runtime.rs"]),
    ("libc", &["src/sys/", "src/tree/errno.rs"]),
    ("rustix::io", &["src/sys/", "src/tree/errno.rs"]),
    ("std::sync::Mutex", &["src/sync.rs"]),
    ("std::sync::RwLock", &["src/sync.rs"]),
    ("std::sync::Condvar", &["src/sync.rs"]),
    ("shuttle", &["src/sync.rs"]),
    ("netlink_packet_core", &["src/net/", "src/sys/netlink/"]),
    ("netlink_packet_netfilter", &["src/net/"]),
    ("netlink_packet_route", &["src/net/"]),
    ("ipnet", &["src/sandbox/network/", "src/net/"]),
    ("etherparse", &["src/net/wake_on_packet/packet.rs"]),
];

/// Rooms inside a room that could be published by themselves: what they may import of the crate
/// besides what is in them.
const CLOSED: [(&str, &[&str]); 1] = [("src/net/nft/", &["sys"])];

/// Returns the sources of the crate with what is in them besides tests.
pub(crate) fn production(sources: &[Source]) -> Vec<(&Source, Vec<CodePath>)> {
    let test_modules = tokens::test_modules(sources);
    let is_for_tests = |source: &Source| {
        let module = source.module();
        test_modules.iter().any(|tests| module == tests || module.starts_with(&format!("{tests}/")))
    };
    sources
        .iter()
        .filter(|source| source.path.starts_with("src/") && !is_for_tests(source))
        .map(|source| {
            let kept = tokens::without_tests(&tokens::tokens(&source.text));
            (source, tokens::paths(&kept))
        })
        .collect()
}

/// Complains of rooms that use one that is not below them.
fn upward_imports(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (source, paths) in production(sources) {
        if source.path == "src/lib.rs" {
            continue;
        }
        let room = room_of(source);
        let Some((_, allowed)) = ROOMS.iter().find(|(known, _)| *known == room) else {
            complaints.push(format!("{}: room `{room}` is not in the table", source.path));
            continue;
        };
        let root = if room == "main" { "dozed" } else { "crate" };
        for path in paths {
            // A lone `crate` is that of `pub(crate)`.
            let Some(used) = path.parts.get(1).map(String::as_str) else {
                continue;
            };
            if path.is_in(root) && used != room && !allowed.contains(&used) {
                complaints
                    .push(format!("{}:{}: `{room}` may not use `{used}`", source.path, path.line));
            }
        }
    }
    complaints.dedup();
    complaints
}

/// Complains of what a closed room uses of the rest of the crate.
fn ways_out_of_closed_rooms(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (source, paths) in production(sources) {
        let room = CLOSED.iter().find(|(room, _)| source.path.starts_with(room));
        let Some((room, allowed)) = room else { continue };
        let is_top = source.path == format!("{room}mod.rs");
        for path in paths {
            let used = path.parts.get(1).map(String::as_str);
            let leads_out = match used {
                Some(used) if path.is_in("crate") => !allowed.contains(&used),
                Some(_) => is_top && path.is_in("super") || path.is_in("super::super"),
                None => false,
            };
            if leads_out {
                let name = path.parts.join("::");
                complaints
                    .push(format!("{}:{}: {room} may not use `{name}`", source.path, path.line));
            }
        }
    }
    complaints.dedup();
    complaints
}

/// Complains of relative paths that may lead out of a room, where no table looks.
fn ways_around_the_table(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (source, paths) in production(sources) {
        let is_top = !source.module().contains('/');
        for path in paths {
            if path.is_in("super::super") || (is_top && path.is_in("super")) {
                complaints.push(format!(
                    "{}:{}: write `crate::` instead of climbing with `super`",
                    source.path, path.line
                ));
            }
        }
    }
    complaints
}

/// Complains of libraries in rooms that are not to know them.
fn libraries_out_of_place(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (source, paths) in production(sources) {
        for path in paths {
            for (library, places) in LIBRARIES {
                if path.is_in(library) && !is_in_place(source, places) {
                    complaints.push(format!(
                        "{}:{}: only {} may use `{library}`",
                        source.path,
                        path.line,
                        places.join(", ")
                    ));
                }
            }
        }
    }
    complaints
}

/// Complains of unsafe code outside `sys`, in tests too.
fn unsafe_out_of_place(sources: &[Source]) -> Vec<String> {
    let outside = sources.iter().filter(|source| !source.path.starts_with("src/sys/"));
    let complaints = outside.flat_map(|source| {
        tokens::tokens(&source.text)
            .into_iter()
            .filter(|token| token.text == "unsafe")
            .map(|token| format!("{}:{}: only src/sys is unsafe", source.path, token.line))
    });
    complaints.collect()
}

fn room_of(source: &Source) -> &str {
    if source.path == "src/main.rs" {
        return "main";
    }
    let module = source.module();
    module.split_once('/').map_or(module, |(room, _)| room)
}

fn is_in_place(source: &Source, places: &[&str]) -> bool {
    places.iter().any(|place| source.path.starts_with(place))
}

#[test]
fn imports_go_down_only() {
    assert_none(&upward_imports(&sources()));
    assert_none(&ways_out_of_closed_rooms(&sources()));
    assert_none(&ways_around_the_table(&sources()));
}

#[test]
fn libraries_and_unsafe_code_are_where_they_belong() {
    assert_none(&libraries_out_of_place(&sources()));
    assert_none(&unsafe_out_of_place(&sources()));
}

#[test]
fn the_table_has_no_circle() {
    let mut left: Vec<_> = ROOMS.to_vec();
    while !left.is_empty() {
        let names: Vec<&str> = left.iter().map(|(room, _)| *room).collect();
        let before = left.len();
        left.retain(|(_, uses)| uses.iter().any(|used| names.contains(used)));
        assert!(left.len() < before, "a circle among {names:?}");
    }
}

#[test]
fn an_upward_import_is_caught_however_it_is_written() {
    for text in [
        "use crate::fuse;",
        "use crate::{sandbox::Period,\n fuse::{a, b}};",
        "use crate::{\n    sandbox::{Period, State},\n    fuse,\n};",
        "fn a() -> crate::fuse::Tree {}",
        "use crate::fuse as f;",
        "pub(crate) use crate::fuse::*;",
        "#[cfg(test)] mod tests { use crate::sys; } use crate::fuse;",
    ] {
        let caught = upward_imports(&[Source::made_up("src/tree/view.rs", text)]);
        assert_eq!(caught.len(), 1, "{text}: {caught:?}");
        assert!(caught[0].contains("`tree` may not use `fuse`"), "{caught:?}");
    }
    for text in [
        "use crate::{sandbox::Period, lifecycle, tree::Node};",
        "// use crate::fuse;\nconst A: &str = \"crate::fuse\";",
        "#[cfg(test)]\nmod tests { use crate::fuse; }",
    ] {
        let caught = upward_imports(&[Source::made_up("src/tree/view.rs", text)]);
        assert!(caught.is_empty(), "{text}: {caught:?}");
    }
    let everything = Source::made_up("src/tree/view.rs", "use crate::*;");
    assert_eq!(upward_imports(&[everything]).len(), 1);
    let main = Source::made_up("src/main.rs", "use dozed::{cli, fuse};");
    assert_eq!(upward_imports(&[main]).len(), 1);
    let unknown = Source::made_up("src/helpers.rs", "");
    assert_eq!(upward_imports(&[unknown]).len(), 1);
}

#[test]
fn a_file_of_tests_may_use_anything_and_no_other_file_may() {
    let file = |text| {
        [
            Source::made_up("src/lock/mod.rs", text),
            Source::made_up("src/lock/tests.rs", "use crate::sys;"),
        ]
    };
    assert!(upward_imports(&file("#[cfg(test)]\nmod tests;")).is_empty());
    assert_eq!(upward_imports(&file("mod tests;")).len(), 1);
}

#[test]
fn a_way_out_of_a_closed_room_is_caught() {
    for (path, text, count) in [
        ("src/net/nft/batch.rs", "use super::ruleset::Set; use crate::sys::netlink;", 0),
        ("src/net/nft/batch.rs", "use crate::{net::Error, sys};", 1),
        ("src/net/nft/batch.rs", "use crate::sandbox::SandboxId;", 1),
        ("src/net/nft/mod.rs", "use super::Error;", 1),
        ("src/net/nft/mod.rs", "pub(crate) use batch::apply;", 0),
        ("src/net/link.rs", "use super::Error;", 0),
    ] {
        let caught = ways_out_of_closed_rooms(&[Source::made_up(path, text)]);
        assert_eq!(caught.len(), count, "{path}: {text}: {caught:?}");
    }
}

#[test]
fn climbing_out_of_a_room_is_caught() {
    for (path, text, count) in [
        ("src/config.rs", "use super::fuse;", 1),
        ("src/config/mod.rs", "use super::fuse;", 1),
        ("src/config/a.rs", "use super::{b, c};", 0),
        ("src/config/a.rs", "use super::super::fuse;", 1),
    ] {
        let caught = ways_around_the_table(&[Source::made_up(path, text)]);
        assert_eq!(caught.len(), count, "{path}: {text}");
    }
}

#[test]
fn a_library_out_of_place_is_caught() {
    for (path, text, count) in [
        ("src/tree/mod.rs", "use fuser::Request;", 1),
        ("src/fuse/mod.rs", "use fuser::Request;", 0),
        ("src/lifecycle/mod.rs", "let x = rusqlite::Connection::open(y);", 1),
        ("src/main.rs", "use clap::Parser;", 1),
        ("src/tree/mod.rs", "libc::EIO", 1),
        ("src/tree/errno.rs", "libc::EIO", 0),
        ("src/lifecycle/mod.rs", "use rustix::{fs, io::Errno};", 1),
        ("src/lifecycle/mod.rs", "use serde_json as json;", 1),
        ("src/lock/mod.rs", "use std::sync::{Arc, Mutex};", 1),
        ("src/lock/mod.rs", "use std::{env, io};", 1),
    ] {
        let caught = libraries_out_of_place(&[Source::made_up(path, text)]);
        assert_eq!(caught.len(), count, "{path}: {text}: {caught:?}");
    }
}

#[test]
fn unsafe_code_out_of_place_is_caught() {
    for (path, text, count) in [
        ("src/vmm/mod.rs", "unsafe { x() }", 1),
        ("tests/e2e/main.rs", "unsafe fn x() {}", 1),
        ("src/sys/clock.rs", "unsafe { x() }", 0),
        ("src/vmm/mod.rs", "// unsafe\nlet unsafe_looking = \"unsafe\";", 0),
    ] {
        let caught = unsafe_out_of_place(&[Source::made_up(path, text)]);
        assert_eq!(caught.len(), count, "{path}: {text}");
    }
}
