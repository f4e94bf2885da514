//! Handing files over to another user, and taking them back from one who may be up to no
//! good: whose directory it is may have put anything in it, and goes on while we look.
//!
//! Whatever is opened here is opened as it is: a link that stands in its place is refused.

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

/// What somebody may want of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// To read it.
    Read,
    /// To run it.
    Execute,
}

/// Opens `path` without the right to read it: for whoever inherits it, and may.
///
/// # Errors
/// Those of open(2).
pub fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Gives a file to the user `uid`, and to the group of that number, for them alone.
///
/// # Errors
/// Those of open(2) and fchown(2), and where it is no regular file.
pub fn give_file(path: &Path, uid: u32) -> io::Result<()> {
    let file = open_as_is(path, OFlags::NONBLOCK)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    own(&file, uid, uid, 0o600)
}

/// Gives a directory to the user `uid`, and to the group of that number, for them alone.
///
/// # Errors
/// Those of open(2) and fchown(2).
pub fn give_dir(dir: &Path, uid: u32) -> io::Result<()> {
    own(&open_as_is(dir, OFlags::DIRECTORY)?, uid, uid, 0o700)
}

/// Lets the group `gid` use the names in a directory of ours, and nobody else. What is
/// behind them is as safe as it is by itself. Our own group gets no more than others.
///
/// # Errors
/// Those of open(2) and fchown(2).
pub fn let_pass(dir: &Path, gid: u32) -> io::Result<()> {
    let (uid, own_gid) = own_ids();
    let mode = if gid == own_gid { 0o700 } else { 0o710 };
    own(&open_as_is(dir, OFlags::DIRECTORY)?, uid, gid, mode)
}

/// Lets the group `gid` read a file of ours.
///
/// # Errors
/// Those of open(2) and fchown(2).
pub fn let_read(file: &Path, gid: u32) -> io::Result<()> {
    own(&open_as_is(file, OFlags::NONBLOCK)?, own_ids().0, gid, 0o640)
}

/// Takes a directory back from whoever it was given to. From then on what is in it stays
/// as it is, but for the bytes of files that are still open.
///
/// # Errors
/// Those of open(2) and fchown(2).
pub fn take_back(dir: &Path) -> io::Result<()> {
    let (uid, gid) = own_ids();
    let file = open_as_is(dir, OFlags::DIRECTORY)?;
    // It is ours before its mode is set, which its owner could set again.
    own(&file, uid, gid, 0o700)
}

/// Looks that there is nothing in a directory, which was taken back from `uid`, but
/// regular files of `uid`'s that have no other name. Anything else is not a file that was
/// made there, and to open it would be to do whatever it is for.
///
/// # Errors
/// Says what there is.
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

/// Asks the kernel which of these files the user `uid`, who is in the group of that number
/// and in `groups`, may use as they wish, with no privilege.
///
/// # Errors
/// Where it cannot be asked; what is refused for whatever reason is `false`.
pub fn may(uid: u32, groups: &[u32], asked: &[(BorrowedFd<'_>, Wish)]) -> io::Result<Vec<bool>> {
    thread::scope(|scope| {
        // Who a thread is for the file system is its own affair. For signals it goes on
        // being us, so that nobody can end us by it.
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

/// Makes this thread, for as long as it lives, that user for the file system, without privileges.
/// For signals it goes on being us, so that they cannot end it.
pub(in crate::sys) fn pretend(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    set_thread_groups(&groups)?;
    for (number, id) in [(libc::SYS_setfsgid, gid), (libc::SYS_setfsuid, uid)] {
        // SAFETY: the call takes a number, and changes nothing but this thread's.
        let _before = unsafe { libc::syscall(number, id) };
        // It never says whether it was done. Of an id that is none it returns the present.
        // SAFETY: as above.
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

/// Sees to it that a file has this owner, group and mode. One that has them is left alone.
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

    /// Nobody's.
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
