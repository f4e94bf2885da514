//! Landlock (`landlock(7)`).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use rustix::fs::{Mode, OFlags, open};

/// Returns the kernel's version of Landlock; 0 without it.
#[must_use]
pub fn abi() -> u32 {
    const GIVE_VERSION: libc::c_uint = 1;
    let no_attributes = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no attributes, and wants null and 0 for them;
    // it makes nothing and returns a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, no_attributes, 0_usize, GIVE_VERSION)
    };
    u32::try_from(version).unwrap_or(0)
}

/// `struct landlock_ruleset_attr` of linux/landlock.h. Older kernels know its first fields.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
struct Ruleset {
    fs: u64,
    net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed: u64,
    dir: i32,
}

/// `LANDLOCK_ACCESS_FS_REMOVE_DIR` and `LANDLOCK_ACCESS_FS_REMOVE_FILE`.
const REMOVE: u64 = 1 << 4 | 1 << 5;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: libc::c_uint = 1;

/// Returns all that the kernel can refuse, by its version of Landlock, and how much of
/// that structure it knows.
fn everything(abi: u32) -> (Ruleset, usize) {
    let fs = match abi {
        0 | 1 => (1 << 13) - 1,
        2 => (1 << 14) - 1,
        3 | 4 => (1 << 15) - 1,
        5.. => (1 << 16) - 1,
    };
    let net = if abi >= 4 { 0b11 } else { 0 };
    let scoped = if abi >= 6 { 0b11 } else { 0 };
    let known = match abi {
        0..=3 => 1,
        4 | 5 => 2,
        6.. => 3,
    };
    (Ruleset { fs, net, scoped }, known * size_of::<u64>())
}

/// Restricts this thread and its children, for good, to removing files and directories below `dir`:
/// they can open and create no file. Landlock does not govern setting a file's times. Returns false
/// without Landlock.
pub fn only_remove_below(dir: &Path) -> io::Result<bool> {
    let abi = abi();
    if abi == 0 {
        return Ok(false);
    }
    let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let (refused, size) = everything(abi);
    let ruleset = create(&refused, size)?;
    let beneath = Beneath { allowed: REMOVE, dir: dir.as_raw_fd() };
    // SAFETY: the structure is what this kind of rule wants, and is alive for the call; both
    // descriptors are open for it.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const beneath,
            0,
        )
    };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call takes no pointers, and the descriptor is open for it.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if done == 0 { Ok(true) } else { Err(io::Error::last_os_error()) }
}

fn create(refused: &Ruleset, size: usize) -> io::Result<OwnedFd> {
    // SAFETY: the structure is alive for the call, and at least `size` bytes long.
    let made =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const *refused, size, 0) };
    let number = i32::try_from(made).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_what_the_kernel_knows() {
        assert_eq!(everything(1), (Ruleset { fs: 0x1fff, net: 0, scoped: 0 }, 8));
        assert_eq!(everything(3), (Ruleset { fs: 0x7fff, net: 0, scoped: 0 }, 8));
        assert_eq!(everything(4), (Ruleset { fs: 0x7fff, net: 3, scoped: 0 }, 16));
        assert_eq!(everything(99), (Ruleset { fs: 0xffff, net: 3, scoped: 3 }, 24));
    }

    #[test]
    fn a_thread_that_gave_it_up_can_only_remove() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = [inside.path().join("a"), outside.path().join("a")];
        files.iter().for_each(|file| std::fs::write(file, "text").unwrap());
        let (shut_in, shut_out) = (inside.path().to_owned(), outside.path().to_owned());
        // Only the thread is shut in.
        let thread = std::thread::Builder::new().spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            if !only_remove_below(&shut_in).unwrap() {
                return;
            }
            for file in &files {
                assert!(std::fs::read(file).is_err());
                assert!(std::fs::write(file, "more").is_err());
                assert!(std::fs::write(file.with_extension("b"), "").is_err());
                assert!(file.metadata().is_ok(), "to look is not governed");
            }
            std::fs::remove_file(&files[0]).unwrap();
            assert!(std::fs::remove_file(&files[1]).is_err());
            assert!(std::fs::remove_dir(&shut_out).is_err());
        });
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn the_version_is_one_that_a_kernel_could_have() {
        // They were at 7 in 2025, and have come one or two a year.
        assert!(abi() < 100, "{}", abi());
        assert_eq!(abi(), abi());
    }
}
