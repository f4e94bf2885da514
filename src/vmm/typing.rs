//! Typing on a serial console, whose other end the guest empties as it pleases.

use std::{
    fs::File,
    io::{self, Write},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::clock::Deadline;

/// How long typing waits for a guest that does not read once the console is full. A
/// writer must be free again within half a second.
const TYPE_LIMIT: Duration = Duration::from_millis(400);

/// Types `bytes` on `input`, which does not block, and returns how many of them there
/// was room for.
pub(super) fn type_on(mut input: File, bytes: &[u8]) -> io::Result<usize> {
    let deadline = Deadline::after(TYPE_LIMIT);
    let mut taken = 0;
    while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
        match input.write(rest) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let left = deadline.left();
                if left.is_zero() {
                    break;
                }
                let timeout = Timespec::try_from(left).ok();
                // Whatever comes of it, the next write tells.
                poll(&mut [PollFd::new(&input, PollFlags::OUT)], timeout.as_ref()).ok();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}
