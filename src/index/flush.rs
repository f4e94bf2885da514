//! Writing activity later than it shows in RAM: at ticks, and unsynced.

use rusqlite::Connection;

use super::{Error, Index, row, schema};
use crate::sync::{lock, read};

/// How many activities one transaction writes: some milliseconds of work, during which
/// a change of state has to wait.
pub(super) const FLUSH_MAX: usize = 1000;

impl Index {
    /// Writes activities that have not been written, up to a thousand, and returns how many
    /// it was. The deadlines to sleep that follow from them are written with them, so a
    /// sweep that must not see stale ones flushes first, until zero is returned. It waits
    /// for nobody: a power cut may undo it, and while another process has the file
    /// locked it does nothing.
    ///
    /// # Errors
    /// What SQLite says; the activities then wait for the next time.
    pub fn flush_activity(&self) -> Result<usize, Error> {
        let mut connection = lock(&self.connection);
        self.wal.check()?;
        self.flush_into(connection.as_mut().ok_or(Error::Closed)?)
    }

    pub(super) fn flush_into(&self, connection: &mut Connection) -> Result<usize, Error> {
        let rows = self.dirty.take(FLUSH_MAX);
        if rows.is_empty() {
            return Ok(0);
        }
        // One that has been removed meanwhile has nothing to write.
        let entries = rows.iter().filter_map(|row| read(&self.table).by_row(*row));
        let (later, entries): (Vec<_>, Vec<_>) = entries.partition(|entry| entry.is_changing());
        for entry in later {
            entry.activity_to_write();
            entry.mark_dirty();
        }
        let written = connection.transaction().and_then(|transaction| {
            for entry in &entries {
                let last_activity = entry.activity_to_write();
                row::update_activity(&transaction, &entry.record(), last_activity)?;
            }
            transaction.commit()
        });
        if let Err(error) = written {
            for entry in &entries {
                entry.mark_dirty();
            }
            if schema::is_locked(&error) {
                return Ok(0);
            }
            let doing = || "writing activities to the index".to_owned();
            return Err(Error::sql(&self.path, doing)(error));
        }
        let _unsynced = self.wal.wrote();
        self.checkpoints.wrote(entries.len());
        Ok(entries.len())
    }
}
