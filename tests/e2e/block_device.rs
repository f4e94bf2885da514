//! Block devices as disks.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use dozed::sys::files::rename;
use rustix::io::Errno;

use crate::support::{Host, LoopDevice, Setup, counter_kernel};

const BYTES: usize = 1 << 20;

/// A host with a sandbox `web`, and a name that leads to a block device.
struct Rig {
    host: Host,
    device: LoopDevice,
    dir: tempfile::TempDir,
}

impl Rig {
    fn start() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let device = device(dir.path(), BYTES);
        let rig = Self { host: Setup::counter("").start(), device, dir };
        symlink(rig.device.path(), rig.name()).unwrap();
        rig.host.mkdir("web").unwrap();
        rig
    }

    fn name(&self) -> PathBuf {
        self.dir.path().join("device")
    }

    fn configure(&self, readonly: bool) {
        let document = format!("disks = [{{ path = {:?}, readonly = {readonly} }}]\n", self.name());
        self.host.write("web/config", document).unwrap();
    }
}

/// Makes a device of so many bytes of sevens, and as many zeros.
fn device(dir: &Path, bytes: usize) -> LoopDevice {
    let file = dir.join(format!("content-{bytes}"));
    fs::write(&file, [vec![7; bytes / 2], vec![0; bytes / 2]].concat()).unwrap();
    LoopDevice::over(&file)
}

#[test]
fn a_block_device_that_guests_share_is_used_where_it_is() {
    let rig = Rig::start();
    let host = &rig.host;
    rig.configure(true);
    host.wake("web");
    let before = host.counts_on("web");
    host.sleep("web");
    let says = fs::read_to_string(host.home("web").join("1/manifest")).unwrap();
    assert!(says.contains(&format!("\"bytes\": {BYTES}")), "{says}");
    host.wake("web");
    assert!(host.counts_on("web").count > before.count);
    assert!(!host.home("web").join("disk-0.img").exists());
}

#[test]
fn a_block_device_of_another_size_is_not_given_to_a_guest_that_slept() {
    let rig = Rig::start();
    let host = &rig.host;
    rig.configure(true);
    host.wake("web");
    let before = host.counts_on("web");
    host.sleep("web");
    let other = device(rig.dir.path(), 2 * BYTES);
    let aside = rig.dir.path().join("aside");
    rename(&rig.name(), &aside).unwrap();
    symlink(other.path(), rig.name()).unwrap();
    assert_eq!(host.write("web/state", "wake"), Err(Errno::IO));
    let says = host.error("web");
    assert!(says.contains("has 2097152 bytes, and had 1048576 when it fell asleep"), "{says}");
    assert_eq!(host.state("web"), "snapshotted");
    fs::remove_file(rig.name()).unwrap();
    rename(&aside, &rig.name()).unwrap();
    host.wake("web");
    assert!(host.counts_on("web").count > before.count);
}

#[test]
fn a_block_device_that_is_written_to_is_copied_as_a_file_is() {
    let rig = Rig::start();
    let host = &rig.host;
    rig.configure(false);
    host.wake("web");
    host.counts_on("web");
    let own = host.home("web").join("disk-0.img");
    let copied = fs::read(&own).unwrap();
    assert!(copied == fs::read(rig.device.path()).unwrap() && copied.len() == BYTES);
    host.sleep("web");
    // What the copy was made from is not needed any more.
    fs::remove_file(rig.name()).unwrap();
    host.wake("web");
    host.counts_on("web");
}

#[test]
fn a_kernel_or_initramfs_on_a_block_device_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("kernel");
    fs::copy(counter_kernel(), &file).unwrap();
    File::options().write(true).open(&file).unwrap().set_len(1 << 20).unwrap();
    let device = LoopDevice::over(&file);
    let host = Setup::counter("").start();
    host.mkdir("web").unwrap();
    let before = host.read("web/config");
    for key in ["kernel", "initramfs"] {
        let document = format!("{key} = {:?}\n", device.path());
        assert_eq!(host.write("web/config", document), Err(Errno::INVAL), "{key}");
        assert!(host.error("web").contains("is a block device"), "{}", host.error("web"));
    }
    assert_eq!(host.read("web/config"), before);
    host.write("web/config", format!("kernel = {file:?}\n")).unwrap();
    host.wake("web");
    host.counts_on("web");
}
