//! The trash: the files of deleted sandboxes, removed by one thread that nobody waits for.
//!
//! One at a time, so that those who delete many sandboxes take no more than one of the threads
//! that others need, and each directory is looked at once.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    sandbox::RowId,
    sync::{Arc, Mutex, lock},
    sys::{
        files::{remove_tree, rename, sync_dir},
        pool::Pool,
    },
};

/// Whether a thread empties the trash.
#[derive(Debug, Default)]
struct Emptying {
    /// A leaf lock.
    stage: Mutex<Stage>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// None does.
    #[default]
    Idle,
    /// One does.
    UnderWay,
    /// One does, and there may be more than it has seen.
    MoreCame,
}

impl Emptying {
    /// Asks for what is in the trash by now to be removed. True where no thread is at it, and
    /// the caller is to start one.
    fn ask(&self) -> bool {
        let mut stage = lock(&self.stage);
        let is_idle = *stage == Stage::Idle;
        *stage = if is_idle { Stage::UnderWay } else { Stage::MoreCame };
        is_idle
    }

    /// Says whether the thread that is at it has to look again; if not, it is over.
    fn goes_on(&self) -> bool {
        let mut stage = lock(&self.stage);
        let more_came = *stage == Stage::MoreCame;
        *stage = if more_came { Stage::UnderWay } else { Stage::Idle };
        more_came
    }

    /// Ends it, whoever asked meanwhile.
    fn give_up(&self) {
        *lock(&self.stage) = Stage::Idle;
    }
}

/// The directory with the files of deleted sandboxes.
#[derive(Debug)]
pub(super) struct Trash {
    dir: PathBuf,
    emptying: Arc<Emptying>,
    pool: Arc<Pool>,
}

impl Trash {
    pub(super) fn new(dir: PathBuf, pool: Arc<Pool>) -> Self {
        Self { dir, emptying: Arc::default(), pool }
    }

    /// Moves a sandbox's directory here, at once, however many GiB it has.
    pub(super) fn take(&self, sandboxes: &Path, row: RowId) -> io::Result<()> {
        let name = row.to_string();
        match rename(&sandboxes.join(&name), &self.dir.join(&name)) {
            // A sandbox that was never woken has no files.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        sync_dir(&self.dir)?;
        sync_dir(sandboxes)
    }

    /// Has all that is in it removed by a thread that nobody waits for.
    pub(super) fn empty_later(&self) {
        if !self.emptying.ask() {
            return;
        }
        let (dir, emptying) = (self.dir.clone(), Arc::clone(&self.emptying));
        let job = move || loop {
            if let Err(error) = empty(&dir) {
                tracing::warn!(%error, trash = %dir.display(), "emptying the trash");
            }
            if !emptying.goes_on() {
                return;
            }
        };
        if self.pool.run(job).is_err() {
            self.emptying.give_up();
            tracing::debug!("all threads are busy; the trash is emptied after the next deletion");
        }
    }
}

/// Removes all that is in `trash`. What cannot be removed keeps nothing else from it; the error
/// is that of the first.
fn empty(trash: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for entry in std::fs::read_dir(trash)? {
        result = result.and(remove_tree(&entry?.path()));
    }
    result
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn one_thread_empties_the_trash_and_looks_again_for_those_who_asked_meanwhile() {
        let emptying = Emptying::default();
        assert!(emptying.ask());
        for _ in 0..3 {
            assert!(!emptying.ask());
        }
        assert!(emptying.goes_on());
        assert!(!emptying.goes_on());
        assert!(emptying.ask());
        emptying.give_up();
        assert!(emptying.ask());
    }

    #[test]
    fn what_cannot_be_removed_keeps_nothing_else_in_the_trash() {
        let temp = tempfile::tempdir().unwrap();
        let (trash, busy) = (temp.path(), temp.path().join("5"));
        for name in 0..10 {
            fs::create_dir(trash.join(name.to_string())).unwrap();
            fs::write(trash.join(name.to_string()).join("f"), "").unwrap();
        }
        // Nobody removes a directory that something is mounted on.
        rustix::mount::mount_bind(&busy, &busy).unwrap();
        let emptied = empty(trash);
        crate::sys::mount::detach(&busy).unwrap();
        emptied.unwrap_err();
        let left: Vec<_> = fs::read_dir(trash).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(left, [busy]);
        empty(trash).unwrap();
        assert_eq!(fs::read_dir(trash).unwrap().count(), 0);
    }
}
