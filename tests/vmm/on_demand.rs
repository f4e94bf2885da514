//! Memory that is loaded on demand, by the driver alone: whether a host lets it is the host's.

use std::{fs, thread};

use dozed::{
    sandbox::RestoreMode,
    vmm::{Error, Machine, Vmm, cloud_hypervisor::CloudHypervisor},
};
use serde_json::{Value, json};

use crate::{
    files::{Host, end},
    support::{Standin, counter_guest, eventually},
};

/// A guest that sleeps, in a directory, and is to be woken on demand.
struct Sleeper {
    standin: Standin,
    vmm: CloudHypervisor,
    host: Host,
}

impl Sleeper {
    fn new() -> Self {
        let standin = Standin::new("53.0");
        let vmm = CloudHypervisor::at(standin.program()).unwrap();
        let mut host = Host::new(&counter_guest(), "touch=4 churn");
        host.plan.restore_mode = RestoreMode::OnDemand;
        let mut machine = vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        host.wait_for_count(2);
        machine.pause().unwrap();
        machine.save(&host.snapshot_dir("first")).unwrap();
        end(&*machine);
        Self { standin, vmm, host }
    }

    fn set(&self, knobs: &[(&str, Value)]) {
        let mut all = json!({ "version": "53.0" });
        for (name, value) in knobs {
            all[name] = value.clone();
        }
        self.standin.set_knobs(&all);
    }

    fn wake(&self, from: &str) -> Result<Box<dyn Machine>, Error> {
        self.vmm.restore(&self.host.plan, &self.host.path(from))
    }
}

#[test]
fn a_sleep_waits_until_all_of_the_memory_is_there_and_saves_all_of_it() {
    let sleeper = Sleeper::new();
    sleeper.set(&[("loading_millis", json!(3_600_000))]);
    let mut machine = sleeper.wake("first").unwrap();
    let asked = sleeper.standin.calls();
    let asked = asked.iter().rfind(|call| call.contains("vm.restore")).unwrap();
    assert!(asked.contains("\"memory_restore_mode\":\"OnDemand\""), "{asked}");
    machine.resume().unwrap();
    // It has the file open, and needs its name no more.
    fs::remove_file(sleeper.host.path("first").join("memory")).unwrap();
    sleeper.host.wait_for_count(sleeper.host.last_count() + 2);
    // What it is going to write is known before it is there.
    assert_eq!(machine.save_bytes(), sleeper.host.plan.memory_bytes);
    machine.pause().unwrap();
    let dir = sleeper.host.snapshot_dir("second");
    let calls = || sleeper.standin.calls();
    let tries = || calls().iter().filter(|call| call.contains("vm.snapshot")).count();
    let before = tries();
    thread::scope(|scope| {
        let save = scope.spawn(|| machine.save(&dir));
        eventually("the third try", || (tries() >= before + 3 || save.is_finished()).then_some(()));
        assert!(!save.is_finished(), "{:?}", save.join());
        // All of it is there.
        sleeper.set(&[]);
        save.join().unwrap().unwrap();
    });
    assert!(tries() < before + 200, "{}", tries());
    end(&*machine);
    sleeper.set(&[]);
    let mut machine = sleeper.wake("second").unwrap();
    machine.resume().unwrap();
    sleeper.host.wait_for_count(sleeper.host.last_count() + 2);
    sleeper.host.assert_whole();
}

#[test]
fn a_sleep_does_not_wait_for_ever_and_the_guest_runs_on() {
    let sleeper = Sleeper::new();
    sleeper.set(&[("loading_millis", json!(3_600_000))]);
    let mut machine = sleeper.wake("first").unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    let error = machine.save(&sleeper.host.snapshot_dir("second")).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("loading what the guest was woken from"), "{error}");
    assert_eq!(fs::read_dir(sleeper.host.path("second")).unwrap().count(), 0);
    machine.resume().unwrap();
    sleeper.host.wait_for_count(sleeper.host.last_count() + 2);
    sleeper.host.assert_whole();
}

#[test]
fn a_guest_that_dies_while_its_sleep_waits_is_told_at_once() {
    let sleeper = Sleeper::new();
    sleeper.set(&[("loading_millis", json!(3_600_000))]);
    let mut machine = sleeper.wake("first").unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    let dies = json!([{ "endpoint": "vm.snapshot", "call": 3, "act": "die" }]);
    sleeper.set(&[("loading_millis", json!(3_600_000)), ("faults", dies)]);
    let error = machine.save(&sleeper.host.snapshot_dir("second")).unwrap_err();
    assert!(matches!(error, Error::Died { .. }), "{error}");
}

#[test]
fn a_host_that_does_not_let_it_is_told_in_the_words_of_the_vmm() {
    let sleeper = Sleeper::new();
    sleeper.set(&[("userfaultfd", json!(false))]);
    let error = sleeper.wake("first").unwrap_err();
    assert!(error.to_string().contains("Failed to create userfaultfd"), "{error}");
    assert!(sleeper.host.processes().is_empty());
    sleeper.set(&[]);
    let mut machine = sleeper.wake("first").unwrap();
    machine.resume().unwrap();
    sleeper.host.wait_for_count(sleeper.host.last_count() + 2);
    sleeper.host.assert_whole();
}

#[test]
fn a_version_that_does_it_badly_or_not_at_all_is_not_asked() {
    for version in ["52.0", "44.0"] {
        let standin = Standin::new(version);
        let vmm = CloudHypervisor::at(standin.program()).unwrap();
        let mut host = Host::new(&counter_guest(), "");
        let mut machine = vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        host.wait_for_count(1);
        machine.pause().unwrap();
        let dir = host.snapshot_dir("first");
        machine.save(&dir).unwrap();
        end(&*machine);
        host.plan.restore_mode = RestoreMode::OnDemand;
        let error = vmm.restore(&host.plan, &dir).unwrap_err();
        assert!(error.to_string().contains("does not restore as `restore_mode` says"), "{error}");
        assert!(host.processes().is_empty());
        assert!(!standin.calls().iter().any(|call| call.contains("vm.restore")));
        let why = vmm.unfit(host.plan.memory_mode, RestoreMode::OnDemand, None).unwrap();
        assert!(why.contains("takes cloud-hypervisor v53.0 or later"), "{why}");
    }
}
