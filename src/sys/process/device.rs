//! Private device files for a child, owned by its user.
//!
//! The child gets a mount namespace in which files of a new tmpfs cover the host's. A copy of all
//! mounts would keep file systems busy that the host unmounts, including the daemon's tree, so
//! mounts that a program does not need are removed from it. The rest follows the host's mounts if
//! they are shared.

use std::{
    ffi::{CStr, CString, OsStr},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, chownat, mknodat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_bind,
        mount_change, move_mount, unmount,
    },
    process::{Gid, Uid},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::sys::mount;

/// Where a program finds what it needs to run: libraries, devices, the kernel's files.
const SYSTEM: [&str; 12] = [
    "/bin", "/dev", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/nix", "/opt", "/proc", "/sys",
    "/usr",
];
/// A directory that every host has, on which the tmpfs is mounted for a moment, in the new
/// namespace only: a file can be mounted elsewhere only from where it can be seen.
const STAGING: &CStr = c"/sys";

/// What is needed to give a child device files of its own.
#[derive(Debug)]
pub struct OwnDevices {
    tmpfs: OwnedFd,
    /// Where each file is for a moment, and where it is to be.
    files: Vec<(CString, CString)>,
    /// What is taken out of the copy of the mounts.
    away: Vec<CString>,
}

impl OwnDevices {
    /// Prepares files of the same devices as `devices` are, for the user `uid`. `needed` is a file
    /// whose mount stays.
    pub fn prepare(devices: &[&Path], uid: u32, needed: &Path) -> io::Result<Self> {
        let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        // Nobody can have it hold more than these files and its directory.
        let inodes = CString::new((1 + devices.len()).to_string())?;
        fsconfig_set_string(context.as_fd(), c"nr_inodes", inodes)?;
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let tmpfs = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let mut files = Vec::new();
        for (number, device) in devices.iter().enumerate() {
            let name = number.to_string();
            make_file(tmpfs.as_fd(), &name, device, uid)?;
            let staged = Path::new(OsStr::from_bytes(STAGING.to_bytes())).join(name);
            files.push((c_string(&staged)?, c_string(device)?));
        }
        let away = away(mount::mount_points()?, needed);
        let away = away.iter().map(|path| c_string(path)).collect::<io::Result<_>>()?;
        Ok(Self { tmpfs, files, away })
    }

    /// Makes the namespace, in the child. It allocates and locks nothing.
    pub(super) fn enter(&self) -> io::Result<()> {
        // SAFETY: the child shares no memory and no table of files with anybody, and what
        // it has open does not depend on the namespace.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        for path in &self.away {
            // What has gone meanwhile need not be taken away.
            unmount(path.as_c_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok();
        }
        let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(self.tmpfs.as_fd(), c"", CWD, STAGING, from)?;
        for (staged, device) in &self.files {
            mount_bind(staged.as_c_str(), device.as_c_str())?;
        }
        unmount(STAGING, UnmountFlags::DETACH)?;
        Ok(())
    }
}

/// Makes the file `name` of the same device as `device` is, for the user `uid`.
fn make_file(dir: BorrowedFd<'_>, name: &str, device: &Path, uid: u32) -> io::Result<()> {
    let meta = fs::metadata(device)?;
    if !meta.file_type().is_char_device() {
        return Err(io::Error::other(format!("{} is no device", device.display())));
    }
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(dir, name, FileType::CharacterDevice, mode, meta.rdev())?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    Ok(chownat(dir, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Returns those of the mounts that a program does not need, without those inside others.
fn away(mounted: Vec<PathBuf>, needed: &Path) -> Vec<PathBuf> {
    let is_needed = |path: &PathBuf| {
        needed.starts_with(path) || SYSTEM.iter().any(|system| path.starts_with(system))
    };
    let unneeded: Vec<_> = mounted.into_iter().filter(|path| !is_needed(path)).collect();
    let is_inside =
        |path: &&PathBuf| unneeded.iter().any(|outer| path.starts_with(outer) && outer != *path);
    unneeded.iter().filter(|path| !is_inside(path)).cloned().collect()
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_needs_stays() {
        let mounted = [
            "/",
            "/proc",
            "/dev/pts",
            "/run",
            "/run/tree",
            "/run/tree",
            "/srv",
            "/srv/vmm",
            "/srvx",
        ];
        let away = |needed: &str| -> Vec<String> {
            let mounted = mounted.iter().map(PathBuf::from).collect();
            let away = away(mounted, Path::new(needed));
            away.iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(away("/usr/bin/vmm"), ["/run", "/srv", "/srvx"]);
        assert_eq!(away("/srv/vmm/bin/vmm"), ["/run", "/srvx"]);
        assert_eq!(away("/run/tree/vmm"), ["/srv", "/srvx"]);
    }
}
