//! Room on the disk for a file that is mostly holes.
//!
//! A page of a mapped file that is a hole gets its blocks when it is first written to. Where
//! the disk has none left the kernel kills whoever wrote (SIGBUS). So a file can have its
//! blocks beforehand, unwritten: they read as zeros, and cost no writing.

use std::{fs::File, io, ops::Range, os::fd::AsRawFd as _, path::Path};

use rustix::{
    fs::{FallocateFlags, fallocate, fstatfs},
    io::Errno,
};

use super::{
    regular::open_regular_to_write,
    sparse::{allocated_bytes, punch},
};

/// The file systems that are known to keep room for a mapping, by `statfs(2)`. Not so tmpfs,
/// where blocks are memory, nor btrfs: there each page that is written again takes a new
/// block, and a block that was given back is not free before all of its extent is.
const EXT4: libc::c_long = 0xEF53;
const XFS: libc::c_long = 0x5846_5342;

/// The smallest piece of unwritten blocks that is given back. Each costs a transaction, at
/// this sleep and at the next wake; so a guest that touched single pages here and there keeps
/// some of the room between them.
const PIECE_MIN_BYTES: u64 = 64 << 10;

/// Whether room was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It has all the blocks that it needs.
    Taken,
    /// The file system keeps none; its blocks come as they are written to.
    NotKept,
}

/// Says whether the file system of `path` can keep room for a mapping.
pub fn keeps_room(path: &Path) -> io::Result<bool> {
    Ok(is_known(rustix::fs::statfs(path)?.f_type))
}

fn is_known(kind: libc::c_long) -> bool {
    [EXT4, XFS].contains(&kind)
}

/// Gives the file `path` the size `len`, if it is smaller, and all the blocks that it has not.
/// What is in it stays.
///
/// # Errors
/// `ENOSPC` where the disk has less; some blocks may have been taken then.
pub fn take_room(path: &Path, len: u64) -> io::Result<Room> {
    let file = open_regular_to_write(path)?;
    if file.metadata()?.len() < len {
        file.set_len(len)?;
    }
    if !is_known(fstatfs(&file)?.f_type) {
        return Ok(Room::NotKept);
    }
    match fallocate(&file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(Room::Taken),
        // An ext4 without extents, as ext3 was.
        Err(Errno::OPNOTSUPP) => Ok(Room::NotKept),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives back the blocks of the file `path` that nobody wrote to, and returns how many bytes it
/// takes then. Nobody may write to it meanwhile, nor have it mapped.
pub fn give_back_room(path: &Path) -> io::Result<u64> {
    let file = open_regular_to_write(path)?;
    if is_known(fstatfs(&file)?.f_type) {
        for piece in unwritten(&file)? {
            if piece.end - piece.start >= PIECE_MIN_BYTES {
                punch(&file, piece.start, piece.end - piece.start)?;
            }
        }
    }
    allocated_bytes(path)
}

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const EXTENTS_AT_ONCE: usize = 256;

/// `struct fiemap` of linux/fiemap.h, with room for some extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS_AT_ONCE],
}

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`, whose 32 bytes are those before the extents.
const FIEMAP: libc::Ioctl = 0xC020_660B_u32 as libc::Ioctl;
/// What is dirty is written first, so that its blocks are not taken for unwritten ones.
const FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 1;
const EXTENT_UNWRITTEN: u32 = 0x800;

/// Lists the parts of a file that have blocks which nobody wrote to. `SEEK_DATA` does not do:
/// it takes zeros that somebody read, and that are in the page cache, for data.
fn unwritten(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut pieces: Vec<Range<u64>> = Vec::new();
    let mut start = 0;
    loop {
        let mut request = Request {
            start,
            length: u64::MAX - start,
            flags: FLAG_SYNC,
            mapped_extents: 0,
            extent_count: u32::try_from(EXTENTS_AT_ONCE).expect("it is a few hundred"),
            reserved: 0,
            extents: [Extent::default(); EXTENTS_AT_ONCE],
        };
        // SAFETY: the descriptor is open, and the kernel reads the head of `request` and fills
        // at most as many extents as that says there is room for.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut request) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        let count = usize::try_from(request.mapped_extents).expect("it is a few hundred");
        let found = &request.extents[..count.min(EXTENTS_AT_ONCE)];
        for extent in found.iter().filter(|extent| extent.flags & EXTENT_UNWRITTEN != 0) {
            let end = extent.logical.saturating_add(extent.length);
            match pieces.last_mut() {
                Some(last) if last.end == extent.logical => last.end = end,
                Some(_) | None => pieces.push(extent.logical..end),
            }
        }
        match found.last() {
            Some(last) if last.flags & EXTENT_LAST == 0 => {
                start = last.logical.saturating_add(last.length);
            }
            Some(_) | None => return Ok(pieces),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt as _};

    use super::*;

    /// A directory on a disk: where cargo builds.
    fn on_a_disk() -> tempfile::TempDir {
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    #[test]
    fn room_is_taken_and_given_back_and_what_was_written_stays() {
        let temp = on_a_disk();
        let path = temp.path().join("f");
        fs::write(&path, "before").unwrap();
        let len = 64 << 20;
        let kept = take_room(&path, len).unwrap();
        assert_eq!(kept == Room::Taken, keeps_room(temp.path()).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().len(), len);
        if kept == Room::Taken {
            assert!(allocated_bytes(&path).unwrap() >= len);
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // Pages that are dirty, and zeros that are in the page cache.
        for at in [20 << 20, (40 << 20) + 5] {
            file.write_all_at(b"a guest", at).unwrap();
        }
        file.read_exact_at(&mut vec![0; 1 << 20], 30 << 20).unwrap();
        let left = give_back_room(&path).unwrap();
        assert!(left < 2 << 20, "{left}");
        let mut bytes = fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"before"));
        for at in [20 << 20, (40 << 20) + 5] {
            assert_eq!(&bytes[at..at + 7], b"a guest");
            bytes[at..at + 7].fill(0);
        }
        assert!(bytes[6..].iter().all(|byte| *byte == 0));
        take_room(&path, len).unwrap();
        assert!(fs::read(&path).unwrap().starts_with(b"before"));
    }

    #[test]
    fn many_pieces_are_given_back() {
        let temp = on_a_disk();
        let path = temp.path().join("f");
        fs::write(&path, "").unwrap();
        take_room(&path, 256 << 20).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        // More than are asked for at once.
        for at in (0..256 << 20).step_by(256 << 10) {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        let left = give_back_room(&path).unwrap();
        // File systems that write large folios write more than was touched.
        assert!((4 << 20..160 << 20).contains(&left), "{left}");
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == 1).count(), 4 << 20);
    }

    #[test]
    fn memory_is_not_taken_for_what_nobody_wrote() {
        let shm = Path::new("/dev/shm");
        assert!(!keeps_room(shm).unwrap());
        let temp = tempfile::tempdir_in(shm).unwrap();
        let path = temp.path().join("f");
        fs::write(&path, "").unwrap();
        assert_eq!(take_room(&path, 16 << 20).unwrap(), Room::NotKept);
        assert_eq!(fs::metadata(&path).unwrap().len(), 16 << 20);
        assert_eq!(allocated_bytes(&path).unwrap(), 0);
        assert_eq!(give_back_room(&path).unwrap(), 0);
    }
}
