//! What took effect is a success, also where it cannot be recorded; and it is recorded later.

use super::*;

fn running() -> Host {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host
}

fn vmm(host: &Host) -> u32 {
    host.entry("a").record().process().unwrap().pid
}

#[test]
fn an_end_that_cannot_be_recorded_is_known_and_recorded_as_soon_as_it_can_be() {
    let host = running();
    host.refuse_writes("UPDATE ON sandbox");
    host.vmm.crash(vmm(&host));
    wait_for("the end to be seen", || host.daemon.unsettled.next_try().is_some());
    wait_for("the lock to be free", || host.daemon.locks_in_use() == 0);
    assert!(!host.daemon.rests_in(&host.entry("a"), State::Running));
    assert!(matches!(host.wake("a"), Err(Error::Index { .. })), "it does not run already");
    assert!(matches!(host.sleep("a"), Err(Error::Index { .. })));
    host.accept_writes();
    host.settle();
    assert_eq!(host.state("a"), State::Stopped);
    let events = host.daemon.memory();
    assert_eq!(events.0, 0, "its memory is given back");
    assert_eq!(host.entry("a").record().error.as_deref(), Some("the VMM was killed by signal 9"));
    host.check("a");
}

#[test]
fn a_wake_of_what_has_just_died_unseen_boots_it_and_does_not_take_it_for_running() {
    let host = running();
    host.refuse_writes("UPDATE ON sandbox");
    host.vmm.crash(vmm(&host));
    wait_for("the end to be seen", || host.daemon.unsettled.next_try().is_some());
    host.accept_writes();
    assert_eq!(host.wake("a").unwrap(), Outcome::Done);
    assert_eq!((host.state("a"), host.vmm.count(Call::Boot)), (State::Running, 2));
    host.settle();
    host.check("a");
}

#[test]
fn a_sleep_that_was_committed_and_not_recorded_has_succeeded() {
    let host = running();
    let runs = host.runs("a");
    host.refuse_writes("UPDATE ON sandbox WHEN new.state = 'snapshotted'");
    assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
    assert_eq!((host.state("a"), host.vmm.living()), (State::Snapshotting, vec![]));
    host.accept_writes();
    host.settle();
    let record = host.entry("a").record();
    assert_eq!((record.state(), record.sleeps, host.runs("a")), (State::Snapshotted, 1, runs));
    assert_eq!(host.error("a"), "ok");
    host.check("a");
}

#[test]
fn a_wake_that_let_the_guest_run_and_was_not_recorded_has_succeeded() {
    let host = running();
    host.sleep("a").unwrap();
    let runs = host.runs("a");
    host.refuse_writes("UPDATE ON sandbox WHEN new.state = 'running'");
    assert_eq!(host.wake("a").unwrap(), Outcome::Done);
    assert!(host.guest_runs("a"));
    let pid = vmm(&host);
    host.accept_writes();
    host.settle();
    let record = host.entry("a").record();
    assert_eq!((record.state(), record.wakes), (State::Running, 1));
    assert_eq!((vmm(&host), host.runs("a")), (pid, runs + 1));
    host.check("a");
}

#[test]
fn a_boot_that_let_the_guest_run_and_was_not_recorded_has_succeeded() {
    let host = Host::new();
    host.create("a");
    host.refuse_writes("UPDATE ON sandbox WHEN new.state = 'running'");
    assert_eq!(host.wake("a").unwrap(), Outcome::Done);
    assert!(host.guest_runs("a"));
    host.accept_writes();
    host.settle();
    assert_eq!((host.state("a"), host.runs("a")), (State::Running, 1));
    host.check("a");
}

#[test]
fn sockets_that_cannot_be_removed_fail_nothing() {
    for ends in [false, true] {
        let host = running();
        let sockets = host.daemon.store.runtime_dir(host.entry("a").row());
        std::fs::remove_dir_all(&sockets).unwrap();
        std::fs::write(&sockets, "no directory").unwrap();
        if ends {
            host.vmm.crash(vmm(&host));
            wait_for("the end to be seen", || host.state("a") == State::Stopped);
        } else {
            assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
            assert_eq!(host.state("a"), State::Snapshotted);
        }
        std::fs::remove_file(&sockets).unwrap();
        host.check("a");
    }
}

#[test]
fn a_guest_that_could_not_be_adopted_is_adopted_later_and_its_end_is_seen() {
    let mut host = running();
    host.vmm.fail_next(Call::Adopt, Fault::Refuse);
    host.restart_after(false, |_| ());
    assert_eq!(host.state("a"), State::Running);
    host.settle();
    host.vmm.crash(vmm(&host));
    wait_for("the end to be seen", || host.state("a") == State::Stopped);
}

#[test]
fn an_intent_that_was_taken_back_and_not_recorded_is_recorded_later() {
    let host = running();
    host.refuse_writes("UPDATE ON sandbox WHEN new.state = 'running'");
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    host.sleep("a").unwrap_err();
    assert!(host.guest_runs("a"));
    host.accept_writes();
    host.settle();
    assert_eq!(host.state("a"), State::Running);
    host.check("a");
}
