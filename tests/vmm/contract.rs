//! What every driver promises by the traits `Vmm` and `Machine`.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use dozed::{
    sandbox::MemoryMode,
    sys::{cancel::Cancel, command, kvm, process::Exit},
    vmm::{
        DiskKind, Error, Machine, Plan, PlannedDisk, SAVED_MEMORY, Vmm,
        cloud_hypervisor::CloudHypervisor, qemu::Qemu,
    },
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    files::{Host, end},
    support::{SOON, Standin, counter_guest},
};

/// A driver under test, and a guest that its program runs.
pub(crate) struct Subject {
    pub(crate) vmm: Box<dyn Vmm>,
    kernel: PathBuf,
    memory: MemoryMode,
    /// What its guests are told besides.
    words: &'static str,
    /// Keeps the stand-in's program and its knobs.
    _standin: Option<Standin>,
}

impl Subject {
    fn of(vmm: Box<dyn Vmm>) -> Self {
        let (kernel, memory) = (counter_guest(), MemoryMode::Auto);
        Self { vmm, kernel, memory, words: "", _standin: None }
    }

    pub(crate) fn qemu() -> Self {
        Self::of(Box::new(Qemu::find().unwrap()))
    }

    pub(crate) fn standin(version: &str) -> Self {
        let standin = Standin::new(version);
        let vmm = Box::new(CloudHypervisor::at(standin.program()).unwrap());
        Self { _standin: Some(standin), ..Self::of(vmm) }
    }

    /// The real one, where there is one.
    pub(crate) fn cloud_hypervisor() -> Option<Self> {
        command::find("cloud-hypervisor")?;
        // As every Linux does, it tells KVM where it wants to find the wall clock. A KVM that
        // is not of the hardware runs such a guest, if it does, by an emulator.
        let words = if kvm::usable().is_ok() { "clock" } else { "clock poll=200" };
        Some(Self { words, ..Self::of(Box::new(CloudHypervisor::find().unwrap())) })
    }

    fn with_memory_in_a_file(self) -> Self {
        Self { memory: MemoryMode::File, ..self }
    }

    pub(crate) fn host(&self, cmdline: &str) -> Host {
        let mut host = Host::new(&self.kernel, &format!("{cmdline} {}", self.words));
        host.plan.memory_mode = self.memory;
        host
    }

    /// Boots a guest that counts.
    pub(crate) fn run(&self, host: &Host) -> Box<dyn Machine> {
        let mut machine = self.vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        host.wait_for_count(1);
        machine
    }
}

/// Has each test run against each driver.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod qemu {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::qemu());
            })*
        }

        mod standin {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::standin("53.0"));
            })*
        }

        mod standin_with_memory_in_a_file {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::standin("53.0").with_memory_in_a_file());
            })*
        }

        mod standin_of_the_oldest_with_memory_in_a_file {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::standin("44.0").with_memory_in_a_file());
            })*
        }

        mod standin_of_the_oldest {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::standin("44.0"));
            })*
        }

        mod standin_of_the_next {
            $(#[test]
            fn $name() {
                super::$name(&super::Subject::standin("54.0.0"));
            })*
        }

        mod cloud_hypervisor {
            $(#[test]
            fn $name() {
                if let Some(subject) = super::Subject::cloud_hypervisor() {
                    super::$name(&subject);
                }
            })*
        }

        mod cloud_hypervisor_with_memory_in_a_file {
            $(#[test]
            fn $name() {
                if let Some(subject) = super::Subject::cloud_hypervisor() {
                    super::$name(&subject.with_memory_in_a_file());
                }
            })*
        }
    };
}

contract! {
    nothing_runs_before_the_first_resume,
    pausing_and_resuming_again_is_no_error,
    a_machine_that_runs_is_not_saved,
    the_guest_counts_on_through_twenty_sleeps,
    a_machine_that_was_restored_and_not_resumed_leaves_its_snapshot_as_it_was,
    a_save_without_room_can_be_taken_back,
    a_save_to_nowhere_can_be_taken_back,
    a_torn_snapshot_leaves_no_process_and_the_whole_one_loads,
    a_guest_that_ends_ends_its_process,
    an_adopted_machine_does_all_that_it_did,
    what_is_called_off_before_it_began_is_not_begun,
    what_is_called_off_later_ends_the_process,
    a_process_that_died_is_told_by_every_call,
    a_disk_is_that_of_one_machine,
    a_machine_without_a_balloon_does_all_the_same,
    typing_is_taken,
    a_machine_without_a_kernel_is_refused,
}

fn nothing_runs_before_the_first_resume(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.vmm.boot(&host.plan).unwrap();
    for _ in 0..10 {
        assert!(!machine.running().unwrap());
    }
    assert_eq!(host.console(), "");
    assert_eq!(host.processes().len(), 1);
    machine.resume().unwrap();
    assert!(machine.running().unwrap());
    host.wait_for_count(2);
    host.assert_whole();
}

fn pausing_and_resuming_again_is_no_error(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    machine.resume().unwrap();
    for _ in 0..3 {
        machine.pause().unwrap();
        let count = host.last_count();
        machine.pause().unwrap();
        assert!(!machine.running().unwrap());
        assert_eq!(host.last_count(), count);
        machine.resume().unwrap();
        machine.resume().unwrap();
        assert!(machine.running().unwrap());
        host.wait_for_count(count + 2);
    }
    host.assert_whole();
}

fn a_machine_that_runs_is_not_saved(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    let dir = host.snapshot_dir("snapshot");
    let error = machine.save(&dir).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(machine.running().unwrap());
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

fn the_guest_counts_on_through_twenty_sleeps(subject: &Subject) {
    let mut host = subject.host("churn touch=4 seed=3");
    let mut machine = subject.vmm.boot(&host.plan).unwrap();
    // What a restore needs of a snapshot is in the snapshot.
    host.plan.kernel = None;
    host.plan.cmdline = String::new();
    for cycle in 1..=20 {
        machine.resume().unwrap();
        host.wait_for_count(host.last_count() + 1);
        machine.pause().unwrap();
        let dir = host.snapshot_dir(&format!("snapshot, {cycle}"));
        machine.save(&dir).unwrap();
        assert!(!machine.running().unwrap());
        let asleep = host.last_count();
        end(&*machine);
        machine = subject.vmm.restore(&host.plan, &dir).unwrap();
        assert!(!machine.running().unwrap());
        assert_eq!(host.last_count(), asleep);
        assert_eq!(host.processes().len(), 1);
    }
    host.assert_whole();
}

fn a_machine_that_was_restored_and_not_resumed_leaves_its_snapshot_as_it_was(subject: &Subject) {
    let host = subject.host("touch=4");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let in_file = subject.vmm.keeps_memory_in_file(subject.memory);
    let memory = if in_file { host.plan.memory.clone() } else { dir.join(SAVED_MEMORY) };
    assert_eq!(dir.join(SAVED_MEMORY).exists(), !in_file);
    let content = || {
        let mut files = state_files(&dir);
        files.push(memory.clone());
        files.iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
    };
    let before = content();
    for _ in 0..2 {
        let machine = subject.vmm.restore(&host.plan, &dir).unwrap();
        assert!(content() == before, "while it is paused");
        end(&*machine);
        assert!(content() == before, "when it is gone");
    }
    let mut machine = subject.vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

fn a_save_without_room_can_be_taken_back(subject: &Subject) {
    let host = subject.host("touch=4");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    let full = host.snapshot_dir("full");
    // Room for a page of the first of two small files.
    mount("none", &full, "tmpfs", MountFlags::empty(), c"size=4k").unwrap();
    let error = machine.save(&full).unwrap_err();
    unmount(&full, UnmountFlags::DETACH).unwrap();
    assert!(!error.to_string().is_empty());
    assert!(!machine.running().unwrap());
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    sleep_and_wake(subject, &host, machine);
}

fn a_save_to_nowhere_can_be_taken_back(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    machine.save(&host.path("nowhere")).unwrap_err();
    assert!(!host.path("nowhere").exists());
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    sleep_and_wake(subject, &host, machine);
}

fn a_torn_snapshot_leaves_no_process_and_the_whole_one_loads(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let torn: Vec<_> = state_files(&dir);
    assert!(!torn.is_empty());
    for path in torn {
        let whole = fs::read(&path).unwrap();
        for length in [0, whole.len() / 2] {
            fs::write(&path, &whole[..length]).unwrap();
            let error = subject.vmm.restore(&host.plan, &dir).unwrap_err();
            assert!(!error.to_string().is_empty());
            assert!(host.processes().is_empty(), "{error}");
        }
        fs::remove_file(&path).unwrap();
        subject.vmm.restore(&host.plan, &dir).unwrap_err();
        assert!(host.processes().is_empty());
        fs::write(&path, &whole).unwrap();
    }
    let mut machine = subject.vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

fn a_guest_that_ends_ends_its_process(subject: &Subject) {
    let host = subject.host("quit=3");
    let mut machine = subject.vmm.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.process().wait(SOON), Some(Exit::Code(0)));
    assert!(host.console().contains("counter guest quits"), "{}", host.console());
    host.assert_whole();
    let error = machine.running().unwrap_err();
    assert!(matches!(error, Error::Died { exit: Exit::Code(0), .. }), "{error}");
}

fn an_adopted_machine_does_all_that_it_did(subject: &Subject) {
    let host = subject.host("");
    let machine = subject.run(&host);
    let process = Arc::clone(machine.process());
    drop(machine);
    assert_eq!(process.exited(), None);
    let mut machine = subject.vmm.adopt(&host.plan, Arc::clone(&process)).unwrap();
    assert!(machine.running().unwrap());
    machine.pause().unwrap();
    drop(machine);
    let mut machine = subject.vmm.adopt(&host.plan, process).unwrap();
    assert!(!machine.running().unwrap());
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    sleep_and_wake(subject, &host, machine);
}

fn what_is_called_off_before_it_began_is_not_begun(subject: &Subject) {
    let host = subject.host("");
    host.plan.cancel.call_off();
    let error = subject.vmm.boot(&host.plan).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let error = subject.vmm.restore(&host.plan, &host.snapshot_dir("snapshot")).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(host.processes().is_empty());
    assert_eq!(host.console(), "");
}

fn what_is_called_off_later_ends_the_process(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    host.plan.cancel.call_off();
    assert_eq!(machine.process().wait(SOON), Some(Exit::Signal(9)));
    machine.pause().unwrap_err();
    assert!(host.processes().is_empty());
}

fn a_process_that_died_is_told_by_every_call(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    end(&*machine);
    let dir = host.snapshot_dir("snapshot");
    let errors = [
        machine.running().map(drop),
        machine.pause(),
        machine.resume(),
        machine.save(&dir),
        subject.vmm.adopt(&host.plan, Arc::clone(machine.process())).map(drop),
    ];
    for error in errors {
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Died { exit: Exit::Signal(9), .. }), "{error}");
        assert!(error.to_string().contains("killed by signal 9"), "{error}");
    }
    machine.type_in(b"hello\n").unwrap_err();
}

fn a_disk_is_that_of_one_machine(subject: &Subject) {
    let mut host = subject.host("");
    let disk = |path: PathBuf, kind| {
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        PlannedDisk { path, kind }
    };
    host.plan.disks = vec![
        disk(host.path("one, own"), DiskKind::Own),
        disk(host.path("one, shared"), DiskKind::Shared),
    ];
    let machine = subject.run(&host);
    let mut other = subject.host("");
    other.plan.disks = vec![host.plan.disks[1].clone()];
    end(&*subject.run(&other));
    // Whether it is found out at the boot or at the resume, nothing runs.
    other.plan.disks = vec![host.plan.disks[0].clone()];
    let printed = other.console();
    let refused = told(&start(subject, &other.plan).unwrap_err());
    assert!(refused.contains("one, own"), "{refused}");
    assert_eq!(other.console(), printed);
    end(&*machine);
    // The lock of a process that was just killed is in nobody's way.
    end(&*start(subject, &other.plan).unwrap());
}

fn a_machine_without_a_balloon_does_all_the_same(subject: &Subject) {
    let mut host = subject.host("");
    host.plan.balloon = false;
    let machine = subject.run(&host);
    sleep_and_wake(subject, &host, machine);
}

fn typing_is_taken(subject: &Subject) {
    let host = subject.host("");
    let mut machine = subject.run(&host);
    assert_eq!(machine.type_in(b"").unwrap(), 0);
    assert_eq!(machine.type_in(b"hello\n").unwrap(), 6);
    sleep_and_wake(subject, &host, machine);
}

fn a_machine_without_a_kernel_is_refused(subject: &Subject) {
    let mut host = subject.host("");
    host.plan.kernel = None;
    let error = subject.vmm.boot(&host.plan).unwrap_err();
    assert!(error.to_string().contains("no kernel"), "{error}");
    host.plan.kernel = Some(host.path("nowhere"));
    start(subject, &host.plan).unwrap_err();
    assert!(host.processes().is_empty());
}

/// Returns an error with its causes.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Boots a machine and lets it run; ends it where that fails.
pub(crate) fn start(subject: &Subject, plan: &Plan) -> Result<Box<dyn Machine>, Error> {
    let plan = Plan { cancel: Arc::new(Cancel::default()), ..plan.clone() };
    let mut machine = subject.vmm.boot(&plan)?;
    let resumed = machine.resume();
    if resumed.is_err() {
        machine.process().kill();
        machine.process().wait(SOON).unwrap();
    }
    resumed.map(|()| machine)
}

/// Shows that a machine that went through something sleeps and wakes as ever.
fn sleep_and_wake(subject: &Subject, host: &Host, mut machine: Box<dyn Machine>) {
    machine.pause().unwrap();
    let dir = host.snapshot_dir("after all");
    machine.save(&dir).unwrap();
    end(&*machine);
    let mut machine = subject.vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

/// Returns the files of a snapshot that are not the memory.
fn state_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| fs::metadata(path).unwrap().len() < 1 << 20).collect()
}
