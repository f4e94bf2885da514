//! What the sequences have found, each in the shortest that shows it.

use std::time::Duration;

use super::{
    op::{End, NAMES, Op, Setting, Trouble, Verb},
    run,
};
use crate::{
    lifecycle::CrashPoint,
    vmm::fake::{Call, Fault},
};

const HOLD: Op = Op::Hold { name: 0, nonblocking: false, trouble: Trouble::None };
const WAKE: Op = verb(Verb::Wake, Trouble::None);
const SLEEP: Op = verb(Verb::Sleep, Trouble::None);
const KILL: Op = Op::Restart { ordered: false, down: Duration::ZERO, dies: [false; NAMES.len()] };
const TICK: Op = Op::Tick(Trouble::None);

const fn verb(verb: Verb, trouble: Trouble) -> Op {
    Op::Verb { name: 0, verb, nonblocking: false, trouble }
}

const fn pass(seconds: u64) -> Op {
    Op::Pass(Duration::from_secs(seconds))
}

#[test]
fn idle_tells_of_the_time_for_which_the_reaper_spares_what_was_held() {
    run(&[Op::Mkdir(0), HOLD, KILL, pass(60), TICK, pass(60), TICK]);
}

#[test]
fn what_was_held_is_not_deleted_while_it_is_spared() {
    let stale = Op::Set(0, Setting::DeleteAfter(Some(1)));
    run(&[Op::Mkdir(0), HOLD, stale, KILL, SLEEP, pass(60), TICK, pass(60), TICK]);
}

#[test]
fn a_look_of_the_reaper_that_does_nothing_leaves_the_error_of_a_command() {
    run(&[Op::Mkdir(0), HOLD, KILL, pass(60), Op::Nonsense(0, 0), TICK]);
}

#[test]
fn a_wake_that_a_crash_cut_off_counts_as_activity() {
    for point in [CrashPoint::WakeConsumed, CrashPoint::WakeResumed] {
        let wake = verb(Verb::Wake, Trouble::Crash(point));
        run(&[Op::Mkdir(0), WAKE, TICK, pass(60), TICK, pass(60), wake, TICK]);
    }
}

#[test]
fn a_boot_that_a_crash_cut_off_counts_as_activity() {
    let boot = verb(Verb::Wake, Trouble::Crash(CrashPoint::BootResumed));
    run(&[Op::Mkdir(0), pass(60), boot, TICK]);
}

#[test]
fn a_wake_whose_driver_panicked_and_that_was_finished_counts_as_activity() {
    let wake = verb(Verb::Wake, Trouble::Faults(vec![(Call::Resume, Fault::Panic)]));
    run(&[Op::Mkdir(0), WAKE, SLEEP, pass(60), wake, TICK]);
}

#[test]
fn a_retry_that_was_put_off_is_not_remembered_beyond_a_sleep_or_wake_that_a_crash_cut_off() {
    let failing = Op::Tick(Trouble::Faults(vec![(Call::Save, Fault::Refuse)]));
    let cut_off = verb(Verb::Sleep, Trouble::Crash(CrashPoint::SleepCommitted));
    let stale = Op::Set(0, Setting::DeleteAfter(Some(1)));
    run(&[Op::Mkdir(0), WAKE, pass(60), failing, stale, cut_off, pass(1), TICK]);
}

#[test]
fn error_tells_of_the_end_of_a_guest_also_after_a_command_that_was_refused() {
    for end in [End::ShutDown, End::Crash] {
        run(&[Op::Mkdir(0), WAKE, Op::Nonsense(0, 0), Op::End(0, end)]);
    }
}

#[test]
fn the_count_of_a_sandbox_is_above_all_of_an_earlier_one_of_its_name() {
    let touch = Op::Touch { name: 0, write: true };
    run(&[Op::Mkdir(0), touch, Op::Rmdir(0, Trouble::None), Op::Mkdir(0)]);
}

#[test]
fn a_sleep_that_fails_does_not_end_the_time_for_which_a_woken_one_stays_awake() {
    let idle = Op::Set(0, Setting::IdleAfter(Some(1)));
    let failing = verb(Verb::Sleep, Trouble::Faults(vec![(Call::Save, Fault::Refuse)]));
    run(&[Op::Mkdir(0), idle, WAKE, failing, pass(9), TICK, pass(1), TICK]);
}
