//! Hosts whose kernel has no Landlock: guests run there all the same, and it is said.

use std::{path::Path, sync::Arc, thread};

use dozed::sys::process::Process;
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

use crate::{
    daemon::{Daemon, spawn},
    support::eventually,
};

const ID: &str = "web-1";
/// `SYS_landlock_create_ruleset`, which is the same for all architectures.
const LANDLOCK_CREATE_RULESET: i64 = 444;

/// Starts a daemon, to which and to whose children the kernel says what one without
/// Landlock does.
fn spawn_without_landlock(dir: &Path) -> Arc<Process> {
    spawn_without(dir, LANDLOCK_CREATE_RULESET, Errno::NOSYS)
}

/// Starts a daemon, to which and to whose children the kernel answers one system call with
/// an error.
pub(crate) fn spawn_without(dir: &Path, call: i64, error: Errno) -> Arc<Process> {
    let filter = SeccompFilter::new(
        [(call, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.raw_os_error().cast_unsigned()),
        TargetArch::x86_64,
    )
    .unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // A filter is the thread's, and is inherited.
    let spawning = || {
        apply_filter(&program).unwrap();
        spawn(dir)
    };
    thread::scope(|scope| scope.spawn(spawning).join().unwrap())
}

#[test]
fn a_host_without_landlock_runs_guests_and_status_says_what_they_lack() {
    let lacks = |daemon: &Daemon| {
        let status = daemon.read(ID, "status");
        status.lines().find_map(|line| line.strip_prefix("lacks ")).unwrap().to_owned()
    };
    let confined = Daemon::start("53.0");
    let bare = Daemon::start_by("53.0", spawn_without_landlock);
    for (daemon, has_landlock) in [(&confined, true), (&bare, false)] {
        daemon.make(ID);
        for verb in ["wake", "sleep", "wake"] {
            daemon.write(ID, verb).unwrap();
        }
        eventually("the guest's count", || {
            daemon.read(ID, "console").contains("count 00000003").then_some(())
        });
        let told = lacks(daemon).contains("the kernel has no Landlock");
        assert_eq!(told, !has_landlock, "{}", lacks(daemon));
        let calls = daemon.standin.calls();
        let created = calls.iter().find(|call| call.contains("vm.create")).unwrap();
        let asked = created.contains("\"landlock_enable\":true");
        assert_eq!(asked, has_landlock, "{created}");
    }
    assert!(bare.log().contains("the kernel has no Landlock"), "{}", bare.log());
}
