//! The identity of files.

use std::{collections::HashSet, fs, io, path::Path};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

/// The unique identity of a file on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    device: (u32, u32),
    inode: u64,
}

impl FileId {
    /// Reads the identity of the file at `path`, without asking a FUSE or network server.
    pub fn of(path: &Path) -> io::Result<Self> {
        let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
        let device = (found.stx_dev_major, found.stx_dev_minor);
        Ok(Self { device, inode: found.stx_ino })
    }
}

/// Returns the files in `dir` and its subdirectories, `depth` deep, without links.
pub fn ids_below(dir: &Path, depth: usize) -> io::Result<HashSet<FileId>> {
    let mut ids = HashSet::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_file() {
            // It may go away meanwhile.
            ids.extend(FileId::of(&entry.path()));
        } else if kind.is_dir() && depth > 0 {
            ids.extend(ids_below(&entry.path(), depth - 1).unwrap_or_default());
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_same_by_every_name_and_a_copy_is_another() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("dir");
        fs::create_dir_all(dir.join("below/deep")).unwrap();
        let (file, copy) = (dir.join("below/file"), temp.path().join("copy"));
        fs::write(&file, "x").unwrap();
        fs::write(dir.join("below/deep/far"), "x").unwrap();
        fs::copy(&file, &copy).unwrap();
        let ids = ids_below(&dir, 1).unwrap();
        assert_eq!(ids, HashSet::from([FileId::of(&file).unwrap()]));
        fs::hard_link(&file, temp.path().join("second")).unwrap();
        assert!(ids.contains(&FileId::of(&temp.path().join("second")).unwrap()));
        assert!(!ids.contains(&FileId::of(&copy).unwrap()));
    }
}
