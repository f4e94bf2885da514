//! Numbers by which a child has files that we choose: the same in every child, so that
//! whoever knows a child knows them, and a name such as `/proc/self/fd/200` can be told it.
//!
//! A child begins as a copy of us, and between the two the standard library has a pipe
//! whose number it does not tell. So these numbers are taken here for good: then nothing
//! else of ours ever has one, and putting a file there in the child closes nothing.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd},
};

use rustix::io::fcntl_dupfd_cloexec;

use crate::sync::{Mutex, lock};

/// The first of the numbers: above what a daemon has opened when it begins, and below what
/// any system lets a process have.
const FIRST: RawFd = 200;
/// How many there are.
const COUNT: u8 = 32;

/// One of the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(u8);

impl Place {
    /// Returns the place of this number, from nought; `None` if there are not as many.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < COUNT { Some(Self(number)) } else { None }
    }

    pub(super) fn descriptor(self) -> RawFd {
        FIRST + RawFd::from(self.0)
    }
}

impl fmt::Display for Place {
    /// Writes the name by which a child finds what is there.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/proc/self/fd/{}", self.descriptor())
    }
}

/// Takes all the numbers, so that nobody else gets one. It is best called before much has
/// been opened; calling it again is no error.
///
/// # Errors
/// Where one is another's already, or the limit of open files is lower than the numbers.
pub fn reserve_places() -> io::Result<()> {
    static RESERVED: Mutex<bool> = Mutex::new(false);
    let mut reserved = lock(&RESERVED);
    if *reserved {
        return Ok(());
    }
    let nothing = OwnedFd::from(File::open("/dev/null")?);
    let held = (0..COUNT)
        .map(|number| hold(&nothing, Place(number).descriptor()))
        .collect::<io::Result<Vec<_>>>()?;
    for file in held {
        // It stays open for as long as we live.
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
