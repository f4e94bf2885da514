//! Machines with a network device: what every driver promises of it.

use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use dozed::{
    net::Wanted,
    sys::{
        netns,
        process::{Privileges, Process},
        tun::{self, Device},
    },
    vmm::Error,
};
use serde_json::{Value, json};

use crate::{
    api::Running,
    contract::{Subject, start, told},
    files::{Host, end},
    network::{Networks, namespace, nic, on_a_host},
    support::{Standin, open_dir},
};

/// Has each test run against each driver that can have a network.
macro_rules! with_a_nic {
    ($($name:ident),* $(,)?) => {
        mod qemu {
            $(#[test]
            fn $name() {
                super::on_a_host(|networks| super::$name(&super::Subject::qemu(), networks));
            })*
        }

        mod standin {
            $(#[test]
            fn $name() {
                super::on_a_host(|networks| {
                    super::$name(&super::Subject::standin("53.0"), networks);
                });
            })*
        }

        mod standin_of_the_oldest {
            $(#[test]
            fn $name() {
                super::on_a_host(|networks| {
                    super::$name(&super::Subject::standin("49.0"), networks);
                });
            })*
        }

        mod cloud_hypervisor {
            $(#[test]
            fn $name() {
                super::on_a_host(|networks| {
                    if let Some(subject) = super::Subject::cloud_hypervisor() {
                        super::$name(&subject, networks);
                    }
                });
            })*
        }
    };
}

with_a_nic! {
    a_machine_wakes_in_the_same_network_and_in_a_new_one,
    a_machine_is_in_its_network_and_the_tap_is_its_alone,
    a_tap_that_is_not_there_is_an_error_and_is_not_made,
    a_snapshot_and_a_plan_that_differ_in_the_device_are_refused,
}

/// Returns a sandbox that has a network.
fn connected(subject: &Subject, networks: &Networks, cmdline: &str) -> (Host, Wanted) {
    let mut host = subject.host(cmdline);
    // The owner of before: the driver gives the tap to whoever its VMM runs as.
    let wanted = networks.wanted(host.plan.user.unwrap() + 1);
    host.plan.nic = Some(nic(&networks.ensure(&wanted)));
    (host, wanted)
}

/// Returns the inode of the namespace that a process is in.
fn network_of(process: &Arc<Process>) -> u64 {
    fs::metadata(format!("/proc/{}/ns/net", process.identity().pid)).unwrap().ino()
}

fn a_machine_wakes_in_the_same_network_and_in_a_new_one(subject: &Subject, networks: &Networks) {
    let (mut host, wanted) = connected(subject, networks, "touch=4");
    let mut machine = subject.run(&host);
    for cycle in 1..=4 {
        machine.pause().unwrap();
        let dir = host.snapshot_dir(&format!("snapshot {cycle}"));
        machine.save(&dir).unwrap();
        end(&*machine);
        let ready = if cycle % 2 == 0 { networks.renew(&wanted) } else { networks.ensure(&wanted) };
        host.plan.nic = Some(nic(&ready));
        machine = subject.vmm.restore(&host.plan, &dir).unwrap();
        assert_eq!(network_of(machine.process()), ready.identity.inode);
        assert!(!networks.is_free(&wanted), "a machine that was loaded has its tap");
        machine.resume().unwrap();
        host.wait_for_count(host.last_count() + 2);
    }
    host.assert_whole();
}

fn a_machine_is_in_its_network_and_the_tap_is_its_alone(subject: &Subject, networks: &Networks) {
    let (host, wanted) = connected(subject, networks, "");
    let machine = subject.run(&host);
    let identity = networks.ensure(&wanted).identity;
    assert_eq!(network_of(machine.process()), identity.inode);
    assert!(!networks.is_free(&wanted));

    let mut other = subject.host("");
    other.plan.nic.clone_from(&host.plan.nic);
    let refused = told(&start(subject, &other.plan).unwrap_err());
    assert!(refused.starts_with("taking the tap "), "{refused}");
    assert!(other.processes().is_empty());
    host.wait_for_count(host.last_count() + 2);

    // A process that was just killed is in nobody's way, and its tap stays.
    end(&*machine);
    end(&*start(subject, &other.plan).unwrap());
    assert_eq!(networks.ensure(&wanted).identity, identity);
    host.assert_whole();
}

fn a_tap_that_is_not_there_is_an_error_and_is_not_made(subject: &Subject, networks: &Networks) {
    let (mut host, wanted) = connected(subject, networks, "");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let there = host.plan.nic.clone().unwrap();
    host.plan.nic.as_mut().unwrap().tap = "tap9".to_owned();
    for refused in [start(subject, &host.plan).map(drop), restored(subject, &host, &dir)] {
        let refused = told(&refused.unwrap_err());
        assert!(refused.ends_with("there is no tap9"), "{refused}");
    }
    host.plan.nic.as_mut().unwrap().namespace = host.path("nowhere");
    for refused in [start(subject, &host.plan).map(drop), restored(subject, &host, &dir)] {
        let refused = told(&refused.unwrap_err());
        assert!(refused.starts_with("opening the network namespace "), "{refused}");
    }
    assert!(host.processes().is_empty());
    let ready = networks.ensure(&wanted);
    let devices = namespace(&ready).run(|_| fs::read_to_string("/proc/thread-self/net/dev"));
    assert!(!devices.unwrap().unwrap().contains("tap9"));

    host.plan.nic = Some(there);
    let mut machine = subject.vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

fn a_snapshot_and_a_plan_that_differ_in_the_device_are_refused(
    subject: &Subject,
    networks: &Networks,
) {
    let (mut host, _wanted) = connected(subject, networks, "");
    let mut machine = subject.run(&host);
    machine.pause().unwrap();
    let dir = host.snapshot_dir("snapshot");
    machine.save(&dir).unwrap();
    end(&*machine);
    let nic = host.plan.nic.take();
    let refused = restored(subject, &host, &dir).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. } | Error::Died { .. }), "{}", told(&refused));
    assert!(host.processes().is_empty());
    host.plan.nic = nic;
    let mut machine = subject.vmm.restore(&host.plan, &dir).unwrap();
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
}

/// Loads a snapshot, and drops the machine.
fn restored(subject: &Subject, host: &Host, dir: &Path) -> Result<(), Error> {
    subject.vmm.restore(&host.plan, dir).map(|machine| end(&*machine))
}

#[test]
fn a_version_that_would_set_an_address_is_refused_a_network() {
    on_a_host(|networks| {
        let subject = Subject::standin("48.0");
        let (mut host, _wanted) = connected(&subject, networks, "");
        let refused = told(&start(&subject, &host.plan).unwrap_err());
        assert!(refused.contains("use v49 or later"), "{refused}");
        assert!(host.processes().is_empty());
        host.plan.nic = None;
        end(&*subject.run(&host));
    });
}

/// Has a stand-in with these privileges boot with the network devices of `net`.
fn boot_with(running: &Running, net: &Value) -> (u16, Value) {
    let mut config = running.config(&json!({ "size": 16 << 20, "shared": true }), "");
    config["net"] = net.clone();
    running.must_with("vm.create", &config);
    running.put("vm.boot")
}

#[test]
fn the_stand_in_opens_taps_as_the_real_one_does() {
    const OTHER_USER: u32 = 4321;
    netns::in_a_new_one(|_| {
        tun::make("tap0", Device::Tap, 0).unwrap();
        tun::make("tap1", Device::Tap, OTHER_USER).unwrap();
        tun::make("tun0", Device::Tun, 0).unwrap();
        let standin = Standin::new("53.0");
        let start = |privileges| Running::start_with(&standin, open_dir("a, b"), privileges);
        let of = |tap: &str| json!([{ "tap": tap, "mac": "02:fc:00:00:00:05" }]);

        let holder = start(Privileges::None);
        assert_eq!(boot_with(&holder, &of("tap0")), (204, Value::Null));
        let configuring = ["Open tap device failed", "Unable to configure tap interface"];
        for (tap, privileges, words) in [
            ("tap0", Privileges::Ours, "Device or resource busy (os error 16)"),
            ("tap1", Privileges::None, "Operation not permitted (os error 1)"),
            ("tap9", Privileges::None, "Operation not permitted (os error 1)"),
            ("tun0", Privileges::None, "Invalid argument (os error 22)"),
        ] {
            let chain = json!([
                "Error from API",
                "The VM could not boot",
                "Error from device manager",
                "Cannot create virtio-net device",
                "Failed to open taps",
                configuring[0],
                configuring[1],
                words,
            ]);
            assert_eq!(boot_with(&start(privileges), &of(tap)), (500, chain), "{tap}");
        }
        // With privileges one that is not there is made, without a word.
        assert_eq!(boot_with(&start(Privileges::Ours), &of("tap9")), (204, Value::Null));
        assert!(standin.calls().contains(&"TAP tap9".to_owned()));
        drop(holder.kill());
        assert_eq!(boot_with(&start(Privileges::None), &of("tap0")), (204, Value::Null));
    })
    .unwrap();
}

#[test]
fn the_stand_in_refuses_network_devices_that_no_machine_has() {
    let standin = Standin::new("53.0");
    let device = |key: &str, value: Value| {
        let mut device = json!({ "tap": "tap0", "mac": "02:fc:00:00:00:05" });
        device[key] = value;
        device
    };
    for (devices, words) in [
        (vec![device("num_queues", json!(1))], "Number of queues (1) to virtio_net should be"),
        (vec![device("num_queues", json!(4))], "Queue count (4) must not exceed boot vCPUs (1)"),
        (vec![device("queue_size", json!(3))], "Queue size must be a power of 2"),
        (vec![device("id", json!("__n"))], "Identifier __n is not invalid"),
        (vec![device("id", json!("n")), device("id", json!("n"))], "Identifier n is not unique"),
    ] {
        let (status, said) = boot_with(&Running::start(&standin), &json!(devices));
        assert_eq!((status, &said[2]), (500, &json!("Failed to validate config")), "{said}");
        assert!(said[3].as_str().unwrap().starts_with(words), "{said}");
    }
    let running = Running::start(&standin);
    let mut config = running.config(&json!({ "size": 16 << 20 }), "");
    config["net"] = json!([device("mac", json!("zz"))]);
    let (status, said) = running.put_with("vm.create", &config);
    assert_eq!(status, 400);
    assert!(said[1].as_str().unwrap().contains("parsing of zz into a MAC address"), "{said}");
}
