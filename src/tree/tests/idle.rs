//! What `activity` and `idle` say, and what `config` says of them.

use super::*;
use crate::{
    activity::Holder,
    lifecycle::{Policy, Why},
    sandbox::{NetMode, Period, Signal, Spec},
};

/// Returns a value of a flat-keyed file.
fn value(tree: &Arc<Tree>, file: File, key: &str) -> String {
    let text = read(tree, "a", file);
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {key}: {text}")).to_owned()
}

fn idle(tree: &Arc<Tree>, key: &str) -> String {
    value(tree, File::Idle, key)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn awake() -> (Host, Arc<Tree>) {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    let tree = tree(&host);
    (host, tree)
}

#[test]
fn idle_names_the_last_signal_that_counts_and_what_follows_from_it() {
    let (host, tree) = awake();
    assert_eq!(idle(&tree, "because"), "the last activity was its boot, 0 s ago; idle_after is 1m");
    for (signal, says) in [
        (Signal::Control, "a verb written to state"),
        (Signal::Console, "input on its console"),
        (Signal::Cpu, "guest CPU, above the threshold of 5%"),
        (Signal::Disk, "disk traffic, above the threshold of 65536 bytes/s"),
        (Signal::Touch, "a touch of activity"),
    ] {
        host.clock.advance(seconds(20));
        host.daemon.activity().saw(&host.entry("a"), signal);
        host.clock.advance(seconds(3));
        let because = format!("the last activity was {says}, 3 s ago; idle_after is 1m");
        assert_eq!(idle(&tree, "because"), because);
        assert_eq!(idle(&tree, "verdict"), "active");
    }
    host.clock.advance(seconds(57));
    assert_eq!(idle(&tree, "verdict"), "idle");
    host.set("a", Policy::IdleAfter(Period::Never)).unwrap();
    assert_eq!(idle(&tree, "verdict"), "exempt");
    assert_eq!(idle(&tree, "because"), "idle_after is never");
    host.sleep("a").unwrap();
    host.set("a", Policy::Pinned(true)).unwrap();
    let because = idle(&tree, "because");
    assert!(because.ends_with("; delete_after is never, and it is pinned"), "{because}");
}

#[test]
fn a_signal_that_does_not_count_is_shown_and_decides_nothing() {
    let (host, tree) = awake();
    host.clock.advance(seconds(20));
    write(&tree, "a", File::Config, "[activity]\nsignals = [\"console\"]").unwrap();
    let (count, due) = (value(&tree, File::Activity, "count"), idle(&tree, "sleeps_at"));
    for signal in [Signal::Control, Signal::Cpu, Signal::Disk] {
        host.daemon.activity().saw(&host.entry("a"), signal);
    }
    write(&tree, "a", File::Activity, "x").unwrap();
    assert_eq!(value(&tree, File::Activity, "count"), count);
    assert_eq!(value(&tree, File::Activity, "touch_age_seconds"), "0");
    assert_eq!(value(&tree, File::Activity, "signals"), "console");
    assert_eq!(idle(&tree, "sleeps_at"), due);
    assert!(idle(&tree, "because").starts_with("the last activity was its boot, 20 s ago"));
    host.daemon.activity().saw(&host.entry("a"), Signal::Console);
    assert_ne!(value(&tree, File::Activity, "count"), count);
    assert_ne!(idle(&tree, "sleeps_at"), due);
}

#[test]
fn what_counts_may_change_in_any_state_and_the_machine_may_not() {
    let (host, tree) = awake();
    let document = "[activity]\ncpu_percent = 50\ndisk_bytes_per_second = 7\n";
    assert_eq!(write(&tree, "a", File::Config, document), Ok(document.len()));
    assert!(read(&tree, "a", File::Config).ends_with(document));
    assert_eq!(value(&tree, File::Activity, "cpu_counts_from_percent"), "50");
    assert_eq!(value(&tree, File::Activity, "disk_counts_from_bytes_per_second"), "7");
    let both = "vcpus = 2\n[activity]\ncpu_percent = 60\n";
    assert_eq!(write(&tree, "a", File::Config, both), Err(Errno::Busy));
    assert_eq!(value(&tree, File::Activity, "cpu_counts_from_percent"), "50");
    host.sleep("a").unwrap();
    assert_eq!(write(&tree, "a", File::Config, "[activity]\ncpu_percent = 70\n"), Ok(28));
    assert_eq!(value(&tree, File::Activity, "cpu_counts_from_percent"), "70");
    assert_eq!(value(&tree, File::Activity, "disk_counts_from_bytes_per_second"), "65536");
    // Also while it is in the middle of something that does not end.
    host.wake("a").unwrap();
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    for _ in 0..2 {
        host.vmm.fail_next(Call::Resume, Fault::Refuse);
    }
    host.sleep("a").unwrap_err();
    assert_eq!(host.state("a"), State::Snapshotting);
    assert_eq!(write(&tree, "a", File::Config, "[activity]\ncpu_percent = 80\n"), Ok(28));
    assert_eq!(host.state("a"), State::Snapshotting);
    assert_eq!(value(&tree, File::Activity, "cpu_counts_from_percent"), "80");
}

#[test]
fn an_unknown_signal_is_refused_with_the_list() {
    let (_host, tree) = awake();
    let bad = "vcpus = 1\n[activity]\nsignals = [\"cpu\", \"ram\"]\n";
    assert_eq!(write(&tree, "a", File::Config, bad), Err(Errno::Inval));
    let error = read(&tree, "a", File::Error);
    let says = "line 3: `signals`: \"ram\" is not accepted; write a list with any of \"control\"";
    assert!(error.contains(says), "{error}");
}

#[test]
fn one_that_was_just_woken_says_how_long_it_stays_awake_and_why() {
    let (host, tree) = awake();
    host.set("a", Policy::IdleAfter(Period::After(seconds(1)))).unwrap();
    host.clock.advance(seconds(4));
    assert_eq!(idle(&tree, "verdict"), "just-woken");
    assert_eq!(idle(&tree, "because"), "woken 4 s ago, it stays awake for 10 s");
    assert_eq!(idle(&tree, "sleeps_at"), idle(&tree, "awake_until"));
    write(&tree, "a", File::Config, "[activity]\nawake_min = \"1m\"").unwrap();
    assert_eq!(idle(&tree, "because"), "woken 4 s ago, it stays awake for 60 s");
    write(&tree, "a", File::Config, "[activity]\nawake_min = \"off\"").unwrap();
    assert_eq!(idle(&tree, "awake_until"), "none");
    assert_eq!(idle(&tree, "verdict"), "idle");
    write(&tree, "a", File::Config, "[activity]\nawake_min = \"10s\"").unwrap();
    for _ in 0..3 {
        host.clock.advance(seconds(100));
        assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), crate::lifecycle::Outcome::Done);
        host.wake("a").unwrap();
    }
    // Nobody was the reaper: who asks for a sleep is never in vain.
    assert_eq!(idle(&tree, "because"), "woken 0 s ago, it stays awake for 10 s");
}

#[test]
fn who_woke_it_and_how_often_is_known_after_a_restart() {
    let (mut host, first) = awake();
    assert_eq!(idle(&first, "last_wake_cause"), "write by pid 7 (test) uid 1");
    assert_eq!(idle(&first, "wakes_today"), "0", "a boot is none");
    for _ in 0..2 {
        host.sleep("a").unwrap();
        host.wake("a").unwrap();
    }
    let said = read(&first, "a", File::Idle);
    drop(first);
    host.restart();
    let second = tree(&host);
    for key in ["sleeps_at", "deletes_at", "last_wake_cause", "wakes_today", "awake_until"] {
        assert!(said.contains(&format!("{key} {}\n", idle(&second, key))), "{key}: {said}");
    }
    assert_eq!(idle(&second, "wakes_today"), "2");
    host.clock.advance(seconds(86_400));
    assert_eq!(idle(&second, "wakes_today"), "0");
}

#[test]
fn one_that_an_earlier_daemon_held_says_how_long_it_is_spared() {
    let (mut host, _tree) = awake();
    let holder = Holder { pid: 7, uid: 1, command: "bash".into() };
    host.daemon.hold(&host.entry("a"), holder).unwrap();
    host.daemon.activity().record_hold(&host.entry("a"));
    host.restart();
    let tree = tree(&host);
    host.clock.advance(seconds(70));
    assert_eq!(idle(&tree, "verdict"), "held");
    let because = idle(&tree, "because");
    assert!(because.ends_with("its holders have 50 s more to open it again"), "{because}");
    host.clock.advance(seconds(50));
    assert_eq!(idle(&tree, "verdict"), "idle");
}

#[test]
fn idle_says_that_a_deletion_waits_for_the_clock_of_this_boot() {
    let (host, tree) = awake();
    host.set("a", Policy::DeleteAfter(Period::After(seconds(600)))).unwrap();
    host.sleep("a").unwrap();
    let day = seconds(86_400);
    let before = idle(&tree, "deletes_at");
    host.clock.boot(day);
    let because = idle(&tree, "because");
    assert!(because.contains("the host's clock has not been synchronised since"), "{because}");
    let deletes_at = idle(&tree, "deletes_at");
    assert!(because.ends_with(&deletes_at) && deletes_at != before, "{because} {deletes_at}");
    host.clock.synchronise(day);
    host.daemon.do_chores();
    let because = idle(&tree, "because");
    assert!(because.ends_with("; delete_after is 10m"), "{because}");
    assert_eq!(idle(&tree, "deletes_at"), before, "by the wall clock it is when it was");
}

#[test]
fn idle_says_which_signal_could_not_be_read_of_one_whose_time_is_over() {
    let (host, tree) = awake();
    host.sleep("a").unwrap();
    host.create("b");
    let entry = host.entry("b");
    let spec = Spec { net: NetMode::Isolated, ..Spec::clone(&entry.record().spec) };
    host.set("b", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("b").unwrap();
    host.network.set_unreadable(entry.id(), true);
    host.clock.advance(seconds(60));
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    let text = read(&tree, "b", File::Idle);
    let says = "verdict unknown\nbecause its network could not be read at the last check; the \
                last activity was its boot, 60 s ago\n";
    assert!(text.starts_with(says), "{text}");
    host.network.set_unreadable(entry.id(), false);
    host.clock.advance(seconds(1));
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    assert!(read(&tree, "b", File::Idle).starts_with("verdict idle\n"));
}

#[test]
fn one_that_nothing_could_wake_is_passed_over_and_says_so() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.vmm.upgrade("2.0");
    host.clock.advance(Duration::from_secs(60));
    let passed_over = host.sleep_because("a", Why::Idle).unwrap();
    assert_eq!(passed_over, crate::lifecycle::Outcome::Skipped);
    let idle = read(&tree(&host), "a", File::Idle);
    let says = "verdict exempt\nbecause nothing here could wake it: its guest runs on a fake with \
                version `1.0`";
    assert!(idle.starts_with(says), "{idle}");
    assert!(idle.contains("\nsleeps_at none\n"), "{idle}");
}
