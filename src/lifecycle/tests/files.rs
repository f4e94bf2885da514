//! Whose files a machine is made of.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::rename;

use super::*;
use crate::{
    sandbox::{FileRole, Writer},
    sys::host::own_ids,
};

/// Whose the sandboxes of `Host::create` are.
const OWNER: Owner = Owner { uid: 1, gid: 2 };

const DISK: FileRole = FileRole::Disk { readonly: true };

/// A directory that everybody may look into.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    /// Makes a file of `owner` that nobody else may read, with its own name in it, which may be
    /// taken for a kernel or a disk.
    fn file(&self, name: &str, owner: Owner) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, sector(&format!("\x7fELF {name}"))).unwrap();
        chown(&path, Some(owner.uid), Some(owner.gid)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn own(&self, name: &str) -> PathBuf {
        self.file(name, OWNER)
    }

    fn ours(&self, name: &str) -> PathBuf {
        let (uid, gid) = own_ids();
        self.file(name, Owner { uid, gid })
    }
}

fn configure(host: &Host, change: impl FnOnce(&mut Spec)) {
    let mut spec = Spec::clone(&host.entry("a").record().spec);
    change(&mut spec);
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
}

fn disk(path: &Path, readonly: bool) -> Disk {
    Disk { path: path.to_owned(), readonly }
}

/// Waking fails, as the owner may not open `path`, and nothing was begun.
fn is_denied(host: &Host, path: &Path, state: State) {
    let before = host.vmm.calls();
    let error = host.wake("a").unwrap_err();
    assert!(matches!(&error, Error::NotWriters { path: at, .. } if at == path), "{error}");
    assert_eq!(error.fault(), Comes::Denied);
    let says = format!("who wrote the `config` of a (uid 1, gid 2) cannot open {}", path.display());
    assert!(host.error("a").contains(&says), "{}", host.error("a"));
    assert_eq!((host.state("a"), host.vmm.calls()), (state, before));
}

/// What is in a file that a machine was planned with.
fn read(host: &Host, path: &Path) -> String {
    assert_eq!(path.parent(), Some(Path::new("/proc/self/fd")), "it is no name of the owner's");
    let held = host.vmm.plan().held;
    let held = held.iter().find(|file| crate::sys::files::handle_path(file) == path);
    assert!(held.is_some(), "{} is not handed on", path.display());
    content(path)
}

#[test]
fn a_file_that_the_owner_may_not_open_boots_nothing() {
    let (host, images) = (Host::new(), Images::new());
    host.create("a");
    let secret = images.ours("secret");
    let link = images.0.path().join("link");
    symlink(&secret, &link).unwrap();
    for path in [&secret, &link] {
        for change in [
            (&|spec: &mut Spec| spec.kernel = Some(path.clone())) as &dyn Fn(&mut Spec),
            &|spec| spec.initramfs = Some(path.clone()),
            &|spec| spec.disks = vec![disk(path, false)],
            &|spec| spec.disks = vec![disk(path, true)],
        ] {
            let before = Spec::clone(&host.entry("a").record().spec);
            configure(&host, change);
            is_denied(&host, path, State::Stopped);
            configure(&host, |spec| *spec = before);
        }
    }
    configure(&host, |spec| spec.disks = vec![disk(&secret, false)]);
    is_denied(&host, &secret, State::Stopped);
    fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
    host.check("a");
}

#[test]
fn what_the_owner_may_open_is_handed_on_open_and_not_by_its_path() {
    let (host, images) = (Host::new(), Images::new());
    host.create("a");
    let (kernel, initramfs) = (images.own("kernel"), images.own("initramfs"));
    let (copied, shared) = (images.own("copied"), images.own("shared"));
    configure(&host, |spec| {
        spec.kernel = Some(kernel.clone());
        spec.initramfs = Some(initramfs.clone());
        spec.disks = vec![disk(&copied, false), disk(&shared, true)];
    });
    host.wake("a").unwrap();
    let plan = host.vmm.plan();
    assert_eq!(read(&host, plan.kernel.as_deref().unwrap()), "\x7fELF kernel");
    assert_eq!(read(&host, plan.initramfs.as_deref().unwrap()), "\x7fELF initramfs");
    assert_eq!(read(&host, &plan.disks[1].path), "\x7fELF shared");
    let own = host.daemon.store.home(&host.entry("a").record()).disk(0);
    assert_eq!(plan.disks[0].path, own);
    assert_eq!(content(&own), "\x7fELF copied");
    drop(plan);
    host.check("a");
}

#[test]
fn a_disk_that_was_swapped_for_a_link_while_it_slept_is_not_attached() {
    let (host, images) = (Host::new(), Images::new());
    host.create("a");
    let (kernel, copied, shared) =
        (images.own("kernel"), images.own("copied"), images.own("shared"));
    configure(&host, |spec| {
        spec.kernel = Some(kernel.clone());
        spec.disks = vec![disk(&copied, false), disk(&shared, true)];
    });
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    // A wake needs neither what was copied nor what was loaded.
    for gone in [&kernel, &copied] {
        fs::remove_file(gone).unwrap();
        symlink(images.ours("secret"), gone).unwrap();
    }
    host.wake("a").unwrap();
    assert_eq!(host.vmm.plan().kernel, None);
    host.sleep("a").unwrap();
    let aside = images.0.path().join("aside");
    rename(&shared, &aside).unwrap();
    symlink(images.ours("secret"), &shared).unwrap();
    is_denied(&host, &shared, State::Snapshotted);
    rename(&aside, &shared).unwrap();
    host.wake("a").unwrap();
    // Nor does a sleep measure what is not theirs; the guest runs on.
    rename(&shared, &aside).unwrap();
    symlink(images.ours("secret"), &shared).unwrap();
    let error = host.sleep("a").unwrap_err();
    assert!(matches!(error, Error::NotWriters { .. }), "{error}");
    assert!(host.guest_runs("a"));
    rename(&aside, &shared).unwrap();
    host.sleep("a").unwrap();
    host.wake("a").unwrap();
}

#[test]
fn a_new_owner_changes_nothing_of_whose_rights_open_it() {
    let (host, images) = (Host::new(), Images::new());
    host.create("a");
    let (own, secret) = (images.own("own"), images.ours("secret"));
    configure(&host, |spec| spec.disks = vec![disk(&own, true)]);
    host.check("a");
    host.sleep("a").unwrap();
    let give = |uid| host.set("a", Policy::Owner(Owner { uid, gid: 9 })).unwrap();
    for uid in [7, own_ids().0] {
        give(uid);
        host.wake("a").unwrap();
        host.sleep("a").unwrap();
        // The old owner can still change what is there, and gets nothing by it.
        let aside = images.0.path().join("aside");
        rename(&own, &aside).unwrap();
        symlink(&secret, &own).unwrap();
        is_denied(&host, &own, State::Snapshotted);
        rename(&aside, &own).unwrap();
    }
    let (denied, root) = (Writer::new(7, 9, vec![]), Writer::new(own_ids().0, 9, vec![]));
    assert!(host.daemon.named_files(&denied).why_unusable(&secret, DISK).unwrap().is_denied);
    assert_eq!(host.daemon.named_files(&root).why_unusable(&secret, DISK), None);
    // Who may, may also write it for somebody else's sandbox.
    give(7);
    host.wake("a").unwrap();
    let before = Spec::clone(&host.entry("a").record().spec);
    let mut spec = before.clone();
    spec.disks = vec![disk(&secret, true)];
    host.create("b");
    host.set("b", Policy::Config(Box::new(spec), root)).unwrap();
    host.wake("b").unwrap();
    let plan = host.vmm.plan();
    assert_eq!(read(&host, &plan.disks[0].path), "\x7fELF secret");
}

#[test]
fn a_file_that_the_template_names_is_for_everybody() {
    let host = Host::new();
    let kernel = host.daemon.settings.template.kernel.clone().unwrap();
    fs::set_permissions(&kernel, Permissions::from_mode(0o600)).unwrap();
    let (owner, role) = (OWNER.into(), FileRole::Kernel);
    assert_eq!(host.daemon.named_files(&owner).why_unusable(&kernel, role), None);
    host.create("a");
    host.wake("a").unwrap();
    assert_eq!(read(&host, host.vmm.plan().kernel.as_deref().unwrap()), "\x7fELF");
    host.check("a");
    // To say that there is none is not to refuse it.
    fs::remove_file(&kernel).unwrap();
    let unusable = host.daemon.named_files(&owner).why_unusable(&kernel, role).unwrap();
    assert!(!unusable.is_denied && unusable.why.contains("no such file"), "{unusable:?}");
    host.create("b");
    let error = host.wake("b").unwrap_err();
    assert!(matches!(&error, Error::Unopened { path, .. } if *path == kernel), "{error}");
}
