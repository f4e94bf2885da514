//! The parts of the driver, against a scripted VMM. `tests/vmm` holds the whole of it
//! against a stand-in for the program, and against the real one where that is there.

mod api;
mod body;

use std::{fs, time::Duration};

use tempfile::TempDir;

use super::*;
use crate::{
    sandbox::{Owner, network::GUEST_MAC},
    sys::cancel::Cancel,
    vmm::{DiskKind, PlannedDisk, PlannedNic, PlannedVsock},
};

/// No wait of these tests is as long on any machine.
const SOON: Duration = Duration::from_secs(180);

/// Returns a plan for a sandbox whose files are in `dir`, with two disks.
fn plan(dir: &TempDir) -> Plan {
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("run")).unwrap();
    Plan {
        id: "web-1".parse().unwrap(),
        token: format!("dozed-ch-test-{}-", std::process::id()),
        user: None,
        vcpus: 2,
        memory_bytes: 256 << 20,
        memory_mode: MemoryMode::Auto,
        restore_mode: RestoreMode::Auto,
        kernel: Some(path("kernel")),
        initramfs: None,
        cmdline: "console=ttyS0".to_owned(),
        disks: vec![
            PlannedDisk { path: path("disk-0.img"), kind: DiskKind::Own },
            PlannedDisk { path: path("shared.img"), kind: DiskKind::Shared },
        ],
        balloon: true,
        vsock: None,
        nic: None,
        memory: path("memory"),
        runtime_dir: path("run"),
        console_log: path("console.log"),
        vmm_log: path("vmm.log"),
        held: Vec::new(),
        cancel: Arc::new(Cancel::default()),
    }
}

#[test]
fn the_version_is_told_from_what_the_program_says_around_it() {
    assert_eq!(parse_version("cloud-hypervisor v53.0\n"), Some("53.0"));
    assert_eq!(parse_version("cloud-hypervisor v53.0-246-gae44"), Some("53.0-246-gae44"));
    assert_eq!(parse_version("QEMU emulator version 7.2.22"), None);
    assert_eq!(parse_version(""), None);
}

#[test]
fn a_program_that_is_too_old_is_refused_with_its_version() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("cloud-hypervisor");
    let at = |version: &str| {
        fs::write(&program, format!("#!/bin/sh\necho cloud-hypervisor {version}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        CloudHypervisor::at(program.clone())
    };
    let error = at("v43.0").unwrap_err().to_string();
    assert!(error.ends_with("it is version 43.0, and v44.0 is the oldest known"), "{error}");
    assert_eq!(at("v44.0").unwrap().identity().unwrap().version, "44.0");
    assert!(at("v44.0").unwrap().lacks("44.0").len() >= 3);
}
