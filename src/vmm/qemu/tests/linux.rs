//! A Linux guest with a disk, which is made once and kept under `target/`.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::vmm::{DiskKind, PlannedDisk};

fn linux_host() -> Host {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    let image = IMAGE.get_or_init(|| built("guest-image", target_dir().join("guest-image")));
    let mut host = Host::new();
    let disk = host.path("disk, 0");
    fs::copy(image.join("disk.ext4"), &disk).unwrap();
    let second = host.path("second disk");
    fs::write(&second, [b"second".as_slice(), &[0; 1 << 20]].concat()).unwrap();
    host.plan.kernel = Some(image.join("vmlinuz"));
    host.plan.initramfs = Some(image.join("initramfs"));
    host.plan.cmdline = "console=ttyS0 reboot=t panic=-1 quiet dozed.quiet".to_owned();
    host.plan.disks = vec![
        PlannedDisk { path: disk, kind: DiskKind::Own },
        PlannedDisk { path: second, kind: DiskKind::Shared },
    ];
    host
}

/// Types `command` and returns what the guest printed up to its end.
fn shell(host: &Host, machine: &mut dyn Machine, command: &str) -> String {
    let before = host.console().len();
    // The shell prints what is typed, so the mark must look otherwise there.
    let line = format!("{command}; echo '<en''d>'\n");
    assert_eq!(machine.type_in(line.as_bytes()).unwrap(), line.len());
    eventually(command, || {
        let console = host.console();
        let said = console.get(before..)?.split_once("<end>")?.0;
        Some(said.to_owned())
    })
}

#[test]
fn linux_sleeps_and_wakes_with_its_shell_and_its_disks() {
    let qemu = Qemu::find().unwrap();
    let mut host = linux_host();
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    eventually("the guest", || host.console().contains("guest# ").then_some(()));
    let said = shell(&host, &mut *machine, "grep data /proc/mounts; head -c 6 /dev/vdb");
    assert!(said.contains("/dev/vda /data ext4 rw"), "{said}");
    assert!(said.contains("second"), "{said}");
    let said = shell(&host, &mut *machine, "echo 1 >/dev/vdb || echo refused");
    assert!(said.contains("\nrefused"), "{said}");
    shell(&host, &mut *machine, "echo kept >/data/file; word=remembered");
    // Its disk is busy when it is paused.
    let busy = "(dd if=/dev/zero of=/data/noise bs=4k count=512; sync) 2>/dev/null & true";
    shell(&host, &mut *machine, busy);

    machine.pause().unwrap();
    let paused = memory(&host);
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    assert!(memory(&host) == paused, "neither a save nor a disk changes a paused memory");
    end(&*machine);
    // Neither the kernel's files nor its command line are needed any more.
    host.plan.kernel = None;
    host.plan.initramfs = None;
    host.plan.cmdline = String::new();
    let mut machine = qemu.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    let said = shell(&host, &mut *machine, "echo $word; sync; cat /data/file");
    assert!(said.contains("remembered\r\nkept"), "{said}");
    assert_eq!(host.console().matches("guest ready").count(), 1);

    machine.type_in(b"poweroff\n").unwrap();
    assert_eq!(machine.process().wait(SOON), Some(Exit::Code(0)));
}

#[test]
fn memory_that_linux_gives_back_becomes_a_hole_in_the_file() {
    let qemu = Qemu::find().unwrap();
    let host = linux_host();
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    eventually("the guest", || host.console().contains("guest# ").then_some(()));
    let used = || fs::metadata(&host.plan.memory).unwrap().blocks() * 512;
    shell(&host, &mut *machine, "head -c 60000000 /dev/zero >/tmp/file");
    let before = used();
    assert!(before > 60_000_000, "{before}");
    shell(&host, &mut *machine, "rm /tmp/file");
    // Linux reports a part of what is free every two seconds.
    eventually("a hole", || (used() + 10_000_000 < before).then_some(()));
}

#[test]
fn memory_that_a_balloon_takes_becomes_a_hole_in_the_file() {
    const WANTED: u64 = 160 << 20;
    let qemu = Qemu::find().unwrap();
    let mut host = linux_host();
    // Newer kernels give a page of a mapped file on ext4 or XFS the blocks of its neighbours
    // too, so that there small holes are filled again; docs/qemu.md says more.
    let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
    host.plan.memory = tmpfs.path().join("memory");
    fs::write(&host.plan.memory, b"").unwrap();
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    eventually("the guest", || host.console().contains("guest# ").then_some(()));
    let used = || fs::metadata(&host.plan.memory).unwrap().blocks() * 512;
    // What was read stays in the guest's page cache, which is not reported as free.
    shell(&host, &mut *machine, "cat /dev/vda >/dev/null");
    let before = used();
    assert_eq!(machine.balloon_bytes().unwrap(), 0);
    machine.set_balloon(WANTED).unwrap();
    eventually("the balloon", || (machine.balloon_bytes().unwrap() == WANTED).then_some(()));
    assert!(used() + (40 << 20) < before, "{} after {before}", used());
    machine.set_balloon(0).unwrap();
    eventually("the balloon", || (machine.balloon_bytes().unwrap() == 0).then_some(()));
}

#[test]
fn a_balloon_that_is_not_there_is_neither_resized_nor_measured() {
    let qemu = Qemu::find().unwrap();
    let mut host = linux_host();
    host.plan.balloon = false;
    let mut machine = qemu.boot(&host.plan).unwrap();
    for error in [machine.set_balloon(1 << 20).err(), machine.balloon_bytes().err()] {
        let error = error.unwrap().to_string();
        assert!(error.contains("balloon"), "{error}");
    }
    machine.resume().unwrap();
    eventually("the guest", || host.console().contains("guest# ").then_some(()));
    // The disks are where they are with one.
    let said = shell(&host, &mut *machine, "grep data /proc/mounts; head -c 6 /dev/vdb");
    assert!(said.contains("/dev/vda /data ext4 rw"), "{said}");
    assert!(said.contains("second"), "{said}");
}
