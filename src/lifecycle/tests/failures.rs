//! What goes wrong while the daemon lives: a failed sleep leaves the guest running, a
//! failed wake leaves it asleep and wakeable.

use std::{
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt as _,
    time::SystemTime,
};

use super::*;
use crate::sandbox::Cause;
use crate::{lifecycle::chores::trim_consoles, machines::ConsoleExtent};

fn running() -> Host {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host
}

fn asleep() -> Host {
    let host = running();
    host.sleep("a").unwrap();
    host
}

#[test]
fn a_failed_sleep_leaves_the_guest_running() {
    for call in [Call::Connect, Call::Pause, Call::Save] {
        for fault in [Fault::Refuse, Fault::NoSpace] {
            let host = running();
            host.vmm.fail_next(call, fault);
            let error = host.sleep("a").unwrap_err();
            let full = fault == Fault::NoSpace;
            assert_eq!(error.fault() == Comes::NoSpace, full, "{call:?} {fault:?}: {error}");
            assert_eq!(host.state("a"), State::Running, "{call:?} {fault:?}");
            assert!(host.guest_runs("a"), "{call:?} {fault:?}");
            assert_ne!(host.error("a"), "ok");
            // What cannot be reached is not paused, and who runs costs no connection.
            assert_eq!(host.vmm.count(Call::Pause), usize::from(call != Call::Connect));
            assert!(host.vmm.living().iter().all(|pid| !host.vmm.is_connected(*pid)));
            host.check("a");
            assert_eq!(host.error("a"), "ok");
        }
    }
}

#[test]
fn a_sleep_does_not_wait_for_a_fifo_or_a_link_in_place_of_the_memory() {
    let put: [fn(&std::path::Path, &std::path::Path); 2] = [
        |path, _| crate::sys::files::regular::tests::make_fifo(path),
        |path, aside| std::os::unix::fs::symlink(aside, path).unwrap(),
    ];
    for put in put {
        let host = running();
        let home = host.daemon.store.home(&host.entry("a").record());
        let memory = || home.live_memory(home.survey().unwrap().live.unwrap());
        let aside = host.daemon.settings().store.join("aside");
        crate::sys::files::rename(&memory(), &aside).unwrap();
        put(&memory(), &aside);
        let error = crate::lifecycle::chain(&host.sleep("a").unwrap_err());
        assert!(error.contains("`memory` is not a file"), "{error}");
        assert_eq!(host.state("a"), State::Running);
        assert!(host.guest_runs("a"));
        let memory = memory();
        std::fs::remove_file(&memory).unwrap();
        crate::sys::files::rename(&aside, &memory).unwrap();
        host.check("a");
    }
}

#[test]
fn a_console_does_not_wait_for_a_fifo_nor_follow_a_link() {
    let host = running();
    let entry = host.entry("a");
    let log = host.daemon.store.home(&entry.record()).console_log();
    let secret = host.daemon.settings().store.join("secret");
    std::fs::write(&secret, "secret").unwrap();
    let put: [&dyn Fn(); 2] = [&|| crate::sys::files::regular::tests::make_fifo(&log), &|| {
        std::os::unix::fs::symlink(&secret, &log).unwrap();
    }];
    for put in put {
        std::fs::remove_file(&log).ok();
        put();
        let console = host.daemon.store.console(&entry.record());
        assert_eq!(console.extent(), ConsoleExtent::default());
        let error = console.read(0, 100).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        trim_consoles(&host.daemon);
    }
    assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
}

#[test]
fn a_vmm_that_dies_while_going_to_sleep_is_a_lost_guest() {
    for call in [Call::Pause, Call::Save] {
        let host = running();
        host.vmm.fail_next(call, Fault::Die);
        host.sleep("a").unwrap_err();
        assert_eq!(host.state("a"), State::Stopped, "{call:?}");
        assert!(host.error("a").contains("killed by signal 9"), "{}", host.error("a"));
        host.check("a");
    }
}

#[test]
fn a_failed_wake_leaves_it_asleep_and_the_next_one_succeeds() {
    for call in [Call::Restore, Call::Connect, Call::Resume] {
        for fault in [Fault::Refuse, Fault::NoSpace, Fault::Die] {
            let host = asleep();
            let runs = host.runs("a");
            host.vmm.fail_next(call, fault);
            host.wake("a").unwrap_err();
            assert_eq!(host.state("a"), State::Snapshotted, "{call:?} {fault:?}");
            assert_eq!(host.runs("a"), runs);
            assert!(host.error("a").contains("a: "), "{}", host.error("a"));
            host.check("a");
            assert_eq!(host.error("a"), "ok");
        }
    }
}

#[test]
fn a_wake_whose_vmm_does_not_say_that_the_guest_runs_is_finished_and_not_taken_back() {
    for copies in [false, true] {
        let host = if copies { Host::copying() } else { Host::new() };
        host.create("a");
        host.wake("a").unwrap();
        host.sleep("a").unwrap();
        let runs = host.runs("a");
        host.vmm.fail_next(Call::Resume, Fault::Unanswered);
        let error = host.wake("a").unwrap_err();
        assert!(matches!(error, Error::Unanswered { .. }), "{error}");
        assert_eq!(error.fault(), Comes::TimedOut);
        let vmm = host.vmm.living();
        assert_eq!((host.state("a"), vmm.len()), (State::Restoring, 1));
        assert!(host.error("a").contains("did not say whether"), "{}", host.error("a"));
        host.settle();
        assert_eq!((host.state("a"), host.vmm.living()), (State::Running, vmm));
        assert_eq!(host.runs("a"), runs + 1);
        host.check("a");
    }
}

#[test]
fn a_sleep_that_fails_and_whose_vmm_does_not_say_that_the_guest_runs_leaves_it_running() {
    let host = running();
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    host.vmm.fail_next(Call::Resume, Fault::Unanswered);
    host.sleep("a").unwrap_err();
    assert!(host.guest_runs("a"));
    host.settle();
    assert_eq!(host.state("a"), State::Running);
    host.check("a");
}

#[test]
fn a_failed_boot_leaves_it_stopped_and_the_next_one_succeeds() {
    for call in [Call::Boot, Call::Connect, Call::Resume] {
        for fault in [Fault::Refuse, Fault::NoSpace, Fault::Die] {
            let host = Host::new();
            host.create("a");
            host.vmm.fail_next(call, fault);
            host.wake("a").unwrap_err();
            assert_eq!(host.state("a"), State::Stopped, "{call:?} {fault:?}");
            host.check("a");
        }
    }
}

#[test]
fn a_panic_in_an_operation_is_recovered_from() {
    for call in [Call::Pause, Call::Save] {
        let host = running();
        host.vmm.fail_next(call, Fault::Panic);
        assert!(matches!(host.sleep("a"), Err(Error::Panicked { .. })));
        assert_eq!(host.state("a"), State::Running, "{call:?}");
        host.check("a");
    }
    for call in [Call::Restore, Call::Resume] {
        let host = asleep();
        host.vmm.fail_next(call, Fault::Panic);
        assert!(matches!(host.wake("a"), Err(Error::Panicked { .. })));
        host.check("a");
    }
}

#[test]
fn an_undo_that_fails_is_made_up_for_by_the_next_operation() {
    let host = running();
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    // The guest cannot be resumed, neither by the undo nor by the recovery after it.
    host.vmm.fail_next(Call::Resume, Fault::Refuse);
    host.vmm.fail_next(Call::Resume, Fault::Refuse);
    let error = host.sleep("a").unwrap_err();
    assert!(matches!(error, Error::Undo { .. }), "{error}");
    assert_eq!(host.state("a"), State::Snapshotting);
    assert!(!host.guest_runs("a"));
    host.wake("a").unwrap();
    host.check("a");
}

#[test]
fn a_sleep_of_what_is_stopped_is_refused_and_error_says_so() {
    let host = Host::new();
    host.create("a");
    assert!(matches!(host.sleep("a"), Err(Error::Refused(_))));
    assert_eq!(host.error("a"), "a sandbox that is stopped cannot be put to sleep");
    assert_eq!(host.state("a"), State::Stopped);
}

#[test]
fn a_sandbox_without_a_kernel_says_how_to_give_it_one() {
    let host = Host::new();
    host.create("a");
    let spec = Spec { kernel: None, ..Spec::clone(&host.entry("a").record().spec) };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    assert!(matches!(host.wake("a"), Err(Error::NoKernel { .. })));
    assert!(host.error("a").contains("set `kernel`"), "{}", host.error("a"));
}

#[test]
fn a_damaged_memory_is_refused_before_the_guest_runs_and_kept() {
    let host = asleep();
    let record = host.entry("a").record();
    let memory =
        host.daemon.store.home(&record).snapshot_dir(record.snapshot().unwrap().generation);
    let memory = memory.join(MEMORY);
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 1 << 20).unwrap();
    let resumes = host.vmm.count(Call::Resume);
    host.wake("a").unwrap_err();
    assert_eq!(host.state("a"), State::Snapshotted);
    assert_eq!(host.vmm.count(Call::Resume), resumes);
    assert!(host.error("a").contains("is damaged"), "{}", host.error("a"));
    assert!(memory.exists());
    host.destroy("a").unwrap();
}

#[test]
fn a_snapshot_of_another_version_of_the_vmm_is_refused() {
    let host = asleep();
    host.vmm.upgrade("2.0");
    assert!(matches!(host.wake("a"), Err(Error::Foreign { .. })));
    assert!(
        host.error("a").contains("version `1.0` and this host has `2.0`"),
        "{}",
        host.error("a")
    );
    assert_eq!(host.state("a"), State::Snapshotted);
    host.vmm.upgrade("1.0");
    host.check("a");
}

#[test]
fn a_guest_of_before_an_upgrade_is_not_put_to_sleep_as_nothing_could_wake_it() {
    let mut host = running();
    host.vmm.upgrade("2.0");
    host.restart();
    let error = host.sleep("a").unwrap_err();
    assert!(matches!(error, Error::Unwakeable { .. }), "{error}");
    let says = "with version `1.0`, and the installed one has `2.0`; reinstall the former";
    assert!(host.error("a").contains(says), "{}", host.error("a"));
    assert_eq!((host.state("a"), host.vmm.count(Call::Pause)), (State::Running, 0));
    assert!(host.guest_runs("a"));
    host.vmm.upgrade("1.0");
    host.sleep("a").unwrap();
    assert_eq!(host.daemon.why_unwakeable(host.entry("a").row()), None);
    host.check("a");
}

#[test]
fn a_snapshot_knows_whether_its_machine_has_a_balloon() {
    let host = Host::new();
    host.create("a");
    let machine = || {
        let record = host.entry("a").record();
        let home = host.daemon.store.home(&record);
        let snapshot = home.open(&record.id, record.snapshot().unwrap().generation).unwrap();
        snapshot.manifest().vmm.machine.clone()
    };
    for (balloon, says) in [(true, "none"), (false, "none, no balloon")] {
        let spec = Spec { balloon, ..Spec::clone(&host.entry("a").record().spec) };
        host.set("a", Policy::Spec(Box::new(spec))).unwrap();
        host.wake("a").unwrap();
        host.sleep("a").unwrap();
        assert_eq!(machine(), says);
        host.wake("a").unwrap();
        stops(&host, "a");
    }
}

#[test]
fn a_snapshot_of_a_machine_with_other_devices_is_refused() {
    let host = asleep();
    let entry = host.entry("a");
    let held = host.daemon.lock(&entry, Wait::ForIt, Cause::Idle).unwrap();
    let spec = Spec { balloon: false, ..Spec::clone(&entry.record().spec) };
    host.daemon.records.amend(&held, &entry, |record| record.spec = spec.into()).unwrap();
    drop(held);
    assert!(matches!(host.wake("a"), Err(Error::Foreign { .. })));
    let says = "machine `none` and this host has `none, no balloon`";
    assert!(host.error("a").contains(says), "{}", host.error("a"));
}

/// Has the guest of a sandbox end.
fn stops(host: &Host, id: &str) {
    host.daemon.machines.get(host.entry(id).row()).unwrap().process.kill();
    wait_for("the end", || host.state(id) == State::Stopped);
}

#[test]
fn an_intent_that_cannot_reach_the_disk_stops_the_sleep_and_the_guest_runs_on() {
    let mut host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.fail_syncs();
    let error = crate::lifecycle::chain(&host.sleep("a").unwrap_err());
    assert!(error.contains("syncing the index"), "{error}");
    assert!(host.guest_runs("a"));
    host.restart();
    assert_eq!(host.state("a"), State::Running);
    host.check("a");
}

#[test]
fn an_intent_that_cannot_reach_the_disk_stops_the_wake_before_its_snapshot_is_used() {
    let mut host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let runs = host.runs("a");
    host.fail_syncs();
    let error = crate::lifecycle::chain(&host.wake("a").unwrap_err());
    assert!(error.contains("syncing the index"), "{error}");
    assert_eq!(host.runs("a"), runs);
    host.restart();
    assert_eq!(host.state("a"), State::Snapshotted);
    host.check("a");
}

#[test]
fn after_a_failed_save_disks_are_written_anew_as_a_sync_may_have_lost_some_of_them() {
    let (host, images) = (Host::new(), tempfile::tempdir().unwrap());
    let image = images.path().join("image");
    std::fs::write(&image, sector("work")).unwrap();
    std::fs::set_permissions(images.path(), Permissions::from_mode(0o755)).unwrap();
    host.create("a");
    let spec = Spec {
        disks: vec![Disk { path: image, readonly: false }],
        ..Spec::clone(&host.entry("a").record().spec)
    };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    let path = host.daemon.store.home(&host.entry("a").record()).disk(0);
    let disk = File::options().read(true).write(true).open(&path).unwrap();
    let before = SystemTime::UNIX_EPOCH;
    let is_written_by = |verb: fn(&Host) -> bool| {
        disk.set_modified(before).unwrap();
        assert!(verb(&host));
        disk.metadata().unwrap().modified().unwrap() != before
    };
    assert!(!is_written_by(|host| host.sleep("a").is_ok()));
    host.wake("a").unwrap();
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    assert!(!is_written_by(|host| host.sleep("a").is_err()));
    assert!(is_written_by(|host| host.sleep("a").is_ok()));
    assert_eq!(content(&path), "work");
    host.wake("a").unwrap();
    assert!(!is_written_by(|host| host.sleep("a").is_ok()));
}

#[test]
fn a_vmm_that_does_not_answer_holds_up_neither_the_start_nor_a_deletion() {
    let mut host = Host::new();
    for id in ["a", "b"] {
        host.create(id);
        host.wake(id).unwrap();
    }
    host.vmm.fail_next(Call::Adopt, Fault::Hang);
    host.start_on_index("index.db");
    let found = host.daemon.reconcile(Duration::from_millis(1));
    assert!(found.late > 0, "{found:?}");
    let is_adopted = |id: &str| host.daemon.machines.get(host.entry(id).row()).is_some();
    wait_for("one of them is taken over", || is_adopted("a") || is_adopted("b"));
    let stuck = if is_adopted("a") { "b" } else { "a" };
    // What is seen of it is what was recorded, and whoever deletes it does not wait.
    assert_eq!(host.state(stuck), State::Running);
    let entry = host.entry(stuck);
    let locked = host.daemon.lock(&entry, Wait::Never, Cause::Reconcile);
    assert!(matches!(locked, Err(Error::Locked { .. })), "it is being settled");
    host.destroy(stuck).unwrap();
    host.check(if stuck == "a" { "b" } else { "a" });
}
