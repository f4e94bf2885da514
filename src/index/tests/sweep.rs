//! Deadlines, and the sweeps over them.

use super::*;

impl Host {
    pub(super) fn sleep_due(&self) -> Option<i64> {
        let due = self.index.due_to_sleep(at(i64::MAX), None, 9).unwrap();
        due.first().map(|due| due.at.as_millis())
    }

    fn delete_due(&self) -> Option<i64> {
        let due = self.index.due_to_delete(at(i64::MAX), None, 9).unwrap();
        due.first().map(|due| due.at.as_millis())
    }
}

#[test]
fn the_deadline_to_sleep_follows_policy_activity_and_failures() {
    let host = Host::new();
    let entry = host.running("web-1", 1000);
    assert_eq!(host.sleep_due(), Some(301_000));
    host.amend(&entry, |record| record.idle_after = minutes(1));
    assert_eq!(host.sleep_due(), Some(61_000));
    host.amend(&entry, |record| record.retry_at = Some(at(90_000)));
    assert_eq!(host.sleep_due(), Some(90_000));
    host.amend(&entry, |record| record.retry_at = Some(at(2000)));
    assert_eq!(host.sleep_due(), Some(61_000));
    host.amend(&entry, |record| record.waking.awake_until = Some(at(70_000)));
    assert_eq!(host.sleep_due(), Some(70_000));
    entry.touch(at(20_000));
    host.index.flush_activity().unwrap();
    assert_eq!(host.sleep_due(), Some(80_000), "also as it is written with an activity");
    host.amend(&entry, |record| record.waking.awake_until = None);
    entry.touch(at(25_000));
    host.amend(&entry, |record| record.retry_at = None);
    assert_eq!(host.sleep_due(), Some(85_000), "a write has the activity too");
    host.amend(&entry, |record| record.idle_after = Period::Never);
    assert_eq!(host.sleep_due(), None);
    host.amend(&entry, |record| record.idle_after = minutes(1));
    host.step(&entry, Step::Sleep, 9000);
    assert_eq!(host.sleep_due(), None);
}

#[test]
fn the_deadline_to_be_deleted_follows_policy_and_failures() {
    let host = Host::new();
    let entry = host.asleep("web-1", 1000);
    assert_eq!(host.delete_due(), Some(3_601_000));
    entry.touch(at(2000));
    host.index.flush_activity().unwrap();
    assert_eq!(host.delete_due(), Some(3_601_000), "activity does not matter");
    host.amend(&entry, |record| record.delete_after = minutes(1));
    assert_eq!(host.delete_due(), Some(61_000));
    host.amend(&entry, |record| record.retry_at = Some(at(90_000)));
    assert_eq!(host.delete_due(), Some(90_000));
    host.amend(&entry, |record| record.pinned = true);
    assert_eq!(host.delete_due(), None);
    host.amend(&entry, |record| record.pinned = false);
    host.amend(&entry, |record| record.delete_after = Period::Never);
    assert_eq!(host.delete_due(), None);
    host.amend(&entry, |record| record.delete_after = minutes(1));
    host.step(&entry, Step::Wake, 2000);
    assert_eq!(host.delete_due(), None);
}

#[test]
fn those_who_are_due_come_in_order_and_page_by_page() {
    let host = Host::new();
    // `b` and `c` are due at the same moment.
    let entries = [("a", 30), ("b", 10), ("c", 10), ("d", 20), ("e", 1000)];
    let rows = entries.map(|(id, now)| host.running(id, now).row());
    let now = at(300_100);
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = host.index.due_to_sleep(now, after, 1).unwrap();
        let Some(last) = page.last() else { break };
        after = Some(*last);
        found.extend(page.iter().map(|due| due.row));
    }
    assert_eq!(found, [rows[1], rows[2], rows[3], rows[0]]);
    assert_eq!(host.index.due_to_sleep(now, None, 9).unwrap().len(), 4);
    assert_eq!(host.index.due_to_delete(now, None, 9).unwrap(), []);
}

#[test]
fn the_next_deadline_is_the_earliest_of_both_kinds() {
    let host = Host::new();
    assert_eq!(host.index.next_due(at(0)).unwrap(), None);
    host.asleep("a", 0);
    assert_eq!(host.index.next_due(at(0)).unwrap(), Some(at(3_600_000)));
    host.running("b", 7);
    assert_eq!(host.index.next_due(at(0)).unwrap(), Some(at(300_007)));
    assert_eq!(host.index.next_due(at(300_007)).unwrap(), Some(at(3_600_000)));
}

#[test]
fn those_in_the_middle_of_an_operation_are_found_without_a_scan() {
    let host = Host::new();
    let entries = ["a", "b", "c"].map(|id| host.running(id, 0));
    assert_eq!(host.index.in_transition(9).unwrap(), []);
    for entry in &entries[..2] {
        host.step(entry, Step::Sleep, 1);
    }
    assert_eq!(host.index.in_transition(9).unwrap(), [entries[0].row(), entries[1].row()]);
    assert_eq!(host.index.in_transition(1).unwrap().len(), 1);
    let connection = lock(&host.index.connection);
    let explain = format!("EXPLAIN QUERY PLAN {}", due::IN_TRANSITION);
    let mut explain = connection.as_ref().unwrap().prepare(&explain).unwrap();
    let plan: String = explain.query_row([0], |row| row.get("detail")).unwrap();
    assert!(plan.starts_with("SEARCH sandbox USING COVERING INDEX"), "{plan}");
}

#[test]
fn no_sweep_scans_or_sorts() {
    let host = Host::new();
    let connection = lock(&host.index.connection);
    for sql in [due::DUE_TO_SLEEP, due::DUE_TO_DELETE] {
        let mut explain =
            connection.as_ref().unwrap().prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let plan: Vec<String> = explain
            .query_map(("running", 0, 0, 0, 0), |row| row.get("detail"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        println!("{plan:?}");
        let [only] = &plan[..] else { panic!("{plan:?}") };
        assert!(only.starts_with("SEARCH sandbox USING COVERING INDEX"), "{only}");
        // Both ends of the range are found in the index, for every page.
        assert!(only.contains("state=?") && only.contains('>') && only.contains('<'), "{only}");
    }
}
