//! What a VMM itself has to say, which it writes to its standard error.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use crate::sys::files::{open_regular, open_regular_to_append};

/// What QEMU says each time it starts, and is no reason for anything.
const WAITS: &str = ": info: QEMU waiting for connection on: ";
/// A VMM's last words are a line or two.
const LAST_WORDS_MAX_BYTES: u64 = 4096;

/// Where to find what one process wrote to a log that others before it wrote to.
#[derive(Debug)]
pub(super) struct LastWords {
    log: PathBuf,
    from: u64,
}

/// Opens the log for a process that is to write to it.
pub(super) fn open(log: &Path) -> io::Result<(File, LastWords)> {
    let file = open_regular_to_append(log)?;
    let from = file.metadata()?.len();
    let log = log.to_owned();
    Ok((file, LastWords { log, from }))
}

impl LastWords {
    /// Returns those of a process that wrote before we knew it: what it writes from now on.
    pub(super) fn from_now_on(log: &Path) -> Self {
        Self { log: log.to_owned(), from: log.symlink_metadata().map_or(0, |meta| meta.len()) }
    }

    /// Returns the end of what the process wrote, as one line. It is for a message about
    /// something else that went wrong, so it is empty where it cannot be read.
    pub(super) fn read(&self) -> String {
        self.read_tail().unwrap_or_default()
    }

    fn read_tail(&self) -> io::Result<String> {
        let mut log = open_regular(&self.log)?;
        let end = log.metadata()?.len();
        let start = self.from.max(end.saturating_sub(LAST_WORDS_MAX_BYTES));
        log.seek(SeekFrom::Start(start))?;
        let mut tail = Vec::new();
        log.take(LAST_WORDS_MAX_BYTES).read_to_end(&mut tail)?;
        let lines: Vec<_> = String::from_utf8_lossy(&tail)
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.contains(WAITS))
            .map(str::to_owned)
            .collect();
        Ok(lines.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_words_of_an_earlier_process_are_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("vmm.log");
        let (mut file, earlier) = open(&log).unwrap();
        writeln!(file, "one").unwrap();
        let (mut file, words) = open(&log).unwrap();
        assert_eq!(words.read(), "");
        writeln!(file, "qemu: info: QEMU waiting for connection on: disconnected:fd:0").unwrap();
        assert_eq!(words.read(), "");
        writeln!(file, "two\n\n  three").unwrap();
        assert_eq!(words.read(), "two; three");
        assert_eq!(earlier.read(), "one; two; three");
        assert_eq!(LastWords::from_now_on(&log).read(), "");
    }

    #[test]
    fn only_the_end_of_many_words_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("vmm.log");
        let (mut file, words) = open(&log).unwrap();
        file.write_all(&[b'x'; 10_000]).unwrap();
        file.write_all(b"end").unwrap();
        let said = words.read();
        assert_eq!(said.len(), 4096);
        assert!(said.ends_with("xend"));
    }
}
