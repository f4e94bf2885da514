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

/// A judge that hears for the first `count` sandboxes, at every port of TCP and at udp/53.
fn judge(count: u32) -> Judge {
    let mut judge = Judge::new(plan());
    (0..count).for_each(|slot| judge.listen(address(slot), woken_by(&["tcp", "udp/53"])));
    judge
}

/// A sleeper whose network is gone.
fn woken_by(ports: &[&str]) -> Sleeper {
    Sleeper { wakes_on: Some(WakePorts::new(ports).unwrap()), lingers: false }
}

fn is_ring(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Ring(..))
}

#[test]
fn the_first_packet_rings_and_the_others_are_held_in_order_until_the_wake_has_ended() {
    let mut judge = judge(1);
    let packets = [syn(HOST, GUEST, 22), udp(HOST, GUEST, 53, b"?"), syn(HOST, GUEST, 80)];
    let ring = Ring { from: HOST, transport: Transport::Tcp, port: 22 };
    assert_eq!(judge.hear(secs(0), &packets[0]), Verdict::Ring(address(0), ring));
    assert_eq!(ring.to_string(), "tcp/22 from 10.213.0.1");
    assert_eq!(judge.hear(secs(1), &packets[1]), Verdict::Hold);
    assert_eq!(judge.hear(secs(2), &packets[2]), Verdict::Hold);
    let held = judge.deliver(secs(3), address(0));
    assert!(held.iter().map(|held| held.to_vec()).eq(packets.clone()));
    assert_eq!((judge.held(), judge.sleepers()), (0, 0));
    // It is awake, and has a route of its own. What comes here is for nobody.
    assert_eq!(judge.hear(secs(3), &packets[0]), Verdict::Refuse(Refusal::Unreachable));
    assert!(judge.deliver(secs(3), address(0)).is_empty());
}

#[test]
fn what_opens_nothing_or_is_from_elsewhere_or_for_another_port_rings_for_nobody() {
    let mut judge = judge(1);
    let mut hear = |bytes: &[u8]| judge.hear(secs(0), bytes);
    let other = "192.0.2.1".parse().unwrap();
    let [nobody, broadcast] = [77, 65_535].map(|at| Ipv4Addr::from(0x0ad5_0000 + at));
    for (bytes, verdict) in [
        (syn(other, GUEST, 22), Verdict::Ignore),
        (udp(other, GUEST, 53, b"?"), Verdict::Ignore),
        (syn(other, nobody, 22), Verdict::Ignore),
        (data(HOST, GUEST, 22, b""), Verdict::Ignore),
        (b"nonsense".to_vec(), Verdict::Ignore),
        (ping(HOST, GUEST), Verdict::Refuse(Refusal::Refused)),
        (udp(HOST, GUEST, 54, b"?"), Verdict::Refuse(Refusal::Refused)),
        (ping(HOST, nobody), Verdict::Refuse(Refusal::Unreachable)),
        (syn(HOST, nobody, 22), Verdict::Refuse(Refusal::Unreachable)),
        (syn(HOST, broadcast, 22), Verdict::Refuse(Refusal::Unreachable)),
    ] {
        assert_eq!(hear(&bytes), verdict, "{bytes:?}");
    }
    assert!(is_ring(hear(&syn(HOST, GUEST, 22))), "and this one does");
}

#[test]
fn data_of_an_open_connection_rings_and_is_held_and_is_reset_where_it_wakes_nobody() {
    let mut judge = Judge::new(plan());
    judge.listen(address(0), woken_by(&["tcp/22", "udp/80"]));
    judge.listen(address(1), Sleeper { wakes_on: None, lingers: true });
    let other = address(1).ip();
    let ring = Ring { from: HOST, transport: Transport::Tcp, port: 22 };
    for (bytes, verdict) in [
        (data(HOST, GUEST, 22, b"ls"), Verdict::Ring(address(0), ring)),
        (data(HOST, GUEST, 22, b"ls"), Verdict::Hold),
        (data(HOST, GUEST, 80, b"GET"), Verdict::Refuse(Refusal::Refused)),
        (data(HOST, GUEST, 80, b""), Verdict::Ignore),
        (data(HOST, other, 22, b"ls"), Verdict::Refuse(Refusal::Unreachable)),
        (data(HOST, other, 22, b""), Verdict::Ignore),
        (syn(HOST, other, 22), Verdict::Refuse(Refusal::Unreachable)),
        (data(HOST, address(2).ip(), 22, b"ls"), Verdict::Refuse(Refusal::Unreachable)),
    ] {
        assert_eq!(judge.hear(secs(0), &bytes), verdict, "{bytes:?}");
    }
    assert_eq!(judge.deliver(secs(0), address(0)).len(), 2);
}

#[test]
fn a_segment_from_elsewhere_is_reset_when_the_network_that_knew_its_connection_is_gone() {
    let mut judge = Judge::new(plan());
    let server = Ipv4Addr::new(192, 0, 2, 1);
    let sleepers = [Some(WakePorts::default()), None];
    for (slot, wakes_on) in (0..).zip(sleepers) {
        judge.listen(address(slot), Sleeper { wakes_on, lingers: true });
        let [said, bare] =
            [b"push".as_slice(), b""].map(|text| data(server, address(slot).ip(), 5000, text));
        assert_eq!(judge.hear(secs(0), &said), Verdict::Ignore);
        judge.end_linger(address(slot));
        for segment in [&said, &bare] {
            assert_eq!(judge.hear(secs(0), segment), Verdict::Refuse(Refusal::Refused));
        }
    }
    assert_eq!(judge.list(), [(address(0), woken_by(&["tcp"]))]);
    // However many there are, the host's callers are told as ever.
    let segment = data(server, address(1).ip(), 5000, b"push");
    let reset = (0..1_000).filter(|_| judge.hear(secs(0), &segment) != Verdict::Ignore).count();
    assert!(reset < 400, "{reset}");
    let call = syn(HOST, address(1).ip(), 22);
    assert_eq!(judge.hear(secs(0), &call), Verdict::Refuse(Refusal::Unreachable));
}

#[test]
fn after_a_wake_that_failed_packets_are_refused_for_longer_each_time() {
    let mut judge = judge(1);
    let packet = syn(HOST, GUEST, 22);
    let mut now = secs(0);
    for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert!(is_ring(judge.hear(now, &packet)), "after {now:?}");
        assert_eq!(judge.refuse(now, address(0)).len(), 1);
        // To be told so again is no second failure.
        assert_eq!(judge.refuse(now, address(0)).len(), 0);
        now += secs(pause) - Duration::from_millis(1);
        assert_eq!(judge.hear(now, &packet), Verdict::Refuse(Refusal::Refused));
        now += Duration::from_millis(1);
    }
    // One that goes well makes it as if nothing had been.
    assert!(is_ring(judge.hear(now, &packet)));
    judge.deliver(now, address(0));
    judge.listen(address(0), woken_by(&["tcp"]));
    assert!(is_ring(judge.hear(now, &packet)));
}

#[test]
fn a_scan_of_all_addresses_wakes_no_more_than_so_many_a_second() {
    let mut judge = judge(10_000);
    let mut scan = |now: Duration| {
        let packets = (0..10_000).map(|slot| syn(HOST, address(slot).ip(), 22));
        packets.filter(|packet| is_ring(judge.hear(now, packet))).count()
    };
    assert_eq!(scan(secs(0)), 64);
    assert_eq!(scan(secs(0)), 0);
    assert_eq!(scan(secs(1)), 16);
    assert_eq!(scan(Duration::from_millis(1_500)), 8);
    assert_eq!(scan(secs(1_000)), 64);
}

#[test]
fn nobody_is_told_no_more_often_than_so_many_times_a_second() {
    let mut judge = judge(0);
    let packet = syn(HOST, GUEST, 22);
    let mut flood = |now| {
        let verdicts = (0..1_000).map(|_| judge.hear(now, &packet));
        verdicts.filter(|it| *it == Verdict::Refuse(Refusal::Unreachable)).count()
    };
    assert_eq!([flood(secs(0)), flood(secs(1)), flood(secs(1))], [400, 200, 0]);
}

#[test]
fn what_is_held_is_bounded_in_number_and_in_time() {
    let mut judge = judge(1);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(judge.hear(secs(0), &packet)));
    for _ in 1..HELD_MAX {
        assert_eq!(judge.hear(secs(1), &packet), Verdict::Hold);
    }
    assert_eq!(judge.hear(secs(1), &packet), Verdict::Ignore);
    // The first one is too old now, and makes room for one.
    assert_eq!(judge.hear(secs(10), &packet), Verdict::Hold);
    assert_eq!(judge.hear(secs(10), &packet), Verdict::Ignore);
    judge.sweep(secs(11));
    assert_eq!(judge.held(), 1);
    assert!(judge.deliver(secs(20), address(0)).is_empty(), "it is too old");
}

#[test]
fn a_flood_to_all_sleepers_holds_no_more_than_so_many_packets() {
    let mut judge = judge(200);
    let mut most = 0;
    for second in 0..9 {
        for slot in 0..200 {
            let packet = syn(HOST, address(slot).ip(), 22);
            for _ in 0..100 {
                judge.hear(secs(second), &packet);
            }
        }
        most = most.max(judge.held());
    }
    assert_eq!(most, HELD_MAX_IN_ALL);
    judge.sweep(secs(30));
    assert_eq!(judge.held(), 0);
}

#[test]
fn a_wake_of_which_nobody_says_how_it_ended_is_rung_for_again_at_last() {
    let mut judge = judge(1);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(judge.hear(secs(0), &packet)));
    assert_eq!(judge.hear(secs(119), &packet), Verdict::Hold);
    assert!(is_ring(judge.hear(secs(120), &packet)));
}

#[test]
fn a_sandbox_that_is_deleted_gives_back_what_was_held_for_it() {
    let mut judge = judge(2);
    let packet = syn(HOST, GUEST, 22);
    assert!(is_ring(judge.hear(secs(0), &packet)));
    assert_eq!(judge.deafen(address(0)).len(), 1);
    assert_eq!(judge.hear(secs(0), &packet), Verdict::Refuse(Refusal::Unreachable));
    // What was never asleep cannot fail to wake, and is not remembered.
    assert!(judge.refuse(secs(0), address(0)).is_empty());
    assert!(judge.failed.is_empty());
    assert_eq!(judge.list(), [(address(1), woken_by(&["tcp", "udp/53"]))]);
}

/// What may happen to a judge.
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
        let mut judge = judge(4);
        let mut now = Duration::ZERO;
        // When a packet was held for whom, and since when somebody is being waked.
        let mut held: [Vec<(Duration, u32)>; 4] = Default::default();
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
                    let verdict = judge.hear(now, &packet);
                    let at = usize::try_from(slot).unwrap();
                    let is_new = waking[at].is_none_or(|since| now - since >= WAKE_FORGOTTEN_AFTER);
                    match verdict {
                        Verdict::Ring(rung, _) => {
                            prop_assert!(is_new && is_udp && rung == address(slot));
                            waking[at] = Some(now);
                            held[at] = vec![(now, next)];
                        }
                        Verdict::Hold => {
                            prop_assert!(!is_new && is_udp);
                            held[at].push((now, next));
                        }
                        Verdict::Refuse(_) | Verdict::Ignore => {}
                    }
                    None
                }
                Event::Deliver(slot) => Some((slot, judge.deliver(now, address(slot)))),
                Event::Refuse(slot) => Some((slot, judge.refuse(now, address(slot)))),
                Event::Deafen(slot) => Some((slot, judge.deafen(address(slot)))),
                Event::Listen(slot) => {
                    judge.listen(address(slot), woken_by(&["udp/53"]));
                    None
                }
                Event::Pass(time) => { now += time; None }
                Event::Sweep => { judge.sweep(now); None }
            };
            if let Some((slot, packets)) = given {
                let at = usize::try_from(slot).unwrap();
                let marks: Vec<u32> = packets
                    .iter()
                    .map(|bytes| u32::from_be_bytes(bytes[28..].try_into().unwrap()))
                    .collect();
                let all: Vec<u32> = held[at].iter().map(|(_, mark)| *mark).collect();
                // Those that are missing are the oldest, and too old.
                prop_assert!(all.ends_with(&marks), "{:?} of {:?}", marks, all);
                for (since, _) in &held[at][..all.len() - marks.len()] {
                    prop_assert!(now - *since >= HELD_FOR);
                }
                held[at].clear();
                waking[at] = None;
            }
            let most = held.iter().map(Vec::len).sum::<usize>();
            prop_assert!(judge.held() <= most);
        }
    }
}
