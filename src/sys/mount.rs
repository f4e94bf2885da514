//! The table of mounts, and unmounting.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::statfs,
    io::Errno,
    mount::{UnmountFlags, unmount},
};

use super::bounded;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// How long a FUSE server may take to answer. It usually takes a millisecond.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The name of a daemon's tree, in mount tables and in `df`.
pub const TREE_NAME: &str = "dozed";

/// A mount, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Such as `ext4` or `fuse.dozed`.
    pub fs_type: OsString,
    /// Such as `/dev/sda1`, or any word.
    pub source: OsString,
    /// The device number of the file system.
    pub device: Device,
}

impl MountInfo {
    /// Returns whether this is the tree of a dozed.
    #[must_use]
    pub fn is_tree(&self) -> bool {
        // Mounts of earlier versions have no subtype.
        self.source == TREE_NAME && self.fs_type.as_encoded_bytes().starts_with(b"fuse")
    }
}

/// The number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// Zero for a file system without a disk.
    pub major: u32,
    /// For a FUSE file system also the name of its directory in `/sys/fs/fuse/connections`.
    pub minor: u32,
}

impl std::str::FromStr for Device {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (major, minor) = text.split_once(':').unwrap_or_default();
        match (major.parse(), minor.parse()) {
            (Ok(major), Ok(minor)) => Ok(Self { major, minor }),
            (Err(_), _) | (_, Err(_)) => Err("write a device as MAJOR:MINOR"),
        }
    }
}

/// Returns what is mounted on `path`, which is absolute and free of symbolic links, without
/// accessing it: a dead server would not answer.
pub fn mounted_at(path: &Path) -> io::Result<Option<MountInfo>> {
    Ok(topmost(&fs::read(MOUNTINFO)?, path))
}

/// Returns all mounts on `path`, the topmost last.
pub fn mounts_at(path: &Path) -> io::Result<Vec<MountInfo>> {
    Ok(stack(&fs::read(MOUNTINFO)?, path))
}

/// Returns the mount that `path` is on, which is absolute and free of symbolic links.
pub fn mount_of(path: &Path) -> io::Result<Option<MountInfo>> {
    let list = fs::read(MOUNTINFO)?;
    Ok(path.ancestors().find_map(|path| topmost(&list, path)))
}

/// Returns a mount of the file system with this device number.
pub fn mount_of_device(device: Device) -> io::Result<Option<MountInfo>> {
    let list = fs::read(MOUNTINFO)?;
    Ok(entries(&list).map(|entry| entry.info).find(|info| info.device == device))
}

/// Returns the mount points of this type.
pub fn mounts_of_type(fs_type: &str) -> io::Result<Vec<PathBuf>> {
    let list = fs::read(MOUNTINFO)?;
    let is_of_type = |entry: &Entry| entry.info.fs_type == fs_type;
    Ok(entries(&list).filter(is_of_type).map(|entry| entry.path).collect())
}

/// Resolves the links above `path`, without accessing `path` itself: a dead server would not
/// answer.
pub fn without_links(path: &Path) -> io::Result<PathBuf> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(path.to_owned());
    };
    Ok(above.canonicalize()?.join(name))
}

/// The kernel's limit of links in a path.
const LINKS_MAX: usize = 40;

/// Returns the mount point of the tree of a dozed that `path` leads into, without accessing the
/// tree: its server may be dead, or be the caller.
pub fn tree_that_has(path: &Path) -> io::Result<Option<PathBuf>> {
    let list = fs::read(MOUNTINFO)?;
    let mut links = 0;
    let mut left: Vec<OsString> = Vec::new();
    let names_of = |path: &Path| -> Vec<OsString> {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
    };
    left.extend(names_of(path));
    let mut at = PathBuf::from("/");
    while let Some(name) = left.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(name);
        if topmost(&list, &next).is_some_and(|mount| mount.is_tree()) {
            return Ok(Some(next));
        }
        match fs::read_link(&next) {
            Ok(target) if links < LINKS_MAX => {
                links += 1;
                left.extend(names_of(&target));
            }
            Ok(_) => return Err(Errno::LOOP.into()),
            // It is not a link, or does not exist.
            Err(_) => at = next,
        }
    }
    Ok(None)
}

/// Returns all mount points, in the order of their mounts, with duplicates.
pub fn mount_points() -> io::Result<Vec<PathBuf>> {
    let list = fs::read(MOUNTINFO)?;
    Ok(entries(&list).map(|entry| entry.path).collect())
}

/// The server of a FUSE file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// It answers.
    Answers,
    /// It does not answer within [`ANSWER_LIMIT`].
    Silent,
    /// It is gone.
    Gone,
}

/// Asks the server of the FUSE file system that is mounted on `path`.
pub fn server_at(path: &Path) -> io::Result<Server> {
    let path = path.to_owned();
    // The kernel never caches the answer.
    match bounded::within(ANSWER_LIMIT, move || statfs(&path)) {
        Ok(Err(Errno::NOTCONN | Errno::CONNABORTED)) => Ok(Server::Gone),
        Ok(_) => Ok(Server::Answers),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(Server::Silent),
        Err(error) => Err(error),
    }
}

/// Detaches the topmost mount on `path`.
///
/// # Errors
/// `InvalidInput` where nothing is mounted there, and whatever else the kernel says.
pub fn detach(path: &Path) -> io::Result<()> {
    Ok(unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// Aborts the FUSE connection of the topmost mount on `path`, in all mount namespaces, and detaches
/// the mount.
pub fn abort(path: &Path) -> io::Result<()> {
    // FORCE aborts the connection; DETACH permits open files.
    let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(unmount(path, flags)?)
}

/// Detects changes of the mount table.
#[derive(Debug)]
pub struct MountWatch(fs::File);

impl MountWatch {
    /// Watches the mount table of this process.
    pub fn start() -> io::Result<Self> {
        Ok(Self(fs::File::open(MOUNTINFO)?))
    }

    /// Returns whether there was a change since the last call. Never blocks.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::PRI)];
        // An error counts as a change.
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
    }
}

/// Returns whether `fs_type` is a network file system, whose locks and syncs are unreliable.
#[must_use]
pub fn is_network_fs(fs_type: &OsStr) -> bool {
    let kinds: [&[u8]; 6] = [b"nfs", b"nfs4", b"cifs", b"smb3", b"9p", b"ceph"];
    kinds.contains(&fs_type.as_bytes())
}

/// Returns the mount on `path` that covers the others.
fn topmost(list: &[u8], path: &Path) -> Option<MountInfo> {
    stack(list, path).pop()
}

/// Returns the mounts on `path`, the topmost last. They are sorted by their parents, because a
/// mount can be made beneath an older one.
fn stack(list: &[u8], path: &Path) -> Vec<MountInfo> {
    let mut left: Vec<_> = entries(list).filter(|entry| entry.path == path).collect();
    let mut stack = Vec::new();
    while !left.is_empty() {
        let is_top = |entry: &Entry| {
            left.iter().all(|other| other.below != entry.id || other.id == entry.id)
        };
        // If a parent was mounted over, the later one is visible.
        let top = left.iter().rposition(is_top).unwrap_or(left.len() - 1);
        stack.push(left.remove(top).info);
    }
    stack.reverse();
    stack
}

/// A line of the list.
#[derive(Debug)]
struct Entry {
    id: u64,
    /// The mount that it is mounted on.
    below: u64,
    path: PathBuf,
    info: MountInfo,
}

/// Reads lines such as `36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda rw`.
fn entries(list: &[u8]) -> impl Iterator<Item = Entry> {
    list.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, below) = (number()?, number()?);
        let device = std::str::from_utf8(fields.next()?).ok()?;
        let (major, minor) = device.split_once(':')?;
        let path = PathBuf::from(unescaped(fields.nth(1)?));
        // A hyphen ends the optional fields.
        fields.find(|field| *field == b"-")?;
        let info = MountInfo {
            fs_type: unescaped(fields.next()?),
            source: unescaped(fields.next()?),
            device: Device { major: major.parse().ok()?, minor: minor.parse().ok()? },
        };
        Some(Entry { id, below, path, info })
    })
}

/// Undoes the kernel's `\040` for a blank, and so on.
fn unescaped(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = code {
            plain.push(byte);
            rest = &tail[3..];
        } else {
            plain.push(first);
            rest = tail;
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use rustix::mount::{MountFlags, mount};

    use super::*;

    const LIST: &[u8] =
        b"22 1 254:1 / / rw,relatime shared:1 master:2 - ext4 /dev/vda1 rw,errors=remount-ro\n\
          40 22 0:30 / /mnt/a\\040b\\134c rw - fuse.x my\\011source rw\n\
          41 22 0:31 / /run/boxes rw - fuse old rw\n\
          42 41 0:32 / /run/boxes rw,nosuid - fuse.dozed new rw\n\
          broken line\n";

    #[test]
    fn the_last_mount_on_a_path_is_the_one() {
        let info = topmost(LIST, Path::new("/run/boxes")).unwrap();
        assert_eq!(info.fs_type, "fuse.dozed");
        assert_eq!(info.source, "new");
        let device = Device { major: 0, minor: 32 };
        assert_eq!(info.device, device);
        assert_eq!(topmost(LIST, Path::new("/run")), None);
        // The one with the lower number was there first, and then the other came beneath it.
        let beneath = b"41 42 0:31 / /m rw - fuse old rw\n42 22 0:32 / /m rw - fuse new rw\n";
        let stack = stack(beneath, Path::new("/m"));
        assert_eq!(stack.iter().map(|info| info.device.minor).collect::<Vec<_>>(), [32, 31]);
    }

    #[test]
    fn blanks_and_backslashes_in_names_are_read() {
        let info = topmost(LIST, Path::new("/mnt/a b\\c")).unwrap();
        assert_eq!(info.source, "my\tsource");
        assert_eq!(unescaped(b"\\9 \\04"), "\\9 \\04");
    }

    #[test]
    fn a_path_is_on_the_mount_above_it() {
        let info = mount_of(Path::new("/proc/self")).unwrap().unwrap();
        assert_eq!(info.fs_type, "proc");
        assert!(mounts_of_type("proc").unwrap().contains(&PathBuf::from("/proc")));
        assert_eq!(mounted_at(Path::new("/proc/self")).unwrap(), None);
    }

    #[test]
    fn a_path_leads_into_a_tree_through_links_and_without_touching_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let tree = dir.join("tree");
        fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink("x/../tree/a", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
        // Nobody serves it, so whoever touched it would wait.
        let (_connection, unmounted) =
            super::super::fuse_mount::Unmounted::create(TREE_NAME).unwrap();
        unmounted.mount(&tree).unwrap();
        let found = ["tree", "tree/a/b", "link/c", "none/../tree", "beside", "tree-2/a"]
            .map(|path| tree_that_has(&dir.join(path)).unwrap());
        let endless = tree_that_has(&dir.join("loop/a"));
        detach(&tree).unwrap();
        let tree = Some(tree);
        assert_eq!(found, [tree.clone(), tree.clone(), tree.clone(), tree, None, None]);
        assert!(endless.is_err());
    }

    #[test]
    fn a_mount_that_comes_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let watch = MountWatch::start().unwrap();
        mount("none", &path, "tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
        let (changed, found) = (watch.has_changed(), mounted_at(&path).unwrap().unwrap());
        let all = mounts_at(&path);
        detach(&path).unwrap();
        assert!(changed);
        assert_eq!(all.unwrap(), [found]);
        assert_eq!(mounts_at(&path).unwrap(), []);
    }

    #[test]
    fn a_dead_mount_is_seen_without_touching_it_and_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(server_at(&path).unwrap(), Server::Answers);
        let server = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = {
            use std::os::fd::AsRawFd;
            let fd = server.as_raw_fd();
            format!("fd={fd},rootmode=40000,user_id=0,group_id=0\0")
        };
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        mount("dead", &path, "fuse.test", MountFlags::empty(), options).unwrap();
        drop(server);
        let seen = mounted_at(&path);
        let dead = server_at(&path);
        detach(&path).unwrap();
        assert_eq!(seen.unwrap().unwrap().fs_type, "fuse.test");
        assert_eq!(dead.unwrap(), Server::Gone);
        assert_eq!(mounted_at(&path).unwrap(), None);
        assert_eq!(detach(&path).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
