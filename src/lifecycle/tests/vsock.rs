//! The socket by which the host reaches a guest.

use super::*;
use crate::lifecycle::MachineError;

/// Has the machine of a sandbox have a vsock or none.
fn connect(host: &Host, id: &str, vsock: bool) {
    let spec = Spec { vsock, ..Spec::clone(&host.entry(id).record().spec) };
    host.set(id, Policy::Spec(Box::new(spec))).unwrap();
}

#[test]
fn a_vmm_that_has_no_vsock_is_told_before_anything_is_done() {
    let host = Host::new();
    host.create("a");
    connect(&host, "a", true);
    assert!(matches!(host.wake("a"), Err(Error::Machine(MachineError::NoVmm { .. }))));
    let says = "`vsock = true`, which needs Cloud Hypervisor, and here it would be fake";
    assert!(host.error("a").contains(says), "{}", host.error("a"));
    assert_eq!((host.state("a"), host.vmm.count(Call::Boot)), (State::Stopped, 0));
    connect(&host, "a", false);
    host.check("a");
}

#[test]
fn the_path_of_a_vsock_is_told_while_its_guest_runs() {
    let host = Host::new();
    host.vmm.have_vsocks();
    host.create("a");
    connect(&host, "a", true);
    let vsock = || host.daemon.store.vsock(&host.entry("a").record());
    assert_eq!(vsock(), None);
    host.wake("a").unwrap();
    assert_eq!(vsock(), Some(host.dir.path().join("run/1/vsock/vsock.sock")));
    host.sleep("a").unwrap();
    assert_eq!(vsock(), None);
    let record = host.entry("a").record();
    let home = host.daemon.store.home(&record);
    let snapshot = home.open(&record.id, record.snapshot().unwrap().generation).unwrap();
    assert_eq!(snapshot.manifest().vmm.machine, "none, vsock");
    host.check("a");
}

#[test]
fn a_new_owner_of_what_runs_has_its_vsock_too() {
    let host = Host::new();
    host.vmm.have_vsocks();
    host.create("a");
    let give = |uid| host.set("a", Policy::Owner(Owner { uid, gid: 9 })).unwrap();
    give(7);
    host.wake("a").unwrap();
    give(8);
    give(8);
    assert_eq!(host.vmm.vsock_owners(), [Owner { uid: 8, gid: 9 }]);
}
