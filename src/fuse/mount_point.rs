//! Where the tree is to be mounted: what may be there already, and what is done about it.
//!
//! - The mount of a daemon that was killed stays until the new tree is beneath it, so that
//!   nobody ever gets to the directory below: what a client makes there is no sandbox.
//! - Between the end of one daemon and the start of the next a client can get there. Empty
//!   directories, which a `mkdir` for a new sandbox leaves, do not keep a daemon from
//!   starting. Anything else does, as the tree would hide it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::sys::{
    fuse_mount::Unmounted,
    mount::{self, Server},
};

/// How many empty directories are tolerated: clients make so many while a daemon restarts.
const EMPTY_DIRS_MAX: usize = 10_000;
/// How many of them are named in the log.
const NAMED_MAX: usize = 5;

/// Why the tree cannot be mounted somewhere.
#[derive(Debug)]
pub enum Unfit {
    /// Another daemon serves its tree there.
    InUse,
    /// Another file system is mounted there, of this type.
    Mounted(String),
    /// The directory has files, which the tree would hide.
    HasFiles,
    /// The system does not let us look.
    Io(io::Error),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Makes the directory `dir` if need be, and looks whether the tree can be mounted on it.
///
/// # Errors
/// Says why it cannot.
pub fn check_mount_point(dir: &Path) -> Result<(), Unfit> {
    if let Some(above) = dir.parent() {
        fs::create_dir_all(above)?;
    }
    let path = mount::without_links(dir)?;
    if let Some(found) = mount::mounted_at(&path)? {
        if !found.is_tree() {
            return Err(Unfit::Mounted(found.fs_type.to_string_lossy().into_owned()));
        }
        // One that does not answer may be stopped, and go on later.
        return match mount::server_at(&path)? {
            Server::Gone => Ok(()),
            Server::Answers | Server::Silent => Err(Unfit::InUse),
        };
    }
    fs::create_dir_all(&path)?;
    let dirs = empty_dirs(&path)?.ok_or(Unfit::HasFiles)?;
    if !dirs.is_empty() {
        let named: Vec<_> = dirs.iter().take(NAMED_MAX).map(|dir| dir.display()).collect();
        tracing::warn!(
            count = dirs.len(),
            "the mount point {} has empty directories, such as {named:?}; they were made while no \
             daemon ran, are not sandboxes, and are hidden while the tree is mounted",
            path.display()
        );
    }
    Ok(())
}

/// Mounts the tree on `path`, and takes away the mounts of daemons that were killed.
pub(super) fn mount_tree(tree: &Unmounted, path: &Path) -> io::Result<()> {
    let mut dead = dead_trees(path)?;
    // All but the last are taken away first: the new tree goes beneath one.
    while dead > 1 {
        mount::abort(path)?;
        dead -= 1;
    }
    if dead == 0 {
        return tree.mount(path);
    }
    tracing::info!(mount = %path.display(), "removing the mount of a daemon that is gone");
    if let Err(error) = tree.mount_beneath(path) {
        // Before Linux 6.5 clients get to the directory below for a moment.
        tracing::debug!(%error, "mounting beneath what is there");
        mount::abort(path)?;
        return tree.mount(path);
    }
    mount::abort(path)
}

/// Counts the trees on `path` that have no server any more.
fn dead_trees(path: &Path) -> io::Result<usize> {
    let Some(found) = mount::mounted_at(path)? else { return Ok(0) };
    if !found.is_tree() || mount::server_at(path)? != Server::Gone {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "something is mounted there"));
    }
    Ok(mount::mounts_at(path)?.iter().rev().take_while(|mount| mount.is_tree()).count())
}

/// Returns the directories below `dir`; `None` if there is anything but empty directories.
fn empty_dirs(dir: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    // What is mounted somewhere below might not answer when it is looked at.
    if mount::mount_points()?.iter().any(|path| path.starts_with(dir)) {
        return Ok(None);
    }
    let (mut found, mut left) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() || found.len() >= EMPTY_DIRS_MAX {
                return Ok(None);
            }
            found.push(entry.path());
            left.push(entry.path());
        }
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_directories_are_tolerated_and_a_file_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().canonicalize().unwrap().join("mount");
        check_mount_point(&dir).unwrap();
        assert!(dir.is_dir());
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::create_dir(dir.join("c")).unwrap();
        check_mount_point(&dir).unwrap();
        assert_eq!(empty_dirs(&dir).unwrap().unwrap().len(), 3);
        fs::write(dir.join("a/b/file"), "").unwrap();
        assert!(matches!(check_mount_point(&dir), Err(Unfit::HasFiles)));
    }

    #[test]
    fn dead_trees_are_replaced_and_others_are_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap();
        for _ in 0..3 {
            let (connection, dead) = Unmounted::create(mount::TREE_NAME).unwrap();
            dead.mount(&path).unwrap();
            drop(connection);
        }
        let checked = check_mount_point(&path);
        let (connection, tree) = Unmounted::create(mount::TREE_NAME).unwrap();
        let mounted = mount_tree(&tree, &path);
        let there = mount::mounts_at(&path).unwrap();
        let silent = check_mount_point(&path);
        let (_connection, other) = Unmounted::create("other").unwrap();
        other.mount(&path).unwrap();
        let (foreign, refused) = (check_mount_point(&path), mount_tree(&tree, &path));
        drop(connection);
        while mount::detach(&path).is_ok() {}
        checked.unwrap();
        mounted.unwrap();
        assert_eq!(there.iter().map(|info| info.device).collect::<Vec<_>>(), [tree.device()]);
        assert!(matches!(silent, Err(Unfit::InUse)), "{silent:?}");
        assert!(matches!(&foreign, Err(Unfit::Mounted(what)) if what.starts_with("fuse")));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }
}
