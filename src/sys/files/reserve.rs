//! Room that is given up so that what makes room can be done on a full disk.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate};

use super::durable::{free_bytes, remove_file};

/// The size of the reserve: some hundred deletions write as much to the index, and each gives
/// back more than it writes.
pub const RESERVE_BYTES: u64 = 8 << 20;
/// With less than this free it is given up.
const LOW_BYTES: u64 = 4 << 20;
/// With this much free it is made, so that it takes no room that somebody waits for.
const AMPLE_BYTES: u64 = 64 << 20;

/// A file that takes room and has no content.
#[derive(Debug)]
pub struct Reserve {
    file: PathBuf,
    dir: PathBuf,
}

impl Reserve {
    /// Names the reserve in `dir`, which may be there or not.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { file: dir.join("reserve"), dir: dir.to_owned() }
    }

    /// Gives the reserve up if the disk is full. Says whether it did.
    pub fn give_up_if_full(&self) -> bool {
        let is_full = free_bytes(&self.dir).is_ok_and(|free| free < LOW_BYTES);
        if !is_full || !self.file.exists() {
            return false;
        }
        match remove_file(&self.file) {
            Ok(()) => {
                let dir = self.dir.display();
                tracing::warn!(
                    "the disk of {dir} is full; the reserve of {RESERVE_BYTES} bytes is released"
                );
                true
            }
            Err(error) => {
                tracing::error!(%error, file = %self.file.display(), "using the reserve");
                false
            }
        }
    }

    /// Makes the reserve, if there is none and plenty of room.
    pub fn keep(&self) {
        let is_ample = free_bytes(&self.dir).is_ok_and(|free| free >= AMPLE_BYTES);
        if !is_ample || self.file.exists() {
            return;
        }
        if let Err(error) = self.make() {
            remove_file(&self.file).ok();
            tracing::debug!(%error, file = %self.file.display(), "making the reserve");
        }
    }

    fn make(&self) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let file: File = options.write(true).create_new(true).mode(0o600).open(&self.file)?;
        Ok(fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::files::allocated_bytes;

    #[test]
    fn a_reserve_takes_room_and_is_kept_while_there_is_more() {
        let temp =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let reserve = Reserve::new(temp.path());
        reserve.keep();
        reserve.keep();
        assert!(allocated_bytes(&reserve.file).unwrap() >= RESERVE_BYTES);
        assert!(!reserve.give_up_if_full());
        assert!(reserve.file.exists());
    }
}
