//! The digest of a memory that is taken while its VMM saves the devices.
//!
//! A paused machine does not change its memory, so where that is a file it can be read,
//! and be on its way to the disk, from the pause on. Should something change it all the
//! same, then that shows by the file's time of change, and the file is read once more.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    thread::{Builder, JoinHandle},
};

use super::digest;
use crate::{
    sync::Arc,
    sys::{
        cancel::Cancel,
        files::{self, PieceError},
    },
};

/// How many threads take the digest of a memory. The guest is paused and its writer waits,
/// so two; more would take CPU from the guests that run.
pub(super) const DIGEST_THREADS: usize = 2;

/// A memory that is being read. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Reading {
    file: File,
    /// When the file was last changed, before it was read.
    changed: (i64, i64),
    thread: Option<JoinHandle<Result<String, PieceError>>>,
    given_up: Arc<Cancel>,
}

impl Reading {
    /// Begins to read the memory `path` of a machine that is paused, and to write it to
    /// the disk.
    pub(super) fn begin(path: &Path, cancel: &Arc<Cancel>) -> io::Result<Self> {
        let file = files::open_regular(path)?;
        let changed = changed(&file)?;
        // A descriptor has one offset, and this one is kept for the time of change.
        let memory = files::open_regular(path)?;
        let given_up = Arc::new(Cancel::default());
        let (cancel, stop) = (Arc::clone(cancel), Arc::clone(&given_up));
        let thread = Builder::new().name("memory-digest".to_owned()).spawn(move || {
            // Whatever it says, the sync of the commit says better.
            files::begin_sync(&memory).ok();
            let goes_on = || cancel.check().and_then(|()| stop.check());
            digest::of_blocks(&memory, &goes_on, DIGEST_THREADS)
        })?;
        Ok(Self { file, changed, thread: Some(thread), given_up })
    }

    /// Returns the digest, or `None` if the file was changed after this was begun.
    pub(super) fn end(mut self) -> Result<Option<String>, PieceError> {
        let Some(thread) = self.thread.take() else { return Ok(None) };
        let digest = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((changed(&self.file)? == self.changed).then_some(digest))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.given_up.call_off();
    }
}

fn changed(file: &File) -> io::Result<(i64, i64)> {
    let meta = file.metadata()?;
    Ok((meta.mtime(), meta.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt, time::Duration};

    use super::*;

    /// A memory on a disk, which was written to a while ago.
    fn memory(dir: &Path) -> File {
        let path = dir.join("memory");
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        let earlier = file.metadata().unwrap().modified().unwrap() - Duration::from_secs(60);
        file.set_modified(earlier).unwrap();
        file
    }

    #[test]
    fn what_is_read_early_is_what_is_read_late() {
        let temp = tempfile::tempdir().unwrap();
        let file = memory(temp.path());
        let path = temp.path().join("memory");
        let cancel = Arc::new(Cancel::default());
        let early = Reading::begin(&path, &cancel).unwrap().end().unwrap();
        let late = digest::of_blocks(&File::open(&path).unwrap(), &|| cancel.check(), 1).unwrap();
        assert_eq!(early, Some(late));
        drop(file);
    }

    #[test]
    fn a_memory_that_was_changed_meanwhile_has_no_early_digest() {
        let temp = tempfile::tempdir().unwrap();
        let file = memory(temp.path());
        let cancel = Arc::new(Cancel::default());
        let reading = Reading::begin(&temp.path().join("memory"), &cancel).unwrap();
        file.write_all_at(b"x", 4096).unwrap();
        assert_eq!(reading.end().unwrap(), None);
    }

    #[test]
    fn a_memory_that_is_mapped_shows_its_changes_too() {
        let temp =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let file = memory(temp.path());
        let path = temp.path().join("memory");
        file.sync_all().unwrap();
        let cancel = Arc::new(Cancel::default());
        let reading = Reading::begin(&path, &cancel).unwrap();
        // What maps it is another process, as a VMM is.
        #[allow(clippy::disallowed_methods, reason = "a test's own helper")]
        let wrote = std::process::Command::new("python3")
            .args([
                "-c",
                "import mmap,sys; f=open(sys.argv[1],'r+b'); mmap.mmap(f.fileno(),0)[0]=1",
            ])
            .arg(&path)
            .status()
            .unwrap();
        assert!(wrote.success());
        assert_eq!(reading.end().unwrap(), None);
    }

    #[test]
    fn a_reading_is_called_off_with_its_operation() {
        let temp = tempfile::tempdir().unwrap();
        let _file = memory(temp.path());
        let cancel = Arc::new(Cancel::default());
        cancel.call_off();
        let error = Reading::begin(&temp.path().join("memory"), &cancel).unwrap().end();
        assert!(matches!(error, Err(PieceError::CalledOff(_))), "{error:?}");
    }
}
