//! Who may what: plain Unix.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt,
    process::{Output, Stdio},
};

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

#[test]
fn what_the_old_owner_has_open_is_of_no_use_after_a_chown() {
    const OLD: u32 = 4_000_011;
    const NEW: u32 = 4_000_012;
    let host = Setup::counter("").start();
    host.bash_ok("chmod 1777 .");
    assert!(as_user(&host, OLD, OLD, "mkdir web-1").status.success());
    // Everything open, and then, when told to, each thing tried.
    let script = "exec 3>web-1/state 4<>web-1/console 5<web-1/status 6>web-1/activity \
         7>web-1/idle_after 8>web-1/config 9>web-1/awake 10<web-1/events; \
         echo open; read -r _; \
         for try in 'echo sleep >&3' 'echo x >&4' 'cat <&4' 'cat <&5' 'echo 1 >&6' 'echo 1s >&7' \
             'cat <&10' \
             'python3 -c \"import os; os.write(8, b\\\"vcpus = 2\\n\\\"); os.fsync(8)\"'; \
         do if eval \"$try\" >/dev/null 2>&1; then echo \"done: $try\"; fi; done; \
         echo tried; read -r _";
    let mut bash = command("/bin/bash");
    bash.args(["-c", script]).current_dir(host.mount()).uid(OLD).gid(OLD);
    let mut child = bash.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut told = child.stdin.take().unwrap();
    assert_eq!(said.next().as_deref(), Some("open"));
    assert_eq!(host.number("web-1/activity", "holds"), 1);
    host.bash_ok(&format!("chown {NEW}:{NEW} web-1"));
    assert_eq!(host.number("web-1/activity", "holds"), 0, "their hold has ended");
    let (before, count) = (host.read("web-1/config"), host.value("web-1/activity", "count"));
    writeln!(told, "go").unwrap();
    let did: Vec<String> = said.by_ref().take_while(|line| line != "tried").collect();
    assert_eq!(did, [""; 0]);
    assert_eq!(host.state("web-1"), "running");
    assert_eq!(host.read("web-1/config"), before);
    assert_eq!(host.value("web-1/activity", "count"), count);
    assert_ne!(host.read("web-1/idle_after"), "1s\n");
    drop(told);
    child.wait().unwrap();
    let new = as_user(&host, NEW, NEW, "echo sleep > web-1/state && cat web-1/status");
    assert!(new.status.success(), "{}", String::from_utf8_lossy(&new.stderr));
}

#[test]
fn what_a_guest_is_told_and_remembers_is_not_shown_to_strangers() {
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    let word = "secret=aB3,\\\"quoted\\\"";
    host.write("web-1/config", format!("cmdline = \"{word} {}\"", "x".repeat(1500))).unwrap();
    host.wake("web-1");
    host.counts_on("web-1");
    let pid = host.vmm("web-1");
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    assert!(!read("cmdline").contains("secret"), "{}", read("cmdline"));
    for (process, limits) in [
        ("the VMM", read("limits")),
        (
            "the daemon",
            std::fs::read_to_string(format!("/proc/{}/limits", host.daemon_pid())).unwrap(),
        ),
    ] {
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(
            core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(),
            ["0", "0"],
            "{process}"
        );
    }
    host.sleep("web-1");
    host.wake("web-1");
    host.counts_on("web-1");
}

#[test]
fn an_error_shows_no_control_character_and_has_an_end() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    let bad = format!("\x1b[31m\u{202e}{}", "y".repeat(4000));
    assert_eq!(host.write("web-1/state", &bad), Err(Errno::INVAL));
    let error = host.error("web-1");
    assert!(error.len() <= 512 && error.contains("[31m\\u{202e}yyy"), "{error}");
    assert!(!error.contains(['\x1b', '\u{202e}']), "{error:?}");
    let long = format!("kernel = \"/{}\"", "\\u202ez".repeat(8000));
    host.write("web-1/config", long).unwrap_err();
    let error = host.error("web-1");
    assert!(error.len() <= 512 && error.chars().all(|c| c != '\u{202e}'), "{error}");
}
