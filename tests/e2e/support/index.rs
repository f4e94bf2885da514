//! The index as another process sees it.

use rusqlite::Connection;

use super::Host;

/// A daemon's index, locked by a transaction of ours until this is dropped.
pub(crate) struct LockedIndex(Connection);

impl LockedIndex {
    #[track_caller]
    pub(crate) fn of(host: &Host) -> Self {
        let connection = Connection::open(host.store().join("index.db")).unwrap();
        connection.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
        connection.execute_batch("BEGIN EXCLUSIVE").unwrap();
        Self(connection)
    }
}

impl Drop for LockedIndex {
    fn drop(&mut self) {
        // Where this fails the end of the connection lets it go as well.
        drop(self.0.execute_batch("ROLLBACK"));
    }
}
