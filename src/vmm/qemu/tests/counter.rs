//! The counter guest, which tells when anything of it was lost.

use std::{ffi::OsString, fs::File, sync::mpsc};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;
use crate::{
    sandbox::network::GUEST_MAC,
    vmm::{DiskKind, PlannedDisk, PlannedNic},
};

pub(super) fn counter_host(cmdline: &str) -> Host {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    let guest = GUEST.get_or_init(|| built("counter-guest", target_dir().join("counter.elf")));
    let mut host = Host::new();
    let kernel = host.path("counter, .elf");
    fs::copy(guest, &kernel).unwrap();
    host.plan.kernel = Some(kernel);
    host.plan.cmdline = cmdline.to_owned();
    host
}

/// The lines `count N sum S`, as pairs. An unfinished line at the end is left out.
fn counts(host: &Host) -> Vec<(u32, String)> {
    let console = host.console();
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .filter_map(|line| line.strip_prefix("count ")?.split_once(" sum "))
        .map(|(count, sum)| (u32::from_str_radix(count, 16).unwrap(), sum.to_owned()))
        .collect()
}

pub(super) fn last_count(host: &Host) -> u32 {
    counts(host).last().map_or(0, |(count, _)| *count)
}

pub(super) fn wait_for_count(host: &Host, wanted: u32) {
    eventually("the count", || (last_count(host) >= wanted).then_some(()));
}

/// Claims that the guest counted from one without a gap or a repeat, always to one sum.
pub(super) fn assert_whole(host: &Host) {
    for (index, (count, sum)) in counts(host).iter().enumerate() {
        assert_eq!(u32::try_from(index + 1), Ok(*count), "{}", host.console());
        assert_eq!(sum, &counts(host)[0].1, "{}", host.console());
    }
    assert_eq!(host.console().matches("ready").count(), 1, "it booted once");
}

#[test]
fn a_boot_runs_no_instruction_before_the_resume() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    assert!(!machine.running().unwrap());
    let registers = registers(&host, machine.process());
    // The reset vector of every x86.
    assert!(registers.contains("EIP=0000fff0"), "{registers}");
    assert_eq!(host.console(), "");
    machine.resume().unwrap();
    assert!(machine.running().unwrap());
    wait_for_count(&host, 1);
}

#[test]
fn the_guest_counts_on_through_ten_sleeps() {
    let qemu = Qemu::find().unwrap();
    // It wants the wall clock, as every Linux does. Where there is KVM, that is written to
    // its memory as soon as somebody says so.
    let mut host = counter_host("churn touch=4 seed=3 clock");
    let mut machine = qemu.boot(&host.plan).unwrap();
    // What a restore needs is in the snapshot.
    fs::remove_file(host.plan.kernel.take().unwrap()).unwrap();
    host.plan.cmdline = String::new();
    for cycle in 1..=10 {
        machine.resume().unwrap();
        wait_for_count(&host, cycle * 2);
        machine.pause().unwrap();
        machine.pause().unwrap();
        assert!(!machine.running().unwrap());
        let paused = memory(&host);
        let dir = host.snapshot_dir(&format!("snapshot {cycle}"));
        machine.save(&dir).unwrap();
        assert!(memory(&host) == paused, "a save changes no memory");
        assert!(!machine.running().unwrap());
        let process = Arc::clone(machine.process());
        // QEMU serves one connection at a time, and what is paused keeps its own.
        drop(machine);
        let asleep = (last_count(&host), registers(&host, &process));
        process.kill();
        process.wait(SOON).unwrap();
        let memory = blake3_of(&host.plan.memory);

        machine = qemu.restore(&host.plan, &dir).unwrap();
        assert!(!machine.running().unwrap());
        assert_eq!(registers(&host, machine.process()), asleep.1);
        assert_eq!(last_count(&host), asleep.0);
        assert_eq!(blake3_of(&host.plan.memory), memory, "memory is as it was");
    }
    machine.resume().unwrap();
    wait_for_count(&host, last_count(&host) + 3);
    assert_whole(&host);
}

#[test]
fn without_a_balloon_everything_else_is_where_it_was() {
    let mut host = counter_host("");
    let disk = host.path("disk");
    host.plan.disks = vec![PlannedDisk { path: disk, kind: DiskKind::Own }];
    let arguments = |plan: &Plan| {
        command_line::arguments(plan, Accelerator::Tcg, command_line::Beginning::Restore, None)
    };
    let mut with = arguments(&host.plan);
    host.plan.balloon = false;
    let is_balloon = |arg: &OsString| arg.to_string_lossy().contains("balloon");
    let at = with.iter().position(is_balloon).unwrap();
    assert_eq!(with.drain(at - 1..=at).next().unwrap(), "-device");
    assert_eq!(arguments(&host.plan), with);
}

#[test]
fn a_network_device_has_a_place_of_its_own_and_nothing_else_moves() {
    let mut host = counter_host("");
    let disk =
        |number| PlannedDisk { path: host.path(&format!("disk {number}")), kind: DiskKind::Own };
    host.plan.disks = (0..5).map(disk).collect();
    let arguments = |plan: &Plan, tap| {
        command_line::arguments(plan, Accelerator::Tcg, command_line::Beginning::Restore, tap)
    };
    let without = arguments(&host.plan, None);
    let (namespace, tap) = ("/no/pin".into(), "tap7".to_owned());
    host.plan.nic = Some(PlannedNic { namespace, tap, mac: GUEST_MAC });
    let mut with = arguments(&host.plan, Some(77));
    let at = with.iter().position(|arg| arg == "-netdev").unwrap();
    let added: Vec<_> = with.drain(at..at + 4).map(|arg| arg.into_string().unwrap()).collect();
    assert_eq!(with, without);
    assert_eq!(added[1], "tap,id=net0,fd=77,vhost=off");
    let device = "virtio-net-device,netdev=net0,mac=02:fc:00:00:00:05,guest_announce=off,bus=";
    let bus = added[3].strip_prefix(device).unwrap();
    let taken = |arg: &OsString| arg.to_string_lossy().ends_with(bus);
    assert!(bus.starts_with("virtio-mmio-bus.") && !without.iter().any(taken), "{bus}");
}

fn blake3_of(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).unwrap()).unwrap();
    hasher.finalize()
}

/// A file system that is full after one page.
struct FullDisk(PathBuf);

impl FullDisk {
    fn at(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(c"size=4k")).unwrap();
        Self(path)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_failed_save_leaves_the_guest_resumable() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    wait_for_count(&host, 1);
    machine.pause().unwrap();
    let full = FullDisk::at(host.path("full"));
    for _ in 0..2 {
        let error = machine.save(&full.0).unwrap_err();
        assert!(
            matches!(&error, Error::Refused { command, .. } if command == "migrate"),
            "{error}"
        );
        assert!(error.to_string().contains("No space left"), "{error}");
        fs::remove_file(full.0.join("vmstate")).unwrap();
        assert!(!machine.running().unwrap());
        machine.resume().unwrap();
        assert!(machine.running().unwrap());
        wait_for_count(&host, last_count(&host) + 2);
        machine.pause().unwrap();
    }
    // Where there is room it goes to sleep after all.
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let mut machine = qemu.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    wait_for_count(&host, last_count(&host) + 2);
    assert_whole(&host);
}

#[test]
fn a_saved_guest_may_be_resumed_as_if_nothing_had_been() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    for attempt in 1..=20 {
        machine.resume().unwrap();
        assert!(machine.running().unwrap());
        machine.pause().unwrap();
        let dir = host.snapshot_dir(&attempt.to_string());
        machine.save(&dir).unwrap();
        let error = machine.save(&dir).unwrap_err();
        assert!(matches!(error, Error::Host { .. }), "nothing is overwritten: {error}");
    }
    machine.resume().unwrap();
    wait_for_count(&host, 2);
    assert_whole(&host);
}

#[test]
fn a_running_machine_is_not_saved() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    let error = machine.save(&host.snapshot_dir("snapshot")).unwrap_err();
    assert!(error.to_string().ends_with("the machine is not paused"), "{error}");
    assert!(machine.running().unwrap());
}

#[test]
fn a_torn_snapshot_is_refused_in_the_words_of_qemu_and_leaves_no_process() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let dir = host.snapshot_dir("snapshot");
    let error = qemu.restore(&host.plan, &dir).unwrap_err();
    assert!(matches!(error, Error::Host { .. }), "there is no state: {error}");

    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.save(&dir).unwrap();
    end(&*machine);
    let state = File::options().write(true).open(dir.join("vmstate")).unwrap();
    state.set_len(state.metadata().unwrap().len() / 2).unwrap();
    let error = qemu.restore(&host.plan, &dir).unwrap_err();
    let Error::Died { exit: Exit::Code(1), said, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(said.contains("load of migration failed"), "{said}");
    assert!(host.processes().is_empty());
}

#[test]
fn a_memory_of_another_size_is_refused() {
    let qemu = Qemu::find().unwrap();
    let mut host = counter_host("");
    let dir = host.snapshot_dir("snapshot");
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.save(&dir).unwrap();
    end(&*machine);
    host.plan.memory_bytes = 128 << 20;
    let error = qemu.restore(&host.plan, &dir).unwrap_err();
    assert!(matches!(error, Error::Died { .. }), "{error}");
    assert!(host.processes().is_empty());
}

#[test]
fn a_guest_that_switches_itself_off_is_told_of() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("quit=5");
    let (send, told) = mpsc::channel();
    let watch = ExitWatch::start(move |tag, exit| send.send((tag, exit)).unwrap()).unwrap();
    let mut machine = qemu.boot(&host.plan).unwrap();
    watch.watch(7, machine.process()).unwrap();
    machine.resume().unwrap();
    assert_eq!(told.recv_timeout(SOON).unwrap(), (7, Exit::Code(0)));
    assert!(host.console().ends_with("counter guest quits\n"));
    let error = machine.pause().unwrap_err();
    assert!(matches!(error, Error::Died { exit: Exit::Code(0), .. }), "{error}");
}

#[test]
fn a_machine_is_adopted_and_goes_on() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    wait_for_count(&host, 1);
    let identity = machine.process().identity().clone();
    drop(machine);

    let process = Process::adopt(&identity, &host.plan.token).unwrap().unwrap();
    let mut adopted = qemu.adopt(&host.plan, process).unwrap();
    assert!(adopted.running().unwrap());
    wait_for_count(&host, last_count(&host) + 1);
    adopted.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    adopted.save(&dir).unwrap();
    adopted.process().kill();
    adopted.process().wait(SOON).unwrap();
    let mut machine = qemu.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    wait_for_count(&host, last_count(&host) + 1);
    assert_whole(&host);
}

#[test]
fn a_guest_that_does_not_read_its_console_goes_on_printing() {
    let qemu = Qemu::find().unwrap();
    let host = counter_host("");
    let mut machine = qemu.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    let taken = machine.type_in(&[b'x'; 200_000]).unwrap();
    assert!((1..200_000).contains(&taken), "{taken}");
    wait_for_count(&host, last_count(&host) + 3);
    assert_whole(&host);
}

#[test]
fn what_qemu_refuses_at_its_start_is_told_in_its_words() {
    let qemu = Qemu::find().unwrap();
    let mut host = counter_host("");
    host.plan.disks.push(PlannedDisk { path: host.path("no such disk"), kind: DiskKind::Own });
    let error = qemu.boot(&host.plan).unwrap_err();
    let Error::Died { exit: Exit::Code(1), said, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(said.contains("no such disk': No such file or directory"), "{said}");
    assert!(host.processes().is_empty());
    host.plan.kernel = None;
    assert!(qemu.boot(&host.plan).is_err());
}

#[test]
fn a_path_that_is_too_long_for_a_socket_is_an_error() {
    let qemu = Qemu::find().unwrap();
    let mut host = counter_host("");
    host.plan.runtime_dir = host.path(&"long".repeat(30));
    fs::create_dir(&host.plan.runtime_dir).unwrap();
    let error = qemu.boot(&host.plan).unwrap_err();
    let Error::Host { source, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::InvalidInput);
}
