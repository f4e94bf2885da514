//! The daemon ends between two steps, and the next one starts.

use super::*;

/// What becomes of a sandbox that is `from` when the daemon crashes at `point`.
fn after_crash(point: CrashPoint, from: State) -> State {
    let mut host = Host::new();
    host.create("a");
    if from != State::Stopped {
        host.wake("a").unwrap();
    }
    if from == State::Snapshotted {
        host.sleep("a").unwrap();
    }
    crash(&mut host, point, |host| {
        let done = if from == State::Running { host.sleep("a") } else { host.wake("a") };
        done.expect("it crashes, it does not fail");
    });
    host.restart();
    let state = host.state("a");
    host.check("a");
    state
}

#[test]
fn a_sleep_that_was_cut_before_its_commit_point_is_undone() {
    for point in [
        CrashPoint::SleepIntended,
        CrashPoint::SleepPaused,
        CrashPoint::SleepStaged,
        CrashPoint::SleepSaved,
    ] {
        assert_eq!(after_crash(point, State::Running), State::Running, "{point:?}");
    }
}

#[test]
fn a_sleep_that_was_cut_after_its_commit_point_is_finished() {
    for point in [CrashPoint::SleepCommitted, CrashPoint::SleepKilled] {
        assert_eq!(after_crash(point, State::Running), State::Snapshotted, "{point:?}");
    }
}

#[test]
fn a_wake_that_was_cut_before_its_commit_point_is_undone() {
    for point in [CrashPoint::WakeIntended, CrashPoint::WakeRestored, CrashPoint::WakeRecorded] {
        assert_eq!(after_crash(point, State::Snapshotted), State::Snapshotted, "{point:?}");
    }
}

#[test]
fn a_wake_that_was_cut_after_its_commit_point_is_finished() {
    for point in [CrashPoint::WakeConsumed, CrashPoint::WakeResumed] {
        assert_eq!(after_crash(point, State::Snapshotted), State::Running, "{point:?}");
    }
}

#[test]
fn a_boot_that_was_cut_is_finished_if_the_guest_runs_and_undone_otherwise() {
    for point in [CrashPoint::BootIntended, CrashPoint::BootSpawned, CrashPoint::BootRecorded] {
        assert_eq!(after_crash(point, State::Stopped), State::Stopped, "{point:?}");
    }
    assert_eq!(after_crash(CrashPoint::BootResumed, State::Stopped), State::Running);
}

#[test]
fn a_delete_that_was_cut_is_finished() {
    for point in [CrashPoint::DeleteIntended, CrashPoint::DeleteKilled, CrashPoint::DeleteTrashed] {
        for steps in 0..3 {
            let mut host = Host::new();
            host.create("a");
            if steps >= 1 {
                host.wake("a").unwrap();
            }
            if steps >= 2 {
                host.sleep("a").unwrap();
            }
            crash(&mut host, point, |host| {
                host.destroy("a").expect("it crashes, it does not fail");
            });
            host.restart();
            assert!(host.daemon.by_id(&name("a")).is_none(), "{point:?} {steps}");
            host.check_nothing_left();
        }
    }
}

#[test]
fn a_guest_that_died_with_the_daemon_is_stopped_or_asleep_as_its_files_prove() {
    for (point, from, then) in [
        (CrashPoint::SleepSaved, State::Running, State::Stopped),
        (CrashPoint::SleepCommitted, State::Running, State::Snapshotted),
        (CrashPoint::WakeRecorded, State::Snapshotted, State::Snapshotted),
        // It had not run: its memory is as it was.
        (CrashPoint::WakeConsumed, State::Snapshotted, State::Snapshotted),
        (CrashPoint::WakeResumed, State::Snapshotted, State::Stopped),
        (CrashPoint::BootResumed, State::Stopped, State::Stopped),
    ] {
        let mut host = Host::new();
        host.create("a");
        if from != State::Stopped {
            host.wake("a").unwrap();
        }
        if from == State::Snapshotted {
            host.sleep("a").unwrap();
        }
        crash(&mut host, point, |host| {
            let done = if from == State::Running { host.sleep("a") } else { host.wake("a") };
            done.expect("it crashes, it does not fail");
        });
        // The first daemon must not see the end of its VMM, as it is gone itself.
        let process = host.entry("a").record().process().cloned().expect("it has a VMM");
        let live = host.daemon.machines.remove(host.entry("a").row()).unwrap();
        assert_eq!(live.process.identity(), &process);
        live.process.kill();
        live.process.wait(PATIENCE).unwrap();
        host.restart();
        assert_eq!(host.state("a"), then, "{point:?}");
        if then == State::Stopped {
            assert!(host.error("a").contains("died"), "{}", host.error("a"));
        }
        host.check("a");
    }
}

#[test]
fn running_guests_are_adopted_and_sleepers_are_left_alone() {
    let mut host = Host::new();
    for id in ["a", "b", "c"] {
        host.create(id);
        host.wake(id).unwrap();
    }
    host.sleep("b").unwrap();
    let pid = host.entry("a").record().process().unwrap().pid;
    host.restart();
    assert_eq!(host.entry("a").record().process().unwrap().pid, pid);
    assert_eq!(host.vmm.count(Call::Adopt), 2);
    assert_eq!(host.vmm.count(Call::Restore), 0);
    for id in ["a", "b", "c"] {
        host.check(id);
    }
}

#[test]
fn a_guest_that_cannot_be_adopted_lives_on_and_is_adopted_by_the_next_operation() {
    let mut host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.vmm.fail_next(Call::Adopt, Fault::Refuse);
    host.daemon = start(host.dir.path(), &host.vmm, &host.network, &host.clock, None);
    assert_eq!(host.daemon.reconcile(PATIENCE).failed, 1);
    assert!(host.guest_runs("a"));
    assert!(host.error("a").contains("adopting a"), "{}", host.error("a"));
    host.sleep("a").unwrap();
    host.check("a");
}

/// Kills the VMM of a sandbox when there is no daemon that would see it.
fn kill_unseen(host: &Host, id: &str) {
    let live = host.daemon.machines.remove(host.entry(id).row()).unwrap();
    live.process.kill();
    live.process.wait(PATIENCE).unwrap();
}

#[test]
fn a_memory_that_cannot_be_read_at_a_start_is_kept_until_it_can_be() {
    let mut host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let runs = host.runs("a");
    crash(&mut host, CrashPoint::WakeConsumed, |host| drop(host.wake("a")));
    kill_unseen(&host, "a");
    let record = host.entry("a").record();
    let run = host.daemon.store.home(&record).live_dir(record.snapshot().unwrap().generation);
    // Opening a link to itself fails, as it does on a disk with an I/O error.
    let (manifest, kept) = (run.join("manifest"), host.dir.path().join("manifest"));
    crate::sys::files::rename(&manifest, &kept).unwrap();
    std::os::unix::fs::symlink("manifest", &manifest).unwrap();
    host.restart_after(false, |_| ());
    assert_eq!(host.state("a"), State::Restoring);
    let error = host.error("a");
    assert!(error.starts_with("taking back the snapshot of a: reading "), "{error}");
    host.wake("a").unwrap_err();
    std::fs::remove_file(&manifest).unwrap();
    crate::sys::files::rename(&kept, &manifest).unwrap();
    host.wake("a").unwrap();
    assert_eq!((host.state("a"), host.runs("a")), (State::Running, runs + 1));
    host.check("a");
}

#[test]
fn a_boot_whose_vmm_does_not_answer_at_a_start_is_not_taken_for_one_that_never_ran() {
    let mut host = Host::new();
    host.create("a");
    crash(&mut host, CrashPoint::BootResumed, |host| drop(host.wake("a")));
    let vmm = host.vmm.living();
    host.vmm.fail_next(Call::Adopt, Fault::Refuse);
    host.restart_after(false, |_| ());
    assert_eq!((host.state("a"), host.vmm.living()), (State::Booting, vmm.clone()));
    assert!(host.error("a").contains("adopting a"), "{}", host.error("a"));
    host.wake("a").unwrap();
    assert_eq!((host.state("a"), host.vmm.living()), (State::Running, vmm));
    assert_eq!((host.runs("a"), host.error("a").as_str()), (1, "ok"));
    host.check("a");
}

/// What becomes of a sandbox that is `from` when the host loses power at `point`, or when
/// the operation has just returned.
fn after_power_cut(point: Option<CrashPoint>, from: State, pages: Pages) -> State {
    let mut host = Host::new();
    host.create("a");
    if from != State::Stopped {
        host.wake("a").unwrap();
    }
    if from == State::Snapshotted {
        host.sleep("a").unwrap();
    }
    let act = |host: &Host| {
        let done = if from == State::Running { host.sleep("a") } else { host.wake("a") };
        assert_eq!(done.unwrap(), Outcome::Done);
    };
    match point {
        Some(point) => crash(&mut host, point, act),
        None => act(&host),
    }
    host.cut_power(pages);
    let state = host.state("a");
    host.check("a");
    state
}

#[test]
fn a_sleep_that_returned_outlasts_a_power_cut_and_one_before_its_commit_point_does_not() {
    for point in [
        CrashPoint::SleepIntended,
        CrashPoint::SleepPaused,
        CrashPoint::SleepStaged,
        CrashPoint::SleepSaved,
    ] {
        let state = after_power_cut(Some(point), State::Running, Pages::Kept);
        assert_eq!(state, State::Stopped, "{point:?}");
    }
    for point in [Some(CrashPoint::SleepCommitted), Some(CrashPoint::SleepKilled), None] {
        let state = after_power_cut(point, State::Running, Pages::Kept);
        assert_eq!(state, State::Snapshotted, "{point:?}");
    }
}

#[test]
fn a_snapshot_that_was_consumed_before_a_power_cut_is_never_woken_again() {
    for point in [CrashPoint::WakeIntended, CrashPoint::WakeRestored, CrashPoint::WakeRecorded] {
        let state = after_power_cut(Some(point), State::Snapshotted, Pages::Kept);
        assert_eq!(state, State::Snapshotted, "{point:?}");
    }
    for pages in [Pages::Kept, Pages::Lost] {
        for point in [Some(CrashPoint::WakeResumed), None] {
            let state = after_power_cut(point, State::Snapshotted, pages);
            assert_eq!(state, State::Stopped, "{point:?} {pages:?}");
        }
    }
    let state = after_power_cut(Some(CrashPoint::WakeConsumed), State::Snapshotted, Pages::Kept);
    assert_eq!(state, State::Stopped);
}

#[test]
fn a_boot_ends_with_the_power_whatever_it_had_come_to() {
    for point in [
        Some(CrashPoint::BootIntended),
        Some(CrashPoint::BootSpawned),
        Some(CrashPoint::BootRecorded),
        Some(CrashPoint::BootResumed),
        None,
    ] {
        let state = after_power_cut(point, State::Stopped, Pages::Kept);
        assert_eq!(state, State::Stopped, "{point:?}");
    }
}

#[test]
fn the_last_of_several_sleeps_is_what_a_power_cut_leaves() {
    let mut host = Host::new();
    host.create("a");
    for _ in 0..3 {
        host.wake("a").unwrap();
        host.sleep("a").unwrap();
    }
    let before = host.entry("a").record();
    host.cut_power(Pages::Kept);
    let after = host.entry("a").record();
    assert_eq!(after.state(), State::Snapshotted);
    assert_eq!(after.snapshot().unwrap().generation, before.snapshot().unwrap().generation);
    assert_eq!((after.sleeps, after.wakes), (before.sleeps, before.wakes));
    assert_eq!(after.generation, before.generation);
    assert_eq!(host.runs("a"), 3);
    host.cut_power(Pages::Kept);
    host.check("a");
}
