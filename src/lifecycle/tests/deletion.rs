//! A deletion happens wholly or not at all, whatever fails in between.

use super::*;
use crate::sandbox::Cause;

fn running() -> Host {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host
}

/// Begins a sleep that takes until it is cancelled, and does `work` meanwhile.
fn during_a_sleep(host: &Host, work: impl FnOnce()) -> Result<Outcome, Error> {
    host.vmm.fail_next(Call::Save, Fault::Hang);
    let saves = host.vmm.count(Call::Save);
    std::thread::scope(|scope| {
        let sleep = scope.spawn(|| host.sleep("a"));
        wait_for("the sleep", || host.vmm.count(Call::Save) > saves);
        work();
        sleep.join().unwrap()
    })
}

#[test]
fn a_deletion_that_cannot_be_recorded_leaves_the_guest_running_and_in_sight() {
    let host = running();
    let pid = host.vmm.living();
    host.refuse_writes("UPDATE ON sandbox");
    assert!(matches!(host.destroy("a"), Err(Error::Index { .. })));
    assert_eq!((host.state("a"), host.vmm.living()), (State::Running, pid));
    assert!(host.guest_runs("a"));
    host.accept_writes();
    host.check("a");
    assert!(host.destroy("a").unwrap());
    host.check_nothing_left();
}

#[test]
fn a_deletion_that_cannot_be_recorded_does_not_cancel_what_is_under_way() {
    let host = running();
    let slept = during_a_sleep(&host, || {
        host.refuse_writes("INSERT ON meta");
        assert!(matches!(host.destroy("a"), Err(Error::Index { .. })));
        assert_eq!((host.state("a"), host.vmm.living().len()), (State::Snapshotting, 1));
        host.accept_writes();
        assert!(host.destroy("a").unwrap());
    });
    assert!(matches!(slept, Err(Error::Gone { .. })), "{slept:?}");
    host.check_nothing_left();
}

#[test]
fn a_recorded_deletion_that_fails_is_out_of_sight_and_finished_later() {
    for write in ["DELETE ON sandbox", "UPDATE ON sandbox"] {
        let host = running();
        let slept = during_a_sleep(&host, || {
            host.refuse_writes(write);
            assert!(!host.destroy("a").unwrap(), "{write}");
            assert!(host.daemon.by_id(&name("a")).is_none(), "{write}");
            assert_eq!(host.vmm.living(), [0; 0], "{write}");
            let owner = Owner { uid: 0, gid: 0 };
            let made = host.daemon.create(&name("a"), owner, Cause::Mkdir(actor()));
            assert!(matches!(made, Err(Error::Locked { .. })), "{write}: {made:?}");
            host.accept_writes();
            host.finish_deletions();
        });
        assert!(matches!(slept, Err(Error::Gone { .. })), "{slept:?}");
        host.create("a");
        host.destroy("a").unwrap();
        host.check_nothing_left();
    }
}

#[test]
fn a_deletion_that_was_cut_off_when_it_had_cancelled_an_operation_is_finished() {
    let mut host = running();
    let slept = during_a_sleep(&host, || {
        let crashed = host.crashes_at(CrashPoint::DeleteIntended, || {
            host.destroy("a").expect("it crashes, it does not fail");
        });
        assert!(crashed);
        let pid = host.vmm.living()[0];
        host.vmm.crash(pid);
    });
    assert!(matches!(slept, Err(Error::Gone { .. })), "{slept:?}");
    assert_ne!(host.daemon.index.by_id(&name("a")).unwrap().record().state(), State::Deleting);
    host.restart();
    assert!(host.daemon.by_id(&name("a")).is_none());
    host.check_nothing_left();
    assert_eq!(host.daemon.index.metas("deleting.").unwrap(), []);
}

#[test]
fn what_an_earlier_daemon_could_not_finish_the_next_one_does() {
    let mut host = running();
    host.refuse_writes("DELETE ON sandbox");
    assert!(!host.destroy("a").unwrap());
    host.restart_after(false, |_| ());
    assert!(host.daemon.by_id(&name("a")).is_none());
    host.accept_writes();
    host.finish_deletions();
    host.check_nothing_left();
}

#[test]
fn one_deletion_too_many_is_refused_and_has_changed_nothing() {
    let host = running();
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = crate::sync::Arc::new(crate::sync::Mutex::new(wait));
    let queue = || {
        let wait = crate::sync::Arc::clone(&wait);
        host.daemon.queue_deletion(move || {
            crate::sync::lock(&wait).recv().unwrap_err();
        })
    };
    while queue().is_ok() {}
    assert_eq!(host.state("a"), State::Running);
    host.check("a");
    drop(release);
    wait_for("a place", || queue().is_ok());
}

#[test]
fn nothing_is_deleted_when_the_daemon_is_ending() {
    let host = running();
    assert_eq!(host.daemon.close(PATIENCE), 0);
    assert!(matches!(host.destroy("a"), Err(Error::ShuttingDown)));
    assert!(host.guest_runs("a"));
}

#[test]
fn a_stale_one_whose_deletion_cannot_be_recorded_sleeps_on() {
    let host = running();
    host.set("a", Policy::DeleteAfter("60s".parse().unwrap())).unwrap();
    host.sleep("a").unwrap();
    host.clock.advance(Duration::from_secs(60));
    host.refuse_writes("UPDATE ON sandbox");
    let entry = host.entry("a");
    let held = host.daemon.lock(&entry, Wait::ForIt, Cause::Stale).unwrap();
    host.daemon.destroy_stale(&held, &entry).unwrap_err();
    drop(held);
    assert_eq!(host.state("a"), State::Snapshotted);
    host.accept_writes();
    host.check("a");
}
