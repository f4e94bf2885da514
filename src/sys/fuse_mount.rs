//! A FUSE file system that is created first and mounted when its server runs.
//!
//! So the mount point always has either its old contents or a tree that answers.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

use super::mount::Device;

/// Where the kernel gives connections to file systems.
const FUSE_DEVICE: &str = "/dev/fuse";
/// `MOVE_MOUNT_BENEATH` of `linux/mount.h`: below the topmost mount of the target. Since Linux 6.5.
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);

/// A FUSE file system that is not mounted yet. Dropped, it is gone.
#[derive(Debug)]
pub struct Unmounted {
    mount: OwnedFd,
    device: Device,
}

impl Unmounted {
    /// Creates a file system that everybody may use as modes and owners allow. `source` is its name
    /// in mount tables. Returns the connection for its server too.
    pub fn create(source: &str) -> io::Result<(OwnedFd, Self)> {
        let connection = open(FUSE_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let number = connection.as_raw_fd().to_string();
        for (key, value) in [
            ("source", source),
            ("subtype", source),
            ("fd", &number),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
        ] {
            fsconfig_set_string(&context, key, value)?;
        }
        for flag in ["allow_other", "default_permissions"] {
            fsconfig_set_flag(&context, flag)?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        // The server does not run yet, so it must not be asked.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = statx(&mount, "", flags, StatxFlags::INO)?;
        let device = Device { major: found.stx_dev_major, minor: found.stx_dev_minor };
        Ok((connection, Self { mount, device }))
    }

    /// Returns the file system's device number.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Mounts it on `path`, over whatever is mounted there.
    pub fn mount(&self, path: &Path) -> io::Result<()> {
        self.move_to(path, MoveMountFlags::empty())
    }

    /// Mounts it on `path`, below the topmost mount there: it is seen once that is taken away.
    ///
    /// # Errors
    /// `InvalidInput` where nothing is mounted there or the kernel (before 6.5) cannot, and
    /// where it does not let us.
    pub fn mount_beneath(&self, path: &Path) -> io::Result<()> {
        self.move_to(path, BENEATH)
    }

    fn move_to(&self, path: &Path, flags: MoveMountFlags) -> io::Result<()> {
        let flags = flags | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.mount, "", CWD, path, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mount::{Server, abort, detach, mounted_at, server_at};

    #[test]
    fn what_is_mounted_beneath_a_dead_mount_is_seen_when_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let (connection, dead) = Unmounted::create("dead").unwrap();
        dead.mount(&path).unwrap();
        drop(connection);
        let (connection, next) = Unmounted::create("next").unwrap();
        let (before, device) = (mounted_at(&path).unwrap().unwrap(), next.device());
        let beneath = next.mount_beneath(&path);
        let covered = mounted_at(&path).unwrap().unwrap();
        let (server, aborted) = (server_at(&path), abort(&path));
        let after = mounted_at(&path).unwrap().unwrap();
        drop(connection);
        detach(&path).unwrap();
        beneath.unwrap();
        aborted.unwrap();
        assert_eq!(server.unwrap(), Server::Gone);
        assert_eq!((before.device, covered.device), (dead.device(), dead.device()));
        assert_eq!((after.device, after.source.as_os_str()), (device, "next".as_ref()));
        assert!(before.fs_type.as_encoded_bytes().starts_with(b"fuse"));
        assert_eq!(mounted_at(&path).unwrap(), None);
        assert!(next.mount_beneath(&path).is_err(), "there is nothing to be beneath");
    }

    #[test]
    fn a_server_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let (connection, tree) = Unmounted::create("silent").unwrap();
        tree.mount(&path).unwrap();
        let server = server_at(&path);
        // Whoever still waits for it gets an error now.
        abort(&path).unwrap();
        drop(connection);
        assert_eq!(server.unwrap(), Server::Silent);
    }
}
