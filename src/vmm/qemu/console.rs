//! The guest's serial console.
//!
//! QEMU's `pipe` device reads what is typed from `console.in`, a FIFO, and writes what
//! the guest prints to `console.out`, which we make a link to `/dev/null`: the output is
//! for the log, which every such device can keep. QEMU has the FIFO open for both
//! directions, so bytes stay in it until the guest takes them, whether or not who typed
//! them is still there, and nobody has to listen.
//!
//! A socket, which is what one would think of first, is no good: a client that does not
//! read stops the guest's output after some 280 bytes, and the log's with it.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::vmm::typing::type_on;

/// Returns what QEMU is told; it appends `.in` and `.out` itself.
pub(super) fn path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("console")
}

/// Makes both ends anew, so that nothing is left of an earlier machine.
pub(super) fn prepare(runtime_dir: &Path) -> io::Result<()> {
    let input = path(runtime_dir).with_extension("in");
    let output = path(runtime_dir).with_extension("out");
    for end in [&input, &output] {
        match fs::remove_file(end) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    mknodat(CWD, &input, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    symlink("/dev/null", &output)
}

/// Types `bytes`, and returns how many of them there was room for.
pub(super) fn type_in(runtime_dir: &Path, bytes: &[u8]) -> io::Result<usize> {
    // Where nobody has it open for reading, this fails rather than waits.
    let input = OpenOptions::new()
        .write(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed())
        .open(path(runtime_dir).with_extension("in"))?;
    type_on(input, bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_was_typed_stays_after_its_writer_has_left() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        prepare(dir.path()).unwrap();
        let error = type_in(dir.path(), b"too soon").unwrap_err();
        assert!(error.to_string().starts_with("No such device"), "{error}");

        // As QEMU opens it.
        let fifo = dir.path().join("console.in");
        let mut vmm = OpenOptions::new().read(true).write(true).open(fifo).unwrap();
        assert_eq!(type_in(dir.path(), b"ls\n").unwrap(), 3);
        assert_eq!(type_in(dir.path(), b"").unwrap(), 0);
        let mut typed = [0; 3];
        vmm.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"ls\n");
    }

    #[test]
    fn typing_at_a_guest_that_does_not_read_ends_and_tells_how_much_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        let fifo = dir.path().join("console.in");
        let _vmm = OpenOptions::new().read(true).write(true).open(fifo).unwrap();
        let taken = type_in(dir.path(), &[b'x'; 100_000]).unwrap();
        assert!((1..100_000).contains(&taken), "{taken}");
        assert_eq!(type_in(dir.path(), b"x").unwrap(), 0);
    }
}
