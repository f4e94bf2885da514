//! The names that it is told of its files.
//!
//! It runs as a user of its own, who may not enter the directories that lead to them. So it
//! inherits them by numbers that are the same in every process, and is told these: whoever
//! adopts it, and whoever loads what it saved, knows them too.

use std::path::{Path, PathBuf};

use crate::{sys::process::FixedFd, vmm::Plan};

/// Returns the place with this number.
const fn place(number: u8) -> FixedFd {
    match FixedFd::new(number) {
        Some(place) => place,
        None => panic!("there are as many places"),
    }
}

/// The sandbox's own directory.
pub(super) const HOME: FixedFd = place(0);
/// The directory of its sockets.
pub(super) const RUNTIME: FixedFd = place(1);
/// The kernel, which is read again when the guest resets its machine.
pub(super) const KERNEL: FixedFd = place(2);
/// The initial RAM file system, which is too.
pub(super) const INITRAMFS: FixedFd = place(3);
/// The memory: that of the snapshot which is loaded, or the one that is mapped.
pub(super) const MEMORY: FixedFd = place(4);
/// The state of the devices in the snapshot which is loaded.
pub(super) const STATE: FixedFd = place(5);
/// Its own program.
pub(super) const PROGRAM: FixedFd = place(6);
/// The number of the first disk's place; the others follow.
const DISKS: u8 = 10;

/// Returns the place of a disk, by its number from nought. There are more of them than a
/// sandbox has disks.
pub(super) fn disk(number: usize) -> Option<FixedFd> {
    u8::try_from(number).ok()?.checked_add(DISKS).and_then(FixedFd::new)
}

/// Returns the path of what is in a place.
pub(super) fn path(place: FixedFd) -> PathBuf {
    PathBuf::from(place.to_string())
}

/// Returns the sandbox's own directory, which its console's log is in.
pub(super) fn home(plan: &Plan) -> &Path {
    plan.console_log.parent().unwrap_or(Path::new("/"))
}

/// Returns what it is told of something in `home`, or of what is elsewhere.
pub(super) fn in_home(home: &Path, file: &Path) -> PathBuf {
    file.strip_prefix(home).map_or_else(|_| file.to_owned(), |name| path(HOME).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_by_its_fixed_fd() {
        assert_eq!(path(HOME), Path::new("/proc/self/fd/200"));
        let home = Path::new("/store/7");
        let told = |file: &str| in_home(home, Path::new(file)).display().to_string();
        assert_eq!(told("/store/7/8.partial"), "/proc/self/fd/200/8.partial");
        assert_eq!(told("/store/70/x"), "/store/70/x");
        assert_eq!(disk(0).unwrap().to_string(), "/proc/self/fd/210");
        assert_eq!(disk(21).unwrap().to_string(), "/proc/self/fd/231");
        assert_eq!(disk(22), None);
    }
}
