//! Packets one by one, on a clock that stands still unless it is moved.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::{
    super::packet::tests::{GUEST, HOST, data, ping, syn, udp},
    *,
};
use crate::sandbox::network::Transport;

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn plan() -> AddressPlan {
    AddressPlan::default()
}

fn address(slot: u32) -> SandboxAddress {
    plan().address(slot).unwrap()
}

/// A policy that listens for the first `count` sandboxes, at every port of TCP and at udp/53.
fn policy(count: u32) -> WakePolicy {
    let mut policy = WakePolicy::new(plan());
    (0..count).for_each(|slot| policy.listen(address(slot), woken_by(&["tcp", "udp/53"])));
    policy
}

/// A sleeper whose network is gone.
fn woken_by(ports: &[&str]) -> Sleeper {
    Sleeper { wakes_on: Some(WakePorts::new(ports).unwrap()), lingers: false }
}

fn is_ring(verdict: Decision) -> bool {
    matches!(verdict, Decision::Trigger(..))
}

#[test]
fn the_first_packet_triggers_and_the_others_are_queued_in_order_until_the_wake_has_ended() {
    let mut policy = policy(1);
    let packets = [syn(HOST, GUEST, 22), udp(HOST, GUEST, 53, b"?"), syn(HOST, GUEST, 80)];
    let trigger = Trigger { from: HOST, transport: Transport::Tcp, port: 22 };
    assert_eq!(policy.decide(secs(0), &packets[0]), Decision::Trigger(address(0), trigger));
    assert_eq!(trigger.to_string(), "tcp/22 from 10.213.0.1");
    assert_eq!(policy.decide(secs(1), &packets[1]), Decision::Queue);
    assert_eq!(policy.decide(secs(2), &packets[2]), Decision::Queue);
    let queued = policy.deliver(secs(3), address(0));
    assert!(queued.iter().map(|queued| queued.to_vec()).eq(packets.clone()));
    assert_eq!((policy.queued(), policy.sleepers()), (0, 0));
    // It is awake, and has a route of its own. What comes here is for nobody.
    assert_eq!(policy.decide(secs(3), &packets[0]), Decision::Refuse(Refusal::Unreachable));
    assert!(policy.deliver(secs(3), address(0)).is_empty());
}

#[test]
fn what_opens_nothing_or_is_from_elsewhere_or_for_another_port_triggers_nothing() {
    let mut policy = policy(1);
    let mut decide = |bytes: &[u8]| policy.decide(secs(0), bytes);
    let other = "192.0.2.1".parse().unwrap();
    let [nobody, broadcast] = [77, 65_535].map(|at| Ipv4Addr::from(0x0ad5_0000 + at));
    for (bytes, verdict) in [
        (syn(other, GUEST, 22), Decision::Ignore),
        (udp(other, GUEST, 53, b"?"), Decision::Ignore),
        (syn(other, nobody, 22), Decision::Ignore),
        (data(HOST, GUEST, 22, b""), Decision::Ignore),
        (b"nonsense".to_vec(), Decision::Ignore),
        (ping(HOST, GUEST), Decision::Refuse(Refusal::Refused)),
        (udp(HOST, GUEST, 54, b"?"), Decision::Refuse(Refusal::Refused)),
        (ping(HOST, nobody), Decision::Refuse(Refusal::Unreachable)),
        (syn(HOST, nobody, 22), Decision::Refuse(Refusal::Unreachable)),
        (syn(HOST, broadcast, 22), Decision::Refuse(Refusal::Unreachable)),
    ] {
        assert_eq!(decide(&bytes), verdict, "{bytes:?}");
    }
    assert!(is_ring(decide(&syn(HOST, GUEST, 22))), "and this one does");
}

#[test]
fn data_of_an_open_connection_triggers_and_is_queued_and_is_reset_where_it_wakes_nobody() {
    let mut policy = WakePolicy::new(plan());
    policy.listen(address(0), woken_by(&["tcp/22", "udp/80"]));
    policy.listen(address(1), Sleeper { wakes_on: None, lingers: true });
    let other = address(1).ip();
    let trigger = Trigger { from: HOST, transport: Transport::Tcp, port: 22 };
    for (bytes, verdict) in [
        (data(HOST, GUEST, 22, b"ls"), Decision::Trigger(address(0), trigger)),
        (data(HOST, GUEST, 22, b"ls"), Decision::Queue),
        (data(HOST, GUEST, 80, b"GET"), Decision::Refuse(Refusal::Refused)),
        (data(HOST, GUEST, 80, b""), Decision::Ignore),
        (data(HOST, other, 22, b"ls"), Decision::Refuse(Refusal::Unreachable)),
        (data(HOST, other, 22, b""), Decision::Ignore),
        (syn(HOST, other, 22), Decision::Refuse(Refusal::Unreachable)),
        (data(HOST, address(2).ip(), 22, b"ls"), Decision::Refuse(Refusal::Unreachable)),
    ] {
        assert_eq!(policy.decide(secs(0), &bytes), verdict, "{bytes:?}");
    }
    assert_eq!(policy.deliver(secs(0), address(0)).len(), 2);
}

#[test]
fn a_segment_from_elsewhere_is_reset_when_the_network_that_knew_its_connection_is_gone() {
    let mut policy = WakePolicy::new(plan());
    let server = Ipv4Addr::new(192, 0, 2, 1);
    let sleepers = [Some(WakePorts::default()), None];
    for (slot, wakes_on) in (0..).zip(sleepers) {
        policy.listen(address(slot), Sleeper { wakes_on, lingers: true });
        let [said, bare] =
            [b"push".as_slice(), b""].map(|text| data(server, address(slot).ip(), 5000, text));
        assert_eq!(policy.decide(secs(0), &said), Decision::Ignore);
        policy.end_linger(address(slot));
        for segment in [&said, &bare] {
            assert_eq!(policy.decide(secs(0), segment), Decision::Refuse(Refusal::Refused));
        }
    }
    assert_eq!(policy.list(), [(address(0), woken_by(&["tcp"]))]);
    // However many there are, the host's callers are told as ever.
    let segment = data(server, address(1).ip(), 5000, b"push");
    let reset = (0..1_000).filter(|_| policy.decide(secs(0), &segment) != Decision::Ignore).count();
    assert!(reset < 400, "{reset}");
    let call = syn(HOST, address(1).ip(), 22);
    assert_eq!(policy.decide(secs(0), &call), Decision::Refuse(Refusal::Unreachable));
}

#[test]
fn after_a_wake_that_failed_packets_are_refused_for_longer_each_time() {
    let mut policy = policy(1);
    let packet = syn(HOST, GUEST, 22);
    let mut now = secs(0);
    for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert!(is_ring(policy.decide(now, &packet)), "after {now:?}");
        assert_eq!(policy.refuse(now, address(0)).len(), 1);
        // To be told so again is no second failure.
        assert_eq!(policy.refuse(now, address(0)).len(), 0);
        now += secs(pause) - Duration::from_millis(1);
        assert_eq!(policy.decide(now, &packet), Decision::Refuse(Refusal::Refused));
        now += Duration::from_millis(1);
    }
    // One that goes well makes it as if nothing had been.
    assert!(is_ring(policy.decide(now, &packet)));
    policy.deliver(now, address(0));
    policy.listen(address(0), woken_by(&["tcp"]));
    assert!(is_ring(policy.decide(now, &packet)));
}

#[test]
fn a_scan_of_all_addresses_wakes_no_more_than_so_many_a_second() {
    let mut policy = policy(10_000);
    let mut scan = |now: Duration| {
        let packets = (0..10_000).map(|slot| syn(HOST, address(slot).ip(), 22));
        packets.filter(|packet| is_ring(policy.decide(now, packet))).count()
    };
    assert_eq!(scan(secs(0)), 64);
    assert_eq!(scan(secs(0)), 0);
    assert_eq!(scan(secs(1)), 16);
    assert_eq!(scan(Duration::from_millis(1_500)), 8);
    assert_eq!(scan(secs(1_000)), 64);
}

#[test]
fn nobody_is_told_no_more_often_than_so_many_times_a_second() {
    let mut policy = policy(0);
    let packet = syn(HOST, GUEST, 22);
    let mut flood = |now| {
        let verdicts = (0..1_000).map(|_| policy.decide(now, &packet));
        verdicts.filter(|it| *it == Decision::Refuse(Refusal::Unreachable)).count()
    };
    assert_eq!([flood(secs(0)), flood(secs(1)), flood(secs(1))], [400, 200, 0]);
}

#[test]
fn what_is_held_is_bounded_in_number_and_in_time() {
    let mut policy = policy(1);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(policy.decide(secs(0), &packet)));
    for _ in 1..QUEUED_MAX {
        assert_eq!(policy.decide(secs(1), &packet), Decision::Queue);
    }
    assert_eq!(policy.decide(secs(1), &packet), Decision::Ignore);
    // The first one is too old now, and makes room for one.
    assert_eq!(policy.decide(secs(10), &packet), Decision::Queue);
    assert_eq!(policy.decide(secs(10), &packet), Decision::Ignore);
    policy.sweep(secs(11));
    assert_eq!(policy.queued(), 1);
    assert!(policy.deliver(secs(20), address(0)).is_empty(), "it is too old");
}

#[test]
fn a_flood_to_all_sleepers_holds_no_more_than_so_many_packets() {
    let mut policy = policy(200);
    let mut most = 0;
    for second in 0..9 {
        for slot in 0..200 {
            let packet = syn(HOST, address(slot).ip(), 22);
            for _ in 0..100 {
                policy.decide(secs(second), &packet);
            }
        }
        most = most.max(policy.queued());
    }
    assert_eq!(most, QUEUED_MAX_IN_ALL);
    policy.sweep(secs(30));
    assert_eq!(policy.queued(), 0);
}

#[test]
fn a_wake_of_which_nobody_says_how_it_ended_is_triggered_again_at_last() {
    let mut policy = policy(1);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(policy.decide(secs(0), &packet)));
    assert_eq!(policy.decide(secs(119), &packet), Decision::Queue);
    assert!(is_ring(policy.decide(secs(120), &packet)));
}

#[test]
fn a_sandbox_that_is_deleted_gives_back_what_was_held_for_it() {
    let mut policy = policy(2);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(policy.decide(secs(0), &packet)));
    assert_eq!(policy.stop_listening(address(0)).len(), 1);
    assert_eq!(policy.decide(secs(0), &packet), Decision::Refuse(Refusal::Unreachable));
    // What was never asleep cannot fail to wake, and is not remembered.
    assert!(policy.refuse(secs(0), address(0)).is_empty());
    assert!(policy.failed.is_empty());
    assert_eq!(policy.list(), [(address(1), woken_by(&["tcp", "udp/53"]))]);
}

/// What may happen to a policy.
#[derive(Debug, Clone, Copy)]
enum Event {
    Packet { slot: u32, udp: bool },
    Deliver(u32),
    Refuse(u32),
    Deafen(u32),
    Listen(u32),
    Pass(Duration),
    Sweep,
}

fn event() -> impl Strategy<Value = Event> {
    let slot = 0_u32..4;
    prop_oneof![
        8 => (slot.clone(), any::<bool>()).prop_map(|(slot, udp)| Event::Packet { slot, udp }),
        1 => slot.clone().prop_map(Event::Deliver),
        1 => slot.clone().prop_map(Event::Refuse),
        1 => slot.clone().prop_map(Event::Deafen),
        1 => slot.prop_map(Event::Listen),
        2 => (0_u64..5_000).prop_map(|millis| Event::Pass(Duration::from_millis(millis))),
        1 => Just(Event::Sweep),
    ]
}

proptest! {
    #[test]
    fn one_ring_for_each_wake_and_nothing_held_is_lost_or_told_twice(
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut policy = policy(4);
        let mut now = Duration::ZERO;
        // When a packet was queued for whom, and since when somebody is being waked.
        let mut queued: [Vec<(Duration, u32)>; 4] = Default::default();
        let mut waking: [Option<Duration>; 4] = [None; 4];
        let mut next = 0_u32;
        for event in events {
            let given = match event {
                Event::Packet { slot, udp: is_udp } => {
                    next += 1;
                    let to = address(slot).ip();
                    let mark = next.to_be_bytes();
                    let packet = if is_udp { udp(HOST, to, 53, &mark) } else {
                        udp(HOST, to, 54, &mark)
                    };
                    let verdict = policy.decide(now, &packet);
                    let at = usize::try_from(slot).unwrap();
                    let is_new = waking[at].is_none_or(|since| now - since >= WAKE_FORGOTTEN_AFTER);
                    match verdict {
                        Decision::Trigger(trigger, _) => {
                            prop_assert!(is_new && is_udp && trigger == address(slot));
                            waking[at] = Some(now);
                            queued[at] = vec![(now, next)];
                        }
                        Decision::Queue => {
                            prop_assert!(!is_new && is_udp);
                            queued[at].push((now, next));
                        }
                        Decision::Refuse(_) | Decision::Ignore => {}
                    }
                    None
                }
                Event::Deliver(slot) => Some((slot, policy.deliver(now, address(slot)))),
                Event::Refuse(slot) => Some((slot, policy.refuse(now, address(slot)))),
                Event::Deafen(slot) => Some((slot, policy.stop_listening(address(slot)))),
                Event::Listen(slot) => {
                    policy.listen(address(slot), woken_by(&["udp/53"]));
                    None
                }
                Event::Pass(time) => { now += time; None }
                Event::Sweep => { policy.sweep(now); None }
            };
            if let Some((slot, packets)) = given {
                let at = usize::try_from(slot).unwrap();
                let marks: Vec<u32> = packets
                    .iter()
                    .map(|bytes| u32::from_be_bytes(bytes[28..].try_into().unwrap()))
                    .collect();
                let all: Vec<u32> = queued[at].iter().map(|(_, mark)| *mark).collect();
                // Those that are missing are the oldest, and too old.
                prop_assert!(all.ends_with(&marks), "{:?} of {:?}", marks, all);
                for (since, _) in &queued[at][..all.len() - marks.len()] {
                    prop_assert!(now - *since >= QUEUED_FOR);
                }
                queued[at].clear();
                waking[at] = None;
            }
            let most = queued.iter().map(Vec::len).sum::<usize>();
            prop_assert!(policy.queued() <= most);
        }
    }
}
