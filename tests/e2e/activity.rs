//! What counts as activity, how long one stays awake after a wake, and what `idle` says of it.

use std::time::Duration;

use dozed::sys::clock::Stopwatch;

use crate::support::{Host, Setup, wait_until};

const TICK: &str = "[reaper]\ntick = \"1s\"";

fn today() -> String {
    jiff::Timestamp::now().to_string()[..10].to_owned()
}

#[test]
fn a_busy_guest_is_put_to_sleep_where_its_cpu_does_not_count() {
    let host = Setup::counter("busy").config(TICK).config("[activity]\ncpu_percent = 15").start();
    host.boot("web-1");
    host.prefer("web-1");
    wait_until("its CPU counts", || host.value("web-1/activity", "cpu_age_seconds") != "none");
    host.write("web-1/config", "[activity]\nsignals = [\"touch\"]\n").unwrap();
    assert_eq!(host.value("web-1/activity", "signals"), "touch");
    let percent = || host.value("web-1/activity", "cpu_percent");
    wait_until("it is seen to be busy", || percent().parse::<f64>().is_ok_and(|p| p > 15.0));
    host.bash_ok("touch web-1/activity");
    let because = host.value("web-1/idle", "because");
    assert!(because.starts_with("the last activity was a touch of activity, "), "{because}");
    host.write("web-1/idle_after", "4s").unwrap();
    wait_until("it sleeps", || host.state("web-1") == "snapshotted");
    assert_eq!(percent(), "none", "nothing of it runs");
}

#[test]
fn one_that_was_woken_stays_awake_for_a_minimum_and_sleeps_at_once_if_it_is_asked_to() {
    let minimum = Duration::from_secs(10);
    let host = Setup::counter("").config(TICK).start();
    host.mkdir("web-1").unwrap();
    let awake_min = |minimum: &str| {
        let document = format!("[activity]\nawake_min = \"{minimum}\"\n");
        host.write("web-1/config", document).unwrap();
    };
    // Longer than it takes any machine to look at what it says.
    awake_min("1h");
    host.wake("web-1");
    host.sleep("web-1");
    host.write("web-1/idle_after", "1s").unwrap();
    let since = Stopwatch::start();
    host.wake("web-1");
    assert_eq!(host.value("web-1/idle", "verdict"), "just-woken");
    let because = host.value("web-1/idle", "because");
    assert!(because.ends_with("s ago, it stays awake for 3600 s"), "{because}");
    let until = host.value("web-1/idle", "awake_until");
    assert_eq!(host.value("web-1/idle", "sleeps_at"), until);
    awake_min("10s");
    wait_until("it sleeps", || host.state("web-1") != "running");
    assert!(since.elapsed() >= minimum, "it was awake for {:?}", since.elapsed());
    wait_until("its sleep is done", || host.state("web-1") == "snapshotted");
    assert_eq!(host.value("web-1/idle", "awake_until"), "none");
}

/// Returns what `idle` says that no restart of the daemon changes.
fn lasting(host: &Host) -> Vec<String> {
    ["sleeps_at", "deletes_at", "last_wake_cause", "wakes_today", "awake_until"]
        .map(|key| host.value("web-1/idle", key))
        .to_vec()
}

/// Says whether two values are the same, or the same moment: each daemon reads the wall clock
/// by itself, and the two readings may fall on either side of a millisecond.
fn is_alike(one: &str, other: &str) -> bool {
    let moments = one.parse::<jiff::Timestamp>().ok().zip(other.parse::<jiff::Timestamp>().ok());
    moments.map_or(one == other, |(one, other)| {
        one.duration_since(other).abs() < jiff::SignedDuration::from_secs(1)
    })
}

#[test]
fn deadlines_and_wakes_are_after_a_crash_of_the_daemon_what_they_were() {
    let day = today();
    let mut host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    // The CPU that a boot took may count as activity between two looks.
    host.write("web-1/config", "[activity]\nawake_min = \"1h\"\nsignals = [\"touch\"]\n").unwrap();
    host.write("web-1/idle_after", "10m").unwrap();
    for _ in 0..2 {
        host.sleep("web-1");
        host.wake("web-1");
    }
    let before = lasting(&host);
    assert!(before[2].starts_with("write by pid "), "{before:?}");
    // The last sign of life reaches the index with the next look.
    let tick = || host.value("dozed.status", "reaper_last_tick");
    let first = tick();
    wait_until("the reaper looks", || tick() != first);
    host.kill_daemon();
    host.restart();
    let after = lasting(&host);
    if today() == day {
        assert_eq!(before[3], "2");
        let is_same = after.iter().zip(&before).all(|(after, before)| is_alike(after, before));
        assert!(is_same, "{after:?}, and it was {before:?}");
    }
    assert_eq!(host.state("web-1"), "running");
    host.sleep("web-1");
    assert_eq!(host.value("web-1/idle", "last_wake_cause"), before[2]);
}

#[test]
fn the_metrics_count_sleeps_and_wakes_of_real_guests() {
    let host = Setup::counter("").config("[limits]\nmemory = \"1GiB\"").start();
    host.boot("web-1");
    host.sleep("web-1");
    host.wake("web-1");
    let text = host.read("dozed.metrics");
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {text}")).parse::<f64>().unwrap()
    };
    for name in [
        "dozed_sleeps_total{cause=\"write\"}",
        "dozed_wakes_total{cause=\"write\"}",
        "dozed_sleep_duration_seconds_count",
        "dozed_wake_duration_seconds_count",
        "dozed_sandboxes{state=\"running\"}",
    ] {
        assert!((number(name) - 1.0).abs() < f64::EPSILON, "{name}: {text}");
    }
    assert!(number("dozed_wake_duration_seconds_sum") > 0.0);
    assert!(number("dozed_memory_budget_bytes") > number("dozed_memory_bytes"));
    assert!(!text.contains("web-1"), "no series names a sandbox");
}
