//! A VMM that hangs, at whichever call: calling the work off ends it, and at once.

use std::{sync::Arc, thread};

use dozed::vmm::{Error, Machine, Vmm, cloud_hypervisor::CloudHypervisor};
use serde_json::json;

use crate::{
    files::{Host, end},
    support::{Standin, counter_guest, eventually},
};

struct Silent {
    standin: Standin,
    vmm: CloudHypervisor,
    host: Host,
}

impl Silent {
    fn new() -> Self {
        let standin = Standin::new("53.0");
        let vmm = CloudHypervisor::at(standin.program()).unwrap();
        Self { standin, vmm, host: Host::new(&counter_guest(), "") }
    }

    /// Does `work`, which hangs at `endpoint` and is called off there.
    fn call_off_at<T>(&self, endpoint: &str, work: impl FnOnce() -> Result<T, Error>) -> Error {
        let heard = || self.standin.calls().iter().filter(|call| call.contains(endpoint)).count();
        let before = heard();
        self.standin.set_faults(&json!([{ "endpoint": endpoint, "act": "hang" }]));
        let cancel = Arc::clone(&self.host.plan.cancel);
        // That it was called off, and did not take as long as a call may, its error says.
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                eventually("the call", || (heard() > before).then_some(()));
                cancel.call_off();
            });
            let Err(error) = work() else {
                panic!("nobody hangs at {endpoint}");
            };
            error
        });
        assert!(self.host.processes().is_empty(), "{endpoint}: {error}");
        error
    }

    fn run(&self) -> Box<dyn Machine> {
        let mut machine = self.vmm.boot(&self.host.plan).unwrap();
        machine.resume().unwrap();
        self.host.wait_for_count(1);
        machine
    }
}

#[test]
fn a_boot_that_hangs_ends_when_it_is_called_off() {
    for endpoint in ["vmm.ping", "vm.create"] {
        let silent = Silent::new();
        let error = silent.call_off_at(endpoint, || silent.vmm.boot(&silent.host.plan));
        assert!(matches!(error, Error::Cancelled { .. }), "{endpoint}: {error}");
    }
}

#[test]
fn a_restore_that_hangs_ends_when_it_is_called_off() {
    for endpoint in ["vmm.ping", "vm.restore"] {
        let silent = Silent::new();
        let mut machine = silent.run();
        machine.pause().unwrap();
        let dir = silent.host.snapshot_dir("snapshot");
        machine.save(&dir).unwrap();
        end(&*machine);
        let error = silent.call_off_at(endpoint, || silent.vmm.restore(&silent.host.plan, &dir));
        assert!(matches!(error, Error::Cancelled { .. }), "{endpoint}: {error}");
    }
}

#[test]
fn what_hangs_of_a_machine_ends_when_it_is_called_off() {
    for endpoint in ["vm.pause", "vm.snapshot", "vm.resume", "vm.info"] {
        let silent = Silent::new();
        let mut machine = silent.run();
        let dir = silent.host.snapshot_dir("snapshot");
        if endpoint != "vm.pause" {
            machine.pause().unwrap();
        }
        let error = silent.call_off_at(endpoint, || match endpoint {
            "vm.pause" => machine.pause(),
            "vm.snapshot" => machine.save(&dir),
            "vm.resume" => machine.resume(),
            _ => machine.running().map(drop),
        });
        assert!(
            matches!(error, Error::Died { .. } | Error::Cancelled { .. }),
            "{endpoint}: {error}"
        );
    }
}

#[test]
fn a_machine_that_was_asked_to_boot_in_vain_never_ran() {
    let silent = Silent::new();
    let mut machine = silent.vmm.boot(&silent.host.plan).unwrap();
    let refusal = json!({ "error": { "status": 500, "chain": ["Error from API", "not now"] } });
    silent.standin.set_faults(&json!([{ "endpoint": "vm.boot", "act": refusal }]));
    let error = machine.resume().unwrap_err();
    assert!(error.to_string().ends_with("Error from API: not now"), "{error}");
    assert!(!machine.running().unwrap());
    assert_eq!(silent.host.console(), "");
    silent.standin.set_faults(&json!([]));
    machine.resume().unwrap();
    silent.host.wait_for_count(2);
    silent.host.assert_whole();
}
