//! A daemon that may open only so many more files.

use std::{collections::BTreeSet, fs};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// Lets the process open only so many more files.
pub(crate) fn leave_descriptors(pid: u32, spare: usize) {
    let open: BTreeSet<u64> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    let free = (0..).filter(|number| !open.contains(number));
    // The limit is the first number that it does not get.
    let limit = free.take(spare + 1).last().unwrap();
    limit_descriptors(pid, Some(limit));
}

/// Sets the number that the descriptors of the process are below, or the most that there is.
pub(crate) fn limit_descriptors(pid: u32, limit: Option<u64>) {
    let most = getrlimit(Resource::Nofile).maximum;
    let pid = Pid::from_raw(pid.cast_signed());
    let limit = Rlimit { current: limit.or(most), maximum: most };
    prlimit(pid, Resource::Nofile, limit).unwrap();
}
