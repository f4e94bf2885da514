//! What is said to the program, by its version.

use serde_json::{Value, json};

use super::{
    super::body::{LandlockRule, RestoreSource, VmConfig, adapt},
    *,
};

fn version(text: &str) -> Version {
    Version::parse(text).unwrap()
}

fn rules() -> Vec<LandlockRule> {
    vec![LandlockRule { path: "/store/7".into(), access: "rw" }]
}

#[test]
fn a_machine_is_described_by_what_its_plan_says_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(&dir);
    let config = VmConfig::new(&plan, None, version("53.0"), Some(rules()));
    assert_eq!(
        serde_json::to_value(&config).unwrap(),
        json!({
            "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
            "memory": { "size": 256 << 20, "shared": true, "thp": false },
            "payload": { "kernel": "/proc/self/fd/202", "cmdline": "console=ttyS0" },
            "disks": [
                { "path": "/proc/self/fd/210", "readonly": false, "image_type": "Raw" },
                { "path": "/proc/self/fd/211", "readonly": true, "image_type": "Raw" },
            ],
            "rng": { "src": "/dev/urandom" },
            "balloon": { "size": 0, "deflate_on_oom": true, "free_page_reporting": true },
            "serial": { "mode": "Tty" },
            "console": { "mode": "Off" },
            "landlock_enable": true,
            "landlock_rules": [{ "path": "/store/7", "access": "rw" }],
        })
    );
}

#[test]
fn a_machine_without_a_balloon_is_described_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan { balloon: false, ..plan(&dir) };
    let config = VmConfig::new(&plan, None, version("53.0"), None);
    assert_eq!(serde_json::to_value(&config).unwrap().get("balloon"), None);
}

#[test]
fn a_vsock_is_described_and_loaded_where_it_is_today() {
    let dir = tempfile::tempdir().unwrap();
    let vsock = PlannedVsock::new(Path::new("/run/d/7"), Owner { uid: 7, gid: 7 });
    let plan = Plan { vsock: Some(vsock), disks: Vec::new(), ..plan(&dir) };
    let config = VmConfig::new(&plan, None, version("53.0"), None);
    let described = serde_json::to_value(&config).unwrap()["vsock"].clone();
    assert_eq!(described, json!({ "cid": 3, "socket": "/proc/self/fd/201/vsock/vsock.sock" }));

    let mut saved = json!({ "vsock": { "cid": 3, "id": "_vsock0", "socket": "/old" } });
    let without = Plan { vsock: None, ..plan.clone() };
    for (config, plan) in [(&mut saved.clone(), &without), (&mut json!({}), &plan)] {
        let said = adapt(config, plan, None, None).unwrap_err();
        assert!(said.contains("only one of snapshot and sandbox has a vsock"), "{said}");
    }
    adapt(&mut saved, &plan, None, None).unwrap();
    let expected =
        json!({ "cid": 3, "id": "_vsock0", "socket": "/proc/self/fd/201/vsock/vsock.sock" });
    assert_eq!(saved["vsock"], expected);
}

#[test]
fn a_network_device_is_that_of_the_tap_and_nothing_of_the_tap_is_to_be_set() {
    let dir = tempfile::tempdir().unwrap();
    let nic = PlannedNic { namespace: "/pin".into(), tap: "tap7".to_owned(), mac: GUEST_MAC };
    let plan = Plan { nic: Some(nic), disks: Vec::new(), ..plan(&dir) };
    let config = VmConfig::new(&plan, None, version("53.0"), None);
    let described = serde_json::to_value(&config).unwrap()["net"].clone();
    let device = json!({
        "id": "net0", "tap": "tap7", "mac": "02:fc:00:00:00:05", "num_queues": 2, "queue_size": 256,
    });
    assert_eq!(described, json!([device]));

    let saved = json!({
        "net": [{ "id": "net0", "tap": "tap6", "host_mac": "02:fc:00:00:00:07", "mtu": null }]
    });
    let mut config = saved.clone();
    adapt(&mut config, &plan, None, None).unwrap();
    let expected = json!({ "id": "net0", "tap": "tap7", "host_mac": null, "mtu": null });
    assert_eq!(config["net"], json!([expected]));

    let without = Plan { nic: None, ..plan.clone() };
    let two = json!({ "net": [{}, {}] });
    for (mut config, plan) in [(saved, &without), (json!({}), &plan), (two, &plan)] {
        let said = adapt(&mut config, plan, None, None).unwrap_err();
        assert!(said.contains("do not have the same network"), "{said}");
    }
}

#[test]
fn memory_in_a_file_is_a_piece_of_its_own_and_nothing_else_is_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = Path::new("/proc/self/fd/7");
    let plan = plan(&dir);
    let config = VmConfig::new(&plan, Some(file), version("44.0"), None);
    let zone = json!({ "id": "mem0", "size": 256 << 20, "file": file, "shared": true });
    assert_eq!(
        serde_json::to_value(&config).unwrap()["memory"],
        json!({ "size": 0, "shared": false, "thp": false, "zones": [zone] })
    );
}

#[test]
fn an_old_version_is_not_told_what_it_would_ignore() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(&dir);
    let disk = |text| {
        let config = VmConfig::new(&plan, None, version(text), None);
        serde_json::to_value(&config).unwrap()["disks"][0].clone()
    };
    assert_eq!(disk("50.0").get("image_type"), None);
    assert_eq!(disk("50.1")["image_type"], "Raw");
    let restore = |text| {
        let url = "file:///s".to_owned();
        let source = RestoreSource::new(url, RestoreMode::Auto, version(text)).unwrap();
        serde_json::to_value(&source).unwrap()
    };
    assert_eq!(restore("51.1"), json!({ "source_url": "file:///s", "prefault": false }));
    assert_eq!(restore("52.0")["memory_restore_mode"], "Copy");
}

#[test]
fn a_snapshot_is_loaded_with_the_disks_and_the_rules_of_today() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(&dir);
    let saved = json!({
        "disks": [{ "id": "_disk0", "path": "/old/0" }, { "id": "_disk1", "path": "/old/1" }],
        "landlock_rules": [{ "path": "/old", "access": "rw" }],
        "cpus": { "boot_vcpus": 2 },
        "payload": { "kernel": "/old/kernel", "initramfs": null, "cmdline": "quiet" },
    });
    let mut config = saved.clone();
    adapt(&mut config, &plan, None, Some(&rules())).unwrap();
    assert_eq!(config["disks"][0], json!({ "id": "_disk0", "path": "/proc/self/fd/210" }));
    assert_eq!(config["disks"][1]["path"], "/proc/self/fd/211");
    assert_eq!(
        config["payload"],
        json!({ "kernel": "/proc/self/fd/202", "initramfs": null, "cmdline": "quiet" })
    );
    assert_eq!(config["landlock_rules"], json!([{ "path": "/store/7", "access": "rw" }]));
    assert_eq!(config["landlock_enable"], true);
    assert_eq!(config["cpus"], saved["cpus"]);

    adapt(&mut config, &plan, None, None).unwrap();
    assert_eq!(
        (&config["landlock_enable"], &config["landlock_rules"]),
        (&json!(false), &Value::Null)
    );

    for (wrong, says) in [
        (json!({ "disks": null }), "the snapshot has 0 disks, and the sandbox has 2"),
        (json!([]), "the snapshot has 0 disks, and the sandbox has 2"),
    ] {
        let mut config = wrong;
        assert_eq!(adapt(&mut config, &plan, None, None), Err(says.to_owned()));
    }
    let plan = Plan { disks: Vec::new(), ..plan };
    assert_eq!(
        adapt(&mut json!([]), &plan, None, None),
        Err("its config.json is not an object".to_owned())
    );
    adapt(&mut json!({}), &plan, None, None).unwrap();
}
