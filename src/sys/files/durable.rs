//! Durable creating, replacing, renaming and removing.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags};

use super::regular::open_regular;

/// Creates the directory `path` and its parents with mode 0700.
///
/// An existing one keeps its mode.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Waits until the entries of the directory `path` are on the disk.
///
/// # Errors
/// Those of open(2) and fsync(2). After a failed fsync nobody knows what is there. A second one
/// does not say that all is well, as it may of a file's content: a directory is in the journal,
/// and a file system whose journal fails (ext4, XFS, btrfs) takes no more changes.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)?;
    file.sync_all()
}

/// Waits until the file `path` is on the disk.
pub fn sync_file(path: &Path) -> io::Result<()> {
    open_regular(path)?.sync_all()
}

/// Replaces the file `path` atomically and durably by `bytes`, with mode 0600.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = with_suffix(path, ".tmp");
    let written = create_private(&draft)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| Ok(rustix::fs::rename(&draft, path)?));
    if let Err(error) = written {
        // The first error is reported; the next write truncates the draft.
        fs::remove_file(&draft).ok();
        return Err(error);
    }
    sync_dir(parent(path)?)
}

/// Renames `from` to `to`, which must not exist, without a sync.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?;
    Ok(())
}

/// Renames `from` to `to`, which must not exist, durably.
///
/// # Errors
/// As [`rename`]. Where it is the fsync that fails the rename is taken back, so that what the
/// directory shows is never more than what was promised.
pub fn rename_durably(from: &Path, to: &Path) -> io::Result<()> {
    let (from_dir, to_dir) = (parent(from)?, parent(to)?);
    rename(from, to)?;
    let synced = sync_dir(to_dir)
        .and_then(|()| if from_dir == to_dir { Ok(()) } else { sync_dir(from_dir) });
    if synced.is_err() {
        // The first error is reported.
        rename(to, from).ok();
    }
    synced
}

/// Removes the directory `path` and its contents, if it exists.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the file `path`, if it exists.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Returns the free bytes of the file system of `dir`.
pub fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Opens `path` empty for reading and writing, with mode 0600.
pub fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Returns `path` with `suffix` at its end.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn parent(path: &Path) -> io::Result<&Path> {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(dir) => Ok(dir),
        None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_private_dir_is_made_with_those_above_it_and_may_be_there() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/b");
        make_private_dir(&dir).unwrap();
        make_private_dir(&dir).unwrap();
        assert_eq!((mode(&temp.path().join("a")), mode(&dir)), (0o700, 0o700));
    }

    #[test]
    fn a_durable_write_replaces_the_file_and_leaves_no_draft() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("f");
        write_durably(&path, b"old, and longer").unwrap();
        write_durably(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_durable_write_that_fails_leaves_no_draft() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("d");
        fs::create_dir(&path).unwrap();
        write_durably(&path, b"x").unwrap_err();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_durable_rename_never_replaces() {
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("from"), temp.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&to).unwrap();
        let error = rename_durably(&from, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        fs::remove_dir(&to).unwrap();
        rename_durably(&from, &to).unwrap();
        assert!(to.is_dir() && !from.exists());
    }

    #[test]
    fn removing_what_is_gone_is_fine() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d");
        fs::create_dir_all(dir.join("e")).unwrap();
        remove_tree(&dir).unwrap();
        remove_tree(&dir).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn a_file_system_says_what_it_has_left() {
        let temp = tempfile::tempdir().unwrap();
        assert!(free_bytes(temp.path()).unwrap() > 0);
    }
}
