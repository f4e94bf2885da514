//! Sockets in directories that a process has which we do not trust.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, fstat, openat};

/// Lets everybody go through the directory `path` to what they know the name of, without listing
/// it.
pub fn let_through(path: &Path) -> io::Result<()> {
    const SEARCH: u32 = 0o011;
    let mode = path.metadata()?.mode() & 0o7777;
    if mode & SEARCH == SEARCH {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode | SEARCH))
}

/// Gives the socket `name` in `dir` to the user and group `to`. It has to be that of the
/// user whose the directory is, or of the user `before`.
///
/// Whoever may write to the directory can put anything there, at any time: so what is
/// given away is the file that was looked at, no link is followed, and one that has a
/// second name is refused, as its first may be anybody's.
///
/// # Errors
/// `InvalidInput` where it is no such socket, and those of openat(2) and fchownat(2).
pub fn give_socket(dir: &Path, name: &str, before: Option<u32>, to: (u32, u32)) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(CWD, dir, flags | OFlags::DIRECTORY, Mode::empty())?;
    let socket = openat(&dir, name, flags, Mode::empty())?;
    let (its_dir, its) = (fstat(&dir)?, fstat(&socket)?);
    let is_socket = FileType::from_raw_mode(its.st_mode) == FileType::Socket;
    let known = [Some(its_dir.st_uid), before, Some(to.0)].contains(&Some(its.st_uid));
    if !is_socket || its.st_nlink != 1 || !known {
        let said = "the socket was replaced";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, said));
    }
    let (user, group) = (Uid::from_raw(to.0), Gid::from_raw(to.1));
    Ok(chownat(&socket, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{chown, lchown, symlink},
        net::UnixListener,
    };

    use super::*;

    const NAME: &str = "a.sock";

    type Make<'a> = Box<dyn FnOnce(&Path) + 'a>;

    /// Makes a directory as of a user 7, with what `make` puts there, and gives it to 8:9.
    fn given(make: impl FnOnce(&Path)) -> (tempfile::TempDir, io::Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(7), Some(7)).unwrap();
        make(&dir.path().join(NAME));
        let result = give_socket(dir.path(), NAME, Some(6), (8, 9));
        (dir, result)
    }

    fn socket_of(user: u32) -> impl FnOnce(&Path) {
        move |path| {
            drop(UnixListener::bind(path).unwrap());
            chown(path, Some(user), Some(user)).unwrap();
        }
    }

    #[test]
    fn a_socket_is_given_away_by_whom_it_was_made_or_had() {
        for user in [7, 6, 8] {
            let (dir, result) = given(socket_of(user));
            result.unwrap();
            let meta = dir.path().join(NAME).symlink_metadata().unwrap();
            assert_eq!((meta.uid(), meta.gid()), (8, 9), "of {user}");
        }
    }

    #[test]
    fn what_is_put_in_the_place_of_a_socket_is_not_given_away() {
        let other = tempfile::tempdir().unwrap();
        let theirs = other.path().join("theirs");
        socket_of(7)(&theirs);
        let made: [(&str, Make<'_>); 5] = [
            ("a link", Box::new(|path| symlink(&theirs, path).unwrap())),
            ("a second name", Box::new(|path| fs::hard_link(&theirs, path).unwrap())),
            (
                "a file",
                Box::new(|path| {
                    fs::write(path, "").unwrap();
                    chown(path, Some(7), Some(7)).unwrap();
                }),
            ),
            ("a socket of somebody else", Box::new(socket_of(5))),
            ("nothing", Box::new(|_| ())),
        ];
        for (what, make) in made {
            let (_dir, result) = given(make);
            result.expect_err(what);
            assert_eq!(theirs.metadata().unwrap().uid(), 7, "{what}");
        }
        // Nor is the directory taken for what it links to.
        let link = other.path().join("link");
        symlink(other.path(), &link).unwrap();
        lchown(&link, Some(7), Some(7)).unwrap();
        give_socket(&link, "theirs", None, (8, 9)).unwrap_err();
    }

    #[test]
    fn a_directory_can_be_gone_through_and_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        for (before, after) in [(0o700, 0o711), (0o755, 0o755), (0o1750, 0o1751)] {
            fs::set_permissions(dir.path(), Permissions::from_mode(before)).unwrap();
            let_through(dir.path()).unwrap();
            assert_eq!(dir.path().metadata().unwrap().mode() & 0o7777, after);
        }
    }
}
