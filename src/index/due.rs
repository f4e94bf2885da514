//! Who is due, as range scans: their cost follows how many are, not how many there are.

use rusqlite::Connection;

use super::{Error, Index};
use crate::{
    sandbox::{RowId, State, Timestamp},
    sync::lock,
};

/// A sandbox that is due. The last one of a page is the cursor for the next page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// Since when.
    pub at: Timestamp,
    /// Its number.
    pub row: RowId,
}

pub(super) const DUE_TO_SLEEP: &str = "SELECT sleep_at, row FROM sandbox WHERE state = ?1 \
     AND (sleep_at, row) > (?2, ?3) AND sleep_at <= ?4 ORDER BY sleep_at, row LIMIT ?5";
pub(super) const DUE_TO_DELETE: &str = "SELECT delete_at, row FROM sandbox WHERE state = ?1 \
     AND (delete_at, row) > (?2, ?3) AND delete_at <= ?4 ORDER BY delete_at, row LIMIT ?5";

pub(super) const IN_TRANSITION: &str = "SELECT row FROM sandbox \
     WHERE state IN ('booting', 'snapshotting', 'restoring', 'deleting') LIMIT ?1";

/// Before every deadline.
const START: Due = Due { at: Timestamp::from_millis(i64::MIN), row: RowId(0) };
/// After every deadline.
const END: Timestamp = Timestamp::from_millis(i64::MAX);

impl Index {
    /// Returns up to `limit` running sandboxes whose time to sleep has come by `now`, those
    /// that are due longest first, beginning after `after`. Activity that has not been
    /// flushed does not count here; whoever acts on it looks at the entry again.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn due_to_sleep(
        &self,
        now: Timestamp,
        after: Option<Due>,
        limit: usize,
    ) -> Result<Vec<Due>, Error> {
        self.due(DUE_TO_SLEEP, State::Running, now, after, limit)
    }

    /// Returns up to `limit` sleeping sandboxes whose time to be deleted has come by `now`,
    /// those that are due longest first, beginning after `after`.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn due_to_delete(
        &self,
        now: Timestamp,
        after: Option<Due>,
        limit: usize,
    ) -> Result<Vec<Due>, Error> {
        self.due(DUE_TO_DELETE, State::Snapshotted, now, after, limit)
    }

    /// Returns the earliest deadline after `now`.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, Error> {
        let passed = Some(Due { at: now, row: RowId(i64::MAX.cast_unsigned()) });
        let sleep = self.due_to_sleep(END, passed, 1)?;
        let delete = self.due_to_delete(END, passed, 1)?;
        Ok(sleep.into_iter().chain(delete).map(|due| due.at).min())
    }

    /// Returns up to `limit` sandboxes that are in one of the states in the middle of an
    /// operation.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn in_transition(&self, limit: usize) -> Result<Vec<RowId>, Error> {
        let none = |(state, count): &(State, usize)| match state {
            State::Stopped | State::Running | State::Snapshotted => true,
            State::Booting | State::Snapshotting | State::Restoring | State::Deleting => {
                *count == 0
            }
        };
        if self.count_by_state().iter().all(none) {
            return Ok(Vec::new());
        }
        let connection = lock(&self.connection);
        let open = connection.as_ref().ok_or(Error::Closed)?;
        let rows = || -> rusqlite::Result<Vec<RowId>> {
            open.prepare_cached(IN_TRANSITION)?
                .query_map([i64::try_from(limit).unwrap_or(i64::MAX)], |found| {
                    Ok(RowId(found.get::<_, i64>(0)?.cast_unsigned()))
                })?
                .collect()
        };
        rows().map_err(Error::sql(&self.path, || "looking in the index for leftovers".to_owned()))
    }

    fn due(
        &self,
        sql: &str,
        state: State,
        now: Timestamp,
        after: Option<Due>,
        limit: usize,
    ) -> Result<Vec<Due>, Error> {
        let connection = lock(&self.connection);
        let open = connection.as_ref().ok_or(Error::Closed)?;
        query(open, sql, state, now, after.unwrap_or(START), limit)
            .map_err(Error::sql(&self.path, || "looking in the index for due sandboxes".to_owned()))
    }
}

fn query(
    connection: &Connection,
    sql: &str,
    state: State,
    now: Timestamp,
    after: Due,
    limit: usize,
) -> rusqlite::Result<Vec<Due>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let (at, row) = (after.at.as_millis(), after.row.0.cast_signed());
    connection
        .prepare_cached(sql)?
        .query_map((state.word(), at, row, now.as_millis(), limit), |found| {
            Ok(Due {
                at: Timestamp::from_millis(found.get(0)?),
                row: RowId(found.get::<_, i64>(1)?.cast_unsigned()),
            })
        })?
        .collect()
}
