//! What a daemon holds: its descriptors and threads, to be compared with an earlier look.

use std::{collections::BTreeMap, fs};

use super::wait::{wait_for, wait_within};

/// The descriptors and threads of a process, by what they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footprint {
    fds: BTreeMap<String, usize>,
    threads: BTreeMap<String, usize>,
}

/// Threads that say nothing: those that wait for work and go away by themselves after a
/// while, and those of the mount, which may start a moment after it serves.
const PASSED_OVER: [&str; 4] = ["dozed-op", "fuser-0", "fuser-1", "fuser-bg"];

/// The thread that listens for packets to all sleepers, from the first of them on to the end.
const LISTENER: &str = "dozed-packets";
/// What it has open: a device, a way to end it, and the kernel's links.
const OF_LISTENER: [&str; 3] = ["/dev/net/tun", "anon_inode", "socket"];

impl Footprint {
    /// Looks at the daemon `pid`, which has just started, until all its threads have
    /// their names: a new one is called as the program until it gets to run.
    pub(super) fn at_start(pid: u32) -> Self {
        wait_for("the threads of the daemon have names", || {
            let now = Self::of(pid);
            (now.threads.get("dozed") == Some(&1)).then_some(now)
        })
    }

    /// Waits until the daemon `pid` holds no more than in `before`, and the listener for packets.
    #[track_caller]
    pub(super) fn wait_for(pid: u32, before: &Self) {
        let mut grown = String::new();
        let held = wait_within(|| {
            grown = Self::of(pid).growth(before);
            grown.is_empty()
        });
        assert!(held, "the daemon holds {grown}than at its start");
    }

    fn of(pid: u32) -> Self {
        let mut footprint = Self { fds: BTreeMap::new(), threads: BTreeMap::new() };
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            // A descriptor that is closed meanwhile does not count.
            let Ok(target) = fs::read_link(fd.path()) else { continue };
            let target = target.to_string_lossy();
            // `socket:[1234]`, `pipe:[1234]` and `/proc/1234/mountinfo` differ at each start.
            let kind = target.split(":[").next().unwrap();
            let kind = kind.replace(&format!("/proc/{pid}/"), "/proc/self/");
            *footprint.fds.entry(kind).or_default() += 1;
        }
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
            if !PASSED_OVER.contains(&name.trim()) {
                *footprint.threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        footprint
    }

    /// Returns what there is more of than in `before`, in words; empty if nothing is.
    fn growth(&self, before: &Self) -> String {
        let has_listener = self.threads.contains_key(LISTENER);
        let grown = |now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>| {
            let more = |(kind, count): (&String, &usize)| {
                let is_its = kind == LISTENER || OF_LISTENER.contains(&kind.as_str());
                let then = then.get(kind).copied().unwrap_or(0);
                let then = then + usize::from(has_listener && is_its);
                (*count > then).then(|| format!("{} more of {kind}; ", count - then))
            };
            now.iter().filter_map(more).collect::<String>()
        };
        grown(&self.fds, &before.fds) + &grown(&self.threads, &before.threads)
    }
}
