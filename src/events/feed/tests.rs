//! Who is told what, and when, without an announcer.

use super::*;
use crate::{events::What, sandbox::Cause};

const ROW: RowId = RowId(5);
const STATE: WatchTarget = WatchTarget::State(ROW);

fn event(row: u64) -> Event {
    Event {
        time: jiff::Timestamp::UNIX_EPOCH,
        row: RowId(row),
        id: format!("s{row}").parse().unwrap(),
        owner: Owner { uid: 1, gid: 2 },
        generation: 0,
        what: What::Created,
        cause: Cause::Idle,
    }
}

fn open() -> ChangeFeed {
    let feed = ChangeFeed::default();
    feed.open();
    feed.announcer_listens();
    feed
}

/// Takes all there is to announce, and returns the targets of it; nothing gets done.
fn taken(feed: &ChangeFeed) -> Vec<(u64, WatchTarget)> {
    let tasks = lock(&feed.inner).announcing.take();
    tasks.into_iter().map(|task| (task.number, task.target)).collect()
}

fn targets(feed: &ChangeFeed) -> Vec<WatchTarget> {
    taken(feed).into_iter().map(|(_, target)| target).collect()
}

#[test]
fn nobody_is_told_before_the_tree_is_served() {
    let feed = ChangeFeed::default();
    feed.publish(&event(5));
    feed.open();
    feed.announcer_listens();
    assert_eq!(targets(&feed), []);
    assert!(lock(&feed.inner).to_wake.is_empty());
}

#[test]
fn a_thousand_changes_at_once_are_merged_and_each_sandbox_is_announced() {
    let feed = open();
    for _ in 0..3 {
        (1..=1000).for_each(|row| feed.publish(&event(row)));
    }
    let (wakes, first) = feed.wait().unwrap();
    assert_eq!((wakes.len(), first.len()), (2001, ON_WAY_MAX));
    let mut seen = HashSet::new();
    let mut tasks: Vec<_> = first.into_iter().map(|task| (task.number, task.target)).collect();
    while !tasks.is_empty() {
        for (number, target) in tasks {
            assert!(seen.insert(target), "{target:?} is announced twice");
            feed.done(number);
        }
        tasks = taken(&feed);
    }
    assert_eq!((seen.len(), feed.unannounced()), (2001, 0));
}

#[test]
fn what_changes_while_it_is_announced_is_announced_once_more() {
    let feed = open();
    feed.publish(&event(5));
    let first = taken(&feed);
    feed.publish(&event(5));
    feed.publish(&event(5));
    assert_eq!(targets(&feed), [], "one touch of a file at a time");
    for (number, _) in first {
        feed.done(number);
    }
    assert_eq!(targets(&feed), [STATE, WatchTarget::Events(ROW), WatchTarget::AllEvents]);
}

#[test]
fn a_file_is_left_alone_while_it_is_written_and_a_write_that_succeeds_tells_by_itself() {
    for (succeeded, told) in [(true, vec![]), (false, vec![STATE])] {
        let feed = open();
        feed.writing(ROW);
        feed.writing(ROW);
        feed.publish(&event(5));
        assert_eq!(targets(&feed), [WatchTarget::Events(ROW), WatchTarget::AllEvents]);
        feed.wrote(ROW, false);
        assert_eq!(targets(&feed), [], "one more is under way");
        feed.wrote(ROW, succeeded);
        assert_eq!(targets(&feed), told);
        assert!(lock(&feed.inner).announcing.writing.is_empty());
    }
}

#[test]
fn a_write_that_changed_nothing_is_not_announced() {
    let feed = open();
    feed.writing(ROW);
    feed.wrote(ROW, false);
    assert_eq!(targets(&feed), []);
}

#[test]
fn what_an_announcer_that_died_had_not_done_is_done_by_the_next() {
    let feed = open();
    (1..=1000).for_each(|row| feed.publish(&event(row)));
    let begun: HashSet<WatchTarget> = targets(&feed).into_iter().collect();
    // Once more, while they are on their way.
    (1..=1000).for_each(|row| feed.publish(&event(row)));
    feed.announcer_died();
    assert_eq!(targets(&feed), [], "there is none");
    feed.announcer_listens();
    let mut seen = HashSet::new();
    loop {
        let tasks = taken(&feed);
        if tasks.is_empty() {
            break;
        }
        for (number, target) in tasks {
            seen.insert(target);
            feed.done(number);
        }
    }
    assert_eq!(seen.len(), 2001);
    assert!(begun.is_subset(&seen));
}

#[test]
fn queues_stay_bounded_while_there_is_no_announcer() {
    let feed = open();
    feed.announcer_died();
    for _ in 0..100 {
        feed.writing(ROW);
        feed.publish(&event(5));
        feed.wrote(ROW, true);
        feed.publish(&event(5));
        feed.publish_gone(&event(6), false);
    }
    let inner = lock(&feed.inner);
    let announcing = &inner.announcing;
    assert!(announcing.queue.len() <= 5, "{announcing:?}");
    assert!(announcing.stale.len() <= 5 && announcing.tombstones.is_empty());
}

#[test]
fn only_what_the_daemon_deleted_has_a_ghost_and_a_new_sandbox_lays_it() {
    let feed = open();
    let id = event(5).id;
    feed.publish_gone(&event(5), true);
    assert_eq!(feed.tombstone(&id), None);
    assert_eq!(targets(&feed), [WatchTarget::AllEvents]);
    feed.publish_gone(&event(5), false);
    assert_eq!(feed.tombstone(&id).unwrap().row, ROW);
    assert_eq!(feed.tombstone_of_row(ROW), feed.tombstone(&id));
    assert!(feed.clear_tombstone(&id) && !feed.clear_tombstone(&id));
    assert_eq!(targets(&feed), [], "there is nothing left to make the kernel forget");
    let feed = open();
    feed.publish_gone(&event(5), false);
    for (number, _) in taken(&feed) {
        feed.done(number);
    }
    assert_eq!(feed.tombstone(&id), None);
}

#[test]
fn only_who_knows_the_greeting_is_the_announcer_and_only_while_that_lives() {
    let feed = open();
    assert!(!feed.register(b"", 7));
    feed.expect_announcer("dozed.secret".to_owned());
    assert!(!feed.register(b"dozed.guess", 7) && !feed.register(b"dozed.secret", 0));
    assert!(feed.register(b"dozed.secret", 7));
    assert!(feed.is_announcer(7) && !feed.is_announcer(8));
    feed.announcer_listens();
    assert!(!feed.register(b"dozed.secret", 8), "the registration is of use once");
    feed.announcer_died();
    assert!(!feed.is_announcer(7));
}
