//! Files that must survive a crash, and files that are mostly holes.
//!
//! What is called durable here is on the disk when the call returns: the bytes, and
//! the directory entries that lead to them. Long work is done in pieces, between
//! which it can be called off. Nothing here knows what a file means.

use std::{io, path::Path};

use super::{bounded, cancel::CalledOff};

mod cached;
mod durable;
mod flock;
mod identity;
mod opening;
mod owner;
pub(crate) mod regular;
mod reserve;
mod rewrite;
mod room;
mod socket;
mod sparse;

pub use cached::{cached_bytes, drop_cache};
pub use durable::{
    create_private, free_bytes, make_private_dir, remove_file, remove_tree, rename, rename_durably,
    sync_dir, sync_file, write_durably,
};
pub use flock::{LockFile, SharedLock, is_image_locked, lock_file, lock_holder};
pub use identity::{FileId, ids_below};
pub use opening::{
    ANSWER_LIMIT, ImageSize, MagicLinks, Opened, START_BYTES, handle_path, no_answer, open_found,
    open_machine_file,
};
pub(super) use owner::pretend;
pub use owner::{
    Wish, check_plain, give_dir, give_file, let_pass, let_read, may, open_path, take_back,
};
pub use regular::{
    open_image, open_regular, open_regular_to_append, open_regular_to_write, overwrite_regular,
    read_regular,
};
pub use reserve::{RESERVE_BYTES, Reserve};
pub use rewrite::write_anew;
pub use room::{Room, give_back_room, keeps_room, take_room};
pub use socket::{give_socket, let_through};
pub use sparse::{
    DataExtents, allocated_bytes, begin_sync, bytes_to_copy, copy_data, copy_image, data_bytes,
    data_extents, make_copy, punch, reflink_works, sync_in_pieces,
};

/// Why work that is done in pieces stopped before its end.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// The operation was called off between two pieces.
    #[error(transparent)]
    CalledOff(#[from] CalledOff),
    /// The system refused a piece.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for PieceError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Returns what is wrong with a file that a machine needs, if anything. A thread is left behind
/// where the file system does not answer.
#[must_use]
pub fn why_unusable(path: &Path) -> Option<String> {
    let named = path.to_owned();
    let looked = bounded::within(ANSWER_LIMIT, move || named.metadata());
    let found = looked.unwrap_or_else(|error| {
        Err(if error.kind() == io::ErrorKind::TimedOut { no_answer() } else { error })
    });
    match found {
        Ok(meta) if meta.is_dir() => {
            Some("that is a directory; write the path of a file".to_owned())
        }
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some("there is no such file; write the path of one".to_owned())
        }
        Err(error) => Some(format!("{error}; write the path of a file")),
    }
}
