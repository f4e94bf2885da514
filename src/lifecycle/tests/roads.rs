//! The main roads, when nothing goes wrong.

use super::*;
use crate::lifecycle::{MachineError, page_cache::drop_page_cache};
use crate::sandbox::Cause;

#[test]
fn a_sandbox_boots_sleeps_and_wakes_where_it_was() {
    let host = Host::new();
    host.create("a");
    assert_eq!(host.state("a"), State::Stopped);
    assert_eq!(host.wake("a").unwrap(), Outcome::Done);
    assert_eq!((host.state("a"), host.runs("a")), (State::Running, 1));
    for cycle in 1..=5 {
        assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
        assert_eq!((host.state("a"), host.runs("a")), (State::Snapshotted, cycle));
        assert_eq!(host.wake("a").unwrap(), Outcome::Done);
        assert_eq!((host.state("a"), host.runs("a")), (State::Running, cycle + 1));
    }
    let record = host.entry("a").record();
    assert_eq!((record.sleeps, record.wakes, record.generation), (5, 5, 10));
    assert_eq!(host.error("a"), "ok");
    assert_eq!(host.vmm.count(Call::Boot), 1);
}

#[test]
fn what_is_as_wanted_is_done_already() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    assert_eq!(host.wake("a").unwrap(), Outcome::Already);
    host.sleep("a").unwrap();
    assert_eq!(host.sleep("a").unwrap(), Outcome::Already);
    assert_eq!(host.vmm.count(Call::Save), 1);
}

#[test]
fn ten_wakes_at_once_are_one_restore_and_ten_successes() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let wakes: Vec<_> = (0..10).map(|_| scope.spawn(|| host.wake("a").unwrap())).collect();
        wakes.into_iter().map(|wake| wake.join().unwrap()).collect()
    });
    let done = outcomes.iter().filter(|outcome| **outcome == Outcome::Done).count();
    assert_eq!((outcomes.len(), done), (10, 1));
    assert_eq!(host.vmm.count(Call::Restore), 1);
    // Whoever attends to the end of the first VMM has the lock for a moment, too.
    wait_for("the lock to be free", || host.daemon.locks_in_use() == 0);
}

#[test]
fn a_sandbox_is_deleted_from_every_state_and_never_woken_for_it() {
    let host = Host::new();
    for steps in 0..3 {
        host.create("a");
        if steps >= 1 {
            host.wake("a").unwrap();
        }
        if steps >= 2 {
            host.sleep("a").unwrap();
        }
        let resumes = host.vmm.count(Call::Resume);
        assert!(host.destroy("a").unwrap());
        assert_eq!(host.vmm.count(Call::Resume), resumes);
        assert!(host.daemon.by_id(&name("a")).is_none());
    }
    host.check_nothing_left();
}

#[test]
fn deleting_calls_off_what_is_under_way() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.vmm.fail_next(Call::Save, Fault::Hang);
    std::thread::scope(|scope| {
        let sleep = scope.spawn(|| host.sleep("a"));
        wait_for("the sleep", || host.vmm.count(Call::Save) == 1);
        let waiting = scope.spawn(|| {
            let entry = host.entry("a");
            let held = host.daemon.lock(&entry, Wait::ForIt, Cause::Write(actor())).unwrap();
            host.daemon.wake(&held, &entry)
        });
        wait_for("a waiter", || waiting.is_finished() || host.daemon.locks_in_use() == 1);
        assert!(host.destroy("a").unwrap());
        assert!(matches!(sleep.join().unwrap(), Err(Error::Gone { .. })));
        // It either waited and learned that the sandbox is gone, or came too late to see it.
        if let Ok(result) = waiting.join() {
            assert!(matches!(result, Err(Error::Gone { .. })));
        }
    });
    host.check_nothing_left();
}

#[test]
fn a_pinned_sandbox_is_not_deleted() {
    let host = Host::new();
    host.create("a");
    host.set("a", Policy::Pinned(true)).unwrap();
    assert!(matches!(host.destroy("a"), Err(Error::Pinned { .. })));
    host.set("a", Policy::Pinned(false)).unwrap();
    host.destroy("a").unwrap();
}

#[test]
fn files_of_a_sandbox_that_no_index_knows_are_kept_and_are_nobody_else_s() {
    let host = Host::new();
    let store = host.dir.path().join("store");
    let strange = store.join("sandboxes/1");
    std::fs::create_dir(&strange).unwrap();
    std::fs::write(strange.join("disk-0.img"), "work").unwrap();
    host.create("a");
    assert!(!strange.exists());
    assert_eq!(std::fs::read_to_string(store.join("lost/1.1/disk-0.img")).unwrap(), "work");
    host.wake("a").unwrap();
    host.check("a");
}

#[test]
fn a_disk_that_another_config_replaces_is_kept() {
    let host = Host::new();
    host.create("a");
    let image = |name: &str| {
        let path = host.dir.path().join(name);
        std::fs::write(&path, sector(name)).unwrap();
        path
    };
    let with = |path: std::path::PathBuf| {
        let disks = vec![Disk { path, readonly: false }];
        let spec = Spec { disks, ..Spec::clone(&host.entry("a").record().spec) };
        host.set("a", Policy::Spec(Box::new(spec)))
    };
    with(image("first")).unwrap();
    host.wake("a").unwrap();
    let record = host.entry("a").record();
    let own = host.daemon.store.home(&record).disk(0);
    assert_eq!(content(&own), "first");
    let live = host.daemon.machines.get(record.row).unwrap();
    live.process.kill();
    wait_for("the end to be seen", || host.state("a") == State::Stopped);
    with(image("second")).unwrap();
    host.wake("a").unwrap();
    assert_eq!(content(&own), "second");
    let kept = host.daemon.store.home(&record).kept_disk(0, &host.dir.path().join("first"));
    assert_eq!(content(&kept), "first");
}

#[test]
fn only_so_many_sandboxes_are_made() {
    let host = Host::new();
    for id in ["a", "b", "c"] {
        host.create(id);
    }
    let create =
        |id| host.daemon.create(&name(id), Owner { uid: 0, gid: 0 }, Cause::Mkdir(actor()));
    assert!(matches!(create("d"), Err(Error::TooMany { limit: 3 })));
    assert!(matches!(create("a"), Err(Error::Exists { .. })));
    host.destroy("b").unwrap();
    create("d").unwrap();
}

#[test]
fn waking_stops_at_the_memory_budget_and_sleeping_gives_back() {
    let host = Host::with_budget(Some(20 << 20));
    host.create("a");
    host.create("b");
    host.wake("a").unwrap();
    assert!(matches!(
        host.wake("b"),
        Err(Error::Machine(MachineError::NoMemory { left_mib: 4, .. }))
    ));
    assert_eq!(host.state("b"), State::Stopped);
    assert!(host.error("b").contains("the budget ([limits] memory)"), "{}", host.error("b"));
    host.sleep("a").unwrap();
    host.wake("b").unwrap();
    assert_eq!(host.error("b"), "ok");
    assert!(matches!(host.wake("a"), Err(Error::Machine(MachineError::NoMemory { .. }))));
    assert_eq!(host.state("a"), State::Snapshotted);
}

#[test]
fn the_reaper_s_reason_is_looked_at_again_under_the_lock() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.clock.advance(Duration::from_secs(59));
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Skipped);
    host.clock.advance(Duration::from_secs(1));
    host.daemon.activity().saw(&host.entry("a"), Signal::Touch);
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Skipped);
    host.clock.advance(Duration::from_secs(60));
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Done);
    // It sleeps already, which is no reason to do anything.
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Already);
}

#[test]
fn a_sleep_with_a_count_is_refused_after_activity() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    let count = host.entry("a").activity_count();
    host.daemon.activity().saw(&host.entry("a"), Signal::Touch);
    assert!(matches!(host.sleep_because("a", Why::AskedAt(count)), Err(Error::Active { .. })));
    let count = host.entry("a").activity_count();
    assert_eq!(host.sleep_because("a", Why::AskedAt(count)).unwrap(), Outcome::Done);
}

#[test]
fn hardware_changes_only_while_stopped() {
    let host = Host::new();
    host.create("a");
    let spec = |vcpus| {
        let spec = Spec { vcpus, ..Spec::clone(&host.entry("a").record().spec) };
        Policy::Spec(Box::new(spec))
    };
    host.set("a", spec(2)).unwrap();
    host.wake("a").unwrap();
    assert!(matches!(host.set("a", spec(4)), Err(Error::NotStopped { .. })));
    host.sleep("a").unwrap();
    assert!(matches!(host.set("a", spec(4)), Err(Error::NotStopped { .. })));
    assert_eq!(host.entry("a").record().spec.vcpus, 2);
    // The same again is no change.
    host.set("a", spec(2)).unwrap();
}

#[test]
fn the_page_cache_of_a_sleeper_is_kept_for_a_while_and_then_given_back() {
    // On a disk: what is on a tmpfs is nothing but cache.
    let host = Host::on_disk();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let cached = || {
        let record = host.entry("a").record();
        host.daemon.store.home(&record).page_cache_bytes(record.snapshot().unwrap().generation)
    };
    host.clock.advance(Duration::from_secs(599));
    drop_page_cache(&host.daemon);
    let Some(before) = cached() else { return }; // This kernel does not tell.
    assert!(before > 0);
    host.clock.advance(Duration::from_secs(1));
    drop_page_cache(&host.daemon);
    assert_eq!(cached(), Some(0));
    host.check("a");
}

#[test]
fn a_guest_that_ends_is_stopped_with_the_reason() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    let live = host.daemon.machines.get(host.entry("a").row()).unwrap();
    live.process.kill();
    wait_for("the end to be seen", || host.state("a") == State::Stopped);
    assert_eq!(host.error("a"), "the VMM was killed by signal 9");
    host.check("a");
}

#[test]
fn a_closed_daemon_takes_no_more_operations() {
    let host = Host::new();
    host.create("a");
    assert_eq!(host.daemon.close(PATIENCE), 0);
    assert!(matches!(host.wake("a"), Err(Error::ShuttingDown)));
    let id = name("b");
    let created = host.daemon.create(&id, Owner { uid: 0, gid: 0 }, Cause::Mkdir(actor()));
    assert!(matches!(created, Err(Error::ShuttingDown)));
}
