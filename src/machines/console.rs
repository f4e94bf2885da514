//! The log of a guest's serial console.
//!
//! The VMM appends to the log by itself, so nothing is lost while no daemon runs. The log is
//! bounded from the front: the oldest part becomes a hole in the file, whose length keeps growing.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, time::SystemTime};

use crate::sys::files::{data_extents, open_regular, open_regular_to_write, punch};

/// How much of a console is kept at least.
const KEEP_BYTES: u64 = 1 << 20;
/// How much there may be before the oldest is dropped; between two ticks it can be more.
const TRIM_FROM_BYTES: u64 = 4 << 20;
/// A hole begins and ends at a block of the file system.
const BLOCK_BYTES: u64 = 64 << 10;

/// The file with what a guest printed.
#[derive(Debug, Clone)]
pub struct ConsoleLog {
    path: PathBuf,
}

/// How much there is of a console's log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsoleExtent {
    /// Where the kept part begins.
    pub start: u64,
    /// All that was ever printed, in bytes.
    pub len: u64,
    /// When it last grew.
    pub mtime: Option<SystemTime>,
}

impl ConsoleLog {
    /// Returns the log at `path`, which exists from the first boot on.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Returns how much there is of it; nothing before the first boot.
    #[must_use]
    pub fn extent(&self) -> ConsoleExtent {
        let Ok(file) = open_regular(&self.path) else {
            return ConsoleExtent::default();
        };
        let Ok(metadata) = file.metadata() else {
            return ConsoleExtent::default();
        };
        let (start, mtime) = (kept_from(&file), metadata.modified().ok());
        ConsoleExtent { start, len: metadata.len(), mtime }
    }

    /// Reads at most `size` bytes from byte `from` of all ever printed.
    ///
    /// # Errors
    /// The file system's.
    pub fn read(&self, from: u64, size: usize) -> io::Result<Vec<u8>> {
        let file = match open_regular(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        // A slow reader continues with what is still kept.
        let from = from.max(kept_from(&file));
        let left = file.metadata()?.len().saturating_sub(from);
        let mut bytes = vec![0; size.min(usize::try_from(left).unwrap_or(usize::MAX))];
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read_at(&mut bytes[filled..], from + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// Drops what is too old.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn trim(&self) -> io::Result<()> {
        match open_regular_to_write(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            file => trim(&file?),
        }
    }
}

/// Returns where the kept part of a log begins: at its first data.
fn kept_from(file: &File) -> u64 {
    data_extents(file).next().and_then(Result::ok).map_or(0, |extent| extent.start)
}

fn trim(file: &File) -> io::Result<()> {
    let len = file.metadata()?.len();
    let start = kept_from(file);
    if len - start < TRIM_FROM_BYTES {
        return Ok(());
    }
    let keep_from = (len - KEEP_BYTES) / BLOCK_BYTES * BLOCK_BYTES;
    punch(file, 0, keep_from)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_long_log_loses_its_front_and_keeps_its_length() {
        let mut file = tempfile::tempfile().unwrap();
        let line = [b'x'; 64 << 10];
        for _ in 0..80 {
            file.write_all(&line).unwrap();
        }
        let len = file.metadata().unwrap().len();
        trim(&file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len);
        assert_eq!(kept_from(&file), len - KEEP_BYTES);
        // Trimming again changes nothing: there is not enough.
        trim(&file).unwrap();
        assert_eq!(kept_from(&file), len - KEEP_BYTES);
    }
}
