//! Fixed file descriptor numbers: the same in every child, so that it can be told names such as
//! `/proc/self/fd/200`.
//!
//! The daemon reserves these numbers for good, so that a file placed there in a child never
//! replaces another, such as the standard library's pipe to the child.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd},
};

use rustix::io::fcntl_dupfd_cloexec;

use crate::sync::{Mutex, lock};

/// Above the files of a starting daemon, and below every system's limit.
const FIRST: RawFd = 200;
const COUNT: u8 = 32;

/// A fixed number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedFd(u8);

impl FixedFd {
    /// Returns the fixed fd with this index, from zero.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < COUNT { Some(Self(number)) } else { None }
    }

    pub(super) fn descriptor(self) -> RawFd {
        FIRST + RawFd::from(self.0)
    }
}

impl fmt::Display for FixedFd {
    /// Writes its path in a child.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/proc/self/fd/{}", self.descriptor())
    }
}

/// Reserves all numbers. Call it early. Idempotent.
pub fn reserve_fixed_fds() -> io::Result<()> {
    static RESERVED: Mutex<bool> = Mutex::new(false);
    let mut reserved = lock(&RESERVED);
    if *reserved {
        return Ok(());
    }
    let nothing = OwnedFd::from(File::open("/dev/null")?);
    let held = (0..COUNT)
        .map(|number| hold(&nothing, FixedFd(number).descriptor()))
        .collect::<io::Result<Vec<_>>>()?;
    for file in held {
        // It stays open for good.
        let _number = file.into_raw_fd();
    }
    *reserved = true;
    Ok(())
}

fn hold(nothing: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    let held = fcntl_dupfd_cloexec(nothing.as_fd(), number)?;
    if held.as_raw_fd() == number {
        return Ok(held);
    }
    Err(io::Error::other(format!("the file descriptor {number} is in use by something else")))
}
