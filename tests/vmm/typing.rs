//! What is typed reaches the guest on Cloud Hypervisor, and does so after a wake.

use dozed::vmm::{Vmm, cloud_hypervisor::CloudHypervisor};

use crate::{
    files::{Host, end},
    support::{Standin, counter_guest, eventually},
};

#[test]
fn a_guest_hears_what_is_typed_before_and_after_a_sleep() {
    let standin = Standin::new("53.0");
    let vmm = CloudHypervisor::at(standin.program()).unwrap();
    let host = Host::new(&counter_guest(), "");
    let hears = |words: &str| {
        let line = format!("heard {words}\n");
        eventually("the echo", || host.console().contains(&line).then_some(()));
    };
    let mut machine = vmm.boot(&host.plan).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.type_in(b"hello, ").unwrap(), 7);
    assert_eq!(machine.type_in(b"guest\n").unwrap(), 6);
    hears("hello, guest");
    machine.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let mut machine = vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    machine.type_in(b"good morning\n").unwrap();
    hears("good morning");
    // Who takes it over types as well.
    let process = std::sync::Arc::clone(machine.process());
    drop(machine);
    let mut machine = vmm.adopt(&host.plan, process).unwrap();
    machine.type_in(b"again\n").unwrap();
    hears("again");
    assert_eq!(host.console().matches("heard ").count(), 3);
}
