//! A sandbox's copies of its disks, while its config changes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::*;
use crate::sandbox::Disk;

struct Stage {
    host: Host,
    images: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let (host, images) = (Host::new(), tempfile::tempdir().unwrap());
        host.create("a");
        Self { host, images }
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.images.path().join(name);
        fs::write(&path, sector(&format!("pristine {name}"))).unwrap();
        path
    }

    /// Stops it and has its config name these images.
    fn name(&self, images: &[&Path]) {
        let mut spec = Spec::clone(&self.host.entry("a").record().spec);
        let disk = |path: &&Path| Disk { path: path.to_path_buf(), readonly: false };
        spec.disks = images.iter().map(disk).collect();
        self.host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    }

    fn disk(&self, number: usize) -> PathBuf {
        self.host.daemon.store.home(&self.host.entry("a").record()).disk(number)
    }

    /// Boots it, and returns what is on its disks.
    fn boot(&self) -> Vec<String> {
        self.host.wake("a").unwrap();
        let count = self.host.entry("a").record().spec.disks.len();
        let disks = (0..count).map(|number| content(&self.disk(number)));
        let disks = disks.collect();
        self.host.vmm.shut_down(self.pid());
        wait_for("the guest to be stopped", || self.host.state("a") == State::Stopped);
        disks
    }

    fn pid(&self) -> u32 {
        self.host.entry("a").record().process().unwrap().pid
    }

    fn guest_writes(&self, number: usize, what: &str) {
        fs::write(self.disk(number), what).unwrap();
    }
}

#[test]
fn a_disk_that_is_dropped_and_named_again_is_the_same_disk() {
    let stage = Stage::new();
    let (one, two) = (stage.image("one"), stage.image("two"));
    stage.name(&[&one]);
    assert_eq!(stage.boot(), ["pristine one"]);
    stage.guest_writes(0, "work on one");
    stage.name(&[]);
    assert_eq!(stage.boot(), [""; 0]);
    stage.name(&[&one]);
    assert_eq!(stage.boot(), ["work on one"]);
    // The image itself is not needed for that.
    stage.name(&[&two]);
    assert_eq!(stage.boot(), ["pristine two"]);
    stage.guest_writes(0, "work on two");
    stage.name(&[&one]);
    fs::remove_file(&one).unwrap();
    assert_eq!(stage.boot(), ["work on one"]);
    stage.name(&[&two]);
    assert_eq!(stage.boot(), ["work on two"]);
}

#[test]
fn disks_that_change_places_keep_what_is_on_them() {
    let stage = Stage::new();
    let (one, two) = (stage.image("one"), stage.image("two"));
    stage.name(&[&one, &two]);
    stage.boot();
    stage.guest_writes(0, "work on one");
    stage.guest_writes(1, "work on two");
    stage.name(&[&two, &one]);
    assert_eq!(stage.boot(), ["work on two", "work on one"]);
    stage.name(&[&two]);
    stage.name(&[&one]);
    assert_eq!(stage.boot(), ["work on one"]);
    stage.name(&[&one, &two]);
    assert_eq!(stage.boot(), ["work on one", "work on two"]);
}

#[test]
fn two_disks_of_one_image_stay_two() {
    let stage = Stage::new();
    let image = stage.image("one");
    stage.name(&[&image, &image]);
    stage.boot();
    stage.guest_writes(0, "first");
    stage.guest_writes(1, "second");
    stage.name(&[]);
    stage.name(&[&image, &image]);
    assert_eq!(stage.boot(), ["first", "second"]);
    stage.name(&[&image]);
    assert_eq!(stage.boot(), ["first"]);
    stage.name(&[&image, &image, &image]);
    assert_eq!(stage.boot(), ["first", "second", "pristine one"]);
}

#[test]
fn a_boot_that_fails_keeps_a_disk_that_it_took_back() {
    let stage = Stage::new();
    let (one, two) = (stage.image("one"), stage.image("two"));
    stage.name(&[&one]);
    stage.boot();
    stage.guest_writes(0, "work on one");
    stage.name(&[]);
    stage.name(&[&one, &two]);
    stage.host.vmm.fail_next(Call::Boot, Fault::Refuse);
    stage.host.wake("a").unwrap_err();
    assert_eq!(content(&stage.disk(0)), "work on one");
    assert!(!stage.disk(1).exists());
    assert_eq!(stage.boot(), ["work on one", "pristine two"]);
}

#[test]
fn an_image_that_is_not_raw_boots_nothing_and_error_says_what_converts_it() {
    let stage = Stage::new();
    let (host, image) = (&stage.host, stage.image("one"));
    fs::write(&image, b"QFI\xfb\0\0\0\x03").unwrap();
    for readonly in [false, true] {
        let mut spec = Spec::clone(&host.entry("a").record().spec);
        spec.disks = vec![Disk { path: image.clone(), readonly }];
        host.set("a", Policy::Spec(Box::new(spec))).unwrap();
        let calls = host.vmm.calls();
        assert!(matches!(host.wake("a"), Err(Error::Unbootable { .. })));
        let says = host.error("a");
        assert!(says.contains(&format!("qemu-img convert -O raw {}", image.display())), "{says}");
        assert_eq!((host.state("a"), host.vmm.calls()), (State::Stopped, calls));
        assert!(!stage.disk(0).exists());
    }
    // What a guest writes to its own copy is its own affair.
    let raw = stage.image("raw");
    stage.name(&[&raw]);
    stage.boot();
    fs::write(stage.disk(0), b"QFI\xfb\0\0\0\x03").unwrap();
    host.wake("a").unwrap();
}

#[test]
fn a_kernel_that_is_none_boots_nothing() {
    let stage = Stage::new();
    let (host, script) = (&stage.host, stage.image("script"));
    let mut spec = Spec::clone(&host.entry("a").record().spec);
    spec.kernel = Some(script.clone());
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    assert!(matches!(host.wake("a"), Err(Error::Unbootable { .. })));
    assert!(host.error("a").contains("is not a kernel"), "{}", host.error("a"));
    fs::write(&script, b"\x7fELF").unwrap();
    host.wake("a").unwrap();
}
