//! What the lock promises, in every order of events that a scheduler checker tries.
//!
//! A deadlock, which is what a lost wake-up is, fails the check.

use std::time::Duration;

use shuttle::{
    check_pct, check_random,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use super::*;

/// Enough to find each bug that was ever put into the lock to try it, many times over.
const SCHEDULES: usize = 5_000;
/// A bug that takes this many unlucky moments together is still found.
const DEPTH: usize = 3;

fn id(text: &str) -> SandboxId {
    text.parse().unwrap()
}

/// Runs `scenario` in many orders of events.
fn check(scenario: fn()) {
    check_random(scenario, SCHEDULES);
    check_pct(scenario, SCHEDULES, DEPTH);
}

/// Something that only one may be in at a time.
#[derive(Default)]
struct Room {
    taken: AtomicBool,
    visits: AtomicUsize,
}

impl Room {
    fn visit(&self) {
        assert!(!self.taken.swap(true, Ordering::SeqCst), "two in the room");
        thread::yield_now();
        self.taken.store(false, Ordering::SeqCst);
        self.visits.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn one_at_a_time_holds_an_id_and_nobody_is_forgotten() {
    check(|| {
        let locks = Locks::new();
        let rooms = Arc::new([Room::default(), Room::default()]);
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let (locks, rooms) = (Arc::clone(&locks), Arc::clone(&rooms));
                thread::spawn(move || {
                    for step in 0..2 {
                        let which = (number + step) % 2;
                        let held = locks.lock(&id(["a", "b"][which]));
                        rooms[which].visit();
                        drop(held);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let visits = |room: &Room| room.visits.load(Ordering::SeqCst);
        assert_eq!(visits(&rooms[0]) + visits(&rooms[1]), 6);
        assert!(locks.is_empty(), "an entry was left");
    });
}

#[test]
fn a_holder_of_one_id_never_stops_another_id() {
    check(|| {
        let locks = Locks::new();
        let held = locks.lock(&id("a"));
        let waiter = {
            let locks = Arc::clone(&locks);
            thread::spawn(move || drop(locks.lock(&id("a"))))
        };
        let other = {
            let locks = Arc::clone(&locks);
            thread::spawn(move || drop(locks.lock(&id("b"))))
        };
        // Were `b` stopped by `a`, nobody would ever get on, and the checker says so.
        other.join().unwrap();
        drop(held);
        waiter.join().unwrap();
        assert!(locks.is_empty(), "an entry was left");
    });
}

#[test]
fn giving_up_loses_neither_the_lock_nor_a_waiter() {
    check(|| {
        let locks = Locks::new();
        let room = Arc::new(Room::default());
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let (locks, room) = (Arc::clone(&locks), Arc::clone(&room));
                thread::spawn(move || {
                    let held = match number {
                        // Without time to wait it queues up and gives up at once, racing
                        // with whoever lets go.
                        0 => locks.lock_within(&id("a"), Duration::ZERO),
                        1 => locks.try_lock(&id("a")),
                        _ => Some(locks.lock(&id("a"))),
                    };
                    if held.is_some() {
                        room.visit();
                    }
                })
            })
            .collect();
        let held = locks.lock(&id("a"));
        room.visit();
        drop(held);
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(room.visits.load(Ordering::SeqCst) >= 2);
        assert!(locks.is_empty(), "an entry was left");
    });
}

#[test]
fn a_lock_that_is_let_go_elsewhere_goes_to_the_waiter() {
    check(|| {
        let locks = Locks::new();
        let held = locks.lock(&id("a"));
        let waiter = {
            let locks = Arc::clone(&locks);
            thread::spawn(move || drop(locks.lock_within(&id("a"), Duration::from_secs(3600))))
        };
        thread::spawn(move || drop(held)).join().unwrap();
        waiter.join().unwrap();
        assert!(locks.is_empty(), "an entry was left");
    });
}

#[test]
#[should_panic(expected = "two in the room")]
fn the_checker_catches_a_lock_that_looks_and_then_takes() {
    check(|| {
        let taken = Arc::new(AtomicBool::new(false));
        let room = Arc::new(Room::default());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (taken, room) = (Arc::clone(&taken), Arc::clone(&room));
                thread::spawn(move || {
                    if !taken.load(Ordering::SeqCst) {
                        taken.store(true, Ordering::SeqCst);
                        room.visit();
                        taken.store(false, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
