//! What a configuration file may say, and what is said of one that may not.

use super::*;
use crate::sandbox::{
    AwakeMin, Signal, SignalSet,
    network::{Destinations, Ignored},
};

fn parse(text: &str) -> Result<Config, SpecError> {
    Config::parse(text, &|_, _| None)
}

#[test]
fn the_longest_path_of_a_socket_fits() {
    let below = format!("/{}/vsock/vsock.sock", i64::MAX);
    assert!(RUNTIME_MAX_BYTES + below.len() <= 107);
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.defaults.idle_after.to_string(), "15m");
    assert_eq!(config.defaults.delete_after.to_string(), "never");
}

const EVERY_KEY: &str = r#"
        mount = "/m/"
        store = "/s"
        runtime = "/r"
        [reaper]
        tick = "5s"
        concurrency = 3
        [defaults]
        idle_after = "never"
        delete_after = "7d"
        [activity]
        cpu_percent = 0
        disk_bytes_per_second = 1
        network_bytes_per_second = 2
        signals = ["touch"]
        awake_min = "off"
        [limits]
        sandboxes = 7
        wakes = 1
        sleeps = 2
        holds = 5
        memory = "16GiB"
        [snapshot]
        verify = "state"
        [vmm]
        cloud_hypervisor = "/bin/true"
        qemu = "/bin/false"
        users = "70000-79999"
        [network]
        range = "172.20.0.0/16"
        linger = "30s"
        ignore = ["10.9.0.1", "tcp/9100"]
        [template]
        vcpus = 2
        kernel = "/k"
        net = "isolated"
        nameservers = ["9.9.9.9"]
        denied = ["93.184.216.0/24"]
        allowed = ["10.1.2.3"]
        [[template.disks]]
        path = "/d"
        "#;

#[test]
fn every_key_is_read() {
    let config = parse(EVERY_KEY).unwrap();
    let disk = crate::sandbox::Disk { path: "/d".into(), readonly: false };
    let want = Config {
        mount: "/m".into(),
        store: "/s".into(),
        runtime: "/r".into(),
        reaper: Reaper { tick: Duration::from_secs(5), concurrency: 3 },
        defaults: Defaults {
            idle_after: Period::Never,
            delete_after: Period::After(Duration::from_secs(7 * 86_400)),
        },
        activity: Activity {
            cpu_percent: 0,
            disk_bytes_per_second: 1,
            network_bytes_per_second: 2,
            signals: SignalSet::of(&[Signal::Touch]),
            awake_min: AwakeMin(Duration::ZERO),
        },
        limits: Limits {
            sandboxes: 7,
            wakes: 1,
            sleeps: 2,
            holds: 5,
            memory_bytes: Some(16 << 30),
        },
        snapshot: Snapshot { verify: Verify::State },
        vmm: Vmm {
            cloud_hypervisor: Some("/bin/true".into()),
            qemu: Some("/bin/false".into()),
            users: Some("70000-79999".parse().unwrap()),
        },
        network: Network {
            range: "172.20.0.0/16".parse().unwrap(),
            linger: Period::After(Duration::from_secs(30)),
            ignore: Ignored::new(&["10.9.0.1", "tcp/9100"]).unwrap(),
        },
        template: Spec {
            vcpus: 2,
            kernel: Some("/k".into()),
            net: crate::sandbox::NetMode::Isolated,
            nameservers: "9.9.9.9".parse().unwrap(),
            denied: Destinations::denied(["93.184.216.0/24"].into_iter()).unwrap(),
            allowed: Destinations::allowed(["10.1.2.3"].into_iter()).unwrap(),
            disks: vec![disk],
            ..Spec::default()
        },
    };
    assert_eq!(config, want);
}

#[test]
fn what_is_not_accepted_is_told_with_its_line_and_what_is() {
    for (text, line, says) in [
        ("\nbogus = 1", 2, "unknown key `bogus`, expected one of `mount`"),
        ("[reaper]\nevery = 1", 2, "expected `tick` or `concurrency`"),
        (
            "[network]\nrange = \"8.8.0.0/16\"",
            2,
            "cannot be the range of sandboxes: it is in none of",
        ),
        ("[network]\nlinger = 5", 2, "\"never\""),
        (
            "[network]\nignore = [\"ping\"]",
            2,
            "`ignore` `ping` is not an address, a network or a port",
        ),
        ("[template]\nnet = \"bridge\"", 2, "expected one of `none`, `isolated`, `internet`"),
        ("[template]\n\ndenied = [\"x\"]", 3, "`denied`: `x` is not a network; write"),
        ("[template]\nnameservers = [\"10.0.0.1\"]", 2, "`10.0.0.1` is not a public address"),
        ("[reaper]\ntick = 30", 2, "write \"30s\" or \"5m\""),
        ("[reaper]\ntick = \"never\"", 2, "write it as \"30s\""),
        ("[reaper]\nconcurrency = 0", 2, "from 1 to 64"),
        ("[defaults]\nidle_after = 5", 2, "`5` is not accepted; write \"90s\""),
        ("[defaults]\nidle_after = \"5x\"", 2, "`5x` is not a duration; write `90s`"),
        ("[activity]\ncpu_percent = 6401", 2, "from 0 to 6400"),
        ("[activity]\ncpu_percent = \"5\"", 2, "a whole number from 0"),
        ("[limits]\nwakes = -1", 2, "`-1` is not accepted"),
        ("[limits]\nmemory = \"16\"", 2, "write it with a unit"),
        ("[snapshot]\nverify = \"no\"", 2, "write \"full\" or \"state\""),
        ("[vmm]\nqemu = \"/no/such\"", 2, "`qemu`: /no/such is not a program; write the path"),
        (
            "[vmm]\ncloud_hypervisor = \"/etc/passwd\"",
            2,
            "`cloud_hypervisor`: /etc/passwd is not a",
        ),
        ("[vmm]\nqemu = \"qemu\"", 2, "write an absolute path"),
        ("[vmm]\nxen = 1", 2, "expected one of `cloud_hypervisor`, `qemu`, `users`"),
        ("[vmm]\nusers = 1000", 2, "write a range, as \"2010000000-2109999999\", or \"off\""),
        ("[vmm]\nusers = \"0-99\"", 2, "user ids below 1000 belong to the system"),
        ("[vmm]\nusers = \"on\"", 2, "\"on\" is not accepted: write it as"),
        ("\nmount = \"m\"", 2, "write an absolute path without `..`"),
        ("mount = \"/a/../b\"", 1, "write an absolute path without `..`"),
        ("mount = 1", 1, "write an absolute path"),
        ("[template]\nmemory = \"256\"", 2, "write it with a unit"),
        ("[template]\nbogus = 1", 2, "unknown key `bogus`"),
        ("[[template.disks]]\npath = \"d\"", 2, "write an absolute one"),
        ("mount = ", 1, ""),
        ("reaper = 3", 1, "`reaper`: integer `3` is not accepted; write a table"),
        ("[template]\nkernel = 3", 2, "`kernel`: integer `3` is not accepted; write an absolute"),
        ("[reaper]\ntick = \"0s\"", 2, "`tick`: \"0s\" is not accepted"),
        ("[network]\nrange = 10", 2, "`range`: integer `10` is not accepted; write a text"),
    ] {
        let error = parse(text).map(drop).expect_err(text);
        assert!(error.message.contains(says), "{text:?}: {error}");
        assert_eq!(error.line, Some(line), "{text:?}: {error}");
        assert!(!error.message.contains('\n'), "{text:?}: {error}");
    }
}

#[test]
fn directories_inside_one_another_are_refused_at_the_line_to_mend() {
    for (text, line) in [
        ("\nmount = \"/var/lib/dozed/mnt\"", 2),
        ("\nmount = \"/var/lib/dozed\"", 2),
        ("\nstore = \"/run\"", 2),
        ("runtime = \"/run/sandboxes/r\"\n", 1),
        ("mount = \"/\"", 1),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.message.contains("is inside `"), "{text:?}: {error}");
        assert_eq!(error.line, Some(line), "{text:?}: {error}");
    }
    assert!(parse("mount = \"/var/lib/dozed-mnt\"").is_ok());
}

#[test]
fn a_runtime_directory_too_long_for_sockets_is_refused() {
    let long = format!("runtime = \"/{}\"", "r".repeat(RUNTIME_MAX_BYTES));
    let error = parse(&long).unwrap_err();
    assert!(error.message.contains("at most 64 bytes"), "{error}");
}

#[test]
fn a_file_is_read_and_what_it_names_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dozed.toml");
    let load = |text: &str| {
        std::fs::write(&file, text).unwrap();
        Config::load(&file).map_err(|error| error.to_string())
    };
    let here = file.display();
    assert_eq!(load("[limits]\nwakes = 3").unwrap().limits.wakes, 3);
    assert_eq!(
        load("\n[template]\nkernel = \"/no/such\"").unwrap_err(),
        format!("{here}:3: `kernel`: /no/such: there is no such file; write the path of one")
    );
    assert!(load("[template]\nkernel = \"/\"").unwrap_err().contains("is a directory"));
    std::fs::remove_file(&file).unwrap();
    let error = Config::load(&file).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{here}: there is no such file; name an")));
}

#[test]
fn a_file_without_end_is_refused() {
    let error = Config::load(Path::new("/dev/zero")).unwrap_err();
    let ConfigError::Read { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), io::ErrorKind::FileTooLarge);
}

#[test]
fn users_of_their_own_are_switched_off_by_a_word() {
    assert_eq!(parse("").unwrap().vmm.users, Some(Users::default()));
    assert_eq!(parse("[vmm]\nqemu = \"/bin/true\"").unwrap().vmm.users, Some(Users::default()));
    assert_eq!(parse("[vmm]\nusers = \"off\"").unwrap().vmm.users, None);
}

#[test]
fn a_template_that_allows_the_sandboxes_own_range_is_refused() {
    let text = "[network]\nrange = \"10.7.0.0/16\"\n[template]\nallowed = [\"10.7.1.0/24\"]";
    let error = parse(text).map(drop).unwrap_err();
    let says = "`10.7.1.0/24`, which cannot be allowed: it is in the range of sandboxes";
    assert!(error.message.contains(says), "{error}");
    parse("[template]\nallowed = [\"10.7.1.0/24\", \"10.0.0.0/8\"]").unwrap();
}
