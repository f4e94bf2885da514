//! Names: what may be made, and what may not.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
};

use rustix::io::Errno;

use super::shell_fails;
use crate::support::Setup;

#[test]
fn a_sandbox_is_made_by_mkdir_once_and_deleted_by_rmdir_once() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    assert_eq!(host.state("web-1"), "stopped");
    assert_eq!(host.error("web-1"), "ok");
    assert_eq!(host.mkdir("web-1"), Err(Errno::EXIST));
    shell_fails(&host, "mkdir web-1", &[], Errno::EXIST);
    assert_eq!(host.list(), ["web-1"]);
    host.rmdir("web-1").unwrap();
    assert_eq!(host.rmdir("web-1"), Err(Errno::NOENT));
    shell_fails(&host, "rmdir web-1", &[], Errno::NOENT);
    assert_eq!(host.try_read("web-1/state"), Err(Errno::NOENT));
    host.bash_ok("mkdir -p web-1 web-2 && rmdir web-1 web-2");
}

#[test]
fn what_is_no_label_is_no_name() {
    let host = Setup::bare().start();
    let (longest, longer, longest_path) = ("a".repeat(63), "a".repeat(64), "a".repeat(255));
    let beyond = "a".repeat(300);
    for id in ["a", "0", "a-b", "x--y", longest.as_str()] {
        host.mkdir(id).unwrap();
    }
    let malformed: [&[u8]; 10] = [
        b"A",
        b"-a",
        b"a-",
        b"a.b",
        b"a_b",
        b"a b",
        b"\xff",
        b"a\n",
        "\u{e9}".as_bytes(),
        b"dozed.x",
    ];
    let too_long = [longer.as_bytes(), longest_path.as_bytes(), beyond.as_bytes()];
    let malformed = malformed.map(|name| (name, Errno::INVAL));
    for (name, errno) in malformed.into_iter().chain(too_long.map(|n| (n, Errno::NAMETOOLONG))) {
        let name = OsStr::from_bytes(name);
        let made = rustix::fs::mkdir(host.mount().join(name), 0o755.into());
        assert_eq!(made, Err(errno), "{name:?}");
        shell_fails(&host, "mkdir -- \"$1\"", &[name], errno);
    }
    assert_eq!(host.mkdir("dozed.status"), Err(Errno::EXIST));
    assert_eq!(host.list().len(), 5);
}

#[test]
fn an_inode_number_is_kept_over_a_restart_and_never_used_again() {
    let mut host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    let inodes = |host: &crate::support::Host| {
        let files = ["web-1", "web-1/state", "web-1/console"];
        files.map(|file| fs::metadata(host.path(file)).unwrap().ino())
    };
    let first = inodes(&host);
    host.terminate();
    host.restart();
    assert_eq!(inodes(&host), first);
    host.kill_daemon();
    host.restart();
    assert_eq!(inodes(&host), first);
    // The last row is gone when the next daemon starts, and its number with it.
    host.rmdir("web-1").unwrap();
    host.terminate();
    host.restart();
    host.mkdir("web-1").unwrap();
    let second = inodes(&host);
    assert!(second.iter().all(|inode| !first.contains(inode)), "{first:?} {second:?}");
}

#[test]
fn a_listing_has_all_names_once_however_many_there_are() {
    let host = Setup::bare().start();
    let want = 700;
    host.bash_ok(&format!("mkdir $(seq -f 's-%g' {want})"));
    let mut names = host.list();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), want);
    assert_eq!(host.read("dozed.list").lines().count(), want);
    assert_eq!(host.bash_ok("ls | wc -l").trim(), (want + 5).to_string());
    assert_eq!(host.number("dozed.status", "stopped"), want as u64);
}
