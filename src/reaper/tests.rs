//! The reaper on a host with a fake VMM and a clock that we move.

use std::time::Duration;

use super::{
    workers::{RETRY_FIRST, RETRY_MAX, backoff},
    *,
};
use crate::{
    activity::{HoldError, Holder},
    lifecycle::{
        Error, Outcome, Policy, Wait, Why,
        testing::{Host, LINGER, wait_for},
    },
    net::{Activity, Count, fake::Fault as NetworkFault},
    sandbox::{Cause, NetMode, Period, Signal, Spec, State, Timestamp},
    sys::clock::{Clock, boots::SYNC_GRACE},
    vmm::fake::{Call, Fault},
};

/// How long the reaper may take to end, on a host that is busy.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);

/// Starts a reaper that only looks when it is notified, and takes each look for a tick.
fn reap(host: &Host) -> Reaper {
    let (tick, wait_max) = (Duration::from_millis(1), LONG);
    let pace = Pace { tick, wait_max, workers: 2, stuck_after: LONG };
    Reaper::at(pace, Arc::clone(&host.daemon)).unwrap()
}

/// Starts a reaper that only looks when it is notified, and for deadlines.
fn reap_between_ticks(host: &Host, stuck_after: Duration) -> Reaper {
    let pace = Pace { tick: LONG * 1000, wait_max: LONG, workers: 2, stuck_after };
    Reaper::at(pace, Arc::clone(&host.daemon)).unwrap()
}

/// Rings, and waits until the reaper has looked.
fn look(host: &Host) {
    let before = host.daemon.records().metrics().last_tick();
    host.clock.advance(Duration::from_millis(1));
    host.daemon.records().reaper_wakeup().notify();
    wait_for("a look", || host.daemon.records().metrics().last_tick() > before);
}

fn awake(id: &str) -> Host {
    let host = Host::new();
    host.create(id);
    host.wake(id).unwrap();
    host
}

#[test]
fn an_idle_one_is_put_to_sleep_and_an_active_one_is_not() {
    let host = awake("a");
    host.create("b");
    host.wake("b").unwrap();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(59));
    look(&host);
    assert_eq!(host.state("a"), State::Running);
    host.daemon.activity().saw(&host.entry("b"), Signal::Touch);
    host.clock.advance(Duration::from_secs(1));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    assert_eq!(host.state("b"), State::Running);
    reaper.stop(END_LIMIT);
}

#[test]
fn never_means_never() {
    let host = awake("a");
    host.set("a", Policy::IdleAfter(Period::Never)).unwrap();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(86_400 * 365));
    look(&host);
    reaper.stop(END_LIMIT);
    assert_eq!(host.state("a"), State::Running);
}

#[test]
fn a_stale_one_is_deleted_unless_it_is_pinned() {
    let host = awake("a");
    host.create("b");
    host.wake("b").unwrap();
    for id in ["a", "b"] {
        host.set(id, Policy::DeleteAfter(Period::After(Duration::from_secs(600)))).unwrap();
        host.sleep(id).unwrap();
    }
    host.set("b", Policy::Pinned(true)).unwrap();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(599));
    look(&host);
    assert_eq!(host.state("a"), State::Snapshotted);
    host.clock.advance(Duration::from_secs(1));
    look(&host);
    wait_for("a to go", || host.daemon.by_id(&"a".parse().unwrap()).is_none());
    reaper.stop(END_LIMIT);
    assert_eq!(host.state("b"), State::Snapshotted);
}

#[test]
fn what_a_deaf_vmm_left_in_the_middle_is_settled_once_it_hears_again() {
    let host = awake("a");
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    // Neither the undo nor the recovery after it can resume the guest, nor the first look.
    for _ in 0..3 {
        host.vmm.fail_next(Call::Resume, Fault::Refuse);
    }
    host.sleep("a").unwrap_err();
    let why = host.error("a");
    assert_eq!(host.state("a"), State::Snapshotting);
    let reaper = reap(&host);
    wait_for("the first try", || host.entry("a").record().retry_at.is_some());
    look(&host);
    assert_eq!(host.state("a"), State::Snapshotting);
    host.clock.advance(RETRY_FIRST);
    look(&host);
    wait_for("a to run", || host.state("a") == State::Running);
    assert!(host.guest_runs("a"));
    assert!(why.contains("as planned"), "{why}");
    assert_eq!(host.error("a"), why);
    reaper.stop(END_LIMIT);
}

#[test]
fn one_that_fails_is_left_alone_for_a_while_and_does_not_starve_the_others() {
    let host = awake("a");
    host.create("b");
    host.vmm.fail_next(Call::Pause, Fault::Refuse);
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("the failure", || host.entry("a").record().retry_at.is_some());
    assert!(host.error("a").contains("pausing a"), "{}", host.error("a"));
    host.wake("b").unwrap();
    host.clock.advance(Duration::from_secs(29));
    look(&host);
    assert_eq!(host.vmm.count(Call::Pause), 1);
    host.clock.advance(Duration::from_secs(31));
    look(&host);
    for id in ["a", "b"] {
        wait_for(id, || host.state(id) == State::Snapshotted);
    }
    reaper.stop(END_LIMIT);
    assert_eq!(host.error("a"), "ok");
    assert_eq!(host.entry("a").record().retry_at, None);
}

#[test]
fn one_that_hangs_does_not_hold_up_the_others() {
    let host = awake("a");
    host.create("b");
    host.vmm.fail_next(Call::Save, Fault::Hang);
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("the hang", || host.vmm.count(Call::Save) == 1);
    host.wake("b").unwrap();
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("b to sleep", || host.state("b") == State::Snapshotted);
    assert_eq!(host.state("a"), State::Snapshotting);
    assert!(host.destroy("a").unwrap());
    reaper.stop(END_LIMIT);
}

#[test]
fn one_that_is_locked_is_passed_over_until_the_next_look() {
    let host = awake("a");
    let reaper = reap(&host);
    let held = host.daemon.lock(&host.entry("a"), Wait::ForIt, Cause::Reconcile).unwrap();
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    look(&host);
    assert_eq!(host.state("a"), State::Running);
    drop(held);
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
}

#[test]
fn a_panic_in_one_act_ends_neither_the_worker_nor_the_sandbox() {
    let host = awake("a");
    host.create("b");
    for _ in 0..3 {
        host.vmm.fail_next(Call::Pause, Fault::Panic);
    }
    let reaper = reap(&host);
    for round in 1..=3 {
        host.clock.advance(Duration::from_secs(3600));
        look(&host);
        wait_for("a panic", || host.vmm.count(Call::Pause) == round);
        wait_for("its end", || host.daemon.locks_in_use() == 0);
        look(&host);
    }
    assert_eq!(host.state("a"), State::Running);
    host.wake("b").unwrap();
    host.clock.advance(Duration::from_secs(7200));
    look(&host);
    for id in ["a", "b"] {
        wait_for(id, || host.state(id) == State::Snapshotted);
    }
    reaper.stop(END_LIMIT);
}

#[test]
fn each_failure_doubles_the_wait_up_to_a_limit() {
    assert_eq!(backoff(1), Duration::from_secs(30));
    assert_eq!(backoff(2), Duration::from_secs(60));
    assert_eq!(backoff(7), Duration::from_secs(1920));
    assert_eq!(backoff(8), RETRY_MAX);
    assert_eq!(backoff(u32::MAX), RETRY_MAX);
}

fn holder() -> Holder {
    Holder { pid: 7, uid: 1, command: "bash".into() }
}

#[test]
fn one_that_is_held_is_not_put_to_sleep_and_idles_from_the_end_of_its_hold() {
    let mut host = awake("a");
    let hold = host.daemon.hold(&host.entry("a"), holder()).unwrap();
    host.daemon.activity().record_hold(&host.entry("a"));
    let reaper = reap(&host);
    for _ in 0..3 {
        host.clock.advance(Duration::from_secs(3600));
        look(&host);
    }
    // Also where the reaper had found it before it was held.
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Skipped);
    assert!(matches!(
        host.sleep_because("a", Why::Asked),
        Err(Error::Hold(HoldError::Held { .. }))
    ));
    host.daemon.activity().release(hold);
    host.clock.advance(Duration::from_secs(59));
    look(&host);
    assert_eq!(host.state("a"), State::Running);
    host.clock.advance(Duration::from_secs(1));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
    host.restart();
    host.wake("a").unwrap();
    host.clock.advance(Duration::from_secs(60));
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Done, "it was not held");
}

#[test]
fn what_an_earlier_daemon_held_is_left_alone_for_a_while() {
    let mut host = awake("a");
    host.set("a", Policy::IdleAfter(Period::After(Duration::from_secs(1)))).unwrap();
    host.daemon.hold(&host.entry("a"), holder()).unwrap();
    host.daemon.activity().record_hold(&host.entry("a"));
    host.restart();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(119));
    look(&host);
    assert_eq!(host.state("a"), State::Running);
    // It is nobody's by now, so whoever asks for it may have it asleep.
    host.clock.advance(Duration::from_secs(2));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
}

/// Moves the clock until the reaper puts `a` to sleep; returns for how many seconds it was awake.
fn awake_for(host: &Host) -> u64 {
    let entry = host.entry("a");
    let since = entry.record().since;
    let due = entry.record().sleep_at(entry.last_activity()).unwrap();
    host.clock.set(Timestamp::from_millis(due.as_millis() - 10));
    look(host);
    assert_eq!(host.state("a"), State::Running);
    host.clock.set(due);
    look(host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    due.since(since).as_secs()
}

#[test]
fn one_that_was_just_woken_stays_awake_for_the_minimum_unless_it_is_asked_to_sleep() {
    let host = awake("a");
    host.set("a", Policy::IdleAfter(Period::After(Duration::from_secs(1)))).unwrap();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(9));
    look(&host);
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Skipped);
    assert_eq!(host.state("a"), State::Running);
    host.clock.advance(Duration::from_secs(1));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
    host.wake("a").unwrap();
    assert_eq!(host.sleep("a").unwrap(), Outcome::Done);
}

#[test]
fn one_that_is_woken_again_and_again_stays_awake_for_longer_also_over_a_restart() {
    let mut host = awake("a");
    host.set("a", Policy::IdleAfter(Period::After(Duration::from_secs(1)))).unwrap();
    for minimum in [10, 10, 20, 40] {
        let reaper = reap(&host);
        assert_eq!(awake_for(&host), minimum);
        reaper.stop(END_LIMIT);
        host.restart();
        host.clock.advance(Duration::from_secs(5));
        host.wake("a").unwrap();
    }
    let reaper = reap(&host);
    assert_eq!(awake_for(&host), 80);
    host.clock.advance(Duration::from_secs(3600));
    host.wake("a").unwrap();
    assert_eq!(awake_for(&host), 10);
    reaper.stop(END_LIMIT);
}

#[test]
fn a_step_of_the_wall_clock_neither_puts_to_sleep_nor_deletes() {
    const DAY_MILLIS: i64 = 86_400_000;
    let mut host = awake("a");
    for id in ["b", "c"] {
        host.create(id);
        host.wake(id).unwrap();
    }
    host.set("b", Policy::DeleteAfter(Period::After(Duration::from_secs(600)))).unwrap();
    host.sleep("b").unwrap();
    host.set("c", Policy::IdleAfter(Period::After(Duration::from_secs(1)))).unwrap();
    for step in [DAY_MILLIS, -2 * DAY_MILLIS, DAY_MILLIS] {
        host.clock.step_wall(step);
        host.restart();
        let reaper = reap(&host);
        look(&host);
        reaper.stop(END_LIMIT);
        assert_eq!(host.state("a"), State::Running, "after a step of {step} ms");
        assert_eq!(host.state("b"), State::Snapshotted, "after a step of {step} ms");
        assert_eq!(host.state("c"), State::Running, "after a step of {step} ms");
        host.clock.advance(Duration::from_secs(2));
    }
    host.restart();
    let reaper = reap(&host);
    host.clock.advance(Duration::from_secs(4));
    look(&host);
    wait_for("c to sleep", || host.state("c") == State::Snapshotted);
    host.clock.advance(Duration::from_secs(50));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    host.clock.advance(Duration::from_secs(540));
    look(&host);
    wait_for("b to go", || host.daemon.by_id(&"b".parse().unwrap()).is_none());
    reaper.stop(END_LIMIT);
}

#[test]
fn a_boot_with_the_wall_clock_ahead_deletes_nothing_that_is_not_stale() {
    const DAY: Duration = Duration::from_secs(86_400);
    let mut host = awake("a");
    host.create("b");
    host.wake("b").unwrap();
    for id in ["a", "b"] {
        host.set(id, Policy::DeleteAfter(Period::After(2 * DAY))).unwrap();
    }
    host.sleep("a").unwrap();
    // It was off for a day, and its clock is ahead by thirty.
    host.clock.boot(31 * DAY);
    let until = host.clock.now().after(SYNC_GRACE);
    host.restart();
    host.wake("b").unwrap();
    host.sleep("b").unwrap();
    let is_there = |id: &str| host.daemon.by_id(&id.parse().unwrap()).is_some();
    let stale = |id: &str| host.daemon.stale_at(&host.entry(id).record()).unwrap();
    let reaper = reap(&host);
    look(&host);
    let waits = stale("a");
    assert!(waits.waits_for_clock && waits.at == until, "{waits:?}");
    assert!(!stale("b").waits_for_clock, "it has slept in this boot only");
    host.clock.set(Timestamp::from_millis(until.as_millis() - 10));
    look(&host);
    assert!(is_there("a") && is_there("b"));
    host.clock.synchronise(30 * DAY);
    look(&host);
    let due = stale("a");
    assert!(!due.waits_for_clock && due.at > host.clock.now(), "{due:?}");
    wait_for("it to be put off", || host.entry("a").record().delete_at() == Some(due.at));
    host.clock.set(Timestamp::from_millis(due.at.as_millis() - 10));
    look(&host);
    assert!(is_there("a"));
    host.clock.set(due.at);
    look(&host);
    wait_for("a to go", || !is_there("a"));
    assert!(is_there("b"));
    reaper.stop(END_LIMIT);
}

#[test]
fn a_host_that_is_never_synchronised_deletes_after_the_grace() {
    let mut host = awake("a");
    host.set("a", Policy::DeleteAfter(Period::After(Duration::from_secs(600)))).unwrap();
    host.sleep("a").unwrap();
    host.clock.boot(Duration::from_secs(86_400));
    host.restart();
    let reaper = reap(&host);
    host.clock.advance(SYNC_GRACE);
    look(&host);
    wait_for("a to go", || host.daemon.by_id(&"a".parse().unwrap()).is_none());
    reaper.stop(END_LIMIT);
}

#[test]
fn the_network_of_a_sleeper_goes_when_it_has_lingered() {
    let host = Host::new();
    let entry = host.create("a");
    let spec = Spec { net: NetMode::Internet, ..Spec::clone(&entry.record().spec) };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let reaper = reap(&host);
    host.clock.advance(LINGER - Duration::from_secs(1));
    look(&host);
    let is_there = || host.network.in_force(entry.id()).is_some();
    assert!(is_there());
    host.clock.advance(Duration::from_secs(1));
    look(&host);
    wait_for("the network to go", || !is_there());
    assert_eq!(host.state("a"), State::Snapshotted);
    reaper.stop(END_LIMIT);
}

#[test]
fn traffic_of_its_network_keeps_one_awake_unless_that_does_not_count() {
    let host = Host::new();
    for id in ["a", "b"] {
        let entry = host.create(id);
        let signals = if id == "a" { "" } else { "signals = [\"cpu\"]\n" };
        let document = format!("net = \"isolated\"\n[activity]\n{signals}");
        let spec = Spec::parse(&document, &entry.record().spec, &|_, _| None).unwrap();
        host.set(id, Policy::Spec(Box::new(spec))).unwrap();
        host.wake(id).unwrap();
    }
    let reaper = reap(&host);
    for round in 1..=12 {
        host.clock.advance(Duration::from_secs(10));
        for id in ["a", "b"] {
            let half = Count { packets: round, bytes: 510 * round };
            let activity = Activity { inward: half, outward: half };
            host.network.set_activity(&id.parse().unwrap(), activity);
        }
        look(&host);
    }
    wait_for("b to sleep", || host.state("b") == State::Snapshotted);
    assert_eq!(host.state("a"), State::Running);
    let rates = host.daemon.activity().busyness(host.entry("a").row());
    assert_eq!(rates.now.network_bytes_per_second, Some(101), "rounded down");
    reaper.stop(END_LIMIT);
}

#[test]
fn where_nobody_says_what_a_network_passed_the_other_signals_are_still_seen() {
    let host = Host::new();
    let entry = host.create("a");
    let spec = Spec { net: NetMode::Isolated, ..Spec::clone(&entry.record().spec) };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    host.network.set_fault(Some(NetworkFault::Activity));
    let reaper = reap(&host);
    let rates = || host.daemon.activity().busyness(entry.row()).now;
    for _ in 0..3 {
        host.clock.advance(Duration::from_secs(10));
        look(&host);
    }
    assert!(rates().cpu_percent.is_some());
    assert_eq!(rates().network_bytes_per_second, None);
    host.network.set_fault(None);
    for _ in 0..2 {
        host.clock.advance(Duration::from_secs(10));
        look(&host);
    }
    assert_eq!(rates().network_bytes_per_second, Some(0));
    reaper.stop(END_LIMIT);
}

/// Makes sandboxes with a network, and wakes them.
fn connected(ids: &[&str]) -> Host {
    let host = Host::new();
    for id in ids {
        let entry = host.create(id);
        let spec = Spec { net: NetMode::Isolated, ..Spec::clone(&entry.record().spec) };
        host.set(id, Policy::Spec(Box::new(spec))).unwrap();
        host.wake(id).unwrap();
    }
    host
}

#[test]
fn a_network_that_cannot_be_read_says_nothing_of_its_sandbox_and_even_less_of_others() {
    let host = connected(&["broken", "busy", "idle"]);
    let name = |id: &str| id.parse().unwrap();
    let reaper = reap(&host);
    look(&host);
    host.network.set_unreadable(&name("broken"), true);
    for round in 1..=12 {
        host.clock.advance(Duration::from_secs(10));
        let inward = Count { packets: round, bytes: 5000 * round };
        host.network.set_activity(&name("busy"), Activity { inward, ..Activity::default() });
        look(&host);
    }
    wait_for("idle to sleep", || host.state("idle") == State::Snapshotted);
    assert_eq!(host.state("busy"), State::Running);
    assert_eq!(host.state("broken"), State::Running);
    assert_eq!(host.error("broken"), "ok");
    let unknown = host.daemon.activity().busyness(host.entry("broken").row()).unknown;
    assert_eq!(unknown.to_string(), "network");
    // Nothing passed all the while.
    host.network.set_unreadable(&name("broken"), false);
    host.clock.advance(Duration::from_secs(10));
    look(&host);
    wait_for("broken to sleep", || host.state("broken") == State::Snapshotted);
    reaper.stop(END_LIMIT);
}

#[test]
fn a_packet_that_passes_while_its_guest_is_being_paused_calls_the_sleep_off() {
    let host = connected(&["a"]);
    let id = "a".parse().unwrap();
    let reaper = reap(&host);
    look(&host);
    // Too little to be above the threshold of 100 bytes/s, by the time that the guest is paused.
    host.network.pass_between_reads(&id, Count { packets: 1, bytes: 10 });
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("the sleep to be called off", || host.vmm.count(Call::Resume) == 2);
    wait_for("a to run", || host.state("a") == State::Running && host.guest_runs("a"));
    assert_eq!((host.error("a").as_str(), host.vmm.count(Call::Save)), ("ok", 0));
    assert!(host.daemon.activity().signals(host.entry("a").row()).last(Signal::Network).is_some());
    // It is idle for another minute first.
    host.network.pass_between_reads(&id, Count::default());
    host.clock.advance(Duration::from_secs(30));
    look(&host);
    assert_eq!(host.vmm.count(Call::Pause), 1);
    host.clock.advance(Duration::from_secs(30));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
}

#[test]
fn a_sleep_by_count_that_meets_a_packet_is_refused_as_the_count_moves() {
    let host = connected(&["a"]);
    let count = host.entry("a").activity_count();
    host.network.pass_between_reads(&"a".parse().unwrap(), Count { packets: 1, bytes: 40 });
    let error = host.sleep_because("a", Why::AskedAt(count)).unwrap_err();
    assert!(matches!(error, Error::Active { .. }), "{error}");
    assert!(host.guest_runs("a") && host.entry("a").activity_count() > count);
    // Whoever asks for it come what may gets it.
    assert_eq!(host.sleep_because("a", Why::Asked).unwrap(), Outcome::Done);
}

#[test]
fn what_passed_since_the_last_look_counts_when_its_sandbox_is_about_to_sleep() {
    let host = connected(&["a"]);
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    host.clock.advance(Duration::from_secs(60));
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    let inward = Count { packets: 1, bytes: 60 };
    host.network.set_activity(&"a".parse().unwrap(), Activity { inward, ..Activity::default() });
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Skipped);
    assert_eq!(host.vmm.count(Call::Pause), 0);
}

#[test]
fn a_deadline_between_ticks_is_kept_and_looks_at_nobody_else() {
    let host = awake("a");
    host.create("b");
    host.wake("b").unwrap();
    host.set("b", Policy::IdleAfter(Period::Never)).unwrap();
    let reaper = reap_between_ticks(&host, LONG);
    wait_for("the first tick", || host.daemon.records().metrics().last_tick().is_some());
    let seen = host.daemon.activity().last_sample(host.entry("b").row());
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    assert_eq!(host.daemon.activity().last_sample(host.entry("b").row()), seen);
    reaper.stop(END_LIMIT);
}

#[test]
fn activity_that_the_index_does_not_know_of_puts_a_deadline_off() {
    let host = awake("a");
    let reaper = reap_between_ticks(&host, LONG);
    wait_for("the first tick", || host.daemon.records().metrics().last_tick().is_some());
    host.clock.advance(Duration::from_secs(40));
    host.daemon.activity().saw(&host.entry("a"), Signal::Touch);
    host.clock.advance(Duration::from_secs(20));
    look(&host);
    assert_eq!(host.state("a"), State::Running);
    host.clock.advance(Duration::from_secs(40));
    look(&host);
    wait_for("a to sleep", || host.state("a") == State::Snapshotted);
    reaper.stop(END_LIMIT);
}

#[test]
fn vmms_that_do_not_answer_cost_only_their_own_places() {
    // As many hang as there are workers.
    let host = Host::new();
    for id in ["a", "b", "c"] {
        host.create(id);
        host.wake(id).unwrap();
        host.clock.advance(Duration::from_secs(1));
    }
    // Whoever is paused third must not overtake the other two.
    host.set("c", Policy::IdleAfter(Period::After(Duration::from_secs(600)))).unwrap();
    for _ in 0..2 {
        host.vmm.fail_next(Call::Pause, Fault::Hang);
    }
    let reaper = reap_between_ticks(&host, Duration::ZERO);
    host.clock.advance(Duration::from_secs(60));
    look(&host);
    wait_for("both to hang", || host.vmm.count(Call::Pause) == 2);
    host.clock.advance(Duration::from_secs(600));
    look(&host);
    wait_for("c to sleep", || host.state("c") == State::Snapshotted);
    for id in ["a", "b"] {
        assert_eq!(host.state(id), State::Snapshotting, "{id} hangs");
        host.destroy(id).unwrap();
    }
    reaper.stop(END_LIMIT);
}
