//! Reading a console: a log whose front is dropped while it is read.
//!
//! To its readers it is a file that is being written, as the logs of events are: byte 0
//! is the oldest that was kept when the first of them opened it, and it never gets shorter
//! while one has it open. Who was too slow for what was dropped gets one line that says so.

use std::{collections::HashMap, io, time::SystemTime};

use super::{Errno, Tree};
use crate::{
    lifecycle::Entry,
    sandbox::{Record, RowId},
    sync::{Arc, Mutex, lock},
    sys::growth::GrowthWatch,
};

/// Where the file of each console that is open begins, and how many have it open.
/// Bounded by the count of open files.
#[derive(Debug, Default)]
pub(super) struct Consoles {
    /// A leaf lock.
    open: Mutex<HashMap<RowId, (u64, usize)>>,
}

/// An open console.
#[derive(Debug)]
pub(super) struct Console {
    consoles: Arc<Consoles>,
    row: RowId,
    /// Where its byte 0 is in all that was ever printed.
    start: u64,
    /// Nothing is locked while it is but what reading a log takes.
    cursor: Mutex<Cursor>,
}

/// How far it was read.
#[derive(Debug, Default)]
struct Cursor {
    /// The byte of the file that comes next.
    offset: u64,
    /// Where that is in all that was ever printed.
    at: u64,
    /// What is left to give of the line about what was dropped.
    gap: Vec<u8>,
}

impl Consoles {
    /// Opens a console that is kept from `start` on.
    pub(super) fn open(self: &Arc<Self>, row: RowId, start: u64) -> Console {
        let mut open = lock(&self.open);
        let (start, count) = open.entry(row).or_insert((start, 0));
        *count += 1;
        let cursor = Cursor { at: *start, ..Cursor::default() };
        Console { consoles: Arc::clone(self), row, start: *start, cursor: Mutex::new(cursor) }
    }

    /// Returns where the file begins of which `start` is the oldest that is kept.
    fn start(&self, row: RowId, start: u64) -> u64 {
        lock(&self.open).get(&row).map_or(start, |(start, _)| *start)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let mut open = lock(&self.consoles.open);
        if let Some((_, count)) = open.get_mut(&self.row) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.row);
            }
        }
    }
}

impl Cursor {
    /// Goes to a byte of the file, and then to where there still is something.
    fn go(&mut self, offset: u64, start: u64, kept: u64) {
        let goes_on = self.offset == offset && offset > 0;
        if !goes_on {
            *self = Self { offset, at: start.saturating_add(offset), gap: Vec::new() };
        }
        if self.at < kept {
            if goes_on {
                let dropped = kept - self.at;
                self.gap =
                    format!("\n[dozed: {dropped} bytes of the console were dropped]\n").into();
            }
            self.at = kept;
        }
    }
}

impl Tree {
    /// Opens the console of a sandbox.
    pub(super) fn open_console(&self, row: RowId) -> Console {
        let entry = self.lifecycle.by_row(row);
        let start =
            entry.map_or(0, |entry| self.lifecycle.store().console(&entry.record()).extent().start);
        self.consoles.open(row, start)
    }

    /// Reads an open console.
    pub(super) fn read_console(
        &self,
        entry: &Entry,
        console: &Console,
        offset: u64,
        size: usize,
    ) -> Result<Vec<u8>, Errno> {
        let mut cursor = lock(&console.cursor);
        let log = self.lifecycle.store().console(&entry.record());
        let kept = log.extent().start;
        cursor.go(offset, console.start, kept);
        let said = cursor.gap.len().min(size);
        let mut bytes: Vec<u8> = cursor.gap.drain(..said).collect();
        let read = log.read(cursor.at, size - said);
        let read = read.map_err(|error| {
            tracing::warn!(id = %entry.id(), %error, "reading a console");
            Errno::Io
        })?;
        cursor.at += read.len() as u64;
        bytes.extend(read);
        cursor.offset = offset + bytes.len() as u64;
        Ok(bytes)
    }

    /// Has `growth` tell when the guest prints. Before the first boot there is nothing to watch;
    /// pollers are woken when it boots.
    pub(super) fn watch_console(&self, growth: &GrowthWatch, row: RowId) {
        let Some(entry) = self.lifecycle.by_row(row) else { return };
        let log = self.lifecycle.store().home(&entry.record()).console_log();
        if let Err(error) = growth.watch(row.0, &log)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "watching a console for a program that polls");
        }
    }

    /// Says whether there is more of a console than was read.
    pub(super) fn console_has_more(&self, entry: &Entry, console: &Console) -> bool {
        let cursor = lock(&console.cursor);
        !cursor.gap.is_empty()
            || self.lifecycle.store().console(&entry.record()).extent().len > cursor.at
    }

    /// The size of the console's log, without what was cut off from its front, and when
    /// it last grew.
    pub(super) fn console_facts(&self, record: &Arc<Record>) -> (u64, SystemTime) {
        let log = self.lifecycle.store().console(record).extent();
        let start = self.consoles.start(record.row, log.start);
        let mtime = log.mtime.unwrap_or_else(|| self.system_time(record.since));
        (log.len.saturating_sub(start), mtime)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_on_is_told_what_was_dropped_and_who_begins_anew_is_not() {
        let mut cursor = Cursor { at: 100, ..Cursor::default() };
        cursor.go(0, 100, 100);
        assert_eq!((cursor.at, cursor.gap.len()), (100, 0));
        (cursor.offset, cursor.at) = (50, 150);
        cursor.go(50, 100, 120);
        assert_eq!((cursor.at, cursor.gap.len()), (150, 0));
        cursor.go(50, 100, 5000);
        let said = String::from_utf8(std::mem::take(&mut cursor.gap)).unwrap();
        assert_eq!(said, "\n[dozed: 4850 bytes of the console were dropped]\n");
        assert_eq!(cursor.at, 5000);
        cursor.go(0, 100, 6000);
        assert_eq!((cursor.at, cursor.gap.len()), (6000, 0));
        cursor.go(7000, 100, 6000);
        assert_eq!((cursor.at, cursor.gap.len()), (7100, 0));
    }

    #[test]
    fn a_file_begins_where_it_did_for_as_long_as_it_is_open() {
        let consoles = Arc::new(Consoles::default());
        let row = RowId(1);
        let first = consoles.open(row, 10);
        let second = consoles.open(row, 20);
        assert_eq!((second.start, consoles.start(row, 30)), (10, 10));
        drop(first);
        assert_eq!(consoles.start(row, 30), 10);
        drop(second);
        assert_eq!(consoles.start(row, 30), 30);
        assert!(lock(&consoles.open).is_empty());
    }
}
