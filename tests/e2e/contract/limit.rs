//! Limits: of sandboxes, of memory, and of the disk.

use rustix::io::Errno;

use super::{refused, shell_fails};
use crate::support::Setup;

#[test]
fn there_are_not_more_sandboxes_than_the_limit() {
    let host = Setup::bare().config("[limits]\nsandboxes = 3").start();
    host.bash_ok("mkdir a b c");
    assert_eq!(host.mkdir("d"), Err(Errno::DQUOT));
    shell_fails(&host, "mkdir d", &[], Errno::DQUOT);
    assert_eq!(host.mkdir("a"), Err(Errno::EXIST), "what exists is not one more");
    host.rmdir("b").unwrap();
    host.mkdir("d").unwrap();
}

#[test]
fn what_is_awake_has_no_more_memory_than_the_limit() {
    let mut host = Setup::counter("").config("[limits]\nmemory = \"60MiB\"").start();
    host.boot("a");
    host.boot("b");
    host.mkdir("c").unwrap();
    refused(&host, "c/state", b"wake", Errno::NOMEM, "12 MiB");
    assert_eq!(host.state("c"), "stopped");
    assert_eq!(host.number("dozed.status", "memory_bytes"), 48 << 20);
    // The budget is also that of the next daemon.
    host.kill_daemon();
    host.restart();
    refused(&host, "c/state", b"wake", Errno::NOMEM, "12 MiB");
    host.sleep("a");
    host.wake("c");
    refused(&host, "a/state", b"wake", Errno::NOMEM, "12 MiB");
    assert_eq!(host.state("a"), "snapshotted");
    host.rmdir("b").unwrap();
    host.wake("a");
    host.counts_on("a");
}
