//! How a daemon is set up before it is started.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use super::{Host, guest};

/// A test says how long a sandbox is idle, and does not wait for more than that, unless it is
/// about just this.
const AWAKE: &str = "[template.activity]\nawake_min = \"off\"\n";

/// A configuration in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Setup {
    memory: Option<&'static str>,
    net: Option<&'static str>,
    wake_on: &'static str,
    template: String,
    config: String,
    store: Option<PathBuf>,
    linked: bool,
    unit: Option<PathBuf>,
}

impl Setup {
    /// A new sandbox has nothing to boot.
    pub(crate) fn bare() -> Self {
        Self::default()
    }

    /// A new sandbox is a counter guest, told `options`.
    pub(crate) fn counter(options: &str) -> Self {
        let kernel = guest::counter_kernel();
        let template = format!("kernel = \"{}\"\ncmdline = \"{options}\"\n", kernel.display());
        Self { template, memory: Some("24MiB"), ..Self::default() }
    }

    /// A new sandbox is a Linux guest with a disk, told `options` besides what it needs.
    pub(crate) fn linux(options: &str) -> Self {
        let dir = guest::linux_dir();
        let dir = dir.display();
        let cmdline = guest::linux_cmdline();
        let template = format!(
            "kernel = \"{dir}/vmlinuz\"\ninitramfs = \"{dir}/initramfs\"\n\
             cmdline = \"{cmdline} {options}\"\n[[template.disks]]\npath = \"{dir}/disk.ext4\"\n"
        );
        Self { template, memory: Some("128MiB"), ..Self::default() }
    }

    /// Gives a new sandbox a copy of the counter guest in `dir`, that only root may read.
    pub(crate) fn private_kernel(mut self, dir: &Path) -> Self {
        let path = dir.join("private");
        fs::copy(guest::counter_kernel(), &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self.template = format!("kernel = \"{}\"\n", path.display());
        self
    }

    /// Gives a new sandbox so much memory.
    pub(crate) fn memory(mut self, size: &'static str) -> Self {
        self.memory = Some(size);
        self
    }

    /// Gives a new sandbox such a network.
    pub(crate) fn net(mut self, mode: &'static str) -> Self {
        self.net = Some(mode);
        self
    }

    /// Has packets wake a sandbox that sleeps.
    pub(crate) fn woken_by_packets(mut self) -> Self {
        self.wake_on = "wake_on = \"packet\"\n";
        self
    }

    /// Adds to the configuration, outside of `[template]`.
    pub(crate) fn config(mut self, text: &str) -> Self {
        self.config.push_str(text);
        self.config.push('\n');
        self
    }

    /// Has the store in a directory that the test made.
    pub(crate) fn store(mut self, dir: &Path) -> Self {
        self.store = Some(dir.to_owned());
        self
    }

    /// Has a symbolic link in the path of the mount.
    pub(crate) fn linked(mut self) -> Self {
        self.linked = true;
        self
    }

    /// Has the daemon restricted as the service of this unit is by systemd.
    pub(crate) fn restricted_by(mut self, unit: &Path) -> Self {
        self.unit = Some(unit.to_owned());
        self
    }

    /// Starts a daemon.
    #[track_caller]
    pub(crate) fn start(self) -> Host {
        Host::start(&self)
    }

    /// Returns the unit that restricts the daemon, if one does.
    pub(super) fn unit(&self) -> Option<&Path> {
        self.unit.as_deref()
    }

    /// Returns where the store is to be, if the test cares.
    pub(super) fn own_store(&self) -> Option<&Path> {
        self.store.as_deref()
    }

    /// Returns where below `place` the mount is to be.
    pub(super) fn mount_in(&self, place: &Path) -> &'static str {
        if !self.linked {
            return "m";
        }
        fs::create_dir(place.join("real")).unwrap();
        symlink("real", place.join("link")).unwrap();
        "link/m"
    }

    /// Returns the whole configuration.
    pub(super) fn document(&self, mount: &Path, store: &Path, runtime: &Path) -> String {
        let Self { template, config, memory, net, wake_on, .. } = self;
        let net = net.map(|mode| format!("net = \"{mode}\"\n")).unwrap_or_default();
        let memory = memory.map(|size| format!("memory = \"{size}\"\n")).unwrap_or_default();
        format!(
            "mount = \"{}\"\nstore = \"{}\"\nruntime = \"{}\"\n{config}\
             [template]\n{memory}{net}{wake_on}{template}\n{AWAKE}",
            mount.display(),
            store.display(),
            runtime.display()
        )
    }
}
