//! A VMM that has the memory of its guests in its process: what is in the store is a copy,
//! which is the same whether or not the guest has run since.

use super::*;
use crate::lifecycle::MachineError;
use crate::snapshot::MEMORY as COPY;

fn asleep() -> Host {
    let host = Host::copying();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    host
}

/// Returns the names of the files of the run of a sandbox.
fn files_of_life(host: &Host) -> Vec<String> {
    let home = host.daemon.store.home(&host.entry("a").record());
    let run = home.live_dir(home.survey().unwrap().live.unwrap());
    let names = std::fs::read_dir(run).unwrap().map(|file| file.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

#[test]
fn a_sandbox_boots_sleeps_and_wakes_where_it_was() {
    let host = Host::copying();
    host.create("a");
    host.wake("a").unwrap();
    assert!(files_of_life(&host).is_empty());
    for cycle in 1..=5 {
        host.sleep("a").unwrap();
        assert_eq!((host.state("a"), host.runs("a")), (State::Snapshotted, cycle));
        host.wake("a").unwrap();
        assert_eq!((host.state("a"), host.runs("a")), (State::Running, cycle + 1));
        // The VMM has the memory, so the copy is given back to the disk.
        wait_for("the copy to be dropped", || files_of_life(&host).is_empty());
    }
    host.check("a");
    host.destroy("a").unwrap();
    host.check_nothing_left();
}

#[test]
fn a_wake_that_fails_while_the_guest_cannot_have_run_leaves_it_asleep() {
    for (call, fault) in [
        (Call::Restore, Fault::Refuse),
        (Call::Restore, Fault::Die),
        (Call::Resume, Fault::Refuse),
        (Call::Resume, Fault::NoSpace),
    ] {
        let host = asleep();
        host.vmm.fail_next(call, fault);
        host.wake("a").unwrap_err();
        assert_eq!(host.state("a"), State::Snapshotted, "{call:?} {fault:?}");
        host.check("a");
        assert_eq!(host.error("a"), "ok");
    }
}

#[test]
fn a_guest_that_may_have_run_is_never_woken_from_the_same_snapshot_again() {
    let host = asleep();
    host.vmm.fail_next(Call::Resume, Fault::Die);
    host.wake("a").unwrap_err();
    assert_eq!(host.state("a"), State::Stopped);
    let error = host.error("a");
    assert!(error.contains("the guest of a may have run"), "{error}");
    assert!(error.contains("resuming a: the VMM ended"), "{error}");
    let survey = host.daemon.store.home(&host.entry("a").record()).survey().unwrap();
    assert_eq!((survey.live, survey.committed), (None, None));
    host.check("a");
}

#[test]
fn a_failed_sleep_leaves_the_guest_running_and_no_copy() {
    for call in [Call::Pause, Call::Save] {
        let host = asleep();
        host.wake("a").unwrap();
        host.vmm.fail_next(call, Fault::Refuse);
        host.sleep("a").unwrap_err();
        assert_eq!(host.state("a"), State::Running, "{call:?}");
        wait_for("the copy to be dropped", || files_of_life(&host).is_empty());
        host.check("a");
    }
}

#[test]
fn a_damaged_copy_is_refused_before_the_guest_runs_and_kept() {
    let host = asleep();
    let record = host.entry("a").record();
    let home = host.daemon.store.home(&record);
    let copy = home.snapshot_dir(record.snapshot().unwrap().generation).join(COPY);
    let file = std::fs::File::options().write(true).open(&copy).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 1 << 20).unwrap();
    let resumes = host.vmm.count(Call::Resume);
    host.wake("a").unwrap_err();
    assert_eq!((host.state("a"), host.vmm.count(Call::Resume)), (State::Snapshotted, resumes));
    assert!(host.error("a").contains("is damaged"), "{}", host.error("a"));
    assert!(copy.exists());
}

/// Has the daemon crash at `point` on the way from `from`, the VMM too if `vmm_dies`, and
/// returns what the next daemon makes of it.
fn after_crash(point: CrashPoint, from: State, vmm_dies: bool) -> State {
    let mut host = asleep();
    if from == State::Running {
        host.wake("a").unwrap();
    }
    crash(&mut host, point, |host| {
        let done = if from == State::Running { host.sleep("a") } else { host.wake("a") };
        done.expect("it crashes, it does not fail");
    });
    if vmm_dies {
        // The first daemon must not see the end of its VMM, as it is gone itself.
        let live = host.daemon.machines.remove(host.entry("a").row()).unwrap();
        live.process.kill();
        live.process.wait(PATIENCE).unwrap();
    }
    host.restart();
    let state = host.state("a");
    host.check("a");
    state
}

#[test]
fn what_a_crash_cut_is_undone_before_its_commit_point_and_finished_after_it() {
    for (point, from, then) in [
        (CrashPoint::SleepIntended, State::Running, State::Running),
        (CrashPoint::SleepPaused, State::Running, State::Running),
        (CrashPoint::SleepStaged, State::Running, State::Running),
        (CrashPoint::SleepSaved, State::Running, State::Running),
        (CrashPoint::SleepCommitted, State::Running, State::Snapshotted),
        (CrashPoint::SleepKilled, State::Running, State::Snapshotted),
        (CrashPoint::WakeIntended, State::Snapshotted, State::Snapshotted),
        (CrashPoint::WakeRestored, State::Snapshotted, State::Snapshotted),
        (CrashPoint::WakeRecorded, State::Snapshotted, State::Snapshotted),
        (CrashPoint::WakeConsumed, State::Snapshotted, State::Running),
        (CrashPoint::WakeResumed, State::Snapshotted, State::Running),
    ] {
        assert_eq!(after_crash(point, from, false), then, "{point:?}");
    }
}

#[test]
fn a_guest_that_died_with_the_daemon_is_asleep_only_if_its_snapshot_is_not_consumed() {
    for (point, from, then) in [
        (CrashPoint::SleepSaved, State::Running, State::Stopped),
        (CrashPoint::SleepCommitted, State::Running, State::Snapshotted),
        (CrashPoint::WakeRecorded, State::Snapshotted, State::Snapshotted),
        // It had not run, but nobody is left who knows.
        (CrashPoint::WakeConsumed, State::Snapshotted, State::Stopped),
        (CrashPoint::WakeResumed, State::Snapshotted, State::Stopped),
    ] {
        assert_eq!(after_crash(point, from, true), then, "{point:?}");
    }
}

#[test]
fn a_sleeper_is_woken_by_the_vmm_that_made_its_snapshot_and_no_other() {
    let host = asleep();
    let record = host.entry("a").record();
    let home = host.daemon.store.home(&record);
    let generation = record.snapshot().unwrap().generation;
    let mut made = home.open(&record.id, generation).unwrap().manifest().vmm.clone();
    assert!(host.daemon.vmms.that_made(&record, &made.name, &made.version).is_ok());
    made.name = "cloud-hypervisor".to_owned();
    let error = host.daemon.vmms.that_made(&record, &made.name, &made.version).unwrap_err();
    assert!(matches!(error, MachineError::NoVmm { .. }));
    assert!(error.to_string().contains("made by cloud-hypervisor 1.0"), "{error}");
}
