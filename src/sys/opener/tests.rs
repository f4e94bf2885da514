//! What openers open, and as whom.

use std::{
    fs::{self, Permissions},
    os::fd::AsRawFd as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::PathBuf,
};

use rustix::fs::{CWD, FileType, Mode};

use super::*;
use crate::{
    sandbox::Owner,
    sys::{
        command::{find, output},
        files::{ImageSize, handle_path},
    },
};

const OWNER: Owner = Owner { uid: 2_147_000_001, gid: 2_147_000_002 };

/// These tests, as a program that opens files.
pub(crate) fn program() -> Program {
    let args = ["--exact", "--include-ignored", "--nocapture", "--test-threads=1"];
    let test = concat!(module_path!(), "::the_process_that_tests_start");
    let test = test.split_once("::").unwrap().1;
    let args = args.into_iter().chain([test]).map(Into::into).collect();
    Program { path: "/proc/self/exe".into(), args }
}

#[test]
#[ignore = "it is the process that other tests start"]
fn the_process_that_tests_start() {
    // Whose rights it has is a pattern that no test has.
    let rights = std::env::args().next_back().unwrap().parse().unwrap();
    serve(&rights).unwrap();
}

fn openers() -> Openers {
    Openers::new(program()).unwrap()
}

/// A directory that everybody may use, where the owner has a file.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::set_permissions(place.0.path(), Permissions::from_mode(0o755)).unwrap();
        place
    }

    /// Makes a file that has its own name in it.
    fn file(&self, name: &str, owner: (u32, u32), mode: u32) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, name).unwrap();
        chown(&path, Some(owner.0), Some(owner.1)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }
}

fn open_one(path: &Path) -> io::Result<Opened> {
    openers().start(&Rights::Of(OWNER.into()))?.open(path)
}

fn refused(path: &Path) -> io::ErrorKind {
    open_one(path).unwrap_err().kind()
}

#[test]
fn an_owner_opens_what_they_may_read_and_nothing_else() {
    let (place, ours) = (Place::new(), own_ids());
    let denied = io::ErrorKind::PermissionDenied;
    let own = place.file("own", (OWNER.uid, OWNER.gid), 0o400);
    let open = open_one(&own).unwrap();
    assert_eq!(fs::read(handle_path(&open.file)).unwrap(), b"own");
    assert_eq!(open.start, b"own");
    let meta = fs::metadata(&own).unwrap();
    let size =
        ImageSize { device: meta.dev(), bytes: meta.len(), allocated_bytes: meta.blocks() * 512 };
    assert_eq!(open.size, size);
    assert!(!open.is_device);
    open_one(&place.file("groups", (ours.0, OWNER.gid), 0o040)).unwrap();
    open_one(&place.file("everybodys", ours, 0o644)).unwrap();
    assert_eq!(refused(&place.file("ours", ours, 0o640)), denied);
    // Mode bits that keep the owner out keep them out here too.
    assert_eq!(refused(&place.file("shut", (OWNER.uid, OWNER.gid), 0o044)), denied);
    assert_eq!(fs::read(place.0.path().join("ours")).unwrap(), b"ours", "we are who we were");
}

#[test]
fn a_file_of_a_group_that_they_were_in_is_opened_too() {
    const GROUP: u32 = 2_147_000_003;
    let (place, ours) = (Place::new(), own_ids());
    let path = place.file("groups", (ours.0, GROUP), 0o640);
    assert_eq!(refused(&path), io::ErrorKind::PermissionDenied);
    let writer = Writer::new(OWNER.uid, OWNER.gid, vec![7, GROUP]);
    openers().start(&Rights::Of(writer)).unwrap().open(&path).unwrap();
}

#[test]
fn a_directory_that_is_shut_to_them_tells_not_even_what_is_in_it() {
    let (place, ours) = (Place::new(), own_ids());
    let there = place.file("shut/there", ours, 0o644);
    fs::set_permissions(there.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
    let denied = io::ErrorKind::PermissionDenied;
    assert_eq!(refused(&there), denied);
    assert_eq!(refused(&there.with_file_name("not there")), denied);
    assert_eq!(refused(&place.0.path().join("nowhere")), io::ErrorKind::NotFound);
}

#[test]
fn what_is_put_in_its_place_afterwards_is_not_what_is_used() {
    let (place, ours) = (Place::new(), own_ids());
    let (own, secret) =
        (place.file("own", (OWNER.uid, OWNER.gid), 0o600), place.file("secret", ours, 0o600));
    let open = open_one(&own).unwrap();
    fs::remove_file(&own).unwrap();
    symlink(&secret, &own).unwrap();
    assert_eq!(fs::read(handle_path(&open.file)).unwrap(), b"own");
    assert_eq!(refused(&own), io::ErrorKind::PermissionDenied, "a link gives nobody more");
}

#[test]
fn what_is_no_file_is_refused_without_waiting_for_it() {
    let place = Place::new();
    let fifo = place.0.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    for path in [fifo.as_path(), place.0.path(), Path::new("/dev/zero")] {
        assert_eq!(refused(path), io::ErrorKind::InvalidInput, "{}", path.display());
    }
}

#[test]
fn our_own_open_files_are_not_theirs() {
    let (place, ours) = (Place::new(), own_ids());
    let path = place.file("shut/ours", ours, 0o644);
    fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
    let open = fs::File::open(&path).unwrap();
    // The file itself may be read by all, but nobody else gets there.
    let ours = format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd());
    open_one(Path::new(&ours)).unwrap_err();
    for path in ["/proc/self/fd/0", "/proc/self/exe"] {
        let error = open_one(Path::new(path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{error}");
    }
}

#[test]
fn each_of_several_files_has_its_own_answer() {
    let (place, ours) = (Place::new(), own_ids());
    let own = place.file("own", (OWNER.uid, OWNER.gid), 0o600);
    let secret = place.file("secret", ours, 0o600);
    let openers = openers();
    let opener = openers.start(&Rights::Of(OWNER.into())).unwrap();
    let answers = [&secret, &own].map(|path| opener.open(path).is_ok());
    assert_eq!(answers, [false, true]);
    let opener = openers.start(&Rights::Ours).unwrap();
    assert_eq!(opener.open(&secret).unwrap().start, b"secret", "we may read all");
}

#[test]
fn a_copy_is_the_file_that_was_opened_and_the_way_to_it_may_be_gone() {
    let place = Place::new();
    let own = place.file("own", (OWNER.uid, OWNER.gid), 0o400);
    fs::OpenOptions::new().append(true).open(&own).unwrap().set_len(10 << 20).unwrap();
    let opener = openers().start(&Rights::Of(OWNER.into())).unwrap();
    let open = opener.open(&own).unwrap();
    fs::remove_file(&own).unwrap();
    let (target, mut pieces) = (tempfile::NamedTempFile::new().unwrap(), 0);
    opener.copy(&open, target.as_file(), &mut || pieces += 1).unwrap();
    let copied = fs::read(target.path()).unwrap();
    assert!(copied.starts_with(b"own\0") && copied.len() == 10 << 20);
    // A file of holes is one piece, or none where blocks are shared.
    assert!(pieces <= 1, "{pieces}");
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = opener.copy(&open, &full, &mut || ()).unwrap_err();
    assert!(error.raw_os_error().is_some(), "{error}");
    assert_eq!(refused(&own), io::ErrorKind::NotFound, "it opens files as before");
}

#[test]
fn the_size_of_a_block_device_is_its_own() {
    let place = Place::new();
    let file = place.file("disk", own_ids(), 0o600);
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    let device = LoopDevice::over(&file);
    let opened = openers().start(&Rights::Ours).unwrap().open(&device.0).unwrap();
    assert!(opened.is_device);
    assert_eq!((opened.size.bytes, opened.size.allocated_bytes), (1 << 20, 1 << 20));
    assert_eq!(opened.start, [7; START_BYTES]);
}

/// A block device whose content is that of a file.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn over(file: &Path) -> Self {
        let device = losetup(&["--find", "--show", "--read-only", file.to_str().unwrap()]);
        Self(device.trim_end().into())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        losetup(&["--detach", self.0.to_str().unwrap()]);
    }
}

fn losetup(args: &[&str]) -> String {
    let losetup = find("losetup").expect("util-linux is there");
    let output = output(&losetup, args, Duration::from_secs(60)).unwrap();
    assert!(output.status.success(), "losetup {args:?}");
    output.stdout
}
