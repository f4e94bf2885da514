//! Whether an unprivileged process may use `userfaultfd(2)`, also for faults in the kernel.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// The switch that opens the call to everybody.
const SWITCH: &str = "/proc/sys/vm/unprivileged_userfaultfd";
/// The device that does the same for whoever may open it, since Linux 6.1.
const DEVICE: &str = "/dev/userfaultfd";

/// Says whether a process of that user and group, without capabilities, may.
#[must_use]
pub fn is_open_to(uid: u32, gid: u32) -> bool {
    is_switched_on(Path::new(SWITCH)) || may_open(Path::new(DEVICE), uid, gid)
}

fn is_switched_on(switch: &Path) -> bool {
    fs::read_to_string(switch).is_ok_and(|text| text.trim() == "1")
}

fn may_open(device: &Path, uid: u32, gid: u32) -> bool {
    const READ_AND_WRITE: u32 = 0o6;
    let Ok(meta) = device.metadata() else {
        return false;
    };
    // A list of further users is not read: whoever made one knows whom it is for.
    let mut size = [0; 0];
    let listed = rustix::fs::getxattr(device, c"system.posix_acl_access", &mut size);
    if listed.is_ok_and(|bytes| bytes > 0) {
        return true;
    }
    let shift = match (meta.uid() == uid, meta.gid() == gid) {
        (true, _) => 6,
        (false, true) => 3,
        (false, false) => 0,
    };
    meta.mode() >> shift & READ_AND_WRITE == READ_AND_WRITE
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_switch_is_on_only_if_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let switch = dir.path().join("switch");
        assert!(!is_switched_on(&switch));
        for (text, on) in [("0\n", false), ("1\n", true)] {
            fs::write(&switch, text).unwrap();
            assert_eq!(is_switched_on(&switch), on, "{text}");
        }
    }

    #[test]
    fn the_device_is_for_those_who_may_read_and_write_it() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("device");
        assert!(!may_open(&device, 0, 0));
        fs::write(&device, "").unwrap();
        let (uid, gid) = crate::sys::host::own_ids();
        let may = |mode, uid, gid| {
            fs::set_permissions(&device, fs::Permissions::from_mode(mode)).unwrap();
            may_open(&device, uid, gid)
        };
        assert!(may(0o600, uid, gid + 1));
        assert!(!may(0o400, uid, gid));
        assert!(!may(0o600, uid + 1, gid));
        assert!(may(0o660, uid + 1, gid));
        assert!(!may(0o606, uid + 1, gid), "the first that fits decides");
        assert!(may(0o606, uid + 1, gid + 1));
    }
}
