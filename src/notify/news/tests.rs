//! Who is told what, and when, without an announcer.

use super::*;
use crate::{notify::What, sandbox::Cause};

const ROW: RowId = RowId(5);
const STATE: Spot = Spot::State(ROW);

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

fn open() -> News {
    let news = News::default();
    news.open();
    news.announcer_listens();
    news
}

/// Takes all there is to announce, and returns the spots of it; nothing gets done.
fn taken(news: &News) -> Vec<(u64, Spot)> {
    let tasks = lock(&news.desk).announcing.take();
    tasks.into_iter().map(|task| (task.number, task.spot)).collect()
}

fn spots(news: &News) -> Vec<Spot> {
    taken(news).into_iter().map(|(_, spot)| spot).collect()
}

#[test]
fn nobody_is_told_before_the_tree_is_served() {
    let news = News::default();
    news.tell(&event(5));
    news.open();
    news.announcer_listens();
    assert_eq!(spots(&news), []);
    assert!(lock(&news.desk).to_wake.is_empty());
}

#[test]
fn a_thousand_changes_at_once_are_merged_and_each_sandbox_is_announced() {
    let news = open();
    for _ in 0..3 {
        (1..=1000).for_each(|row| news.tell(&event(row)));
    }
    let (wakes, first) = news.wait().unwrap();
    assert_eq!((wakes.len(), first.len()), (2001, ON_WAY_MAX));
    let mut seen = HashSet::new();
    let mut tasks: Vec<_> = first.into_iter().map(|task| (task.number, task.spot)).collect();
    while !tasks.is_empty() {
        for (number, spot) in tasks {
            assert!(seen.insert(spot), "{spot:?} is announced twice");
            news.done(number);
        }
        tasks = taken(&news);
    }
    assert_eq!((seen.len(), news.unannounced()), (2001, 0));
}

#[test]
fn what_changes_while_it_is_announced_is_announced_once_more() {
    let news = open();
    news.tell(&event(5));
    let first = taken(&news);
    news.tell(&event(5));
    news.tell(&event(5));
    assert_eq!(spots(&news), [], "one touch of a file at a time");
    for (number, _) in first {
        news.done(number);
    }
    assert_eq!(spots(&news), [STATE, Spot::Events(ROW), Spot::AllEvents]);
}

#[test]
fn a_file_is_left_alone_while_it_is_written_and_a_write_that_succeeds_tells_by_itself() {
    for (succeeded, told) in [(true, vec![]), (false, vec![STATE])] {
        let news = open();
        news.writing(ROW);
        news.writing(ROW);
        news.tell(&event(5));
        assert_eq!(spots(&news), [Spot::Events(ROW), Spot::AllEvents]);
        news.wrote(ROW, false);
        assert_eq!(spots(&news), [], "one more is under way");
        news.wrote(ROW, succeeded);
        assert_eq!(spots(&news), told);
        assert!(lock(&news.desk).announcing.writing.is_empty());
    }
}

#[test]
fn a_write_that_changed_nothing_is_not_announced() {
    let news = open();
    news.writing(ROW);
    news.wrote(ROW, false);
    assert_eq!(spots(&news), []);
}

#[test]
fn what_an_announcer_that_died_had_not_done_is_done_by_the_next() {
    let news = open();
    (1..=1000).for_each(|row| news.tell(&event(row)));
    let begun: HashSet<Spot> = spots(&news).into_iter().collect();
    // Once more, while they are on their way.
    (1..=1000).for_each(|row| news.tell(&event(row)));
    news.announcer_died();
    assert_eq!(spots(&news), [], "there is none");
    news.announcer_listens();
    let mut seen = HashSet::new();
    loop {
        let tasks = taken(&news);
        if tasks.is_empty() {
            break;
        }
        for (number, spot) in tasks {
            seen.insert(spot);
            news.done(number);
        }
    }
    assert_eq!(seen.len(), 2001);
    assert!(begun.is_subset(&seen));
}

#[test]
fn queues_stay_bounded_while_there_is_no_announcer() {
    let news = open();
    news.announcer_died();
    for _ in 0..100 {
        news.writing(ROW);
        news.tell(&event(5));
        news.wrote(ROW, true);
        news.tell(&event(5));
        news.tell_gone(&event(6), false);
    }
    let desk = lock(&news.desk);
    let announcing = &desk.announcing;
    assert!(announcing.queue.len() <= 5, "{announcing:?}");
    assert!(announcing.stale.len() <= 5 && announcing.ghosts.is_empty());
}

#[test]
fn only_what_the_daemon_deleted_has_a_ghost_and_a_new_sandbox_lays_it() {
    let news = open();
    let id = event(5).id;
    news.tell_gone(&event(5), true);
    assert_eq!(news.ghost(&id), None);
    assert_eq!(spots(&news), [Spot::AllEvents]);
    news.tell_gone(&event(5), false);
    assert_eq!(news.ghost(&id).unwrap().row, ROW);
    assert_eq!(news.ghost_of(ROW), news.ghost(&id));
    assert!(news.lay(&id) && !news.lay(&id));
    assert_eq!(spots(&news), [], "there is nothing left to make the kernel forget");
    let news = open();
    news.tell_gone(&event(5), false);
    for (number, _) in taken(&news) {
        news.done(number);
    }
    assert_eq!(news.ghost(&id), None);
}

#[test]
fn only_who_knows_the_greeting_is_the_announcer_and_only_while_that_lives() {
    let news = open();
    assert!(!news.greet(b"", 7));
    news.expect_announcer("dozed.secret".to_owned());
    assert!(!news.greet(b"dozed.guess", 7) && !news.greet(b"dozed.secret", 0));
    assert!(news.greet(b"dozed.secret", 7));
    assert!(news.is_announcer(7) && !news.is_announcer(8));
    news.announcer_listens();
    assert!(!news.greet(b"dozed.secret", 8), "the greeting is of use once");
    news.announcer_died();
    assert!(!news.is_announcer(7));
}
