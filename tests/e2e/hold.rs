//! Holds: a sandbox is awake for as long as somebody has its `awake` open for writing.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
};

use rustix::{io::Errno, process::Signal};

use crate::support::{Host, Setup, command, signal, wait_for, wait_until};

/// Starts a shell in the mount that does `script`, says what its last job is, and waits for
/// the end of its input. Returns that too.
fn shell(host: &Host, script: &str) -> (Child, String) {
    let mut bash = command("/bin/bash");
    bash.args(["-c", &format!("{script}; echo \"job $!\"; read line")]);
    bash.current_dir(host.mount()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = bash.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    (child, line.strip_prefix("job ").unwrap().trim().to_owned())
}

fn holders(host: &Host, id: &str) -> usize {
    host.read(&format!("{id}/awake")).lines().count()
}

#[test]
fn a_shell_that_holds_wakes_and_keeps_awake_until_it_is_killed() {
    let host = Setup::counter("").config("[reaper]\ntick = \"1s\"").start();
    host.boot("web-1");
    host.sleep("web-1");
    host.write("web-1/idle_after", "1s").unwrap();

    let (mut bash, _) = shell(&host, "exec 9> web-1/awake");
    assert_eq!(host.state("web-1"), "running");
    let line = host.read("web-1/awake");
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words[0], words[1], words[3]), (&*bash.id().to_string(), "0", "bash"), "{line}");
    assert_eq!(host.value("web-1/idle", "verdict"), "held");
    assert_eq!(host.value("web-1/idle", "sleeps_at"), "none");

    // Longer than it may be idle, by two looks of the reaper.
    let looked = || host.value("dozed.status", "reaper_last_tick");
    for _ in 0..3 {
        let before = looked();
        wait_until("a look of the reaper", || looked() != before);
    }
    assert_eq!(host.state("web-1"), "running");
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::BUSY));
    assert!(host.error("web-1").contains(&format!("bash (pid {}, uid 0)", bash.id())));
    assert_eq!(host.rmdir("web-1"), Err(Errno::BUSY));

    signal(&bash, Signal::KILL);
    bash.wait().unwrap();
    wait_until("the end of the hold", || holders(&host, "web-1") == 0);
    wait_until("the reaper", || host.state("web-1") == "snapshotted");
}

#[test]
fn the_last_who_has_the_file_holds() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let hold = "exec 9> web-1/awake; sleep 1000 > /dev/null & exec 9>&-";
    let (mut bash, child) = shell(&host, hold);
    drop(bash.stdin.take());
    bash.wait().unwrap();
    assert_eq!(holders(&host, "web-1"), 1, "a child has it still");
    assert_eq!(host.write("web-1/state", "sleep"), Err(Errno::BUSY));
    host.bash_ok(&format!("kill {child}"));
    wait_until("the end of the hold", || holders(&host, "web-1") == 0);
    host.sleep("web-1");
}

#[test]
fn who_does_not_wait_has_a_hold_at_once_and_who_is_signalled_has_none() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    host.sleep("web-1");
    let script = "import os; f = os.open(\"web-1/awake\", os.O_WRONLY | os.O_NONBLOCK); \
                  print(open(\"web-1/awake\").read(), end=\"\")";
    let line = host.bash_ok(&format!("python3 -c '{script}'"));
    assert!(line.contains(" python3"), "{line}");
    wait_until("the wake", || host.state("web-1") == "running");
    wait_until("the end of the hold", || holders(&host, "web-1") == 0);

    // A sleep that is stuck has the lock, so whoever opens has to wait.
    let vmm = host.vmm("web-1");
    host.signal_vmm(vmm, Signal::STOP);
    let mut sleep = command("/bin/bash");
    sleep.args(["-c", "echo sleep > web-1/state"]).current_dir(host.mount());
    let mut sleep = sleep.spawn().unwrap();
    wait_until("the sleep has begun", || host.state("web-1") == "snapshotting");
    let mut opener = command("/bin/bash");
    opener.args(["-c", "exec 9> web-1/awake"]).current_dir(host.mount());
    let mut opener = opener.stderr(Stdio::null()).spawn().unwrap();
    wait_until("the opener waits", || holders(&host, "web-1") == 1);
    signal(&opener, Signal::TERM);
    wait_for("the end of the opener", || opener.try_wait().unwrap());
    host.signal_vmm(vmm, Signal::CONT);
    sleep.wait().unwrap();
    // It had asked for it to be woken before it left; that is done, and then it lets go.
    wait_until("the end of the hold", || holders(&host, "web-1") == 0);
    wait_until("a state to stay in", || {
        ["running", "snapshotted"].contains(&&*host.state("web-1"))
    });
    host.sleep("web-1");
}
