//! A file with its owner mapped to another user: a detached id-mapped mount of that one file (Linux
//! 5.12).

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use rustix::{
    mount::{OpenTreeFlags, open_tree},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};

/// Returns `file` as one that the user `uid` owns, for reading.
pub fn for_user(file: BorrowedFd<'_>, uid: u32) -> io::Result<OwnedFd> {
    let meta = File::from(file.try_clone_to_owned()?).metadata()?;
    let map = namespace((meta.uid(), uid), (meta.gid(), uid))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(file, c"", flags)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(map.as_raw_fd()).expect("a descriptor is not negative"),
    };
    // SAFETY: name and attributes live until the call is over, and the size is theirs.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(mount) } else { Err(io::Error::last_os_error()) }
}

/// Makes a user namespace that maps one user, from and to, and one group.
fn namespace(user: (u32, u32), group: (u32, u32)) -> io::Result<File> {
    let child = Holder::start()?;
    let file = |name: &str| format!("/proc/{}/{name}", child.pid.as_raw_nonzero());
    fs::write(file("uid_map"), format!("{} {} 1", user.0, user.1))?;
    fs::write(file("gid_map"), format!("{} {} 1", group.0, group.1))?;
    File::open(file("ns/user"))
}

/// A process that does nothing but be in a new user namespace: no thread of ours can.
struct Holder {
    pid: Pid,
}

impl Holder {
    fn start() -> io::Result<Self> {
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: without a stack of its own and without shared memory it is a fork. The
        // child makes system calls only, and never returns.
        let pid =
            unsafe { libc::syscall(libc::SYS_clone, flags, nothing, nothing, nothing, nothing) };
        if pid == 0 {
            wait_to_be_killed();
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pid.map(|pid| Self { pid }).ok_or_else(io::Error::last_os_error)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It is our child and nobody else reaps it, so the number is its own until then.
        kill_process(self.pid, Signal::KILL).ok();
        waitpid(Some(self.pid), WaitOptions::empty()).ok();
    }
}

fn wait_to_be_killed() -> ! {
    // SAFETY: the call takes numbers. Should we die first, so does this process.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: without descriptors and without a limit it waits for a signal.
        unsafe { libc::syscall(libc::SYS_ppoll, nothing, 0, nothing, nothing, 0) };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
        path::Path,
    };

    use super::*;
    use crate::sys::files::{Wish, may, open_path};

    const UID: u32 = 2_147_000_002;

    #[test]
    fn a_file_that_only_root_may_read_is_anothers_for_reading() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("secret");
        fs::write(&path, b"secret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = open_path(&path).unwrap();
        assert_eq!(may(UID, &[], &[(file.as_fd(), Wish::Read)]).unwrap(), [false]);
        let mapped = for_user(file.as_fd(), UID).unwrap();
        assert_eq!(may(UID, &[], &[(mapped.as_fd(), Wish::Read)]).unwrap(), [true]);
        assert_eq!(may(UID + 1, &[], &[(mapped.as_fd(), Wish::Read)]).unwrap(), [false]);
        let by_number = format!("/proc/self/fd/{}", mapped.as_raw_fd());
        let mut text = String::new();
        File::open(&by_number).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "secret");
        assert_eq!(fs::metadata(&by_number).unwrap().uid(), UID);
        assert_eq!(fs::metadata(&path).unwrap().uid(), 0, "the file itself is whose it was");
        File::options().write(true).open(&by_number).unwrap_err();
    }

    #[test]
    fn a_file_system_that_cannot_says_so() {
        let file = open_path(Path::new("/proc/self/status")).unwrap();
        for_user(file.as_fd(), UID).unwrap_err();
    }
}
