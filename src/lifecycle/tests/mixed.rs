//! Sandboxes of one VMM of which some have their memory in a file and some have not, as
//! their `config` says.

use super::*;

/// The other kind.
fn other(mode: MemoryMode) -> MemoryMode {
    match mode {
        MemoryMode::File => MemoryMode::Shared,
        MemoryMode::Shared | MemoryMode::Auto => MemoryMode::File,
    }
}

fn set_mode(host: &Host, id: &str, memory_mode: MemoryMode) -> Result<(), Error> {
    let spec = Spec { memory_mode, ..(*host.entry(id).record().spec).clone() };
    host.set(id, Policy::Spec(Box::new(spec)))
}

/// A host with a sandbox `a` that has its memory as `mode` says, asleep, and one `b` that has
/// it the other way, awake. What the VMM does if nobody says is what `a` does not do.
fn asleep(mode: MemoryMode) -> Host {
    let host = if mode == MemoryMode::File { Host::copying() } else { Host::new() };
    for (id, mode) in [("a", mode), ("b", other(mode))] {
        host.create(id);
        set_mode(&host, id, mode).unwrap();
        host.wake(id).unwrap();
    }
    host.sleep("a").unwrap();
    host
}

/// Says whether the run of a sandbox has a memory file.
fn has_memory_file(host: &Host, id: &str) -> bool {
    let home = host.daemon.store.home(&host.entry(id).record());
    home.live_memory(home.survey().unwrap().live.unwrap()).exists()
}

/// Has the daemon crash at `point` on the way of `a` from `from`, the VMM too if `vmm_dies`,
/// and returns what the next daemon makes of it.
fn after_crash(mode: MemoryMode, point: CrashPoint, from: State, vmm_dies: bool) -> State {
    let mut host = asleep(mode);
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
    if state == State::Running && mode == MemoryMode::File {
        assert!(has_memory_file(&host, "a"), "{point:?}");
    }
    host.check("a");
    host.check("b");
    state
}

#[test]
fn each_sleeps_and_wakes_as_its_own_config_says() {
    for mode in [MemoryMode::File, MemoryMode::Shared] {
        let host = asleep(mode);
        for cycle in 2..=5 {
            host.wake("a").unwrap();
            assert_eq!(host.runs("a"), cycle);
            wait_for("copies to be dropped", || {
                has_memory_file(&host, "a") == (mode == MemoryMode::File)
            });
            host.sleep("a").unwrap();
        }
        host.check("a");
        host.check("b");
        for id in ["a", "b"] {
            host.destroy(id).unwrap();
        }
        host.check_nothing_left();
    }
}

#[test]
fn what_a_crash_cut_is_settled_by_where_its_own_memory_is() {
    for mode in [MemoryMode::File, MemoryMode::Shared] {
        for (point, from, then) in [
            (CrashPoint::SleepPaused, State::Running, State::Running),
            (CrashPoint::SleepStaged, State::Running, State::Running),
            (CrashPoint::SleepSaved, State::Running, State::Running),
            (CrashPoint::SleepCommitted, State::Running, State::Snapshotted),
            (CrashPoint::SleepKilled, State::Running, State::Snapshotted),
            (CrashPoint::WakeRestored, State::Snapshotted, State::Snapshotted),
            (CrashPoint::WakeRecorded, State::Snapshotted, State::Snapshotted),
            (CrashPoint::WakeConsumed, State::Snapshotted, State::Running),
            (CrashPoint::WakeResumed, State::Snapshotted, State::Running),
        ] {
            assert_eq!(after_crash(mode, point, from, false), then, "{mode:?} {point:?}");
        }
    }
}

#[test]
fn a_guest_that_died_with_the_daemon_is_asleep_again_only_if_its_own_memory_proves_it() {
    for (point, from, in_file, in_process) in [
        (CrashPoint::SleepSaved, State::Running, State::Stopped, State::Stopped),
        (CrashPoint::SleepCommitted, State::Running, State::Snapshotted, State::Snapshotted),
        (CrashPoint::WakeRecorded, State::Snapshotted, State::Snapshotted, State::Snapshotted),
        // It had not run, which only a file that is mapped can tell.
        (CrashPoint::WakeConsumed, State::Snapshotted, State::Snapshotted, State::Stopped),
        (CrashPoint::WakeResumed, State::Snapshotted, State::Stopped, State::Stopped),
    ] {
        for (mode, then) in [(MemoryMode::File, in_file), (MemoryMode::Shared, in_process)] {
            assert_eq!(after_crash(mode, point, from, true), then, "{mode:?} {point:?}");
        }
    }
}

#[test]
fn a_failed_sleep_gives_memory_that_is_in_a_file_back() {
    for call in [Call::Pause, Call::Save] {
        for fault in [Fault::Refuse, Fault::NoSpace] {
            let host = asleep(MemoryMode::File);
            host.wake("a").unwrap();
            host.vmm.fail_next(call, fault);
            host.sleep("a").unwrap_err();
            assert_eq!(host.state("a"), State::Running, "{call:?} {fault:?}");
            assert!(has_memory_file(&host, "a"), "{call:?} {fault:?}");
            host.check("a");
        }
    }
}

#[test]
fn a_resume_that_died_before_the_guest_ran_is_taken_back_by_memory_that_is_in_a_file() {
    let host = asleep(MemoryMode::File);
    host.vmm.fail_next(Call::Resume, Fault::Die);
    host.wake("a").unwrap_err();
    assert_eq!(host.state("a"), State::Snapshotted);
    host.check("a");
}

#[test]
fn where_memory_is_changes_only_while_a_sandbox_is_stopped() {
    let host = asleep(MemoryMode::Shared);
    for state in [State::Snapshotted, State::Running] {
        let error = set_mode(&host, "a", MemoryMode::File).unwrap_err();
        assert!(matches!(error, Error::NotStopped { state: at, .. } if at == state), "{error}");
        if state == State::Snapshotted {
            host.wake("a").unwrap();
        }
    }
    let process = host.entry("a").record().process().cloned().unwrap();
    let live = host.daemon.machines.get(host.entry("a").row()).unwrap();
    assert_eq!(live.process.identity(), &process);
    live.process.kill();
    wait_for("the guest to be lost", || host.state("a") == State::Stopped);
    set_mode(&host, "a", MemoryMode::File).unwrap();
    host.wake("a").unwrap();
    assert!(has_memory_file(&host, "a"));
    host.check("a");
}

#[test]
fn a_machine_that_the_vmm_cannot_run_is_refused_before_anything_is_done() {
    let host = asleep(MemoryMode::File);
    host.create("c");
    host.vmm.object(Some("it takes a newer one"));
    let (boots, restores) = (host.vmm.count(Call::Boot), host.vmm.count(Call::Restore));
    for (id, state) in [("a", State::Snapshotted), ("c", State::Stopped)] {
        let error = host.wake(id).unwrap_err();
        assert_eq!(error.to_string(), format!("{id} cannot run here: it takes a newer one"));
        assert_eq!(host.state(id), state);
    }
    assert_eq!((host.vmm.count(Call::Boot), host.vmm.count(Call::Restore)), (boots, restores));
    // What runs already may sleep.
    host.sleep("b").unwrap();
    host.vmm.object(None);
    for id in ["a", "b"] {
        host.check(id);
    }
}
