//! Who may what: plain Unix.

use std::{os::unix::process::CommandExt, process::Output};

use rustix::io::Errno;

use super::{shell_fails, words};
use crate::support::{Host, Setup, command};

const NOBODY: u32 = 65534;

fn as_nobody(host: &Host, script: &str) -> Output {
    as_user(host, NOBODY, NOBODY, script)
}

fn as_user(host: &Host, uid: u32, gid: u32, script: &str) -> Output {
    let mut bash = command("/bin/bash");
    bash.args(["-c", script]).current_dir(host.mount()).uid(uid).gid(gid);
    bash.output().unwrap()
}

#[test]
fn even_root_does_not_write_what_is_only_read() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    for file in [
        "web-1/status",
        "web-1/error",
        "web-1/idle",
        "web-1/events",
        "dozed.status",
        "dozed.events",
    ] {
        assert_eq!(host.open(file).err(), Some(Errno::ACCESS), "{file}");
        shell_fails(&host, &format!("echo x > {file}"), &[], Errno::ACCESS);
    }
}

#[test]
fn a_stranger_sees_and_does_nothing_and_an_owner_all() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    host.mkdir("web-2").unwrap();
    for script in [
        "cat web-1/state",
        "echo wake > web-1/state",
        "ls web-1",
        "touch web-1/activity",
        "chmod 777 web-1",
        "chown 65534 web-1",
        "rmdir web-1",
        "mkdir web-3",
    ] {
        let output = as_nobody(&host, script);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{script}");
        let refusals = [words(Errno::ACCESS), words(Errno::PERM)];
        assert!(refusals.iter().any(|refusal| said.contains(refusal)), "{script} says {said}");
    }
    let listed = as_nobody(&host, "cat dozed.list").stdout;
    assert_eq!(String::from_utf8_lossy(&listed), "", "nor sees it in the list");
    host.bash_ok(&format!("chown {NOBODY}:{NOBODY} web-1"));
    for script in [
        "test $(cat web-1/state) = stopped",
        "touch web-1/activity",
        "echo 5m > web-1/idle_after",
        "echo 'vcpus = 2' > web-1/config",
        "grep -q '^web-1 stopped 65534:65534 ' dozed.list && ! grep -q web-2 dozed.list",
    ] {
        let output = as_nobody(&host, script);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script} says {said}");
    }
    let output = as_nobody(&host, "echo sleep > web-1/state");
    assert!(String::from_utf8_lossy(&output.stderr).contains(&words(Errno::INVAL)));
}

#[test]
fn who_may_make_sandboxes_is_the_mode_of_the_root() {
    let host = Setup::bare().start();
    host.bash_ok("chmod 1777 .");
    assert!(as_nobody(&host, "mkdir mine && rmdir mine && mkdir mine").status.success());
    assert_eq!(host.value("mine/status", "owner"), format!("{NOBODY}:{NOBODY}"));
    // The sticky bit keeps what is root's.
    host.mkdir("roots").unwrap();
    assert!(!as_nobody(&host, "rmdir roots").status.success());
    assert!(as_nobody(&host, "rmdir mine").status.success());
}

#[test]
fn a_member_of_the_group_operates_and_does_not_delete() {
    const OWNER: u32 = 4_000_001;
    const MEMBER: u32 = 4_000_002;
    const GROUP: u32 = 4_000_003;
    let host = Setup::counter("").config("[reaper]\ntick = \"1s\"").start();
    host.bash_ok("chmod 1777 .");
    assert!(as_user(&host, OWNER, GROUP, "mkdir web-1").status.success());
    let member = |script: &str| as_user(&host, MEMBER, GROUP, script);
    for script in [
        "echo wake > web-1/state",
        "test $(cat web-1/state) = running",
        "cat web-1/config web-1/delete_after web-1/pinned",
        "touch web-1/activity",
        "echo 5m > web-1/idle_after",
        ": > web-1/awake",
    ] {
        let output = member(script);
        assert!(output.status.success(), "{script} {}", String::from_utf8_lossy(&output.stderr));
    }
    // Each of these deletes, or has it deleted, or lets it be.
    for script in [
        "echo 1s > web-1/delete_after",
        "echo 0 > web-1/pinned",
        "echo 1 > web-1/pinned",
        "echo 'kernel = \"/dev/null\"' > web-1/config",
        "chmod 666 web-1/delete_after",
        "rmdir web-1",
    ] {
        assert!(!member(script).status.success(), "{script}");
    }
    assert!(member("echo sleep > web-1/state").status.success());
    assert_eq!(host.read("web-1/delete_after"), "never\n");
    assert!(as_user(&host, OWNER, GROUP, "echo 7d > web-1/delete_after").status.success());
    assert_eq!(host.state("web-1"), "snapshotted");
}
