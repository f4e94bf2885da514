//! A client of a mounted tree, for processes that do not serve it.
//!
//! The serving process must never call this: see `events`.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{
        AtFlags, Mode, OFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fstat,
        major, minor, open, openat, statat, statx, unlinkat, utimensat,
    },
    io::Errno,
};

use super::mount::Device;

/// The open root of a tree, which keeps it busy.
#[derive(Debug)]
pub struct MountClient(OwnedFd);

/// The result of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// Done.
    Yes,
    /// The file is gone.
    Gone,
}

impl MountClient {
    /// Opens the tree that is mounted at `mount`.
    ///
    /// # Errors
    /// `NotFound` where another file system, or none, is mounted there by now.
    pub fn open(mount: &Path, device: Device) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = open(mount, flags, Mode::empty())?;
        let found = fstat(&root)?.st_dev;
        if (major(found), minor(found)) != (device.major, device.minor) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self(root))
    }

    /// Looks up a name that does not exist, and returns whether the server recognises this client
    /// by it, with EALREADY.
    pub fn register(&self, name: &str) -> io::Result<bool> {
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::ALREADY) => Ok(true),
            Ok(_) | Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the modification time of a file to now, if it still has this inode. Watchers see
    /// IN_MODIFY.
    pub fn touch(&self, path: &str, inode: u64) -> io::Result<Done> {
        let Some(file) = self.find(path, inode)? else {
            return Ok(Done::Gone);
        };
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: omit, last_modification: now };
        match utimensat(&file, "", &times, AtFlags::EMPTY_PATH) {
            Ok(()) => Ok(Done::Yes),
            Err(Errno::NOENT | Errno::NODEV) => Ok(Done::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a directory with these files, if it still has this inode. Missing files are skipped.
    pub fn remove_dir(&self, name: &str, inode: u64, files: &[&str]) -> io::Result<Done> {
        let Some(dir) = self.find(name, inode)? else {
            return Ok(Done::Gone);
        };
        for file in files {
            // Watchers of a file that remains get no event; the directory matters more.
            unlinkat(&dir, *file, AtFlags::empty()).ok();
        }
        drop(dir);
        match unlinkat(&self.0, name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(Done::Yes),
            Err(Errno::NOENT) => Ok(Done::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens `path`, if it has this inode.
    fn find(&self, path: &str, inode: u64) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.0, path, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::NODEV) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // An inode's number never changes, so no request to the server is needed.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = statx(&file, "", flags, StatxFlags::INO)?.stx_ino;
        Ok((found == inode).then_some(file))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt, time::SystemTime};

    use super::*;

    fn device_of(path: &Path) -> Device {
        let dev = fs::metadata(path).unwrap().dev();
        Device { major: major(dev), minor: minor(dev) }
    }

    #[test]
    fn a_touch_sets_the_time_of_the_file_that_is_meant_and_of_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let client = MountClient::open(dir.path(), device_of(dir.path())).unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "text").unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let inode = file.metadata().unwrap().ino();
        assert_eq!(client.touch("a", inode + 1).unwrap(), Done::Gone);
        assert_eq!(file.metadata().unwrap().modified().unwrap(), SystemTime::UNIX_EPOCH);
        assert_eq!(client.touch("a", inode).unwrap(), Done::Yes);
        assert_ne!(file.metadata().unwrap().modified().unwrap(), SystemTime::UNIX_EPOCH);
        assert_eq!(client.touch("b", inode).unwrap(), Done::Gone);
        assert_eq!(fs::read(&path).unwrap(), b"text");
    }

    #[test]
    fn a_directory_is_removed_only_if_it_is_the_one_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let client = MountClient::open(dir.path(), device_of(dir.path())).unwrap();
        let path = dir.path().join("a");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("state"), "").unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let files = ["state", "absent"];
        assert_eq!(client.remove_dir("a", inode + 1, &files).unwrap(), Done::Gone);
        assert!(path.join("state").exists());
        assert_eq!(client.remove_dir("a", inode, &files).unwrap(), Done::Yes);
        assert!(!path.exists());
        assert_eq!(client.remove_dir("a", inode, &files).unwrap(), Done::Gone);
        assert!(!client.register("a").unwrap());
    }

    #[test]
    fn another_file_system_is_not_taken_for_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let device = device_of(dir.path());
        let other = Device { minor: device.minor + 1, ..device };
        let error = MountClient::open(dir.path(), other).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
