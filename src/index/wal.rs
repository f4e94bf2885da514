//! The write-ahead log of SQLite, and waiting until it is on the disk.
//!
//! SQLite syncs the log before it moves it into the file, and here nothing else does: it
//! runs with `synchronous = NORMAL`. So what a power cut leaves is what was committed up
//! to some moment, whole, and this says which moment that is at the least. Commits have
//! numbers, a thread syncs for all that are there, and whoever needs one of them on the
//! disk waits for its number. So commits of many at once share a sync, and a commit that
//! is needed later is on its way while its owner does something else. A commit that nobody
//! waits for is deferred: it is synced together with the next that somebody does wait for, or
//! by itself after a moment.
//!
//! While the disk has not taken a commit within the limit, no change is begun. What was
//! changed can be undone in SQLite and in memory, so both say the same meanwhile and afterwards.
//!
//! The kernel tells of a failed write once, takes what it lost for written, and the next sync
//! succeeds. So after one that failed nothing is believed any more, and whoever opens an index
//! that was not closed writes what is in the log once more before it is built upon.
//!
//! The log is one file from the first commit until the index is closed, and SQLite takes
//! no locks on it, so that we have a descriptor of our own harms nothing.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use rusqlite::Connection;

use super::{Error, schema};
use crate::{
    sync::{Arc, Condvar, Mutex, lock, wait, wait_while_within},
    sys::{clock::Deadline, files},
};

/// How long a sync of some KiB may take. A disk that is busy with the memory of guests
/// takes seconds; one that takes this long is not well.
const SYNC_LIMIT: Duration = Duration::from_secs(120);

/// How long a change waits for a disk that did not take an earlier one within that limit. A
/// disk that is well again takes it at once.
const STALLED_LIMIT: Duration = Duration::from_secs(1);

/// How long a commit that nobody waits for may stay unsynced. Long enough for the next operation
/// of a burst to share its sync; a power cut costs no more than this of what is proven elsewhere.
const DEFER_LIMIT: Duration = Duration::from_secs(1);

/// How much of the log is written anew at a time.
const PIECE_BYTES: usize = 1 << 20;

/// A commit that may not be on the disk yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "a power cut may undo it until it is waited for, or something else proves it"]
pub struct Commit(u64);

#[cfg(test)]
impl Commit {
    /// Returns how many commits there were from `earlier` to this one.
    pub(super) fn since(self, earlier: Self) -> u64 {
        self.0 - earlier.0
    }
}

/// The log, and the thread that syncs it.
#[derive(Debug)]
pub(super) struct WriteAheadLog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    /// The number of the last commit.
    written: AtomicU64,
    /// A leaf.
    progress: Mutex<Progress>,
    /// Something is wanted, or it is over.
    wanted: Condvar,
    /// Something was synced, or cannot be.
    done: Condvar,
    defer_limit: Duration,
    /// What the disk is to do.
    #[cfg(test)]
    disk: Mutex<Disk>,
    #[cfg(test)]
    syncs: AtomicU64,
    /// How long the log was after each commit.
    #[cfg(test)]
    lengths: Mutex<Vec<u64>>,
    /// How long it was after the last commit that was waited for.
    #[cfg(test)]
    needed_bytes: AtomicU64,
}

#[derive(Debug)]
struct Progress {
    wanted: u64,
    synced: u64,
    /// The last commit that nobody waits for, and when the first of those that are not synced
    /// is due.
    deferred: u64,
    deferred_due: Option<Deadline>,
    /// The last commit that somebody gave up waiting for. While it is not synced the disk is
    /// taken for stalled.
    given_up: u64,
    /// Why nothing can be synced any more: after a failed sync nobody knows what is there,
    /// and a later one that succeeds says nothing of what was lost before.
    broken: Option<Broken>,
    over: bool,
}

/// Why nothing can be synced any more.
#[derive(Debug, Clone, Copy)]
enum Broken {
    /// A sync failed: the number of the error, and its kind where it has none.
    Failed(Option<i32>, io::ErrorKind),
    /// A change was too late for its caller, and could not be undone.
    TooLate,
}

impl From<Broken> for Error {
    fn from(broken: Broken) -> Self {
        let source = match broken {
            Broken::Failed(Some(number), _) => io::Error::from_raw_os_error(number),
            Broken::Failed(None, kind) => kind.into(),
            Broken::TooLate => io::ErrorKind::TimedOut.into(),
        };
        Self::Unsynced { source }
    }
}

/// What the disk does, for tests.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disk {
    Works,
    Fails,
    /// It answers no sync, and who waits gives up at once.
    Hangs,
    /// It answers no sync for now, and who waits is patient.
    Slow,
}

impl WriteAheadLog {
    /// Opens the log of the index at `path`, which has one, and brings it to the disk.
    pub(super) fn open(connection: &Connection, path: &Path) -> Result<Self, Error> {
        let name = name_of(path);
        let file = File::options().read(true).write(true).open(&name);
        let file = file.map_err(|source| Error::Unsynced { source })?;
        schema::while_locked(connection, path, || write_anew(&file))?
            .and_then(|()| file.sync_data())
            .and_then(|()| name.parent().map_or(Ok(()), files::sync_dir))
            .and_then(|()| Self::over(file))
            .map_err(|source| Error::Unsynced { source })
    }

    /// Takes `file` for a log of which everything is on the disk.
    pub(super) fn over(file: File) -> io::Result<Self> {
        Self::deferring(file, DEFER_LIMIT)
    }

    fn deferring(file: File, defer_limit: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            defer_limit,
            #[cfg(test)]
            disk: Mutex::new(Disk::Works),
            #[cfg(test)]
            syncs: AtomicU64::new(0),
            #[cfg(test)]
            lengths: Mutex::default(),
            #[cfg(test)]
            needed_bytes: AtomicU64::new(file.metadata()?.len()),
            file,
            written: AtomicU64::new(0),
            progress: Mutex::new(Progress {
                wanted: 0,
                synced: 0,
                deferred: 0,
                deferred_due: None,
                given_up: 0,
                broken: None,
                over: false,
            }),
            wanted: Condvar::new(),
            done: Condvar::new(),
        });
        let syncing = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("dozed-index".to_owned())
            .spawn(move || syncing.sync_what_is_wanted())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Gives the commit that was just made its number. The connection is locked.
    pub(super) fn wrote(&self) -> Commit {
        #[cfg(test)]
        lock(&self.shared.lengths).push(self.shared.file.metadata().map_or(0, |meta| meta.len()));
        Commit(self.shared.written.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Has `commit` synced, and does not wait for it.
    pub(super) fn want(&self, commit: Commit) {
        let mut progress = lock(&self.shared.progress);
        if progress.wanted < commit.0 {
            progress.wanted = commit.0;
            self.shared.wanted.notify_one();
        }
    }

    /// Has `commit` synced with the next that is wanted, or after a moment.
    pub(super) fn defer(&self, commit: Commit) {
        let mut progress = lock(&self.shared.progress);
        progress.deferred = progress.deferred.max(commit.0);
        if progress.deferred_due.is_none() {
            progress.deferred_due = Some(Deadline::after(self.shared.defer_limit));
            self.shared.wanted.notify_one();
        }
    }

    /// Waits briefly for a disk that has not taken an earlier commit in time, if there is one.
    ///
    /// # Errors
    /// `Stalled`, or why nothing can be synced any more.
    pub(super) fn check_disk(&self) -> Result<(), Error> {
        let is_stalled = |progress: &mut Progress| {
            progress.synced < progress.given_up && progress.broken.is_none() && !progress.over
        };
        let progress = lock(&self.shared.progress);
        let limit = self.limit(STALLED_LIMIT);
        let mut progress = wait_while_within(&self.shared.done, progress, limit, is_stalled);
        if is_stalled(&mut progress) {
            return Err(Error::Stalled { limit: SYNC_LIMIT });
        }
        progress.broken.map_or(Ok(()), |broken| Err(broken.into()))
    }

    /// Waits until `commit`, and so all before it, is on the disk.
    pub(super) fn wait_for(&self, commit: Commit) -> Result<(), Error> {
        self.want(commit);
        let waits = |progress: &mut Progress| {
            progress.synced < commit.0 && progress.broken.is_none() && !progress.over
        };
        let limit = self.limit(SYNC_LIMIT);
        let progress = lock(&self.shared.progress);
        let mut progress = wait_while_within(&self.shared.done, progress, limit, waits);
        #[cfg(test)]
        self.note_needed(commit);
        match progress.broken {
            _ if progress.synced >= commit.0 => Ok(()),
            Some(broken) => Err(broken.into()),
            None => {
                progress.given_up = progress.given_up.max(commit.0);
                Err(Error::Stalled { limit: SYNC_LIMIT })
            }
        }
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "the twin for tests uses it")]
    fn limit(&self, limit: Duration) -> Duration {
        limit
    }

    #[cfg(test)]
    fn limit(&self, _limit: Duration) -> Duration {
        match *lock(&self.shared.disk) {
            Disk::Hangs => Duration::from_millis(1),
            // Whatever it is, a busy machine may take longer.
            Disk::Works | Disk::Fails | Disk::Slow => SYNC_LIMIT,
        }
    }

    /// Takes no more commits: one could not be undone.
    pub(super) fn give_up(&self) {
        tracing::error!("a change of the index came too late and cannot be undone");
        self.shared.break_by(Broken::TooLate);
    }

    /// Says whether commits can still be brought to the disk.
    pub(super) fn check(&self) -> Result<(), Error> {
        lock(&self.shared.progress).broken.map_or(Ok(()), |broken| Err(broken.into()))
    }

    /// Waits until all that was written is on the disk.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        self.wait_for(Commit(self.shared.written.load(Ordering::SeqCst))).unwrap();
    }

    /// Says what the disk does from now on.
    #[cfg(test)]
    pub(super) fn disk(&self, disk: Disk) {
        *lock(&self.shared.disk) = disk;
    }

    #[cfg(test)]
    fn note_needed(&self, commit: Commit) {
        let place = usize::try_from(commit.0).expect("tests make few") - 1;
        let bytes = lock(&self.shared.lengths)[place];
        self.shared.needed_bytes.fetch_max(bytes, Ordering::SeqCst);
    }

    /// Returns how much of the log a power cut leaves in the worst case: what somebody
    /// waited for, and nothing that was merely under way.
    #[cfg(test)]
    pub(super) fn needed_bytes(&self) -> u64 {
        self.shared.needed_bytes.load(Ordering::SeqCst)
    }
}

impl Drop for WriteAheadLog {
    fn drop(&mut self) {
        lock(&self.shared.progress).over = true;
        self.shared.wanted.notify_one();
        if let Some(thread) = self.thread.take() {
            // It panics nowhere, and if it did then that is told.
            thread.join().ok();
        }
    }
}

impl Shared {
    fn sync_what_is_wanted(&self) {
        loop {
            if !self.wait_for_work() {
                return;
            }
            // All that is written by now is synced with it.
            let written = self.written.load(Ordering::SeqCst);
            #[cfg(test)]
            self.hang();
            let synced = self.file.sync_data();
            #[cfg(test)]
            let synced = synced.and_then(|()| match *lock(&self.disk) {
                Disk::Fails => Err(io::ErrorKind::StorageFull.into()),
                Disk::Works | Disk::Hangs | Disk::Slow => Ok(()),
            });
            match synced {
                Ok(()) => {
                    #[cfg(test)]
                    self.syncs.fetch_add(1, Ordering::SeqCst);
                    let mut progress = lock(&self.progress);
                    progress.synced = written;
                    // What was deferred since has waited for less long than what is synced.
                    let is_left = progress.deferred > written;
                    progress.deferred_due = is_left.then(|| Deadline::after(self.defer_limit));
                    self.done.notify_all();
                }
                Err(error) => {
                    tracing::error!(%error, "syncing the index failed; it accepts no more changes");
                    self.break_by(Broken::Failed(error.raw_os_error(), error.kind()));
                }
            }
        }
    }

    /// Waits until a commit is wanted or a deferred one is due. Returns false once it is over.
    fn wait_for_work(&self) -> bool {
        let rests = |progress: &mut Progress| {
            let is_due = progress.deferred_due.as_ref().is_some_and(Deadline::passed);
            progress.wanted <= progress.synced && !is_due && !progress.over
        };
        let mut progress = lock(&self.progress);
        while rests(&mut progress) {
            progress = match progress.deferred_due.as_ref().map(Deadline::left) {
                None => wait(&self.wanted, progress),
                Some(left) => wait_while_within(&self.wanted, progress, left, rests),
            };
        }
        !progress.over && progress.broken.is_none()
    }

    fn break_by(&self, broken: Broken) {
        lock(&self.progress).broken.get_or_insert(broken);
        self.done.notify_all();
        self.wanted.notify_all();
    }

    #[cfg(test)]
    fn hang(&self) {
        while matches!(*lock(&self.disk), Disk::Hangs | Disk::Slow) && !lock(&self.progress).over {
            crate::sys::clock::pause_for(Duration::from_millis(1));
        }
    }
}

/// Writes what is in a log to it once more, so that the disk has to take all of it. Nobody
/// else writes to it meanwhile.
pub(super) fn write_anew(file: &File) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        match file.read_at(&mut piece, at)? {
            0 => return Ok(()),
            count => {
                file.write_all_at(&piece[..count], at)?;
                at += count as u64;
            }
        }
    }
}

/// Returns SQLite's name for the log of the file `path`.
pub(super) fn name_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_commit_is_on_the_disk_once_it_was_waited_for_and_so_are_those_before_it() {
        let log = WriteAheadLog::over(tempfile::tempfile().unwrap()).unwrap();
        let (first, second) = (log.wrote(), log.wrote());
        log.wait_for(second).unwrap();
        assert_eq!(lock(&log.shared.progress).synced, second.0);
        log.wait_for(first).unwrap();
    }

    #[test]
    fn what_cannot_be_synced_is_told_to_everybody_for_good() {
        // A pipe has no disk.
        let (_reader, writer) = io::pipe().unwrap();
        let log = WriteAheadLog::over(OwnedFd::from(writer).into()).unwrap();
        log.check().unwrap();
        let commit = log.wrote();
        log.wait_for(commit).unwrap_err();
        log.wait_for(commit).unwrap_err();
        log.check().unwrap_err();
        let next = log.wrote();
        log.wait_for(next).unwrap_err();
    }

    #[test]
    fn a_commit_that_nobody_waits_for_shares_the_sync_of_the_next() {
        let file = tempfile::tempfile().unwrap();
        let log = WriteAheadLog::deferring(file, Duration::from_secs(86_400)).unwrap();
        for _ in 0..9 {
            log.defer(log.wrote());
        }
        let last = log.wrote();
        log.wait_for(last).unwrap();
        assert_eq!(lock(&log.shared.progress).synced, last.0);
        assert_eq!(log.shared.syncs.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_commit_that_nobody_waits_for_is_synced_after_a_moment() {
        let file = tempfile::tempfile().unwrap();
        let log = WriteAheadLog::deferring(file, Duration::from_millis(1)).unwrap();
        for _ in 0..3 {
            let commit = log.wrote();
            log.defer(commit);
            let progress = lock(&log.shared.progress);
            let is_missing = |progress: &mut Progress| progress.synced < commit.0;
            let patience = Duration::from_secs(60);
            let progress = wait_while_within(&log.shared.done, progress, patience, is_missing);
            assert_eq!(progress.synced, commit.0);
        }
    }

    #[test]
    fn many_who_wait_at_once_are_all_served() {
        let log = WriteAheadLog::over(tempfile::tempfile().unwrap()).unwrap();
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let commit = log.wrote();
                        log.wait_for(commit).unwrap();
                    }
                });
            }
        });
        assert_eq!(lock(&log.shared.progress).synced, 16 * 50);
    }
}
