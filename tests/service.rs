//! What the systemd unit must have, and must not. That everything works under what it forbids
//! is tried out by `tests/e2e/unit.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{fs, path::Path};

/// What gives a service a mount namespace of its own, by the start of the directive: a
/// tree that is mounted there is seen by nobody else (systemd.exec(5)).
const HIDES_MOUNTS: [&str; 21] = [
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "InaccessiblePaths",
    "LoadCredential",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "Private",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernel",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "TemporaryFileSystem",
];

fn directives(unit: &str) -> Vec<(&str, &str)> {
    let lines = unit.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).collect()
}

fn hides_mounts<'a>(directives: &[(&'a str, &str)]) -> Vec<&'a str> {
    let names = directives.iter().map(|(name, _)| *name);
    names.filter(|name| HIDES_MOUNTS.iter().any(|start| name.starts_with(start))).collect()
}

#[test]
fn the_unit_shows_the_tree_and_spares_the_guests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package/dozed.service");
    let unit = fs::read_to_string(path).unwrap();
    let directives = directives(&unit);
    assert!(hides_mounts(&directives).is_empty(), "{:?}", hides_mounts(&directives));
    for needed in [
        ("Type", "notify"),
        ("KillMode", "process"),
        ("OOMPolicy", "continue"),
        ("Restart", "always"),
        ("LimitCORE", "0"),
        ("Wants", "time-sync.target"),
    ] {
        assert!(directives.contains(&needed), "{needed:?}");
    }
    // Without these a VMM cannot become a user of its own; the announcer has two of them.
    let capabilities: Vec<_> = directives
        .iter()
        .filter(|(name, _)| *name == "CapabilityBoundingSet")
        .flat_map(|(_, value)| value.split(' '))
        .collect();
    let needed = "CAP_SETUID CAP_SETGID CAP_CHOWN CAP_FOWNER CAP_MKNOD CAP_DAC_OVERRIDE";
    for needed in needed.split(' ') {
        assert!(capabilities.contains(&needed), "{needed}");
    }
    // systemd would empty it when the daemon stops, with the sockets of guests in it.
    assert!(!unit.contains("RuntimeDirectory"));
    // QEMU without KVM translates.
    assert!(!directives.iter().any(|(name, _)| *name == "MemoryDenyWriteExecute"));
}

#[test]
fn what_the_unit_names_as_its_documentation_is_installed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = fs::read_to_string(root.join("scripts/package/dozed.service")).unwrap();
    let page = fs::read_to_string(root.join("docs/operations.md")).unwrap();
    assert!(page.contains("install -D -m 0644 -t /usr/share/doc/dozed README.md docs/*.md\n"));
    let directives = directives(&unit);
    let (_, named) = directives.iter().find(|(name, _)| *name == "Documentation").unwrap();
    for file in named.split(' ') {
        let name = file.strip_prefix("file:///usr/share/doc/dozed/").unwrap();
        let dir = if name == "README.md" { root.to_owned() } else { root.join("docs") };
        assert!(dir.join(name).exists(), "{file}");
    }
}

#[test]
fn what_the_pages_install_from_the_source_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for page in ["README.md", "docs/operations.md"] {
        let text = fs::read_to_string(root.join(page)).unwrap();
        let installs = text.lines().filter(|line| line.starts_with("install "));
        let units: Vec<_> = installs
            .flat_map(|line| line.split_whitespace())
            .filter(|word| word.ends_with(".service"))
            .collect();
        assert!(!units.is_empty(), "{page} installs no unit");
        for unit in units {
            assert!(root.join(unit).exists(), "{page} installs {unit}");
        }
    }
}

#[test]
fn what_hides_mounts_is_caught() {
    let bad = "[Service]\nProtectSystem=strict\n#PrivateTmp=yes\nPrivateDevices=yes\nUMask=0077\n";
    assert_eq!(hides_mounts(&directives(bad)), ["ProtectSystem", "PrivateDevices"]);
}
