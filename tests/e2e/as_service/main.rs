//! Runs a program under the restrictions of a systemd unit, where systemd is not there to do
//! it: `as-service UNIT DIR PROGRAM ARGUMENT…`, in a mount namespace of its own that shares
//! what is mounted below DIR.
//!
//! A directive that it does not know ends it, so that no unit has one that is not tried.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::disallowed_methods,
    reason = "it is replaced by the program, and waits for the others"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use rustix::{
    fs::{Mode, OFlags, open},
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive,
        mount_change, mount_remount, unmount,
    },
    thread::{CapabilitySet, remove_capability_from_bounding_set, set_no_new_privs},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// What restricts nobody that runs already, or gives more than a test has to give.
const HARMLESS: [&str; 19] = [
    "After",
    "Description",
    "Documentation",
    "ExecStart",
    "KillMode",
    "LimitCORE",
    "LimitNOFILE",
    "OOMPolicy",
    "RequiresMountsFor",
    "Restart",
    "RestartPreventExitStatus",
    "RestartSec",
    "StartLimitIntervalSec",
    "TasksMax",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "Type",
    "WantedBy",
    "Wants",
];
/// What `DevicePolicy=closed` leaves; terminals are a file system of their own.
const DEVICES: [&str; 7] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx"];

/// The directives of a unit: those of one name are one list.
struct Unit(BTreeMap<String, Vec<String>>);

impl Unit {
    fn read(path: &Path) -> Self {
        let mut directives: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for line in fs::read_to_string(path).unwrap().lines() {
            let Some((name, value)) = line.split_once('=').filter(|_| !line.starts_with('#'))
            else {
                continue;
            };
            let values = value.split_whitespace().map(str::to_owned);
            directives.entry(name.to_owned()).or_default().extend(values);
        }
        directives.retain(|name, _| name != "Wants" && !HARMLESS.contains(&name.as_str()));
        Self(directives)
    }

    /// Takes a directive out, so that what is left is what nobody has heeded.
    fn take(&mut self, name: &str) -> Vec<String> {
        self.0.remove(name).unwrap_or_default()
    }

    /// Takes out one that has a certain value or is not there. Says whether it is.
    fn takes(&mut self, name: &str, value: &str) -> bool {
        let values = self.take(name);
        assert!(values.is_empty() || values == [value], "{name}={values:?}");
        !values.is_empty()
    }
}

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let mut unit = Unit::read(Path::new(&arguments.next().unwrap()));
    let shared = PathBuf::from(arguments.next().unwrap());
    let program = arguments.next().unwrap();

    let has_all_devices = !unit.takes("DevicePolicy", "closed");
    let allowed = unit.take("DeviceAllow");
    if !has_all_devices {
        leave_devices(&allowed, &shared);
    }
    let mask = unit.take("UMask").first().map(|mask| u32::from_str_radix(mask, 8).unwrap());
    rustix::process::umask(Mode::from_raw_mode(mask.unwrap_or(0o022)));

    let mut filters = vec![
        families(&unit.take("RestrictAddressFamilies")),
        calls(&unit.take("SystemCallFilter")),
    ];
    assert!(unit.takes("SystemCallArchitectures", "native"));
    assert!(unit.takes("SystemCallErrorNumber", "EPERM"));
    if unit.takes("LockPersonality", "yes") {
        filters.push(refuse(libc::SYS_personality, &[&[(0, SeccompCmpOp::Ne, 0)]], libc::EPERM));
    }
    if unit.takes("RestrictRealtime", "yes") {
        let realtime = [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE];
        let realtime = realtime.map(|policy| [(1, SeccompCmpOp::Eq, policy.try_into().unwrap())]);
        let rules: Vec<&[_]> = realtime.iter().map(<[_; 1]>::as_slice).collect();
        filters.push(refuse(libc::SYS_sched_setscheduler, &rules, libc::EPERM));
    }
    bound(&unit.take("CapabilityBoundingSet"));
    assert!(unit.takes("NoNewPrivileges", "yes"));
    assert!(unit.0.is_empty(), "what of these directives? {:?}", unit.0);
    set_no_new_privs(true).unwrap();
    for filter in filters {
        seccompiler::apply_filter(&filter).unwrap();
    }
    panic!("{}: {}", program.display(), Command::new(&program).args(arguments).exec());
}

/// Takes all devices away but these and what is always there.
fn leave_devices(allowed: &[String], shared: &Path) {
    // Whoever else on this machine serves a file system is not to be held up by us, and what
    // we do to mounts is to be seen below the shared directory only.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter_map(|line| Some((line.split(' ').nth(4)?, line)));
    let others: Vec<_> = mounts.filter(|(dir, _)| !Path::new(dir).starts_with(shared)).collect();
    for (dir, _) in &others {
        // One that is covered by another is not reached, and need not be.
        mount_change(*dir, MountPropagationFlags::PRIVATE).ok();
    }
    for (dir, _) in others.iter().filter(|(_, line)| line.contains(" - fuse")) {
        unmount(*dir, UnmountFlags::DETACH).ok();
    }
    let always = DEVICES.iter().map(|name| Path::new("/dev").join(name));
    let paths: Vec<_> =
        allowed.iter().filter(|word| word.starts_with('/')).map(PathBuf::from).collect();
    let kept: Vec<(PathBuf, File)> = always
        .chain(paths)
        .filter_map(|path| {
            let file = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
            Some((path, File::from(file)))
        })
        .collect();
    // In a mount of it without devices those that are kept are mounts of their own.
    mount_bind_recursive("/dev", "/dev").unwrap();
    mount_remount("/dev", MountFlags::BIND | MountFlags::NODEV, c"").unwrap();
    for (path, file) in kept {
        mount_bind(format!("/proc/self/fd/{}", file.as_raw_fd()), &path).unwrap();
    }
    File::open("/dev/null").unwrap();
    File::open("/dev/kmsg").expect_err("it is not allowed");
}

/// Refuses a system call where one of the rules holds, of which each is conditions on
/// arguments.
fn refuse(call: i64, rules: &[&[(u8, SeccompCmpOp, u64)]], errno: i32) -> BpfProgram {
    let rules = rules.iter().map(|conditions| {
        let conditions = conditions.iter().map(|(argument, op, value)| {
            SeccompCondition::new(*argument, Dword, op.clone(), *value).unwrap()
        });
        SeccompRule::new(conditions.collect()).unwrap()
    });
    let rules = [(call, rules.collect())].into_iter().collect();
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64)
        .unwrap()
        .try_into()
        .unwrap()
}

/// Refuses sockets of all families but these.
fn families(allowed: &[String]) -> BpfProgram {
    let conditions: Vec<_> = allowed
        .iter()
        .map(|name| {
            let family = match name.as_str() {
                "AF_UNIX" => libc::AF_UNIX,
                "AF_INET" => libc::AF_INET,
                "AF_INET6" => libc::AF_INET6,
                "AF_NETLINK" => libc::AF_NETLINK,
                other => panic!("what is {other}?"),
            };
            (0, SeccompCmpOp::Ne, family.try_into().unwrap())
        })
        .collect();
    refuse(libc::SYS_socket, &[&conditions], libc::EAFNOSUPPORT)
}

/// Refuses the system calls of these groups, of which the first begins with `~`.
fn calls(groups: &[String]) -> BpfProgram {
    assert!(groups[0].starts_with('~'), "a list of what is refused: {groups:?}");
    let names: BTreeSet<_> =
        groups.iter().flat_map(|group| expand(group.trim_start_matches('~'))).collect();
    let filter = |names: &[String]| {
        let calls: Vec<_> =
            names.iter().map(|name| format!("{{\"syscall\": \"{name}\"}}")).collect();
        let errno = libc::EPERM;
        let filter = format!(
            "{{\"it\": {{\"mismatch_action\": \"allow\", \"match_action\": {{\"errno\": {errno}}}, \
             \"filter\": [{}]}}}}",
            calls.join(",")
        );
        seccompiler::compile_from_json(filter.as_bytes(), TargetArch::x86_64)
    };
    // This machine has not all of them.
    let known = names.into_iter().filter(|name| filter(std::slice::from_ref(name)).is_ok());
    filter(&known.collect::<Vec<_>>()).unwrap().remove("it").unwrap()
}

/// Returns the names of the calls of a group, as systemd has them.
fn expand(name: &str) -> Vec<String> {
    if !name.starts_with('@') {
        return vec![name.to_owned()];
    }
    let mut analyze = Command::new("systemd-analyze");
    let output = analyze.args(["syscall-filter", name]).output().unwrap();
    assert!(output.status.success(), "{name}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().skip(1).map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).flat_map(expand).collect()
}

/// Leaves these capabilities to be had, and no others.
fn bound(allowed: &[String]) {
    let allowed: Vec<_> =
        allowed.iter().map(|name| name.strip_prefix("CAP_").unwrap().to_owned()).collect();
    for (name, capability) in CapabilitySet::all().iter_names() {
        if !allowed.iter().any(|allowed| allowed == name) {
            // A kernel has not all of them.
            remove_capability_from_bounding_set(capability).ok();
        }
    }
    let unknown = allowed.iter().find(|name| CapabilitySet::from_name(name).is_none());
    assert_eq!(unknown, None, "what is that capability?");
}
