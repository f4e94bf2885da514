//! Who it runs as, and how its files come to be usable for that user.
//!
//! The files of a sandbox that its guest writes are given to the user. Of those that it only
//! reads the kernel is asked whether the user may; if not, it gets a view of that one file
//! as its own (`idmap`). The directories above them do not matter, as it inherits the files.
//! Where something cannot be had so, it runs as our user, without privileges, and the
//! sandbox says so.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use super::{memory_file, saved::STATE_FILE, told};
use crate::{
    sys::{
        device_access::DeviceAccess,
        files::{Wish, give_file, let_pass, make_private_dir, may, open_path, remove_tree},
        host::own_ids,
        idmap, kvm,
        process::{FixedFd, OwnDevices, Privileges, User},
        tun,
    },
    vmm::{Error, Plan, SAVED_MEMORY, peer::host},
};

/// The directory of the link that names the program, in that of the sockets.
const EXEC: &str = "exec";

/// Who a VMM is to be, and what it inherits.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) privileges: Privileges,
    pub(super) devices: Option<OwnDevices>,
    pub(super) placed: Vec<(FixedFd, OwnedFd)>,
    /// Why it is our user although it was to be another.
    pub(super) why_ours: Option<String>,
}

/// Says whether /dev/kvm can be used by another user than us on this host.
pub(super) fn kvm_is_possible() -> bool {
    /// Whoever it is, the answer is the same.
    const ANY: u32 = 65_534;
    let kvm = Path::new(kvm::PATH);
    match DeviceAccess::of(kvm) {
        Ok(DeviceAccess::Everyone | DeviceAccess::Absent | DeviceAccess::Group(_)) => true,
        Ok(DeviceAccess::RootOnly) => OwnDevices::prepare(&[kvm], ANY, Path::new("/")).is_ok(),
        Err(_) => false,
    }
}

/// The files of a machine that is to start.
struct Files<'a> {
    plan: &'a Plan,
    /// What the guest writes, and what of a snapshot is loaded.
    own: Vec<(FixedFd, PathBuf)>,
    /// What is everybody's.
    shared: Vec<(FixedFd, &'a Path, Wish)>,
}

impl Identity {
    /// Prepares for a machine that boots, or that loads the snapshot in `snapshot`.
    pub(super) fn prepare(
        program: &Path,
        plan: &Plan,
        snapshot: Option<&Path>,
    ) -> Result<Self, Error> {
        let files = Files::of(program, plan, snapshot)?;
        let ours = own_ids().0;
        let Some(uid) = plan.user.filter(|uid| *uid != ours) else {
            return files.for_us(None);
        };
        match files.for_user(uid, program) {
            Ok(identity) => Ok(identity),
            Err((what, error)) => files.for_us(Some(format!("{what}: {error}"))),
        }
    }

    /// Prepares for the same again, after a process could not be started as another user.
    pub(super) fn prepare_ours(
        program: &Path,
        plan: &Plan,
        snapshot: Option<&Path>,
        error: &io::Error,
    ) -> Result<Self, Error> {
        let why = format!("it cannot be started as a user of its own: {error}");
        Files::of(program, plan, snapshot)?.for_us(Some(why))
    }

    /// Says whether it is another user than us.
    pub(super) fn is_another(&self) -> bool {
        matches!(self.privileges, Privileges::NoneAs(_))
    }
}

impl<'a> Files<'a> {
    fn of(program: &'a Path, plan: &'a Plan, snapshot: Option<&Path>) -> Result<Self, Error> {
        let mut own = match snapshot {
            None => Vec::new(),
            Some(dir) => vec![(told::STATE, dir.join(STATE_FILE))],
        };
        if memory_file::is_wanted(plan.memory_mode) {
            own.push((told::MEMORY, plan.memory.clone()));
        } else if let Some(dir) = snapshot {
            own.push((told::MEMORY, dir.join(SAVED_MEMORY)));
        }
        let mut shared = vec![(told::PROGRAM, program, Wish::Execute)];
        let kernel = plan.kernel.as_deref().map(|path| (told::KERNEL, path));
        let initramfs = plan.initramfs.as_deref().map(|path| (told::INITRAMFS, path));
        for (place, path) in kernel.into_iter().chain(initramfs) {
            shared.push((place, path, Wish::Read));
        }
        for (number, disk) in plan.disks.iter().enumerate() {
            let place = told::disk(number).ok_or_else(|| Error::Refused {
                command: "starting".to_owned(),
                said: format!("there is no place for {} disks", plan.disks.len()),
            })?;
            if disk.kind.is_readonly() {
                shared.push((place, &disk.path, Wish::Read));
            } else {
                own.push((place, disk.path.clone()));
            }
        }
        Ok(Self { plan, own, shared })
    }

    /// Has it be another user; says what that cannot use, and why, if so.
    fn for_user(&self, uid: u32, program: &Path) -> Result<Identity, (String, io::Error)> {
        let (groups, devices) = self.open_doors(uid, program)?;
        let mut placed = self.give(uid).map_err(named)?;
        if let Some(failure) = self.show(uid, &groups, &mut placed).map_err(named)? {
            return Err(failure);
        }
        let privileges = Privileges::NoneAs(User { uid, groups });
        Ok(Identity { uid, privileges, devices, placed, why_ours: None })
    }

    /// Finds what lets the user have the devices that it needs: groups to be in, and files
    /// of its own for what is root's alone.
    fn open_doors(
        &self,
        uid: u32,
        program: &Path,
    ) -> Result<(Vec<u32>, Option<OwnDevices>), (String, io::Error)> {
        let tun = self.plan.nic.as_ref().map(|_| tun::PATH);
        let (mut groups, mut closed) = (Vec::new(), Vec::new());
        for path in [Some(kvm::PATH), tun].into_iter().flatten() {
            match DeviceAccess::of(Path::new(path)).map_err(|error| not_given(&[path], error))? {
                DeviceAccess::Everyone | DeviceAccess::Absent => {}
                DeviceAccess::Group(gid) => groups.push(gid),
                DeviceAccess::RootOnly => closed.push(path),
            }
        }
        if closed.is_empty() {
            return Ok((groups, None));
        }
        // What it needs to run is beside the file itself.
        let program = program.canonicalize().unwrap_or_else(|_| program.to_owned());
        let paths: Vec<_> = closed.iter().map(Path::new).collect();
        let own = OwnDevices::prepare(&paths, uid, &program);
        Ok((groups, Some(own.map_err(|error| not_given(&closed, error))?)))
    }

    /// Has it be our user, without privileges.
    fn for_us(&self, why_ours: Option<String>) -> Result<Identity, Error> {
        let opening = |(path, error): (PathBuf, io::Error)| {
            host(format!("opening {}", path.display()))(error)
        };
        let uid = own_ids().0;
        let mut placed = self.give(uid).map_err(opening)?;
        // Without privileges we may not open everything either. If that cannot be helped then
        // the VMM says so.
        if self.show(uid, &[], &mut placed).is_err() {
            for (place, path, _) in &self.shared {
                let file = open_path(path).map_err(|error| opening((path.to_path_buf(), error)))?;
                placed.push((*place, file));
            }
        }
        let (privileges, devices) = (Privileges::None, None);
        Ok(Identity { uid, privileges, devices, placed, why_ours })
    }

    /// Gives the user what is to be its own, and the use of the names in the directories.
    fn give(&self, uid: u32) -> Result<Vec<(FixedFd, OwnedFd)>, (PathBuf, io::Error)> {
        let mut placed = Vec::new();
        let dirs = [(told::HOME, told::home(self.plan)), (told::RUNTIME, &self.plan.runtime_dir)];
        for (place, dir) in dirs {
            let opened = let_pass(dir, uid).and_then(|()| open_path(dir));
            placed.push((place, opened.map_err(|error| (dir.to_owned(), error))?));
        }
        for (place, file) in &self.own {
            let opened = give_file(file, uid).and_then(|()| open_path(file));
            placed.push((*place, opened.map_err(|error| (file.clone(), error))?));
        }
        Ok(placed)
    }

    /// Puts everybody's files in their places, so that the user may use them. Returns what
    /// keeps it from using one, if anything does.
    fn show(
        &self,
        uid: u32,
        groups: &[u32],
        placed: &mut Vec<(FixedFd, OwnedFd)>,
    ) -> Result<Option<(String, io::Error)>, (PathBuf, io::Error)> {
        let open = |path: &Path| open_path(path).map_err(|error| (path.to_owned(), error));
        let opened = self.shared.iter().map(|(_, path, _)| open(path));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        let wishes = self.shared.iter().map(|(_, _, wish)| *wish);
        let asked: Vec<_> = opened.iter().map(AsFd::as_fd).zip(wishes).collect();
        let granted = may(uid, groups, &asked).map_err(|error| (PathBuf::from("/"), error))?;
        let mut failure = None;
        for (((place, path, wish), file), is_granted) in self.shared.iter().zip(opened).zip(granted)
        {
            let shown = if is_granted { Ok(None) } else { as_own(file.as_fd(), *wish, uid) };
            match shown {
                Ok(shown) => placed.push((*place, shown.unwrap_or(file))),
                Err(error) => {
                    let path = path.display();
                    failure = Some((format!("{path} cannot be shown to a user of its own"), error));
                    placed.push((*place, file));
                }
            }
        }
        Ok(failure)
    }
}

/// Returns a view of the file as the user's own.
fn as_own(file: BorrowedFd<'_>, wish: Wish, uid: u32) -> io::Result<Option<OwnedFd>> {
    let shown = idmap::for_user(file, uid)?;
    match may(uid, &[], &[(shown.as_fd(), wish)])?.as_slice() {
        [true] => Ok(Some(shown)),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

fn not_given(devices: &[&str], error: io::Error) -> (String, io::Error) {
    (format!("{} cannot be given to a user of its own", devices.join(" and ")), error)
}

fn named((path, error): (PathBuf, io::Error)) -> (String, io::Error) {
    (format!("{} cannot be used", path.display()), error)
}

/// A name for the program which ends as it does, and is a way to it for every user: the
/// system calls a process by the last word of the path that it was started by.
#[derive(Debug)]
pub(super) struct ExecName {
    dir: PathBuf,
    pub(super) path: PathBuf,
}

impl ExecName {
    pub(super) fn make(program: &Path, plan: &Plan, uid: u32) -> Result<Self, Error> {
        let dir = plan.runtime_dir.join(EXEC);
        let name = program.file_name().unwrap_or(EXEC.as_ref());
        let made = remove_tree(&dir)
            .and_then(|()| make_private_dir(&dir))
            .and_then(|()| let_pass(&dir, uid))
            .and_then(|()| symlink(told::path(told::PROGRAM), dir.join(name)));
        made.map_err(host(format!("making {}", dir.display())))?;
        Ok(Self { path: told::path(told::RUNTIME).join(EXEC).join(name), dir })
    }
}

impl Drop for ExecName {
    fn drop(&mut self) {
        // What stays is removed with the directory that it is in.
        fs::remove_dir_all(&self.dir).ok();
    }
}
