//! When the network of a sandbox is there, with which policy, and when it goes.

use std::{net::Ipv4Addr, sync::mpsc};

use super::*;
use crate::lifecycle::{
    packet::wake_for_packet,
    upkeep::{look_over_networks, renew_networks},
};
use crate::{
    lifecycle::{View, chain, testing::LINGER},
    net::{Network, Trigger, Wanted, fake::Fault as NetFault},
    sandbox::{
        Cause, NetMode,
        network::{Destinations, Reach, SandboxAddress, Transport, WakeOn, WakePorts},
    },
};

/// A host on which `a` may reach the internet.
fn connected() -> Host {
    let host = Host::new();
    host.create("a");
    reconfigure(&host, |spec| spec.net = NetMode::Internet).unwrap();
    host
}

fn reconfigure(host: &Host, change: impl FnOnce(&mut Spec)) -> Result<(), Error> {
    let mut spec = Spec::clone(&host.entry("a").record().spec);
    change(&mut spec);
    host.set("a", Policy::Spec(Box::new(spec)))
}

fn deny(host: &Host, network: &str) -> Result<(), Error> {
    host.set("a", Policy::Denied(Destinations::denied(network.lines()).unwrap()))
}

fn in_force(host: &Host) -> Option<Wanted> {
    host.network.in_force(&name("a"))
}

fn denied(host: &Host) -> String {
    in_force(host).expect("there is a network").policy.denied.to_string()
}

/// What the reaper does of networks.
fn reap(host: &Host) -> usize {
    let rows = host.daemon.networks().lingered();
    for row in &rows {
        let entry = host.daemon.by_row(*row).unwrap();
        let held = host.daemon.lock(&entry, Wait::ForIt, Cause::Reconcile).unwrap();
        host.daemon.networks().remove_lingered(&held, &entry).unwrap();
    }
    rows.len()
}

#[test]
fn a_guest_with_a_network_begins_and_goes_on_with_the_policy_of_that_moment() {
    let host = connected();
    assert_eq!(in_force(&host), None, "nothing is made before it is needed");
    deny(&host, "10.0.0.0/8").unwrap();
    host.wake("a").unwrap();
    let wanted = in_force(&host).unwrap();
    assert_eq!((wanted.policy.reach, &*denied(&host)), (Reach::Internet, "10.0.0.0/8\n"));
    assert_eq!(wanted.address.to_string(), "10.213.0.2");
    assert_eq!(Some(wanted.address), host.daemon.networks().address(&host.entry("a").record()));
    deny(&host, "10.1.0.0/16").unwrap();
    assert_eq!(denied(&host), "10.1.0.0/16\n", "at once");
    host.sleep("a").unwrap();
    deny(&host, "10.2.0.0/16").unwrap();
    assert_eq!(denied(&host), "10.2.0.0/16\n", "also while it lingers");
    host.clock.advance(LINGER);
    assert_eq!((reap(&host), in_force(&host)), (1, None));
    deny(&host, "10.3.0.0/16").unwrap();
    host.wake("a").unwrap();
    assert_eq!(denied(&host), "10.3.0.0/16\n");
    host.check("a");
}

#[test]
fn a_sandbox_without_a_network_has_neither_one_nor_an_address() {
    let host = Host::new();
    host.create("a");
    deny(&host, "10.0.0.0/8").unwrap();
    host.wake("a").unwrap();
    assert_eq!(in_force(&host), None);
    let record = host.entry("a").record();
    assert_eq!((record.slot, host.daemon.networks().address(&record)), (None, None));
    let refused = reconfigure(&host, |spec| spec.net = NetMode::Isolated).unwrap_err();
    assert!(matches!(refused, Error::NotStopped { .. }), "an interface is hardware");
}

#[test]
fn how_far_an_interface_reaches_changes_while_it_runs() {
    let host = connected();
    host.wake("a").unwrap();
    reconfigure(&host, |spec| spec.net = NetMode::Isolated).unwrap();
    assert_eq!(in_force(&host).unwrap().policy.reach, Reach::Isolated);
    let refused = reconfigure(&host, |spec| spec.net = NetMode::None).unwrap_err();
    assert!(matches!(refused, Error::NotStopped { .. }));
}

#[test]
fn a_policy_that_cannot_be_put_in_force_is_not_recorded_either() {
    let host = connected();
    deny(&host, "10.0.0.0/8").unwrap();
    host.wake("a").unwrap();
    host.network.set_fault(Some(NetFault::Policy));
    let error = deny(&host, "10.1.0.0/16").unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert_eq!(host.entry("a").record().spec.denied.to_string(), "10.0.0.0/8\n");
    assert_eq!(denied(&host), "10.0.0.0/8\n");
}

#[test]
fn where_no_network_can_be_made_nothing_runs_and_nothing_is_left() {
    let host = connected();
    host.network.set_fault(Some(NetFault::Ensure));
    let error = host.wake("a").unwrap_err();
    assert!(chain(&error).contains("making the network of a: doing as told"), "{error}");
    assert_eq!((host.state("a"), host.vmm.count(Call::Boot)), (State::Stopped, 0));
    host.network.set_fault(None);
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    host.network.set_fault(Some(NetFault::Ensure));
    host.wake("a").unwrap_err();
    assert_eq!((host.state("a"), host.vmm.count(Call::Restore)), (State::Snapshotted, 0));
    host.network.set_fault(None);
    host.check("a");
}

#[test]
fn a_wake_that_fails_leaves_the_network_lingering_and_a_boot_that_fails_none() {
    let host = connected();
    host.vmm.fail_next(Call::Boot, Fault::Refuse);
    host.wake("a").unwrap_err();
    assert_eq!(in_force(&host), None);
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let until = host.daemon.networks().next_lingered();
    assert!(until.is_some());
    host.clock.advance(LINGER / 2);
    host.vmm.fail_next(Call::Restore, Fault::Refuse);
    host.wake("a").unwrap_err();
    assert_eq!(
        host.daemon.networks().next_lingered(),
        until,
        "it is counted from when it fell asleep"
    );
    host.wake("a").unwrap();
    assert_eq!(host.daemon.networks().next_lingered(), None);
    host.clock.advance(LINGER);
    assert_eq!(reap(&host), 0);
    assert!(in_force(&host).is_some());
}

#[test]
fn the_network_goes_with_the_guest_and_with_the_sandbox() {
    let host = connected();
    host.wake("a").unwrap();
    let live = host.daemon.machines.get(host.entry("a").row()).unwrap();
    live.process.kill();
    wait_for("the end to be seen", || host.state("a") == State::Stopped);
    assert_eq!(in_force(&host), None);
    for asleep in [false, true] {
        host.wake("a").unwrap();
        if asleep {
            host.sleep("a").unwrap();
        }
        assert!(in_force(&host).is_some());
        host.network.set_fault(Some(NetFault::Remove));
        assert!(!host.destroy("a").unwrap(), "not all of it is gone");
        assert!(host.daemon.by_id(&name("a")).is_none());
        host.network.set_fault(None);
        host.finish_deletions();
        assert_eq!((in_force(&host), host.daemon.networks().next_lingered()), (None, None));
        host.create("a");
        reconfigure(&host, |spec| spec.net = NetMode::Isolated).unwrap();
    }
}

#[test]
fn a_network_that_cannot_be_removed_is_tried_again_later() {
    let host = connected();
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    host.clock.advance(LINGER);
    host.network.set_fault(Some(NetFault::Remove));
    let entry = host.entry("a");
    let held = host.daemon.lock(&entry, Wait::ForIt, Cause::Reconcile).unwrap();
    host.daemon.networks().remove_lingered(&held, &entry).unwrap_err();
    host.network.set_fault(None);
    drop(held);
    assert_eq!(reap(&host), 0, "not at once");
    assert!(host.daemon.networks().next_lingered().is_some());
    host.clock.advance(Duration::from_secs(60));
    assert_eq!(reap(&host), 1);
}

#[test]
fn addresses_are_given_for_good_and_given_again_when_their_sandbox_is_gone() {
    let host = connected();
    let slot = |id: &str| host.entry(id).record().slot;
    assert_eq!(slot("a"), Some(0));
    let entry = host.create("b");
    let spec = Spec { net: NetMode::Isolated, ..Spec::clone(&entry.record().spec) };
    host.set("b", Policy::Spec(Box::new(spec))).unwrap();
    assert_eq!(slot("b"), Some(1));
    reconfigure(&host, |spec| spec.net = NetMode::None).unwrap();
    assert_eq!(
        (slot("a"), host.daemon.networks().address(&host.entry("a").record())),
        (Some(0), None)
    );
    host.destroy("a").unwrap();
    host.create("a");
    reconfigure(&host, |spec| spec.net = NetMode::Internet).unwrap();
    assert_eq!(slot("a"), Some(0));
}

#[test]
fn what_a_crash_left_of_a_network_is_put_in_order_by_the_next_start() {
    for (point, woken_before) in [
        (CrashPoint::BootConnected, false),
        (CrashPoint::BootSpawned, false),
        (CrashPoint::WakeConnected, true),
        (CrashPoint::WakeRestored, true),
        (CrashPoint::SleepKilled, true),
    ] {
        let mut host = connected();
        if woken_before {
            host.wake("a").unwrap();
            if point != CrashPoint::SleepKilled {
                host.sleep("a").unwrap();
            }
        }
        crash(&mut host, point, |host| {
            let done =
                if point == CrashPoint::SleepKilled { host.sleep("a") } else { host.wake("a") };
            done.unwrap();
        });
        host.restart();
        let lingers = host.daemon.networks().next_lingered().is_some();
        let wanted = (woken_before, woken_before);
        assert_eq!((in_force(&host).is_some(), lingers), wanted, "{point:?}");
        host.check("a");
    }
}

#[test]
fn a_start_leaves_what_runs_alone_and_brings_its_policy_up_to_date() {
    let mut host = connected();
    host.wake("a").unwrap();
    let stranger = Wanted { id: name("z"), ..in_force(&host).unwrap() };
    host.network.ensure(&stranger).unwrap();
    host.network.apply_policy(&Wanted { id: name("a"), ..stranger }).unwrap();
    host.restart();
    assert_eq!(host.network.in_force(&name("z")), None, "it is of nobody");
    assert!(in_force(&host).is_some());
    renew_networks(&host.daemon);
    assert_eq!(host.error("a"), "ok");
    // Somebody took it away under its guest.
    let address = in_force(&host).unwrap().address;
    host.network.remove(&name("a"), address).unwrap();
    renew_networks(&host.daemon);
    assert_eq!(in_force(&host), None, "another would not be the guest's");
    assert!(host.error("a").contains("checking the network of a"), "{}", host.error("a"));
    host.sleep("a").unwrap();
    host.wake("a").unwrap();
    assert!(in_force(&host).is_some());
}

#[test]
fn a_policy_of_one_that_runs_is_in_force_also_where_only_its_vmm_leads_to_its_network() {
    let host = connected();
    deny(&host, "10.0.0.0/8").unwrap();
    host.wake("a").unwrap();
    host.network.unpin(&name("a"));
    deny(&host, "10.1.0.0/16").unwrap();
    assert_eq!(denied(&host), "10.1.0.0/16\n");
    // And where nothing does, it is not, and says so.
    let address = in_force(&host).unwrap().address;
    host.network.remove(&name("a"), address).unwrap();
    let error = deny(&host, "10.2.0.0/16").unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert_eq!(host.entry("a").record().spec.denied.to_string(), "10.1.0.0/16\n");
}

#[test]
fn what_is_wrong_with_a_network_is_told_once_and_until_it_is_mended() {
    let host = connected();
    host.wake("a").unwrap();
    let wanted = in_force(&host).unwrap();
    look_over_networks(&host.daemon);
    assert_eq!(host.error("a"), "ok");
    host.network.remove(&wanted.id, wanted.address).unwrap();
    let says = "checking the network of a: the sandbox has no network";
    let lacks = || host.daemon.lacks(&host.entry("a").record()).iter().any(|it| it == says);
    let view = View::Sandbox(host.entry("a").row());
    let told = || host.daemon.records.feed().log().size(&view).0;
    let before = told();
    look_over_networks(&host.daemon);
    let once = told();
    assert!(once > before, "there is an event");
    look_over_networks(&host.daemon);
    assert_eq!((&*host.error("a"), lacks(), told()), (says, true, once));
    host.network.ensure(&wanted).unwrap();
    look_over_networks(&host.daemon);
    assert_eq!((&*host.error("a"), lacks()), ("ok", false));
    // One that is asleep has no network to look for.
    host.network.remove(&wanted.id, wanted.address).unwrap();
    host.sleep("a").unwrap();
    look_over_networks(&host.daemon);
    assert_eq!((&*host.error("a"), lacks()), ("ok", false));
}

/// A host on which `a` sleeps and is waked by packets, and whoever tells of them.
fn with_triggers() -> (Host, mpsc::Sender<(SandboxAddress, Trigger)>) {
    let host = connected();
    reconfigure(&host, |spec| spec.wake_on = WakeOn::Packet).unwrap();
    let (trigger, triggers) = mpsc::channel();
    host.daemon.wake_on_packets(triggers).unwrap();
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    (host, trigger)
}

fn packet() -> Trigger {
    Trigger { from: Ipv4Addr::LOCALHOST, transport: Transport::Tcp, port: 22 }
}

fn address(host: &Host) -> SandboxAddress {
    host.daemon.networks().address(&host.entry("a").record()).unwrap()
}

fn is_heard(host: &Host) -> bool {
    host.network.wakes(address(host)).is_some()
}

#[test]
fn a_packet_wakes_a_sleeper_that_is_to_be_woken_by_it() {
    let (host, trigger) = with_triggers();
    assert!(is_heard(&host));
    trigger.send((address(&host), packet())).unwrap();
    wait_for("the wake", || host.state("a") == State::Running && !is_heard(&host));
    assert_eq!(host.network.refused(), []);
    // It is awake, so a late one is none of anybody's business.
    wake_for_packet(&host.daemon, address(&host), packet());
    assert_eq!((host.state("a"), host.entry("a").record().wakes), (State::Running, 1));
    host.sleep("a").unwrap();
    assert!(is_heard(&host));
    reconfigure(&host, |spec| spec.wake_on = WakeOn::None).unwrap();
    assert!(!is_heard(&host), "at once");
    wake_for_packet(&host.daemon, address(&host), packet());
    assert_eq!(host.network.refused(), [address(&host)]);
    assert_eq!(host.state("a"), State::Snapshotted);
    reconfigure(&host, |spec| spec.wake_on = WakeOn::Packet).unwrap();
    assert!(is_heard(&host));
}

#[test]
fn a_wake_that_fails_is_told_to_who_sent_the_packet_and_the_next_one_is_heard() {
    let (host, _trigger) = with_triggers();
    for call in [Call::Restore, Call::Resume] {
        let told = host.network.refused().len();
        host.vmm.fail_next(call, Fault::Refuse);
        wake_for_packet(&host.daemon, address(&host), packet());
        assert!(host.network.refused().len() > told);
        assert_eq!((host.state("a"), is_heard(&host)), (State::Snapshotted, true), "{call:?}");
    }
    wake_for_packet(&host.daemon, address(&host), packet());
    assert_eq!(host.state("a"), State::Running);
    host.check("a");
}

#[test]
fn packets_are_heard_of_after_a_restart_and_not_after_the_end_of_a_sandbox() {
    let (mut host, _trigger) = with_triggers();
    let listened = address(&host);
    host.network.stop_listening(listened);
    host.restart();
    assert!(is_heard(&host));
    host.destroy("a").unwrap();
    assert_eq!(host.network.wakes(listened), None);
}

#[test]
fn a_host_that_cannot_hear_has_its_sandboxes_sleep_all_the_same() {
    let host = connected();
    reconfigure(&host, |spec| spec.wake_on = WakeOn::Packet).unwrap();
    host.wake("a").unwrap();
    host.network.set_fault(Some(NetFault::Listen));
    host.sleep("a").unwrap();
    assert_eq!(host.state("a"), State::Snapshotted);
    assert!(!is_heard(&host));
    assert!(host.daemon.networks().next_lingered().is_some(), "its network goes all the same");
    let ports: WakePorts = WakePorts::new(&["tcp/22"]).unwrap();
    reconfigure(&host, |spec| spec.wake_ports = ports.clone()).unwrap_err();
    assert_ne!(host.entry("a").record().spec.wake_ports, ports, "nor is it recorded");
    host.wake("a").unwrap();
}

#[test]
fn what_no_sandbox_reaches_cannot_be_allowed() {
    let host = connected();
    let allow =
        |text: &str| host.set("a", Policy::Allowed(Destinations::allowed(text.lines()).unwrap()));
    for (text, says) in [
        ("10.1.0.0/16\n10.213.7.0/24", "it is in the range of sandboxes, 10.213.0.0/16"),
        ("192.168.1.5", "its addresses belong to the host, which sandboxes cannot reach"),
    ] {
        let error = allow(text).unwrap_err();
        let network = text.lines().last().unwrap();
        assert!(error.to_string().starts_with(&format!("`{network}")), "{error}");
        assert!(error.to_string().ends_with(says), "{error}");
        let in_config = reconfigure(&host, |spec| {
            spec.allowed = Destinations::allowed(text.lines()).unwrap();
        });
        assert!(matches!(in_config, Err(Error::NotAllowed { .. })));
    }
    assert_eq!(host.entry("a").record().spec.allowed.to_string(), "");
    // What has them in it opens the rest.
    allow("10.0.0.0/8\n192.168.1.0/24").unwrap();
}

#[test]
fn a_guest_whose_host_no_longer_forwards_is_told_to_lack_it() {
    let host = connected();
    host.wake("a").unwrap();
    let lacks = || host.daemon.lacks(&host.entry("a").record()).join("; ");
    let look = || look_over_networks(&host.daemon);
    look();
    let before = lacks();
    host.network.set_fault(Some(NetFault::Forwarding));
    look();
    assert!(lacks().contains("set net.ipv4.ip_forward = 1 with sysctl"), "{}", lacks());
    // Who reaches nothing beyond the host needs none.
    reconfigure(&host, |spec| spec.net = NetMode::Isolated).unwrap();
    assert_eq!(lacks(), before);
    reconfigure(&host, |spec| spec.net = NetMode::Internet).unwrap();
    host.network.set_fault(None);
    look();
    assert_eq!(lacks(), before);
}
