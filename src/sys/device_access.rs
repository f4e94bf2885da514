//! The users that may access a device file.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

/// The users that may access a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceAccess {
    /// Everybody.
    Everyone,
    /// This group, which is not root's group.
    Group(u32),
    /// Only root.
    RootOnly,
    /// The device does not exist.
    Absent,
}

impl DeviceAccess {
    /// Reads who may access the device `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(meta) => Ok(Self::of_mode(meta.mode(), meta.gid())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Absent),
            Err(error) => Err(error),
        }
    }

    fn of_mode(mode: u32, gid: u32) -> Self {
        if mode & 0o006 == 0o006 {
            Self::Everyone
        } else if mode & 0o060 == 0o060 && gid != 0 {
            Self::Group(gid)
        } else {
            // A VMM must not be in root's group.
            Self::RootOnly
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_follows_from_mode_and_group() {
        for (mode, gid, access) in [
            (0o666, 0, DeviceAccess::Everyone),
            (0o660, 36, DeviceAccess::Group(36)),
            (0o660, 0, DeviceAccess::RootOnly),
            (0o640, 36, DeviceAccess::RootOnly),
            (0o604, 36, DeviceAccess::RootOnly),
            (0o600, 0, DeviceAccess::RootOnly),
        ] {
            assert_eq!(DeviceAccess::of_mode(mode, gid), access, "{mode:o} {gid}");
        }
        assert_eq!(DeviceAccess::of(Path::new("/no/such/device")).unwrap(), DeviceAccess::Absent);
    }
}
