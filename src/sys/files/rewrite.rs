//! Writing a file anew after the disk has lost some of it.

use std::{io, ops::Range, os::unix::fs::FileExt as _, path::Path};

use super::{PieceError, regular::open_regular_to_write, sparse::data_extents};
use crate::sys::cancel::Cancel;

/// How much is read at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// The unit in which it is decided what is written: the page of every file system here.
const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// Writes all bytes of the file `path` anew, as they read now, so that the next sync of it
/// covers all of them. Nobody else may write to it meanwhile.
///
/// When the kernel fails to write pages to the disk, it reports that to one fsync(2) and marks
/// the pages clean. A later fsync(2) returns 0, although the disk never got them. So after a
/// failed sync only a fresh write brings them there. Holes are not to be trusted either: some
/// file systems (btrfs) call a page that they failed to write a hole, while the page cache
/// still has its bytes. So this reads the file from its beginning to its end.
///
/// # Errors
/// `CalledOff` within a piece; otherwise what the disk says.
pub fn write_anew(path: &Path, cancel: &Cancel) -> Result<(), PieceError> {
    let file = open_regular_to_write(path)?;
    // A failure that nobody was told of yet is of the writes before these.
    file.sync_data().ok();
    let len = file.metadata()?.len();
    let extents = data_extents(&file).collect::<io::Result<Vec<_>>>()?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = 0;
    while at < len {
        cancel.check()?;
        let count = usize::try_from(len - at).map_or(BUFFER_BYTES, |left| left.min(BUFFER_BYTES));
        let bytes = &mut buffer[..count];
        file.read_exact_at(bytes, at)?;
        for run in runs_to_write(bytes, at, &extents) {
            let start = at + u64::try_from(run.start).expect("a buffer is small");
            file.write_all_at(&bytes[run], start)?;
        }
        at += u64::try_from(count).expect("a buffer is small");
    }
    Ok(())
}

/// Returns the parts of `bytes`, which are at `at` of the file, that are not zeros in a hole.
fn runs_to_write(bytes: &[u8], at: u64, extents: &[Range<u64>]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for start in (0..bytes.len()).step_by(PAGE) {
        let end = bytes.len().min(start + PAGE);
        let page = &bytes[start..end];
        let offset = at + u64::try_from(start).expect("a buffer is small");
        // The first extent that ends behind the start of the page.
        let next = extents.partition_point(|extent| extent.end <= offset);
        let page_end = offset + u64::try_from(end - start).expect("a page is small");
        let is_data = extents.get(next).is_some_and(|extent| extent.start < page_end);
        if !is_data && *page == ZEROS[..page.len()] {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            Some(_) | None => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::sys::files::allocated_bytes;

    #[test]
    fn a_file_that_is_written_anew_has_the_same_bytes_and_holes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("f");
        let file = File::create_new(&path).unwrap();
        file.set_len((64 << 20) + 100).unwrap();
        for (at, bytes) in [(5000, &b"one"[..]), (9 << 20, &[7; 70_000]), ((64 << 20) + 99, b"x")] {
            file.write_all_at(bytes, at).unwrap();
        }
        let (before, took) = (fs::read(&path).unwrap(), allocated_bytes(&path).unwrap());
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        write_anew(&path, &Cancel::default()).unwrap();
        assert!(before == fs::read(&path).unwrap());
        assert_eq!(allocated_bytes(&path).unwrap(), took);
        assert!(fs::metadata(&path).unwrap().modified().unwrap() >= changed);
    }

    #[test]
    fn zeros_are_written_where_the_disk_may_have_something_else() {
        let mut bytes = vec![0; 5 * PAGE];
        bytes[4 * PAGE + 1] = 1;
        let (at, page) = (1 << 30, u64::try_from(PAGE).unwrap());
        let extents = [0..10, at + page..at + page + 1];
        assert_eq!(runs_to_write(&bytes, at, &extents), [PAGE..2 * PAGE, 4 * PAGE..5 * PAGE]);
        let all = vec![at - page..at + 5 * page, at + 6 * page..at + 7 * page];
        assert_eq!(runs_to_write(&bytes, at, &all).pop(), Some(0..5 * PAGE));
        assert_eq!(runs_to_write(&bytes[..100], at, &[]), []);
    }

    #[test]
    fn writing_anew_can_be_called_off() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("f");
        fs::write(&path, "bytes").unwrap();
        let cancel = Cancel::default();
        cancel.call_off();
        let error = write_anew(&path, &cancel).unwrap_err();
        assert!(matches!(error, PieceError::CalledOff(_)), "{error}");
    }
}
