//! Gives files to another user, and takes them back from one that may be malicious and change its
//! directory at any time.
//!
//! Links are never followed.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
};

use rustix::{
    fs::{CWD, Mode, OFlags, fchmod, fchown, openat},
    process::{Gid, Uid},
    thread::{CapabilitySet, CapabilitySets, set_capabilities, set_thread_groups},
};

use crate::sys::host::own_ids;

/// A kind of access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// To read it.
    Read,
    /// To run it.
    Execute,
}

/// Opens `path` with `O_PATH`, for a child that may read it.
pub fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Gives a file to the user `uid` and the group of that number, with mode 0600.
pub fn give_file(path: &Path, uid: u32) -> io::Result<()> {
    let file = open_as_is(path, OFlags::NONBLOCK)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    own(&file, uid, uid, 0o600)
}

/// Gives a directory to the user `uid` and the group of that number, with mode 0700.
pub fn give_dir(dir: &Path, uid: u32) -> io::Result<()> {
    own(&open_as_is(dir, OFlags::DIRECTORY)?, uid, uid, 0o700)
}

/// Lets the group `gid`, and nobody else, enter a directory of the daemon.
pub fn let_pass(dir: &Path, gid: u32) -> io::Result<()> {
    let (uid, own_gid) = own_ids();
    let mode = if gid == own_gid { 0o700 } else { 0o710 };
    own(&open_as_is(dir, OFlags::DIRECTORY)?, uid, gid, mode)
}

/// Lets the group `gid` read a file of the daemon.
pub fn let_read(file: &Path, gid: u32) -> io::Result<()> {
    own(&open_as_is(file, OFlags::NONBLOCK)?, own_ids().0, gid, 0o640)
}

/// Takes a directory back from its user. From then on only the contents of open files can change.
pub fn take_back(dir: &Path) -> io::Result<()> {
    let (uid, gid) = own_ids();
    let file = open_as_is(dir, OFlags::DIRECTORY)?;
    // The owner first: the old owner could change the mode again.
    own(&file, uid, gid, 0o700)
}

/// Checks that a directory, which was taken back from `uid`, contains only regular files of `uid`
/// with one name. Opening anything else could have effects.
pub fn check_plain(dir: &Path, uid: u32) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // This looks at a link, and not at what it leads to.
        let meta = entry.metadata()?;
        let why = if !meta.is_file() {
            "is not a regular file"
        } else if meta.nlink() != 1 {
            "has a second hard link"
        } else if meta.uid() != uid {
            "belongs to somebody else"
        } else {
            continue;
        };
        let name = entry.file_name();
        return Err(io::Error::other(format!("`{}` {why}", name.display())));
    }
    Ok(())
}

/// Asks the kernel which of these files the user `uid`, in the group of that number and in
/// `groups`, may access without privileges.
pub fn may(uid: u32, groups: &[u32], asked: &[(BorrowedFd<'_>, Wish)]) -> io::Result<Vec<bool>> {
    thread::scope(|scope| {
        // The file system identity belongs to the thread, and does not affect signals.
        let asking = thread::Builder::new().name("dozed-may".to_owned()).spawn_scoped(
            scope,
            || -> io::Result<Vec<bool>> {
                pretend(uid, uid, groups)?;
                Ok(asked.iter().map(|(file, wish)| is_granted(*file, *wish)).collect())
            },
        )?;
        asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Changes the file system identity of this thread, for good, without privileges. It does not
/// affect signals.
pub(in crate::sys) fn pretend(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    set_thread_groups(&groups)?;
    for (number, id) in [(libc::SYS_setfsgid, gid), (libc::SYS_setfsuid, uid)] {
        // SAFETY: the call takes a number, and changes nothing but this thread's.
        let _before = unsafe { libc::syscall(number, id) };
        // It reports no errors. With an invalid id it returns the current one. SAFETY: as above.
        let now = unsafe { libc::syscall(number, u32::MAX) };
        if now != libc::c_long::from(id) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

fn is_granted(file: BorrowedFd<'_>, wish: Wish) -> bool {
    let mode = match wish {
        Wish::Read => libc::R_OK,
        Wish::Execute => libc::X_OK,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_EACCESS;
    // SAFETY: the name is a string that lives until the call is over, and the descriptor
    // is open.
    let answer =
        unsafe { libc::syscall(libc::SYS_faccessat2, file.as_raw_fd(), c"".as_ptr(), mode, flags) };
    answer == 0
}

fn open_as_is(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(openat(CWD, path, flags, Mode::empty())?))
}

/// Sets owner, group and mode of a file, if they differ.
fn own(file: &File, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    let meta = file.metadata()?;
    if (meta.uid(), meta.gid()) != (uid, gid) {
        fchown(file.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if meta.mode() & 0o7777 != mode || meta.uid() != uid {
        fchmod(file.as_fd(), Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    const UID: u32 = 2_147_000_001;

    fn facts(path: &Path) -> (u32, u32, u32) {
        let meta = fs::symlink_metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    }

    #[test]
    fn a_file_is_given_and_a_link_in_its_place_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let (file, link) = (temp.path().join("file"), temp.path().join("link"));
        fs::write(&file, b"x").unwrap();
        symlink(&file, &link).unwrap();
        let before = facts(&file);
        give_file(&link, UID).unwrap_err();
        give_dir(&link, UID).unwrap_err();
        take_back(&link).unwrap_err();
        assert_eq!(facts(&file), before);
        give_file(&file, UID).unwrap();
        assert_eq!(facts(&file), (UID, UID, 0o600));
        assert!(give_file(temp.path(), UID).is_err(), "a directory is no file");
    }

    #[test]
    fn a_directory_is_given_and_taken_back_whatever_mode_it_has_by_then() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        give_dir(dir, UID).unwrap();
        assert_eq!(facts(dir), (UID, UID, 0o700));
        fs::set_permissions(dir, fs::Permissions::from_mode(0o3777)).unwrap();
        take_back(dir).unwrap();
        let (uid, gid) = own_ids();
        assert_eq!(facts(dir), (uid, gid, 0o700));
        let_pass(dir, UID).unwrap();
        assert_eq!(facts(dir), (uid, UID, 0o710));
        let_pass(dir, gid).unwrap();
        assert_eq!(facts(dir), (uid, gid, 0o700));
    }

    #[test]
    fn what_is_no_plain_file_of_its_maker_is_told_by_its_name() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, outside) = (temp.path().join("dir"), temp.path().join("outside"));
        fs::write(&outside, b"x").unwrap();
        let uid = own_ids().0;
        let fifo = |path: &Path| {
            let mode = Mode::RUSR;
            rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        };
        type Make<'a> = &'a dyn Fn(&Path);
        let cases: [(Make<'_>, &str); 5] = [
            (&|path| symlink(&outside, path).unwrap(), "`it` is not a regular file"),
            (&|path| fs::hard_link(&outside, path).unwrap(), "`it` has a second hard link"),
            (&fifo, "`it` is not a regular file"),
            (&|path| fs::create_dir(path).unwrap(), "`it` is not a regular file"),
            (
                &|path| {
                    fs::write(path, b"x").unwrap();
                    give_file(path, UID).unwrap();
                },
                "`it` belongs to somebody else",
            ),
        ];
        for (make, says) in cases {
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("good"), b"x").unwrap();
            check_plain(&dir, uid).unwrap();
            make(&dir.join("it"));
            assert_eq!(check_plain(&dir, uid).unwrap_err().to_string(), says);
            fs::remove_dir_all(&dir).unwrap();
        }
    }

    #[test]
    fn the_kernel_says_what_somebody_else_may() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        fs::write(&path, b"x").unwrap();
        let file = open_path(&path).unwrap();
        let ask = |uid, groups: &[u32]| {
            let asked = [(file.as_fd(), Wish::Read), (file.as_fd(), Wish::Execute)];
            may(uid, groups, &asked).unwrap()
        };
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o600);
        assert_eq!(ask(UID, &[]), [false, false]);
        mode(0o604);
        assert_eq!(ask(UID, &[]), [true, false]);
        mode(0o750);
        assert_eq!(ask(UID, &[]), [false, false]);
        assert_eq!(ask(UID, &[own_ids().1]), [true, true], "by one of its groups");
        // Root without privileges is a user like others.
        give_file(&path, UID).unwrap();
        assert_eq!(ask(own_ids().0, &[]), [false, false]);
        assert_eq!(ask(UID, &[]), [true, false]);
        assert_eq!(fs::read(&path).unwrap(), b"x", "we are who we were");
    }
}
