//! The stand-in answers as the real program was measured to. Without these, a driver that
//! passes against it would prove nothing.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::Duration,
};

use dozed::sys::{clock::Stopwatch, command, process::Exit};
use serde_json::{Value, json};

use crate::{
    api::Running,
    support::{SOON, Standin, eventually},
};

const MIB: u64 = 1 << 20;

fn shared(mib: u64) -> Value {
    json!({ "size": mib * MIB, "shared": true })
}

/// Waits until the guest has counted so far, and returns its last whole line.
fn counted(running: &Running, lines: usize) -> String {
    eventually("the count", || {
        let printed = running.printed();
        let whole: Vec<_> = printed.lines().filter(|line| line.starts_with("count ")).collect();
        (whole.len() > lines).then(|| whole[whole.len() - 2].to_owned())
    })
}

fn count_of(line: &str) -> u32 {
    u32::from_str_radix(line.split(' ').nth(1).unwrap(), 16).unwrap()
}

fn chain(answer: &(u16, Value)) -> Vec<String> {
    serde_json::from_value(answer.1.clone()).unwrap()
}

/// Pauses, and makes a directory for the snapshot.
fn pause_for_snapshot(running: &Running, name: &str) -> Value {
    running.must("vm.pause");
    fs::create_dir(running.path(name)).unwrap();
    json!({ "destination_url": running.url(name) })
}

#[test]
fn the_program_tells_its_version_and_refuses_what_it_does_not_know() {
    for (version, lines) in [("53.0", 2), ("52.0", 1)] {
        let standin = Standin::new(version);
        let program = standin.program();
        let said = command::output(&program, &["--version"], SOON).unwrap();
        assert!(said.stdout.starts_with(&format!("cloud-hypervisor v{version}\n")));
        assert_eq!(said.stdout.lines().count(), lines);
        for (wrong, code) in [
            (&["--frobnicate"][..], 2),
            (&["--seccomp", "maybe"], 2),
            (&["--landlock"], 2),
            (&[], 2),
            (&["--event-monitor", "path=/tmp/a, b"], 1),
            (&["--api-socket", "fd=200"], 1),
        ] {
            let said = command::output(&program, wrong, SOON).unwrap();
            assert_eq!(said.status.code(), Some(code), "{wrong:?}");
        }
    }
}

#[test]
fn http_is_spoken_as_narrowly_as_by_the_real_one() {
    let running = Running::start(&Standin::new("53.0"));
    let (status, ping) = running.get("vmm.ping");
    assert_eq!((status, &ping["version"]), (200, &json!("53.0.0")));
    assert_eq!(ping["pid"], json!(running.process.identity().pid));
    assert_eq!(running.put("vmm.ping"), (400, json!(["Bad Request"])));
    assert_eq!(running.get("vm.boot"), (400, json!(["Bad Request"])));
    assert_eq!(running.get("vm.frobnicate"), (404, json!(["Not Found"])));
    assert_eq!(running.ask("GET / HTTP/1.1\r\n\r\n"), (404, json!(["Not Found"])));
    // What takes no body takes none; what takes one needs it, with its length.
    assert_eq!(running.put_with("vm.boot", &json!({})).0, 400);
    assert_eq!(running.put("vm.create"), (400, Value::Null));
    assert_eq!(running.put("vm.snapshot"), (400, json!(["Bad Request"])));
    let chunks = "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    let chunked = format!("PUT /api/v1/vm.create HTTP/1.1\r\n{chunks}");
    assert_eq!(running.ask(&chunked).0, 400);
    assert_eq!(running.ask("POST /api/v1/vm.boot HTTP/1.1\r\n\r\n").0, 400);
    let long = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 51201\r\n\r\n";
    assert_eq!(running.ask(long).0, 400);
    let expects = "PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2";
    assert!(running.exchange(&format!("{expects}\r\n\r\n")).starts_with("HTTP/1.1 100 \r\n"));
    let bare = running.exchange("PUT /api/v1/vm.delete HTTP/1.1\r\n\r\n");
    assert!(bare.starts_with("HTTP/1.1 204 \r\n"), "{bare}");
    assert!(!bare.contains("Content-Length"), "{bare}");
}

#[test]
fn one_connection_takes_any_number_of_requests() {
    for version in ["44.0", "53.0"] {
        let running = Running::start(&Standin::new(version));
        let mut stream = running.connect();
        let mut ask = |request: &str| {
            let answer = Running::exchange_by(&mut stream, &format!("{request}\r\n\r\n"));
            let (head, _) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.contains("\r\nConnection: keep-alive"), "{head}");
            head.split(' ').nth(1).unwrap().to_owned()
        };
        // A refusal ends it no more than a success does.
        assert_eq!(ask("GET /api/v1/vmm.ping HTTP/1.1"), "200");
        assert_eq!(ask("PUT /api/v1/vm.frobnicate HTTP/1.1"), "404");
        assert_eq!(ask("PUT /api/v1/vm.delete HTTP/1.1"), "204");
        assert_eq!(ask("PUT /api/v1/vm.pause HTTP/1.1"), "500");
        // Others are answered meanwhile.
        assert_eq!(running.get("vmm.ping").0, 200);
        assert_eq!(ask("GET /api/v1/vmm.ping HTTP/1.1"), "200");
    }
}

#[test]
fn a_description_is_taken_as_serde_takes_it() {
    let running = Running::start(&Standin::new("53.0"));
    let mut config = running.config(&shared(64), "");
    config["memory"]["shared"] = json!("yes");
    assert_eq!(running.put_with("vm.create", &config).0, 400);
    config["memory"]["shared"] = json!(true);
    config["serial"]["mode"] = json!("Loud");
    let refused = running.put_with("vm.create", &config);
    assert_eq!(refused.0, 400);
    assert_eq!(chain(&refused)[0], "Failed to deserialize JSON");
    assert!(chain(&refused)[1].starts_with("unknown variant `Loud`"), "{refused:?}");
    config["serial"]["mode"] = json!("File");
    config["no_such_field"] = json!(7);
    running.must_with("vm.create", &config);
    let (_, info) = running.get("vm.info");
    assert_eq!(info["state"], "Created");
    assert_eq!(info["config"].get("no_such_field"), None);
    let again = running.put_with("vm.create", &config);
    assert_eq!(again.0, 500);
    assert_eq!(chain(&again)[1..], ["The VM could not be created", "VM is already created"]);
}

#[test]
fn the_wrong_state_is_a_500_with_the_whole_chain() {
    let running = Running::start(&Standin::new("53.0"));
    let wanted = ["Error from API", "The VM could not be paused", "VM is not running"];
    assert_eq!(running.put("vm.pause"), (500, json!(wanted)));
    assert_eq!(running.get("vm.info").0, 404);
    assert_eq!(running.put("vm.boot").0, 404);
    running.boot(&shared(64), "");
    running.must("vm.pause");
    let wanted = [
        "Error from API",
        "The VM could not be paused",
        "Cannot pause VM",
        "Failed to pause migratable component",
        "Invalid transition: InvalidStateTransition(Paused, Paused)",
    ];
    assert_eq!(running.put("vm.pause"), (500, json!(wanted)));
    running.must("vm.resume");
    assert_eq!(running.put("vm.resume").0, 500);
    let url = json!({ "destination_url": running.url("") });
    let refused = chain(&running.put_with("vm.snapshot", &url));
    assert_eq!(refused.last().unwrap(), "Trying to snapshot while VM is running");
    // Before v53 what is not there is no 404, and before v47 a chain is a text.
    let running = Running::start(&Standin::new("46.0"));
    let (status, said) = running.get("vm.info");
    assert_eq!(status, 500);
    assert!(said.as_str().unwrap().ends_with("VM is not created"), "{said}");
}

#[test]
fn a_guest_runs_from_the_boot_on_and_counts_on_after_a_restore() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    running.must_with("vm.create", &running.config(&shared(64), "touch=2 seed=5"));
    assert_eq!(running.printed(), "");
    running.must("vm.boot");
    counted(&running, 3);
    let url = pause_for_snapshot(&running, "snapshot");
    running.must_with("vm.snapshot", &url);
    let before = running.printed();
    let last = before.lines().last().unwrap().to_owned();
    let source = json!({ "source_url": running.url("snapshot") });
    let running = Running::start_in(&standin, running.kill());
    running.must_with("vm.restore", &source);
    // The file was emptied.
    assert_eq!(running.printed(), "");
    assert_eq!(running.get("vm.info").1["state"], "Paused");
    running.must("vm.resume");
    counted(&running, 2);
    let first = running.printed().lines().next().unwrap().to_owned();
    assert_eq!(count_of(&first), count_of(&last) + 1);
    assert_eq!(first.split(' ').nth(3), last.split(' ').nth(3));
    // There is a configuration now, and so no other restore.
    assert_eq!(running.put_with("vm.restore", &source).0, 500);
}

#[test]
fn a_snapshot_is_refused_where_it_cannot_be_and_leaves_what_it_wrote() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    running.boot(&shared(64), "");
    counted(&running, 1);
    running.must("vm.pause");
    let to = |name: &str| json!({ "destination_url": running.url(name) });
    let refused = running.put_with("vm.snapshot", &to("nowhere"));
    assert!(chain(&refused).last().unwrap().starts_with("Destination is not a directory: "));
    for (present, written) in [("config.json", 1), ("state.json", 2), ("memory-ranges", 3)] {
        let dir = running.path(present.split('.').next().unwrap());
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(present), "").unwrap();
        let name = dir.file_name().unwrap().to_str().unwrap();
        let refused = running.put_with("vm.snapshot", &to(name));
        assert_eq!(refused.0, 500);
        assert_eq!(chain(&refused).last().unwrap(), "File exists (os error 17)");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), written, "{present}");
    }
    // The event came, each time.
    let events = fs::read_to_string(running.path("events")).unwrap();
    assert_eq!(events.matches("\"snapshotted\"").count(), 4);
    assert_eq!(running.get("vm.info").1["state"], "Paused");
    running.must("vm.resume");
    let mode = fs::metadata(running.path("state/config.json")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn only_shared_memory_is_saved_sparsely_and_a_file_of_ours_not_at_all() {
    for (version, memory, least, most) in [
        ("53.0", shared(64), 1, 4 * MIB),
        ("51.1", shared(64), 64 * MIB, 65 * MIB),
        ("53.0", json!({ "size": 64 * MIB }), 64 * MIB, 65 * MIB),
    ] {
        let running = Running::start(&Standin::new(version));
        running.boot(&memory, "");
        counted(&running, 1);
        let url = pause_for_snapshot(&running, "snapshot");
        running.must_with("vm.snapshot", &url);
        let meta = fs::metadata(running.path("snapshot/memory-ranges")).unwrap();
        assert_eq!(meta.len(), 64 * MIB);
        assert!((least..=most).contains(&(meta.blocks() * 512)), "{version} {memory} {meta:?}");
    }
    let running = Running::start(&Standin::new("53.0"));
    let file = running.path("memory");
    fs::write(&file, "").unwrap();
    let zone = |size| json!({ "id": "mem0", "size": size, "file": file, "shared": true });
    let memory = json!({ "size": 0, "zones": [zone(64 * MIB)] });
    running.must_with("vm.create", &running.config(&memory, ""));
    fs::File::options().write(true).open(&file).unwrap().set_len(64 * MIB).unwrap();
    running.must("vm.boot");
    counted(&running, 1);
    let url = pause_for_snapshot(&running, "snapshot");
    running.must_with("vm.snapshot", &url);
    assert!(!running.path("snapshot/memory-ranges").exists());
    assert!(fs::metadata(&file).unwrap().blocks() > 0);
}

#[test]
fn memory_in_a_file_is_taken_as_it_is_found() {
    let zone = |file: &Path| {
        let zone = json!({ "id": "mem0", "size": 64 * MIB, "file": file, "shared": true });
        json!({ "size": 0, "zones": [zone] })
    };
    let standin = Standin::new("53.0");
    let boot = |running: &Running| {
        running.must_with("vm.create", &running.config(&zone(&running.path("memory")), ""));
        running.put("vm.boot")
    };
    let running = Running::start(&standin);
    let last = |answer: &(u16, Value)| chain(answer).split_off(2);
    let gone = boot(&running);
    assert_eq!(gone.0, 500);
    assert_eq!(
        last(&gone),
        [
            "Memory manager error",
            "Failed to stat filesystem",
            "No such file or directory (os error 2)"
        ]
    );
    let running = Running::start(&standin);
    fs::create_dir(running.path("memory")).unwrap();
    let said = "Using a directory as a backing file for memory is not supported";
    assert_eq!(last(&boot(&running)), ["Memory manager error", said]);
    // That it is too short is found out by who uses what is not there.
    let running = Running::start(&standin);
    fs::write(running.path("memory"), "").unwrap();
    let config = running.config(&zone(&running.path("memory")), "");
    running.must_with("vm.create", &config);
    running.exchange("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    assert_eq!(running.process.wait(SOON), Some(Exit::Signal(7)));
}

#[test]
fn a_guest_is_told_the_time_before_it_runs() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    let file = running.path("memory");
    File::create(&file).unwrap().set_len(64 * MIB).unwrap();
    let zone = json!({ "id": "mem0", "size": 64 * MIB, "file": file, "shared": true });
    running.boot(&json!({ "size": 0, "zones": [zone] }), "");
    counted(&running, 1);
    let url = pause_for_snapshot(&running, "snapshot");
    running.must_with("vm.snapshot", &url);
    let running = Running::start_in(&standin, running.kill());
    let before = fs::read(&file).unwrap();
    let source =
        json!({ "source_url": running.url("snapshot"), "memory_restore_mode": "OnDemand" });
    // There is nothing to load, so it does not matter how.
    running.must_with("vm.restore", &source);
    assert!(before != fs::read(&file).unwrap());
    assert_eq!(running.get("vm.info").1["state"], "Paused");
}

#[test]
fn what_landlock_does_not_cover_cannot_be_written_to() {
    let running = Running::start(&Standin::new("53.0"));
    let mut config = running.config(&shared(64), "");
    fs::create_dir(running.path("covered")).unwrap();
    config["landlock_enable"] = json!(true);
    config["landlock_rules"] = json!([{ "path": running.path("covered"), "access": "rw" }]);
    running.must_with("vm.create", &config);
    running.must("vm.boot");
    counted(&running, 1);
    let url = pause_for_snapshot(&running, "outside");
    let refused = running.put_with("vm.snapshot", &url);
    assert_eq!(chain(&refused).last().unwrap(), "Permission denied (os error 13)");
    fs::create_dir(running.path("covered/snapshot")).unwrap();
    let inside = json!({ "destination_url": running.url("covered/snapshot") });
    running.must_with("vm.snapshot", &inside);
    // A rule for what is not there is found out at the boot.
    let running = Running::start(&Standin::new("54.0.0"));
    config["landlock_rules"][0]["path"] = json!("/nowhere");
    running.must_with("vm.create", &config);
    assert_eq!(running.put("vm.boot").0, 400);
}

#[test]
fn nothing_is_answered_while_a_snapshot_is_written() {
    let standin = Standin::new("53.0");
    standin.set_faults(&json!([{ "endpoint": "vm.snapshot", "act": { "slow": 300 } }]));
    let running = Running::start(&standin);
    running.boot(&shared(64), "");
    let url = pause_for_snapshot(&running, "snapshot");
    thread::scope(|scope| {
        // It is slow from when it was asked, which is after this, however busy the host is.
        let watch = Stopwatch::start();
        scope.spawn(|| running.must_with("vm.snapshot", &url));
        eventually("the request", || {
            standin.calls().iter().any(|call| call.contains("vm.snapshot")).then_some(())
        });
        assert_eq!(running.get("vmm.ping").0, 200);
        assert!(watch.elapsed() >= Duration::from_millis(300), "{:?}", watch.elapsed());
    });
}

#[test]
fn what_is_left_of_sockets_is_in_the_way() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    drop(UnixListener::bind(running.path("serial.sock")).unwrap());
    drop(UnixListener::bind(running.path("vsock")).unwrap());
    let mut config = running.config(&shared(64), "");
    config["serial"] = json!({ "mode": "Socket", "socket": running.path("serial.sock") });
    config["vsock"] = json!({ "cid": 3, "socket": running.path("vsock") });
    let refused = running.put_with("vm.create", &config);
    assert_eq!(chain(&refused).last().unwrap(), "Address already in use (os error 98)");
    // It holds the description nevertheless.
    assert_eq!(running.put_with("vm.create", &config).0, 500);
    running.must("vm.delete");
    fs::remove_file(running.path("serial.sock")).unwrap();
    running.must_with("vm.create", &config);
    let refused = chain(&running.put("vm.boot"));
    assert!(refused.contains(&"Cannot create virtio-vsock backend".to_owned()), "{refused:?}");
    fs::remove_file(running.path("vsock")).unwrap();
    running.must("vm.boot");
}

#[test]
fn a_vsock_needs_its_directory_before_the_program_shuts_itself_in_and_after() {
    let running = Running::start(&Standin::new("53.0"));
    let mut config = running.config(&shared(64), "");
    let socket = running.path("v/vsock.sock");
    config["vsock"] = json!({ "cid": 2, "socket": socket });
    running.must_with("vm.create", &config);
    let refused = chain(&running.put("vm.boot"));
    assert!(refused.contains(&"2 is a special VSOCK CID".to_owned()), "{refused:?}");
    running.must("vm.delete");

    config["vsock"]["cid"] = json!(3);
    config["landlock_enable"] = json!(true);
    running.must_with("vm.create", &config);
    let said = |answer| chain(&answer).last().unwrap().clone();
    assert_eq!(said(running.put("vm.boot")), "No such file or directory (os error 2)");
    fs::create_dir(running.path("v")).unwrap();
    assert_eq!(said(running.put("vm.boot")), "Permission denied (os error 13)");
    drop(running);

    let running = Running::start(&Standin::new("53.0"));
    fs::create_dir(running.path("v")).unwrap();
    let socket = running.path("v/vsock.sock");
    let mut config = running.config(&shared(64), "");
    config["vsock"] = json!({ "cid": 3, "socket": socket });
    running.must_with("vm.create", &config);
    running.must("vm.boot");
    let url = pause_for_snapshot(&running, "saved");
    running.must_with("vm.snapshot", &url);
    // Nobody answers for a guest that does not run.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"CONNECT 52\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    stream.read_exact(&mut [0]).unwrap_err();
    running.must("vm.resume");
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.read_exact(&mut [0; 3]).unwrap();
    running.must("vm.delete");
    assert!(!socket.exists());

    let source = json!({ "source_url": running.url("saved") });
    drop(UnixListener::bind(&socket).unwrap());
    assert_eq!(
        said(running.put_with("vm.restore", &source)),
        "Address already in use (os error 98)"
    );
    fs::remove_dir_all(running.path("v")).unwrap();
    let missing = "No such file or directory (os error 2)";
    assert_eq!(said(running.put_with("vm.restore", &source)), missing);
    fs::create_dir(running.path("v")).unwrap();
    running.must_with("vm.restore", &source);
}

#[test]
fn a_disk_is_locked_against_another_and_free_once_its_vmm_is_dead() {
    let standin = Standin::new("53.0");
    let (one, other) = (Running::start(&standin), Running::start(&standin));
    fs::write(one.path("disk"), [0; 512]).unwrap();
    for running in [&one, &other] {
        let mut config = running.config(&shared(64), "");
        config["disks"] = json!([{ "path": one.path("disk"), "image_type": "Raw" }]);
        running.must_with("vm.create", &config);
    }
    one.must("vm.boot");
    let refused = chain(&other.put("vm.boot"));
    let wanted = "Error locking disk images: Another instance likely holds a lock";
    assert!(refused.contains(&wanted.to_owned()), "{refused:?}");
    // The VM is there, and was not started: a second try is another mistake.
    assert_eq!(chain(&other.put("vm.boot"))[2], "VM is already created");
    let _dir = one.kill();
    other.must("vm.delete");
}

#[test]
fn a_torn_snapshot_is_refused_and_the_next_try_is_free() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    running.boot(&shared(64), "");
    counted(&running, 1);
    let url = pause_for_snapshot(&running, "snapshot");
    running.must_with("vm.snapshot", &url);
    let source = json!({ "source_url": running.url("snapshot") });
    let running = Running::start_in(&standin, running.kill());
    let state = fs::read(running.path("snapshot/state.json")).unwrap();
    fs::write(running.path("snapshot/state.json"), &state[..state.len() / 2]).unwrap();
    let refused = chain(&running.put_with("vm.restore", &source));
    assert!(refused.contains(&"Error deserialising VM state snapshot".to_owned()), "{refused:?}");
    assert_eq!(running.get("vm.info").0, 404);
    fs::write(running.path("snapshot/state.json"), &state).unwrap();
    let memory = running.path("snapshot/memory-ranges");
    fs::copy(&memory, running.path("kept")).unwrap();
    fs::remove_file(&memory).unwrap();
    let refused = chain(&running.put_with("vm.restore", &source));
    assert!(refused.contains(&"Error opening snapshot file".to_owned()), "{refused:?}");
    fs::copy(running.path("kept"), &memory).unwrap();
    running.must_with("vm.restore", &source);
}

#[test]
fn ways_to_restore_go_by_the_version() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    running.boot(&shared(512), "");
    counted(&running, 1);
    let url = pause_for_snapshot(&running, "snapshot");
    running.must_with("vm.snapshot", &url);
    let by = |running: &Running, mode: &str| {
        let source = running.url("snapshot");
        running
            .put_with("vm.restore", &json!({ "source_url": source, "memory_restore_mode": mode }))
    };
    let dir = running.kill();
    let mut dir = Some(dir);
    for (version, mode, status) in [
        ("51.0", "Whatever", 204),
        ("52.0", "CopyOnWrite", 400),
        ("53.0", "CopyOnWrite", 400),
        ("54.0", "CopyOnWrite", 204),
        ("53.0", "Copy", 204),
    ] {
        let running = Running::start_in(&Standin::new(version), dir.take().unwrap());
        assert_eq!(by(&running, mode).0, status, "{version} {mode}");
        dir = Some(running.kill());
    }
    // On demand fills everything, and no snapshot is taken meanwhile.
    let loading = |millis| json!({ "version": "53.0", "loading_millis": millis });
    standin.set_knobs(&loading(3_600_000));
    let running = Running::start_in(&standin, dir.take().unwrap());
    assert_eq!(by(&running, "OnDemand").0, 204);
    fs::create_dir(running.path("next")).unwrap();
    let url = json!({ "destination_url": running.url("next") });
    let early = chain(&running.put_with("vm.snapshot", &url));
    assert_eq!(early.last().unwrap(), "VM on-demand memory restore is still in progress");
    standin.set_knobs(&loading(0));
    eventually("the memory", || (running.put_with("vm.snapshot", &url).0 == 204).then_some(()));
    let meta = fs::metadata(running.path("next/memory-ranges")).unwrap();
    assert!(meta.blocks() * 512 >= 512 * MIB, "{meta:?}");
}

#[test]
fn a_balloon_gives_back_what_the_guest_has_no_use_for() {
    let running = Running::start(&Standin::new("53.0"));
    let mut config = running.config(&shared(256), "garbage=64");
    running.must_with("vm.create", &config);
    running.must("vm.boot");
    counted(&running, 1);
    assert_eq!(running.put_with("vm.resize", &json!({ "desired_balloon": MIB })).0, 500);
    let before = running.process.memfd_bytes().unwrap();
    assert!(before > 64 * MIB, "{before}");
    drop(running);

    let running = Running::start(&Standin::new("53.0"));
    config["serial"]["file"] = json!(running.path("serial"));
    config["payload"]["kernel"] = json!(running.path("kernel"));
    config["balloon"] = json!({ "size": 0, "deflate_on_oom": true });
    fs::write(running.path("kernel"), b"\x7fELF").unwrap();
    running.must_with("vm.create", &config);
    running.must("vm.boot");
    running.must_with("vm.resize", &json!({ "desired_balloon": 128 * MIB }));
    eventually("the memory", || {
        let (_, info) = running.get("vm.info");
        (info["memory_actual_size"] == json!(128 * MIB)).then_some(())
    });
    let after = running.process.memfd_bytes().unwrap();
    assert!(after < 8 * MIB, "{after}");
}

#[test]
fn a_guest_that_turns_the_machine_off_ends_the_program() {
    let running = Running::start(&Standin::new("53.0"));
    running.boot(&shared(64), "quit=2");
    assert_eq!(running.process.wait(SOON), Some(Exit::Code(0)));
    assert!(running.printed().ends_with("counter guest quits\n"), "{}", running.printed());
    let running = Running::start(&Standin::new("53.0"));
    assert_eq!(running.put("vmm.shutdown"), (200, Value::Null));
    assert_eq!(running.process.wait(SOON), Some(Exit::Code(0)));
}

#[test]
fn whatever_a_test_wants_to_go_wrong_goes_wrong() {
    let standin = Standin::new("53.0");
    let running = Running::start(&standin);
    let error = json!({ "error": { "status": 500, "chain": ["No", "Way"] } });
    standin.set_faults(&json!([{ "endpoint": "vmm.ping", "call": 2, "act": error }]));
    let calls = [(); 3].map(|()| running.get("vmm.ping").0);
    assert_eq!(calls, [200, 500, 200]);
    standin.set_faults(&json!([{ "endpoint": "vmm.ping", "act": "half" }]));
    let half = running.exchange("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
    assert!(half.starts_with("HTTP/1.1 200 ") && !half.contains("features"), "{half}");
    standin.set_faults(&json!([{ "endpoint": "vmm.ping", "act": { "say": "hello" } }]));
    assert_eq!(running.exchange("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"), "hello");
    standin.set_faults(&json!([{ "endpoint": "vmm.ping", "act": "die" }]));
    assert_eq!(running.exchange("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"), "");
    assert_eq!(running.process.wait(SOON), Some(Exit::Signal(9)));
    // A misspelt knob is no fault that never comes.
    standin.set_knobs(&json!({ "versoin": "53.0" }));
    let said = command::output(&standin.program(), &["--version"], SOON).unwrap();
    assert_eq!(said.status.code(), Some(1));
}
