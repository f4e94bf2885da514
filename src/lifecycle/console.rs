//! The guest's serial console: what it printed, and typing on it.
//!
//! The VMM appends to a log by itself, so that nothing is lost while no daemon is
//! there. The log is bounded from the front: what is too old becomes a hole in the
//! file, whose length goes on growing.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    time::SystemTime,
};

use super::{Entry, Error, Lifecycle, Signal, error::vmm_failed};
use crate::{
    sandbox::Record,
    sync::lock,
    sys::files::{data_extents, open_regular, open_regular_to_write, punch},
};

/// How much of a console is kept at least.
const KEEP_BYTES: u64 = 1 << 20;
/// How much there may be before the oldest is dropped; between two ticks it can be more.
const TRIM_FROM_BYTES: u64 = 4 << 20;
/// A hole begins and ends at a block of the file system.
const BLOCK_BYTES: u64 = 64 << 10;

/// How much there is of a console's log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsoleLog {
    /// Where the kept part begins.
    pub start: u64,
    /// All that was ever printed, in bytes.
    pub len: u64,
    /// When it last grew.
    pub mtime: Option<SystemTime>,
}

impl Lifecycle {
    /// Returns how much there is of a sandbox's console; nothing before its first boot.
    #[must_use]
    pub fn console(&self, record: &Record) -> ConsoleLog {
        let Ok(file) = open_regular(&self.home(record).console_log()) else {
            return ConsoleLog::default();
        };
        let Ok(metadata) = file.metadata() else {
            return ConsoleLog::default();
        };
        ConsoleLog { start: kept_from(&file), len: metadata.len(), mtime: metadata.modified().ok() }
    }

    /// Reads at most `size` bytes of a console from byte `from` of all ever printed.
    ///
    /// # Errors
    /// The file system's.
    pub fn read_console(&self, entry: &Entry, from: u64, size: usize) -> io::Result<Vec<u8>> {
        let file = match open_regular(&self.home(&entry.record()).console_log()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        // A reader that was slow goes on with what is still kept.
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

    /// Types on a sandbox's console. Returns how many bytes its guest's UART took.
    ///
    /// # Errors
    /// `NotRunning`, or what the VMM says.
    pub fn type_in(&self, entry: &Entry, bytes: &[u8]) -> Result<usize, Error> {
        let record = entry.record();
        let live = self
            .machines
            .get(record.row)
            .ok_or_else(|| Error::NotRunning { id: record.id.clone(), state: record.state() })?;
        let typed = lock(&live.machine)
            .type_in(bytes)
            .map_err(vmm_failed(entry, "typing on the console of"))?;
        self.saw(entry, Signal::Console);
        Ok(typed)
    }

    /// Drops what is too old of the consoles of all that run. Called at each tick.
    pub fn trim_consoles(&self) {
        for (row, _) in self.machines.all() {
            let Some(entry) = self.by_row(row) else {
                continue;
            };
            let path = self.home(&entry.record()).console_log();
            let trimmed = open_regular_to_write(&path).and_then(|f| trim(&f));
            if let Err(error) = trimmed
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(id = %entry.id(), %error, "trimming a console");
            }
        }
    }

    /// Returns the bytes on disk of a sandbox's own disks.
    #[must_use]
    pub fn disk_bytes(&self, record: &Record) -> u64 {
        let home = self.home(record);
        let own = record.spec.disks.iter().enumerate().filter(|(_, disk)| !disk.readonly);
        own.filter_map(|(number, _)| std::fs::symlink_metadata(home.disk(number)).ok())
            .map(|metadata| metadata.blocks() * 512)
            .sum()
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
