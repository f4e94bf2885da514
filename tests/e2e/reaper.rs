//! The reaper: who is put to sleep and who is deleted by itself, and who is not.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use dozed::{
    sandbox::Timestamp,
    sys::clock::{ClockBasis, Stopwatch, is_synchronised, pause_for},
};

use crate::support::{Host, Setup, wait_until};

const TICK: &str = "[reaper]\ntick = \"1s\"";

/// Boots a sandbox that the reaper is to leave alone until `idle_after` is set.
fn boot(host: &Host, id: &str, config: &str) {
    host.mkdir(id).unwrap();
    host.write(&format!("{id}/idle_after"), "never").unwrap();
    host.write(&format!("{id}/config"), config).unwrap();
    host.wake(id);
    host.counts_on(id);
}

#[test]
fn what_is_idle_is_put_to_sleep_and_what_is_busy_is_not() {
    let host = Setup::counter("").config(TICK).config("[activity]\ncpu_percent = 15").start();
    boot(&host, "idle", "");
    boot(&host, "busy", "cmdline = \"busy\"");
    boot(&host, "exempt", "");
    host.prefer("busy");
    for id in ["idle", "busy"] {
        host.write(&format!("{id}/idle_after"), "5s").unwrap();
    }
    wait_until("the idle one sleeps", || host.state("idle") == "snapshotted");
    assert_eq!(host.state("busy"), "running");
    assert_eq!(host.state("exempt"), "running");
    let because = host.value("busy/idle", "because");
    assert!(because.contains("guest CPU of "), "{because}");
    assert!(because.contains("idle_after is 5s"), "{because}");
    assert_eq!(host.value("busy/idle", "verdict"), "active");
    assert_eq!(host.value("exempt/idle", "verdict"), "exempt");
    assert_eq!(host.value("exempt/idle", "sleeps_at"), "never");
    assert_eq!(host.value("idle/idle", "verdict"), "snapshotted");
    assert_eq!(host.number("idle/status", "sleeps"), 1);
    host.write("idle/idle_after", "never").unwrap();
    host.wake("idle");
    assert_eq!(host.counts_on("idle").boots, 1);
    host.write("idle/idle_after", "5s").unwrap();
    wait_until("the idle one sleeps again", || host.state("idle") == "snapshotted");
    assert_eq!(host.number("busy/status", "sleeps"), 0);
}

/// Does something when it is dropped, also by a panic.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_touch_now_and_then_keeps_awake() {
    let host = Setup::counter("").config(TICK).start();
    for id in ["touched", "control"] {
        boot(&host, id, "");
    }
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Whatever else takes long, it is touched.
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                host.write("touched/activity", "x").unwrap();
                pause_for(Duration::from_millis(50));
            }
        });
        let over = OnDrop(|| is_over.store(true, Ordering::Relaxed));
        for id in ["touched", "control"] {
            host.write(&format!("{id}/idle_after"), "5s").unwrap();
        }
        for sleeps in 1..=2 {
            let slept = || host.number("control/status", "sleeps") == sleeps;
            wait_until("the one that is not touched sleeps", slept);
            wait_until("its sleep is done", || host.state("control") == "snapshotted");
            // Where that takes five seconds it sleeps again by then.
            host.write("control/state", "wake").unwrap();
        }
        assert_eq!(host.number("touched/status", "sleeps"), 0);
        assert!(host.value("touched/idle", "because").contains("a touch of activity"));
        drop(over);
    });
    wait_until("it sleeps when it is touched no more", || host.state("touched") == "snapshotted");
}

#[test]
fn what_has_slept_for_too_long_is_deleted_unless_it_is_pinned() {
    let host = Setup::counter("").config(TICK).start();
    for id in ["stale", "pinned", "kept", "awake"] {
        host.boot(id);
    }
    host.write("pinned/pinned", "1").unwrap();
    let home = host.home("stale");
    for id in ["kept", "pinned", "stale"] {
        host.sleep(id);
    }
    // When they sleep, so that none is gone before that was looked at.
    for id in ["awake", "pinned", "stale"] {
        host.write(&format!("{id}/delete_after"), "2s").unwrap();
    }
    assert_eq!(host.value("kept/idle", "deletes_at"), "never");
    wait_until("the stale one is deleted", || !host.list().contains(&"stale".to_owned()));
    assert!(host.try_read("stale/state").is_err());
    wait_until("its files are gone", || !home.exists());
    // The pinned one is older; two more ticks have passed it over.
    for _ in 0..2 {
        let tick = host.value("dozed.status", "reaper_last_tick");
        wait_until("the reaper looks", || host.value("dozed.status", "reaper_last_tick") != tick);
    }
    let mut left = host.list();
    left.sort_unstable();
    assert_eq!(left, ["awake", "kept", "pinned"]);
    host.write("pinned/pinned", "0").unwrap();
    wait_until("no longer pinned it is deleted", || host.list().len() == 2);
}

/// Touches just before `id` is due, and checks that it then is awake for as long as
/// `idle_after` says. False if the touch came too late.
fn touch_in_time(host: &Host, id: &str, early: Duration) -> bool {
    let idle_after = Duration::from_secs(1);
    let touch = || host.write(&format!("{id}/activity"), "x").unwrap();
    let since = Stopwatch::start();
    touch();
    wait_until("it is nearly due", || since.elapsed() + early >= idle_after);
    // From before the touch on, since a busy machine may return from it late.
    let since = Stopwatch::start();
    touch();
    // It is not looked at after a wake: a busy machine may have it asleep again by then.
    let wake = || host.write(&format!("{id}/state"), "wake").unwrap();
    if host.state(id) != "running" {
        wait_until("its sleep is done", || host.state(id) == "snapshotted");
        wake();
        return false;
    }
    wait_until("it goes to sleep", || host.state(id) == "snapshotted");
    let awake = since.elapsed();
    assert!(awake >= idle_after, "touched {early:?} early, asleep {awake:?} after the touch");
    wake();
    true
}

#[test]
fn a_touch_that_returned_before_the_sleep_began_wins() {
    let host = Setup::counter("").config(TICK).start();
    let ids = ["a", "b", "c", "d"];
    for id in ids {
        boot(&host, id, "");
        host.write(&format!("{id}/idle_after"), "1s").unwrap();
    }
    let won: usize = thread::scope(|scope| {
        let rounds = |id| {
            let host = &host;
            move || {
                let in_time = |early| touch_in_time(host, id, Duration::from_millis(early));
                let won = (0..8).filter(|round| in_time(4 * round)).count();
                // Where a busy machine delays all of those, earlier ones win.
                won + usize::from(won == 0 && (1..=8).any(|round| in_time(100 * round)))
            }
        };
        let threads = ids.map(|id| scope.spawn(rounds(id)));
        threads.map(|thread| thread.join().unwrap()).iter().sum()
    });
    println!("{won} touches came in time");
    assert!(won > 0);
}

/// Has an index believe that all in it happened so long before, in another boot.
fn age(index: &Path, by: Duration) {
    let millis = i64::try_from(by.as_millis()).unwrap();
    let open = rusqlite::Connection::open(index).unwrap();
    let earlier = "UPDATE sandbox SET since = since - ?1, created_at = created_at - ?1, \
         snapshotted_at = snapshotted_at - ?1, last_activity_at = last_activity_at - ?1, \
         delete_at = delete_at - ?1";
    assert_eq!(open.execute(earlier, [millis]).unwrap(), 1);
    let key = "clock";
    let text: String =
        open.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0)).unwrap();
    let mut basis = ClockBasis::from_text(&text).unwrap();
    basis.boot_id = "another".to_owned();
    basis.last_seen = Timestamp::from_millis(basis.last_seen.as_millis() - millis);
    let set = "UPDATE meta SET value = ?1 WHERE key = ?2";
    assert_eq!(open.execute(set, [&basis.to_text(), key]).unwrap(), 1);
}

#[test]
fn a_boot_with_the_wall_clock_ahead_deletes_nothing_before_the_clock_is_synchronised() {
    let mut host = Setup::counter("").config(TICK).start();
    host.boot("sleeper");
    host.write("sleeper/delete_after", "7d").unwrap();
    host.sleep("sleeper");
    host.terminate();
    age(&host.store().join("index.db"), Duration::from_secs(30 * 86_400));
    host.restart();
    // One that is deleted by its age shows that the reaper has looked, and that what slept
    // in this boot only need not wait.
    host.boot("stale");
    host.sleep("stale");
    host.write("stale/delete_after", "1s").unwrap();
    wait_until("the stale one is gone", || !host.list().contains(&"stale".to_owned()));
    if is_synchronised() {
        // Then it is as old as it seems.
        wait_until("the sleeper is gone", || host.list().is_empty());
        return;
    }
    assert_eq!(host.state("sleeper"), "snapshotted");
    let because = host.value("sleeper/idle", "because");
    assert!(because.contains("the host's clock has not been synchronised"), "{because}");
    assert!(because.ends_with(&host.value("sleeper/idle", "deletes_at")), "{because}");
    host.wake("sleeper");
}
