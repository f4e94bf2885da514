//! Memory that a guest gives up before it is put to sleep.

use super::*;
use crate::vmm::fake::Guests;

const MIB: u64 = 1 << 20;
/// What a guest of 256 MiB is asked for.
const SPARE: u64 = (256 - 64 - 8) * MIB;

/// A sandbox that runs, and is asked for memory before it sleeps.
fn running() -> Host {
    let host = Host::new();
    host.create("a");
    let spec = Spec {
        inflate_before_sleep: true,
        memory_bytes: 256 * MIB,
        ..Spec::clone(&host.entry("a").record().spec)
    };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    host
}

/// Returns how much the balloon of the sandbox is to have.
fn balloon(host: &Host) -> u64 {
    host.vmm.balloon_of(host.entry("a").record().process().unwrap().pid).unwrap()
}

#[test]
fn the_balloon_grows_before_the_pause_and_is_let_go_after_the_resume() {
    let host = running();
    host.sleep("a").unwrap();
    assert_eq!(
        host.vmm.calls(),
        [
            Call::Boot,
            Call::Connect,
            Call::Resume,
            Call::Connect,
            Call::Balloon,
            Call::Pause,
            Call::Save
        ]
    );
    assert_eq!(host.vmm.balloons(), [SPARE]);
    host.wake("a").unwrap();
    let woken = [Call::Restore, Call::Connect, Call::Resume, Call::Balloon];
    assert_eq!(host.vmm.calls()[7..], woken);
    assert_eq!(balloon(&host), 0);
    host.check("a");
}

#[test]
fn nobody_is_asked_for_memory_who_was_not_to_be() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.check("a");
    assert_eq!(host.vmm.count(Call::Balloon), 0);
}

#[test]
fn a_guest_too_small_to_spare_anything_is_not_asked() {
    let host = running();
    host.daemon.machines.get(host.entry("a").row()).unwrap().process.kill();
    wait_for("the end", || host.state("a") == State::Stopped);
    let spec = Spec { memory_bytes: 64 * MIB, ..Spec::clone(&host.entry("a").record().spec) };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    assert_eq!(host.vmm.count(Call::Balloon), 0);
}

#[test]
fn a_guest_that_gives_nothing_goes_to_sleep_all_the_same() {
    for guests in [Guests::Deaf, Guests::Dawdle] {
        let host = running();
        host.vmm.have_guests(guests);
        assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
        assert_eq!(host.error("a"), "ok");
        host.wake("a").unwrap();
        assert_eq!(balloon(&host), 0, "{guests:?}");
    }
}

#[test]
fn a_vmm_that_does_not_resize_keeps_nobody_from_sleeping_or_waking() {
    for fault in [Fault::Refuse, Fault::NoSpace] {
        let host = running();
        host.vmm.fail_next(Call::Balloon, fault);
        assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
        host.vmm.fail_next(Call::Balloon, fault);
        assert_eq!(host.wake("a").unwrap(), Outcome::Done);
        assert_eq!(host.error("a"), "ok");
        host.check("a");
    }
}

#[test]
fn a_vmm_that_dies_of_it_is_a_lost_guest() {
    let host = running();
    host.vmm.fail_next(Call::Balloon, Fault::Die);
    host.sleep("a").unwrap_err();
    assert_eq!(host.state("a"), State::Stopped);
    assert!(host.error("a").contains("killed by signal 9"), "{}", host.error("a"));
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    host.vmm.fail_next(Call::Balloon, Fault::Die);
    host.wake("a").unwrap();
    wait_for("the end to be told", || host.state("a") == State::Stopped);
    assert!(host.error("a").contains("killed by signal 9"), "{}", host.error("a"));
}

#[test]
fn a_failed_sleep_gives_the_memory_back() {
    for call in [Call::Pause, Call::Save] {
        let host = running();
        host.vmm.fail_next(call, Fault::Refuse);
        host.sleep("a").unwrap_err();
        assert_eq!((host.state("a"), balloon(&host)), (State::Running, 0), "{call:?}");
        assert_eq!(host.vmm.calls().last(), Some(&Call::Balloon));
        host.check("a");
    }
}

#[test]
fn a_panic_on_the_way_gives_the_memory_back() {
    let host = running();
    host.vmm.fail_next(Call::Save, Fault::Panic);
    host.sleep("a").unwrap_err();
    assert_eq!((host.state("a"), balloon(&host)), (State::Running, 0));
    host.check("a");
}

#[test]
fn a_touch_while_the_guest_gives_memory_wins() {
    let host = running();
    host.clock.advance(Duration::from_secs(120));
    host.vmm.have_guests(Guests::Dawdle);
    for idle in [true, false] {
        let count = host.entry("a").activity_count();
        let why = if idle { Why::Idle } else { Why::AskedAt(count) };
        let before = host.vmm.count(Call::Balloon);
        std::thread::scope(|scope| {
            let sleep = scope.spawn(|| host.sleep_because("a", why));
            wait_for("the balloon", || host.vmm.count(Call::Balloon) > before);
            host.daemon.activity().saw(&host.entry("a"), Signal::Touch);
            let slept = sleep.join().unwrap();
            if idle {
                assert_eq!(slept.unwrap(), Outcome::Skipped);
            } else {
                assert!(matches!(slept, Err(Error::Active { .. })));
            }
        });
        assert_eq!((host.state("a"), balloon(&host)), (State::Running, 0), "{why:?}");
        assert_eq!(host.vmm.count(Call::Pause), 0);
    }
    host.vmm.have_guests(Guests::Give);
    host.check("a");
}

#[test]
fn deleting_does_not_wait_for_a_guest_that_gives_memory() {
    let host = running();
    host.vmm.have_guests(Guests::Dawdle);
    std::thread::scope(|scope| {
        let sleep = scope.spawn(|| host.sleep("a"));
        wait_for("the balloon", || host.vmm.count(Call::Balloon) == 1);
        assert!(host.destroy("a").unwrap());
        assert!(matches!(sleep.join().unwrap(), Err(Error::Gone { .. })));
    });
    host.check_nothing_left();
}

#[test]
fn a_later_daemon_gives_back_what_an_earlier_one_asked_for() {
    for point in [CrashPoint::SleepInflated, CrashPoint::SleepPaused, CrashPoint::SleepSaved] {
        let mut host = running();
        crash(&mut host, point, |host| {
            host.sleep("a").expect("it crashes, it does not fail");
        });
        assert_eq!(balloon(&host), SPARE);
        host.restart();
        assert_eq!((host.state("a"), balloon(&host)), (State::Running, 0), "{point:?}");
        host.check("a");
    }
    let mut host = running();
    host.sleep("a").unwrap();
    crash(&mut host, CrashPoint::WakeConsumed, |host| {
        host.wake("a").expect("it crashes, it does not fail");
    });
    host.restart();
    assert_eq!((host.state("a"), balloon(&host)), (State::Running, 0));
}
