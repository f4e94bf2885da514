//! What the lock promises, on real threads.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use super::*;
use crate::sys::clock::{Deadline, pause_for};

/// Far longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(180);

fn id(text: &str) -> SandboxId {
    text.parse().unwrap()
}

/// Waits until `count` threads wait for `id`.
fn until_waiting(locks: &Arc<Locks>, id: &SandboxId, count: usize) {
    let deadline = Deadline::after(LONG);
    while lock(&locks.table).get(id).map(VecDeque::len) != Some(count) {
        assert!(!deadline.passed(), "{count} waiters never came");
        pause_for(Duration::from_millis(1));
    }
}

#[test]
fn an_entry_is_there_only_while_its_id_is_held() {
    let locks = Locks::new();
    assert!(locks.is_empty());
    let web = locks.lock(&id("web-1"));
    let db = locks.lock(&id("db"));
    assert_eq!((web.id().as_str(), locks.len()), ("web-1", 2));
    drop(web);
    assert_eq!(locks.len(), 1);
    drop(db);
    assert!(locks.is_empty());
}

#[test]
fn trying_takes_a_free_lock_and_no_other() {
    let locks = Locks::new();
    let held = locks.try_lock(&id("a")).unwrap();
    assert!(locks.try_lock(&id("a")).is_none());
    assert!(locks.try_lock(&id("b")).is_some());
    drop(held);
    assert!(locks.try_lock(&id("a")).is_some());
    assert!(locks.is_empty());
}

#[test]
fn the_longest_waiter_is_next() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    let (tell, told) = mpsc::channel();
    let waiters: Vec<_> = (0..8)
        .map(|number| {
            let (waiting, tell) = (Arc::clone(&locks), tell.clone());
            let waiter = thread::Builder::new()
                .spawn(move || {
                    let held = if number % 2 == 0 {
                        waiting.lock(&id("a"))
                    } else {
                        waiting.lock_within(&id("a"), LONG).unwrap()
                    };
                    tell.send(number).unwrap();
                    drop(held);
                })
                .unwrap();
            until_waiting(&locks, &id("a"), number + 1);
            waiter
        })
        .collect();
    drop(tell);
    drop(held);
    assert_eq!(told.iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
    for waiter in waiters {
        waiter.join().unwrap();
    }
    assert!(locks.is_empty());
}

#[test]
fn nobody_gets_in_before_one_who_waits() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    let waiter = {
        let locks = Arc::clone(&locks);
        thread::Builder::new().spawn(move || locks.lock(&id("a"))).unwrap()
    };
    until_waiting(&locks, &id("a"), 1);
    drop(held);
    // The waiter may not have run yet, but the lock is its own already.
    assert!(locks.try_lock(&id("a")).is_none());
    drop(waiter.join().unwrap());
    assert!(locks.is_empty());
}

#[test]
fn a_waiter_that_gives_up_leaves_nothing_behind() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    assert!(locks.lock_within(&id("a"), Duration::from_millis(5)).is_none());
    assert!(locks.lock_within(&id("a"), Duration::ZERO).is_none());
    assert_eq!(lock(&locks.table)[&id("a")].len(), 0);
    drop(held);
    assert!(locks.is_empty());
    assert!(locks.lock_within(&id("a"), Duration::ZERO).is_some());
    assert!(locks.is_empty());
}

#[test]
fn a_waiter_that_gives_up_is_skipped_and_the_others_keep_their_order() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    let (tell, told) = mpsc::channel();
    let spawn = |name: &'static str, limit| {
        let (locks, tell) = (Arc::clone(&locks), tell.clone());
        thread::Builder::new()
            .spawn(move || {
                let held = locks.lock_within(&id("a"), limit);
                tell.send((name, held.is_some())).unwrap();
            })
            .unwrap()
    };
    let hasty = spawn("hasty", Duration::from_millis(30));
    let patient = spawn("patient", LONG);
    assert_eq!(told.recv().unwrap(), ("hasty", false));
    until_waiting(&locks, &id("a"), 1);
    drop(held);
    assert_eq!(told.recv().unwrap(), ("patient", true));
    hasty.join().unwrap();
    patient.join().unwrap();
    assert!(locks.is_empty());
}

#[test]
fn a_turn_that_comes_as_the_time_runs_out_has_come() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    let turn = locks.queue_up(&id("a")).unwrap();
    drop(held);
    assert!(!locks.leave_queue(&id("a"), &turn), "it was its turn");
    drop(locks.held(&id("a")));
    assert!(locks.is_empty());
}

#[test]
fn a_lock_may_be_let_go_on_another_thread() {
    let locks = Locks::new();
    let held = locks.lock(&id("a"));
    thread::Builder::new().spawn(move || drop(held)).unwrap().join().unwrap();
    assert!(locks.is_empty());
}

#[test]
fn a_panic_lets_go() {
    let locks = Locks::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _held = locks.lock(&id("a"));
        panic!("as this test wants");
    }));
    assert!(panicked.is_err());
    assert!(locks.try_lock(&id("a")).is_some());
    assert!(locks.is_empty());
}

#[test]
fn a_million_locks_over_a_thousand_ids_leave_an_empty_table() {
    const THREADS: usize = 16;
    const LOCKS_EACH: usize = 1_000_000 / THREADS;
    let ids: Vec<SandboxId> = (0..1_000).map(|n| id(&format!("s{n}"))).collect();
    let inside: Vec<AtomicBool> = ids.iter().map(|_| AtomicBool::new(false)).collect();
    let taken = AtomicUsize::new(0);
    let locks = Locks::new();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (ids, inside, taken, locks) = (&ids, &inside, &taken, &locks);
            scope.spawn(move || {
                // A stride without a common divisor visits every id, each thread in its
                // own order; the first ten ids are fought for.
                let stride = [7, 11, 13, 17][thread % 4];
                for step in 0..LOCKS_EACH {
                    let spread = (step * stride + thread) % ids.len();
                    let chosen = if step % 4 == 0 { spread % 10 } else { spread };
                    let held = match step % 8 {
                        0 => locks.try_lock(&ids[chosen]),
                        1 => locks.lock_within(&ids[chosen], Duration::from_micros(10)),
                        _ => None,
                    };
                    let held = held.unwrap_or_else(|| locks.lock(&ids[chosen]));
                    assert!(!inside[chosen].swap(true, Ordering::SeqCst), "two holders");
                    inside[chosen].store(false, Ordering::SeqCst);
                    taken.fetch_add(1, Ordering::Relaxed);
                    drop(held);
                }
            });
        }
    });
    assert!(locks.is_empty());
    assert_eq!(taken.into_inner(), 1_000_000);
}
