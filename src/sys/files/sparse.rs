//! Sparse files: disk images and guest memory.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::Path,
};

use rustix::{
    fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom, fstat},
    io::Errno,
};

use super::{
    PieceError,
    durable::{create_private, rename_durably, with_suffix},
    opening::ImageSize,
    regular::open_regular,
};
use crate::sys::cancel::Cancel;

/// The bytes that are copied or flushed between two checks for cancellation, a third of a second on
/// a slow disk.
const PIECE_BYTES: u64 = 32 << 20;
/// How much is copied at a time. A server of files that gives 1 MB/s takes four seconds for it.
const COPY_BYTES: u64 = 4 << 20;
/// How much is copied by hand at a time, where the kernel cannot copy by itself.
const BUFFER_BYTES: usize = 1 << 20;
/// The shortest hole that a copy by hand makes of zeros.
const HOLE_BYTES: usize = 64 << 10;

/// The data of a file, in order, from [`data_extents`].
#[derive(Debug)]
pub struct DataExtents<'a> {
    file: &'a File,
    at: u64,
}

/// Lists the data of `file`.
///
/// It moves the file's offset, so whoever else reads it does so by `read_at`.
#[must_use]
pub fn data_extents(file: &File) -> DataExtents<'_> {
    DataExtents { file, at: 0 }
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start,
            // There is no data from here on.
            Err(Errno::NXIO) => return None,
            Err(errno) => return Some(Err(errno.into())),
        };
        match rustix::fs::seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) => {
                self.at = end;
                Some(Ok(start..end))
            }
            Err(errno) => Some(Err(errno.into())),
        }
    }
}

/// Returns how many bytes the file `path` takes on its disk.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.blocks().saturating_mul(512))
}

/// Returns the written bytes of the file `path`.
pub fn data_bytes(path: &Path) -> io::Result<u64> {
    let file = open_regular(path)?;
    data_extents(&file).map(|extent| extent.map(|extent| extent.end - extent.start)).sum()
}

/// Returns how much of its disk a copy of an image in `dir` takes: nothing where the two can share
/// it.
pub fn bytes_to_copy(image: &ImageSize, dir: &Path) -> io::Result<u64> {
    if image.device == fs::metadata(dir)?.dev() && reflink_works(dir) {
        return Ok(0);
    }
    Ok(image.allocated_bytes.min(image.bytes))
}

/// Starts writing `file` to the disk.
pub fn begin_sync(file: &File) -> io::Result<()> {
    // A length of nought means up to the end.
    sync_range(file, &(0..0), libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until the bytes of `file` are on the disk, one piece after the other.
///
/// # Errors
/// `CalledOff` after at most two pieces more; otherwise what the disk says.
pub fn sync_in_pieces(file: &File, cancel: &Cancel) -> Result<(), PieceError> {
    // While the disk writes one piece it is already told the next.
    let mut under_way: Option<Range<u64>> = None;
    for piece in Pieces::of(file) {
        cancel.check()?;
        let piece = piece?;
        sync_range(file, &piece, libc::SYNC_FILE_RANGE_WRITE)?;
        if let Some(earlier) = under_way.replace(piece) {
            await_range(file, &earlier)?;
        }
    }
    if let Some(last) = under_way {
        cancel.check()?;
        await_range(file, &last)?;
    }
    cancel.check()?;
    // The pieces have moved bytes only: this adds the metadata that lead to them, and
    // empties the disk's own cache.
    Ok(file.sync_data()?)
}

/// Copies the image `source` to `to`, which must not exist, and returns its size.
///
/// Where the file system can share blocks the copy costs nothing; otherwise holes stay
/// holes. When it returns the copy is durable, and its owner's alone. After an error,
/// or a crash on the way, there is nothing at `to`.
///
/// # Errors
/// `CalledOff` within a piece or two; otherwise what the system says.
pub fn copy_image(source: &File, to: &Path, cancel: &Cancel) -> Result<u64, PieceError> {
    let meta = source.metadata()?;
    if !meta.is_file() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "an image is a regular file");
        return Err(error.into());
    }
    make_copy(to, cancel, |target| {
        copy_data(source, target, meta.len(), &mut || Ok(cancel.check()?))
    })?;
    Ok(meta.len())
}

/// Makes the file `to`, which must not exist, of what `fill` writes to an empty file. When it
/// returns the file is durable, and its owner's alone. After an error, or a crash on the way,
/// there is nothing at `to`.
///
/// # Errors
/// `CalledOff` where the operation was called off, also if `fill` failed by that; otherwise
/// those of `fill` and what the system says.
pub fn make_copy(
    to: &Path,
    cancel: &Cancel,
    fill: impl FnOnce(&File) -> Result<(), PieceError>,
) -> Result<(), PieceError> {
    cancel.check()?;
    let draft = with_suffix(to, ".tmp");
    let copied = create_private(&draft)
        .map_err(PieceError::from)
        .and_then(|target| {
            let filled = fill(&target);
            cancel.check()?;
            filled?;
            sync_in_pieces(&target, cancel)
        })
        .and_then(|()| Ok(rename_durably(&draft, to)?));
    copied.inspect_err(|_| {
        // A draft that stays is truncated by the next copy.
        fs::remove_file(&draft).ok();
    })
}

/// Fills the empty file `target` with the first `len` bytes of `source`, a regular file or a block
/// device. Where the file system can share blocks this costs nothing; otherwise holes stay holes.
/// `go_on` is called before each piece.
pub fn copy_data(
    source: &File,
    target: &File,
    len: u64,
    go_on: &mut dyn FnMut() -> Result<(), PieceError>,
) -> Result<(), PieceError> {
    // Whatever a clone fails of, the copy succeeds in spite of it or tells better.
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    target.set_len(len)?;
    // A block device tells of no holes.
    let is_device = FileType::from_raw_mode(fstat(source)?.st_mode) == FileType::BlockDevice;
    let whole = is_device.then_some(Ok(0..len));
    let extents = data_extents(source).take(if is_device { 0 } else { usize::MAX });
    for extent in whole.into_iter().chain(extents) {
        let extent = extent?;
        let mut at = extent.start;
        while at < extent.end.min(len) {
            go_on()?;
            let most = COPY_BYTES.min(extent.end.min(len) - at);
            let done = copy_piece(source, target, at, most)?;
            if done == 0 {
                let error = io::Error::new(io::ErrorKind::UnexpectedEof, "the image has shrunk");
                return Err(error.into());
            }
            at += done;
        }
    }
    Ok(())
}

/// Says whether the file system of `dir` can share blocks between two files.
#[must_use]
pub fn reflink_works(dir: &Path) -> bool {
    let nameless = || -> io::Result<File> {
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode)?.into())
    };
    let (Ok(source), Ok(target)) = (nameless(), nameless()) else {
        return false;
    };
    source.write_all_at(&[1; 4096], 0).is_ok()
        && rustix::fs::ioctl_ficlone(&target, &source).is_ok()
}

/// Punches a hole into `file`.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

/// Spans of a file with about [`PIECE_BYTES`] of data in each. They may have holes in
/// them, as to flush a hole costs nothing, while to wait for each small extent by
/// itself costs a turn of the disk.
struct Pieces<'a> {
    extents: DataExtents<'a>,
    /// What is left of an extent that was longer than a piece.
    rest: Range<u64>,
}

impl<'a> Pieces<'a> {
    fn of(file: &'a File) -> Self {
        Self { extents: data_extents(file), rest: 0..0 }
    }
}

impl Iterator for Pieces<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut span: Option<Range<u64>> = None;
        let mut room = PIECE_BYTES;
        while room > 0 {
            if self.rest.is_empty() {
                match self.extents.next() {
                    Some(Ok(extent)) => self.rest = extent,
                    Some(Err(error)) => return Some(Err(error)),
                    None => break,
                }
            }
            let taken = room.min(self.rest.end - self.rest.start);
            let end = self.rest.start + taken;
            span = Some(span.map_or(self.rest.start, |span| span.start)..end);
            self.rest.start = end;
            room -= taken;
        }
        span.map(Ok)
    }
}

fn await_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(file, range, flags)
}

fn sync_range(file: &File, range: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let start = range.start.cast_signed();
    let len = (range.end - range.start).cast_signed();
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the call takes
    // numbers only: no memory of ours is read or written.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Copies up to `most` bytes at `at`, and returns how many it was.
fn copy_piece(source: &File, target: &File, at: u64, most: u64) -> io::Result<u64> {
    let (mut from, mut to) = (at, at);
    let count = usize::try_from(most).expect("a piece is far smaller than the address space");
    match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count) {
        Ok(done) => Ok(u64::try_from(done).expect("it is at most what was asked for")),
        // Between some file systems the kernel leaves it to us.
        Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
            copy_by_hand(source, target, at, count)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn copy_by_hand(source: &File, target: &File, at: u64, most: usize) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER_BYTES.min(most)];
    let count = source.read_at(&mut buffer, at)?;
    for (piece, offset) in buffer[..count].chunks(HOLE_BYTES).zip((at..).step_by(HOLE_BYTES)) {
        if piece.iter().any(|byte| *byte != 0) {
            target.write_all_at(piece, offset)?;
        }
    }
    Ok(u64::try_from(count).expect("a buffer's size is a u64"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A file of 200 MiB with some bytes at each of `places`.
    fn sparse(path: &Path, places: &[u64]) -> File {
        let file = create_private(path).unwrap();
        file.set_len(200 * MIB).unwrap();
        for place in places {
            file.write_all_at(&[7; 4096], *place).unwrap();
        }
        file
    }

    #[test]
    fn extents_are_the_data_and_nothing_else() {
        let temp = tempfile::tempdir().unwrap();
        let file = sparse(&temp.path().join("f"), &[MIB, 100 * MIB]);
        let extents: Vec<_> = data_extents(&file).map(Result::unwrap).collect();
        assert_eq!(extents.len(), 2, "{extents:?}");
        assert!(extents[0].contains(&MIB) && extents[1].contains(&(100 * MIB)));
        let empty = sparse(&temp.path().join("e"), &[]);
        assert!(data_extents(&empty).next().is_none());
    }

    #[test]
    fn a_piece_has_a_bounded_amount_of_data_and_none_is_missed() {
        let temp = tempfile::tempdir().unwrap();
        let file = sparse(&temp.path().join("f"), &[190 * MIB, 195 * MIB]);
        file.write_all_at(&vec![1; usize::try_from(80 * MIB).unwrap()], 0).unwrap();
        let pieces: Vec<_> = Pieces::of(&file).map(Result::unwrap).collect();
        assert_eq!(pieces.len(), 3, "{pieces:?}");
        assert_eq!(pieces[0], 0..32 * MIB);
        assert_eq!(pieces[1], 32 * MIB..64 * MIB);
        assert!(pieces[2].start == 64 * MIB && pieces[2].end > 195 * MIB);
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_holes() {
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("from"), temp.path().join("to"));
        let source = sparse(&from, &[3 * MIB, 150 * MIB]);
        let size = copy_image(&source, &to, &Cancel::default()).unwrap();
        assert_eq!(size, 200 * MIB);
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(allocated_bytes(&to).unwrap() < MIB);
        let mode = fs::metadata(&to).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }

    #[test]
    fn a_copy_by_hand_has_the_same_bytes() {
        let temp = tempfile::tempdir().unwrap();
        let (source, to) =
            (sparse(&temp.path().join("from"), &[0, 200_704]), temp.path().join("to"));
        let target = create_private(&to).unwrap();
        target.set_len(262_144).unwrap();
        assert_eq!(copy_by_hand(&source, &target, 0, 262_144).unwrap(), 262_144);
        let (mut bytes, mut copied) = ([0; 262_144], [0; 262_144]);
        source.read_exact_at(&mut bytes, 0).unwrap();
        target.read_exact_at(&mut copied, 0).unwrap();
        assert!(bytes == copied && copied.contains(&7));
        assert!(allocated_bytes(&to).unwrap() <= 131_072, "zeros are holes");
    }

    #[test]
    fn a_copy_that_fails_or_is_called_off_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("from"), temp.path().join("to"));
        let source = sparse(&from, &[MIB]);
        let called_off = Cancel::default();
        called_off.call_off();
        let error = copy_image(&source, &to, &called_off).unwrap_err();
        assert!(matches!(error, PieceError::CalledOff(_)), "{error}");
        let dir = File::open(temp.path()).unwrap();
        let error = copy_image(&dir, &to, &Cancel::default()).unwrap_err();
        assert_eq!(error.to_string(), "an image is a regular file");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
        fs::write(&to, "mine").unwrap();
        copy_image(&source, &to, &Cancel::default()).unwrap_err();
        assert_eq!(fs::read(&to).unwrap(), b"mine");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_flush_can_be_called_off() {
        let temp = tempfile::tempdir().unwrap();
        let file = sparse(&temp.path().join("f"), &[MIB]);
        let cancel = Cancel::default();
        sync_in_pieces(&file, &cancel).unwrap();
        cancel.call_off();
        let error = sync_in_pieces(&file, &cancel).unwrap_err();
        assert!(matches!(error, PieceError::CalledOff(_)), "{error}");
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_takes_no_room() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("f");
        let file = sparse(&path, &[0]);
        file.sync_all().unwrap();
        punch(&file, 0, 4096).unwrap();
        assert_eq!(allocated_bytes(&path).unwrap(), 0);
        assert_eq!(file.metadata().unwrap().len(), 200 * MIB);
    }

    #[test]
    fn asking_for_shared_blocks_leaves_no_file() {
        let temp = tempfile::tempdir().unwrap();
        let works = reflink_works(temp.path());
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        assert!(!reflink_works(&temp.path().join("gone")), "here: {works}");
    }
}
