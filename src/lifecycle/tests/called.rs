//! Activity that begins while its sandbox is being put to sleep.

use super::*;
use crate::{
    net::{Activity, Count},
    sandbox::NetMode,
    sync::Arc,
    sys::clock::Clock,
};

/// What happens to a sandbox, once it is known when.
type Event = Box<dyn FnOnce() + Send>;

/// A host on which `a` runs, and is idle for long enough to be put to sleep.
fn idle() -> Host {
    let host = Host::new();
    let entry = host.create("a");
    let spec = Spec { net: NetMode::Isolated, ..Spec::clone(&entry.record().spec) };
    host.set("a", Policy::Spec(Box::new(spec))).unwrap();
    host.wake("a").unwrap();
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    host.clock.advance(Duration::from_secs(3600));
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    host
}

fn pass(host: &Host, bytes: u64) -> Event {
    let network = Arc::clone(&host.network);
    let inward = Count { packets: 1, bytes };
    Box::new(move || network.set_activity(&name("a"), Activity { inward, ..Activity::default() }))
}

/// Too little to be above the threshold of 100 bytes/s.
fn one_packet(host: &Host) -> Event {
    pass(host, 10)
}

fn one_touch(host: &Host) -> Event {
    let (daemon, entry) = (Arc::clone(&host.daemon), host.entry("a"));
    Box::new(move || daemon.activity().saw(&entry, Signal::Touch))
}

fn by_count(host: &Host) -> Why {
    Why::AskedAt(host.entry("a").activity_count())
}

#[test]
fn nothing_that_reaches_a_guest_between_the_look_and_the_pause_is_swallowed() {
    let whys: [fn(&Host) -> Why; 2] = [|_| Why::Idle, by_count];
    let events: [fn(&Host) -> Event; 2] = [one_packet, one_touch];
    // The counters are read by the first look, by the last look, and when the guest is paused.
    for (why, event, reads) in whys
        .into_iter()
        .flat_map(|why| events.map(|event| (why, event)))
        .flat_map(|(why, event)| [1, 2].map(|reads| (why, event, reads)))
    {
        let host = idle();
        let why = why(&host);
        host.network.act_after_reads(reads, event(&host));
        match host.sleep_because("a", why) {
            Ok(outcome) => assert_eq!((why, outcome), (Why::Idle, Outcome::Skipped), "{reads}"),
            Err(error) => assert!(matches!(error, Error::Active { .. }), "{why:?}: {error}"),
        }
        assert!(host.guest_runs("a"), "{why:?}: after {reads} readings");
        assert_eq!((host.state("a"), host.vmm.count(Call::Save)), (State::Running, 0));
        // Its new count is one that it can be put to sleep by.
        assert_eq!(host.sleep_because("a", by_count(&host)).unwrap(), Outcome::Done);
    }
}

#[test]
fn what_comes_when_the_guest_is_paused_already_does_not_call_its_sleep_off() {
    let host = idle();
    host.network.act_after_reads(3, one_packet(&host));
    assert_eq!(host.sleep_because("a", Why::Idle).unwrap(), Outcome::Done);
    host.check("a");
}

#[test]
fn a_sleep_by_count_is_refused_for_traffic_that_no_sample_has_seen_yet() {
    let host = idle();
    let Why::AskedAt(count) = by_count(&host) else { unreachable!("it is by count") };
    pass(&host, 9000)();
    let error = host.sleep_because("a", Why::AskedAt(count)).unwrap_err();
    assert!(matches!(error, Error::Active { count: now, .. } if now > count), "{error}");
    assert_eq!(host.vmm.count(Call::Pause), 0);
}

#[test]
fn traffic_before_a_sleep_that_failed_is_activity() {
    let host = idle();
    pass(&host, 9000)();
    host.vmm.fail_next(Call::Save, Fault::NoSpace);
    host.sleep("a").unwrap_err();
    host.clock.advance(Duration::from_secs(1));
    host.daemon.sample_activity(crate::lifecycle::Guests::All);
    let seen = host.daemon.activity().signals(host.entry("a").row()).last(Signal::Network);
    assert_eq!(seen, Some(host.clock.now()));
}
