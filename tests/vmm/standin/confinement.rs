//! Landlock, played: which paths the process lets itself open once it is confined.
//!
//! The real one holds the rules by inode. So does this: a directory that was removed and
//! made again is another one, and not covered.

use std::{fs::File, io, os::unix::fs::MetadataExt, path::Path};

use rustix::{
    fs::{Mode, OFlags, open, openat},
    io::Errno,
};

use crate::{
    config::VmConfig,
    failure::{Failure, Within},
};

/// What the process may use; everything, until `confine`.
#[derive(Debug, Default)]
pub(crate) struct Confinement {
    /// Each confinement only takes away.
    layers: Vec<Vec<Allowed>>,
}

#[derive(Debug)]
struct Allowed {
    /// Keeps the inode's number from being another's.
    _file: File,
    inode: (u64, u64),
    write: bool,
}

impl Confinement {
    /// Confines the process to what a VM needs, if its description asks for it.
    pub(crate) fn confine(&mut self, config: &VmConfig) {
        if !config.landlock_enable {
            return;
        }
        let own = config.own_paths().into_iter();
        let rules = config.landlock_rules.iter().flatten();
        let ruled = rules.map(|rule| (rule.path.as_path(), rule.access.as_str()));
        // A path that is not there has no rule, and nobody is told.
        self.layers
            .push(own.chain(ruled).filter_map(|(path, access)| allow(path, access)).collect());
    }

    /// Refuses to make a file in `dir`, unless it is in something that may be written to.
    pub(crate) fn check_write(&self, dir: &Path) -> Result<(), Failure> {
        let ancestors = inodes(dir).within("Error looking at the directory")?;
        let covered = |layer: &Vec<Allowed>| {
            layer.iter().any(|allowed| allowed.write && ancestors.contains(&allowed.inode))
        };
        if self.layers.iter().all(covered) {
            return Ok(());
        }
        Err(io::Error::from(rustix::io::Errno::ACCESS).into())
    }
}

fn allow(path: &Path, access: &str) -> Option<Allowed> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty()).ok()?);
    let meta = file.metadata().ok()?;
    Some(Allowed { inode: (meta.dev(), meta.ino()), write: access.contains('w'), _file: file })
}

/// Returns the inodes of a directory and of all it is in, as far as this user sees them:
/// what has a rule was seen. The kernel looks further, and finds no rule there.
fn inodes(path: &Path) -> io::Result<Vec<(u64, u64)>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = File::from(open(path, flags, Mode::empty())?);
    let mut inodes = Vec::new();
    loop {
        let meta = dir.metadata()?;
        let inode = (meta.dev(), meta.ino());
        if inodes.last() == Some(&inode) {
            return Ok(inodes);
        }
        inodes.push(inode);
        dir = match openat(&dir, c"..", flags, Mode::empty()) {
            Ok(above) => File::from(above),
            Err(Errno::ACCESS) => return Ok(inodes),
            Err(error) => return Err(error.into()),
        };
    }
}
