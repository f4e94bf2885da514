//! Opening files that somebody else names, with no more rights than they have.
//!
//! A path means something else at each look, when whoever names it may change what is there.
//! So it is looked up once, by a thread that is that somebody for the file system, and what
//! is found then is what is used: the open file, and never the path again.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

use super::owner::pretend;
use crate::sandbox::Writer;

/// Opens files for reading as `writer`, who is in the groups that are known of them. What is
/// neither a regular file nor a block device is refused, and not opened: to open some is to
/// wait, or to do something.
///
/// # Errors
/// Where nothing can be opened as them. What each of the files says is in its place.
pub fn open_as(writer: &Writer, paths: &[&Path]) -> io::Result<Vec<io::Result<OwnedFd>>> {
    thread::scope(|scope| {
        // Who a thread is for the file system is its own affair, and this one ends here. For
        // signals it goes on being us, so that they cannot end us by it.
        let opening = thread::Builder::new().name("dozed-open".to_owned()).spawn_scoped(
            scope,
            || -> io::Result<Vec<_>> {
                pretend(writer.uid, writer.gid, writer.groups())?;
                Ok(paths.iter().map(|path| open(path)).collect())
            },
        )?;
        opening.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns a path that leads to what is open as `file`, whatever is at its own path by now:
/// for us as long as it is open, and for a child that inherits it by the same number.
#[must_use]
pub fn handle_path(file: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

/// Reads the first bytes of a regular file or block device, at most `max`, without waiting for
/// anybody who has it. Anything else is refused.
///
/// # Errors
/// Those of open(2) and read(2).
pub fn read_start(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let found = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(openat(CWD, handle_path(&found), flags, Mode::empty())?);
    let mut start = Vec::with_capacity(max);
    file.take(max as u64).read_to_end(&mut start)?;
    Ok(start)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    // The files that a process has open are found by such links, and here that one is us.
    let links = ResolveFlags::NO_MAGICLINKS;
    let found = openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), links)?;
    let why = match FileType::from_raw_mode(fstat(&found)?.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => {
            // It was found already; this asks the kernel whether it may be read. Where
            // another holds a lease of it we do not wait.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            return Ok(openat(CWD, handle_path(&found), flags, Mode::empty())?);
        }
        FileType::Directory => "it is a directory",
        FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::Unknown => "it is neither a regular file nor a block device",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, chown, symlink},
    };

    use super::*;
    use crate::{sandbox::Owner, sys::host::own_ids};

    /// Nobody's.
    const OWNER: Owner = Owner { uid: 2_147_000_001, gid: 2_147_000_002 };

    /// A directory that everybody may use, where the owner has a file.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::set_permissions(place.0.path(), Permissions::from_mode(0o755)).unwrap();
            place
        }

        /// Makes a file that has its own name in it.
        fn file(&self, name: &str, owner: (u32, u32), mode: u32) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, name).unwrap();
            chown(&path, Some(owner.0), Some(owner.1)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    fn open_one(path: &Path) -> io::Result<OwnedFd> {
        open_as(&OWNER.into(), &[path]).unwrap().pop().unwrap()
    }

    fn refused(path: &Path) -> io::ErrorKind {
        open_one(path).unwrap_err().kind()
    }

    #[test]
    fn an_owner_opens_what_they_may_read_and_nothing_else() {
        let (place, ours) = (Place::new(), own_ids());
        let denied = io::ErrorKind::PermissionDenied;
        let own = place.file("own", (OWNER.uid, OWNER.gid), 0o400);
        let open = open_one(&own).unwrap();
        assert_eq!(fs::read(handle_path(&open)).unwrap(), b"own");
        open_one(&place.file("groups", (ours.0, OWNER.gid), 0o040)).unwrap();
        open_one(&place.file("everybodys", ours, 0o644)).unwrap();
        assert_eq!(refused(&place.file("ours", ours, 0o640)), denied);
        // Mode bits that keep the owner out keep them out here too.
        assert_eq!(refused(&place.file("shut", (OWNER.uid, OWNER.gid), 0o044)), denied);
        assert_eq!(fs::read(place.0.path().join("ours")).unwrap(), b"ours", "we are who we were");
    }

    #[test]
    fn a_file_of_a_group_that_they_were_in_is_opened_too() {
        const GROUP: u32 = 2_147_000_003;
        let (place, ours) = (Place::new(), own_ids());
        let path = place.file("groups", (ours.0, GROUP), 0o640);
        assert_eq!(refused(&path), io::ErrorKind::PermissionDenied);
        let writer = Writer::new(OWNER.uid, OWNER.gid, vec![7, GROUP]);
        open_as(&writer, &[&path]).unwrap().pop().unwrap().unwrap();
    }

    #[test]
    fn a_directory_that_is_shut_to_them_tells_not_even_what_is_in_it() {
        let (place, ours) = (Place::new(), own_ids());
        let there = place.file("shut/there", ours, 0o644);
        fs::set_permissions(there.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
        let denied = io::ErrorKind::PermissionDenied;
        assert_eq!(refused(&there), denied);
        assert_eq!(refused(&there.with_file_name("not there")), denied);
        assert_eq!(refused(&place.0.path().join("nowhere")), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_put_in_its_place_afterwards_is_not_what_is_used() {
        let (place, ours) = (Place::new(), own_ids());
        let (own, secret) =
            (place.file("own", (OWNER.uid, OWNER.gid), 0o600), place.file("secret", ours, 0o600));
        let open = open_one(&own).unwrap();
        fs::remove_file(&own).unwrap();
        symlink(&secret, &own).unwrap();
        assert_eq!(fs::read(handle_path(&open)).unwrap(), b"own");
        assert_eq!(refused(&own), io::ErrorKind::PermissionDenied, "a link gives nobody more");
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting_for_it() {
        let place = Place::new();
        let fifo = place.0.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        for path in [fifo.as_path(), place.0.path(), Path::new("/dev/zero")] {
            assert_eq!(refused(path), io::ErrorKind::InvalidInput, "{}", path.display());
        }
    }

    #[test]
    fn our_own_open_files_are_not_theirs() {
        let (place, ours) = (Place::new(), own_ids());
        let path = place.file("shut/ours", ours, 0o644);
        fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
        let open = fs::File::open(&path).unwrap();
        // The file itself may be read by all, but nobody else gets there.
        let error = open_one(&handle_path(&open)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{error}");
    }

    #[test]
    fn each_of_several_files_has_its_own_answer() {
        let (place, ours) = (Place::new(), own_ids());
        let own = place.file("own", (OWNER.uid, OWNER.gid), 0o600);
        let secret = place.file("secret", ours, 0o600);
        let answers = open_as(&OWNER.into(), &[&secret, &own]).unwrap();
        assert_eq!(answers.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, true]);
    }
}
