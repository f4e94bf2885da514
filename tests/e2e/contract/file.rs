//! Files are neither made, removed, moved nor linked, and only writes act.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::{
    fs::{CWD, FileType, Mode},
    io::Errno,
};

use super::shell_fails;
use crate::support::Setup;

#[test]
fn files_are_not_made_by_hand() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    for dir in [".", "web-1"] {
        let new = host.path(dir).join("new");
        let made = std::fs::File::create(&new).unwrap_err();
        assert_eq!(Errno::from_io_error(&made), Some(Errno::ACCESS), "{dir}");
        let fifo = rustix::fs::mknodat(CWD, &new, FileType::Fifo, Mode::RUSR, 0);
        assert_eq!(fifo, Err(Errno::PERM), "{dir}");
        assert_eq!(rustix::fs::symlink("web-1", &new), Err(Errno::PERM), "{dir}");
        let linked = rustix::fs::link(host.path("web-1/state"), &new);
        assert_eq!(linked, Err(Errno::PERM), "{dir}");
    }
    assert_eq!(rustix::fs::mkdir(host.path("web-1/sub"), Mode::RWXU), Err(Errno::PERM));
    shell_fails(&host, "touch newfile", &[], Errno::ACCESS);
    shell_fails(&host, "echo x > web-1/newfile", &[], Errno::ACCESS);
    shell_fails(&host, "ln -s web-1 other", &[], Errno::PERM);
    shell_fails(&host, "ln web-1/state web-1/other", &[], Errno::PERM);
    shell_fails(&host, "mkfifo web-1/fifo", &[], Errno::PERM);
    shell_fails(&host, "mkdir web-1/sub", &[], Errno::PERM);
}

#[test]
fn files_are_neither_removed_nor_moved() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    assert_eq!(rustix::fs::unlink(host.path("web-1/state")), Err(Errno::PERM));
    assert_eq!(rustix::fs::unlink(host.path("dozed.status")), Err(Errno::PERM));
    assert_eq!(rustix::fs::rmdir(host.path("web-1/state")), Err(Errno::NOTDIR));
    let moved = rustix::fs::rename(host.path("web-1"), host.path("web-2"));
    assert_eq!(moved, Err(Errno::PERM));
    shell_fails(&host, "mv web-1 web-2", &[], Errno::PERM);
    shell_fails(&host, "mv web-1/state web-1/error", &[], Errno::PERM);
    shell_fails(&host, "rm -f web-1/state", &[], Errno::PERM);
    shell_fails(&host, "rm -rf web-1", &[], Errno::PERM);
    assert_eq!(host.state("web-1"), "stopped");
}

#[test]
fn only_a_write_acts() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let before = (host.read("web-1/config"), host.number("web-1/activity", "count"));
    for file in ["state", "idle_after", "delete_after", "pinned", "config"] {
        for script in [
            "touch web-1/FILE",
            "touch -d yesterday web-1/FILE",
            ": > web-1/FILE",
            ": >> web-1/FILE",
            "truncate -s 0 web-1/FILE",
            "truncate -s 5 web-1/FILE",
            "echo > web-1/FILE",
            "echo '   ' > web-1/FILE",
            "printf '' > web-1/FILE",
            "printf '\\n\\t \\n' >> web-1/FILE",
            "exec 3<> web-1/FILE",
            "dd if=/dev/null of=web-1/FILE 2>/dev/null",
        ] {
            host.bash_ok(&script.replace("FILE", file));
        }
    }
    host.bash_ok("chmod 600 web-1/state");
    assert_eq!(host.state("web-1"), "running");
    assert_eq!(host.error("web-1"), "ok");
    assert_eq!(host.read("web-1/pinned"), "0\n");
    let after = (host.read("web-1/config"), host.number("web-1/activity", "count"));
    assert_eq!(after, before);
    let mode = std::fs::metadata(host.path("web-1/state")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "but chmod does what it says");
}

#[test]
fn every_way_to_write_a_verb_is_a_command() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for script in [
        "echo VERB > web-1/state",
        "echo VERB >> web-1/state",
        "printf VERB > web-1/state",
        "printf '  VERB\\t\\n' > web-1/state",
        "echo VERB | tee web-1/state",
        "echo VERB | dd of=web-1/state 2>/dev/null",
        "echo VERB | dd of=web-1/state conv=fsync,notrunc seek=3 2>/dev/null",
        "echo VERB 1<> web-1/state",
        "f=$(mktemp) && echo VERB > $f && cp $f web-1/state && rm $f",
        "python3 -c \"open('web-1/state','w').write('VERB')\"",
    ] {
        host.bash_ok(&script.replace("VERB", "sleep"));
        assert_eq!(host.state("web-1"), "snapshotted", "{script}");
        host.bash_ok(&script.replace("VERB", "wake"));
        assert_eq!(host.state("web-1"), "running", "{script}");
    }
    host.counts_on("web-1");
}

#[test]
fn a_files_attributes_are_those_of_the_contract() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    for (file, mode) in [
        ("web-1", 0o40750),
        ("web-1/state", 0o100_660),
        ("web-1/activity", 0o100_660),
        ("web-1/config", 0o100_640),
        ("web-1/delete_after", 0o100_640),
        ("web-1/pinned", 0o100_640),
        ("web-1/status", 0o100_440),
        ("web-1/error", 0o100_440),
        ("web-1/idle", 0o100_440),
    ] {
        let metadata = std::fs::metadata(host.path(file)).unwrap();
        assert_eq!(metadata.mode(), mode, "{file}: {:o}", metadata.mode());
    }
    host.bash_ok("chown 1234:4321 web-1 && chmod 700 web-1");
    let metadata = std::fs::metadata(host.path("web-1/state")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321), "the directory's owner has all");
    assert_eq!(host.value("web-1/status", "owner"), "1234:4321");
}
