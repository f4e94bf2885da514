//! Opens files that a VMM can replace, and images, without blocking.
//!
//! A VMM with its own user owns the directory of its sandbox, and may replace a file there by a
//! FIFO, a link or a leased file, whose open would block or lead elsewhere.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    io::Errno,
};

/// Opens a regular file for reading, without following a link.
pub fn open_regular(path: &Path) -> io::Result<File> {
    open(path, OFlags::RDONLY | OFlags::NOFOLLOW, &[FileType::RegularFile])
}

/// As [`open_regular`], for reading and writing.
pub fn open_regular_to_write(path: &Path) -> io::Result<File> {
    open(path, OFlags::RDWR | OFlags::NOFOLLOW, &[FileType::RegularFile])
}

/// As [`open_regular`], for appending. Creates the file with mode 0600 if it does not exist.
pub fn open_regular_to_append(path: &Path) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW;
    open(path, flags, &[FileType::RegularFile])
}

/// Reads a regular file that its VMM may still be writing to.
pub fn read_regular(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Replaces the contents of an existing regular file.
pub fn overwrite_regular(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = open_regular_to_write(path)?;
    file.set_len(0)?;
    file.write_all(bytes)
}

/// Opens a disk image, a regular file or a block device, for reading. Follows links.
pub fn open_image(path: &Path) -> io::Result<File> {
    open(path, OFlags::RDONLY, &[FileType::RegularFile, FileType::BlockDevice])
}

fn open(path: &Path, flags: OFlags, types: &[FileType]) -> io::Result<File> {
    let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
    // On a regular file `NONBLOCK` changes only what the open does.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat(CWD, path, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => file,
        Err(Errno::LOOP) => return Err(wrong("it is a symbolic link, not a regular file")),
        Err(Errno::NXIO) => return Err(wrong("it is a FIFO or a socket, not a regular file")),
        Err(Errno::AGAIN) => {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "another process has a lease on it",
            ));
        }
        Err(errno) => return Err(errno.into()),
    };
    let found = FileType::from_raw_mode(fstat(&file)?.st_mode);
    if types.contains(&found) {
        return Ok(File::from(file));
    }
    Err(wrong(match found {
        FileType::Directory => "it is a directory, not a regular file",
        FileType::Fifo => "it is a FIFO, not a regular file",
        FileType::BlockDevice | FileType::CharacterDevice => "it is a device, not a regular file",
        FileType::RegularFile | FileType::Symlink | FileType::Socket | FileType::Unknown => {
            "it is not a regular file"
        }
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    use super::*;

    pub(crate) fn make_fifo(path: &Path) {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0).unwrap();
    }

    #[test]
    fn what_is_no_regular_file_is_refused_at_once_and_stays() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::write(at("file"), "text").unwrap();
        make_fifo(&at("fifo"));
        symlink(at("file"), at("link")).unwrap();
        symlink(at("made"), at("dangling")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        let _listening = UnixListener::bind(at("socket")).unwrap();
        type Open = fn(&Path) -> io::Result<File>;
        let ways: [Open; 3] = [open_regular, open_regular_to_write, open_regular_to_append];
        for open in ways {
            open(&at("file")).unwrap();
            for name in ["fifo", "link", "dangling", "socket"] {
                let error = open(&at(name)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
                assert!(error.to_string().contains("not a regular file"), "{name}: {error}");
            }
            open(&at("dir")).unwrap_err();
        }
        overwrite_regular(&at("link"), b"changed").unwrap_err();
        overwrite_regular(&at("fifo"), b"changed").unwrap_err();
        assert_eq!(fs::read(at("file")).unwrap(), b"text");
        assert!(!at("made").exists(), "a link is not followed to make a file");
        overwrite_regular(&at("file"), b"new").unwrap();
        assert_eq!(fs::read(at("file")).unwrap(), b"new");
    }

    #[test]
    fn an_image_may_be_named_by_a_link_and_is_no_fifo() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::write(at("file"), "text").unwrap();
        symlink(at("file"), at("link")).unwrap();
        make_fifo(&at("fifo"));
        open_image(&at("link")).unwrap();
        for path in [at("fifo"), temp.path().to_owned(), "/dev/zero".into()] {
            let error = open_image(&path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}: {error}", path.display());
        }
    }
}
