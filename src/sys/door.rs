//! Who may use a device file of the host's.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

/// Who may use a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Everybody.
    Open,
    /// This group, which is not root's.
    Group(u32),
    /// Root alone.
    Ours,
    /// There is none.
    Absent,
}

impl Door {
    /// Says who may use the device that has the file `path`.
    ///
    /// # Errors
    /// Where it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(meta) => Ok(Self::of_mode(meta.mode(), meta.gid())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Absent),
            Err(error) => Err(error),
        }
    }

    fn of_mode(mode: u32, gid: u32) -> Self {
        if mode & 0o006 == 0o006 {
            Self::Open
        } else if mode & 0o060 == 0o060 && gid != 0 {
            Self::Group(gid)
        } else {
            // Root's group may read much that is nobody else's business.
            Self::Ours
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_door_is_as_wide_as_its_mode_says() {
        for (mode, gid, door) in [
            (0o666, 0, Door::Open),
            (0o660, 36, Door::Group(36)),
            (0o660, 0, Door::Ours),
            (0o640, 36, Door::Ours),
            (0o604, 36, Door::Ours),
            (0o600, 0, Door::Ours),
        ] {
            assert_eq!(Door::of_mode(mode, gid), door, "{mode:o} {gid}");
        }
        assert_eq!(Door::of(Path::new("/no/such/device")).unwrap(), Door::Absent);
    }
}
