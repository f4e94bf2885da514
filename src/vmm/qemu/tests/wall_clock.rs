//! States that the real QEMU saved, as they are and with something else in them.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
};

use serde_json::{Value, json};

use super::{
    counter::{assert_whole, counter_host, last_count, wait_for_count},
    *,
};
use crate::vmm::{
    nic::tests::Pinned,
    qemu::wall_clock::{forget, places, read},
};

const REGISTER: usize = 8;
/// Where a guest may want its wall clock: the last page of its memory, which it does not use.
const SOMEWHERE: u64 = (256 << 20) - 4096;

/// Returns the state of a machine with `vcpus` that has run nothing.
fn state_of(vcpus: u8) -> Vec<u8> {
    state_with(vcpus, None)
}

/// Returns the same of one with a network device, if there is a tap for it.
fn state_with(vcpus: u8, pinned: Option<&Pinned>) -> Vec<u8> {
    let qemu = Qemu::find().unwrap();
    let mut host = counter_host("");
    host.plan.vcpus = vcpus;
    host.plan.nic = pinned.map(|pinned| pinned.nic.clone());
    let dir = host.snapshot_dir("snapshot");
    qemu.boot(&host.plan).unwrap().save(&dir).unwrap();
    fs::read(dir.join("vmstate")).unwrap()
}

fn number_at(stream: &[u8], place: usize) -> u64 {
    u64::from_be_bytes(stream[place..place + REGISTER].try_into().unwrap())
}

/// Has each register in `state` say that the guest wants its wall clock somewhere.
fn want_clocks(state: &Path, places: &[usize]) -> Vec<u8> {
    let file = File::options().write(true).open(state).unwrap();
    for place in places {
        file.write_all_at(&SOMEWHERE.to_be_bytes(), u64::try_from(*place).unwrap()).unwrap();
    }
    fs::read(state).unwrap()
}

/// Returns the state as QEMU saves it without us.
fn save_by_qemu(host: &Host, process: &Arc<Process>) -> Vec<u8> {
    let path = host.path("by qemu");
    let peer = peer(host, process);
    let mut qmp = qmp::Qmp::open(&peer, "testing", SOON).unwrap();
    qmp.hand_over("state", File::create_new(&path).unwrap().as_fd()).unwrap();
    qmp.run("migrate", &json!({ "uri": "fd:state" }), SOON).unwrap();
    assert_eq!(qmp.wait_for_migration("migrate", SOON).unwrap(), qmp::Migration::Completed);
    fs::read(path).unwrap()
}

/// Returns `stream` with another description.
fn described(stream: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let at = stream.windows(12).rposition(|bytes| bytes == br#"{"page_size""#).unwrap();
    let mut description: Value = serde_json::from_slice(&stream[at..]).unwrap();
    edit(&mut description);
    let text = description.to_string();
    let length = u32::try_from(text.len()).unwrap();
    [&stream[..at - 4], &length.to_be_bytes(), text.as_bytes()].concat()
}

/// Returns the description of the first CPU.
fn cpu(description: &mut Value) -> &mut Value {
    let devices = description["devices"].as_array_mut().unwrap();
    devices.iter_mut().find(|device| device["name"] == "cpu").unwrap()
}

/// Returns the description of that field of the first CPU.
fn wall_clock(description: &mut Value) -> &mut Value {
    let fields = cpu(description)["fields"].as_array_mut().unwrap();
    fields.iter_mut().find(|field| field["name"] == "env.wall_clock_msr").unwrap()
}

#[test]
fn the_register_of_each_cpu_is_where_qemu_has_it() {
    let pinned = Pinned::new();
    for (vcpus, pinned) in [(1, None), (3, None), (2, Some(&pinned))] {
        let stream = state_with(vcpus, pinned);
        let has_nic = stream.windows(10).any(|bytes| bytes == b"virtio-net");
        assert_eq!(has_nic, pinned.is_some());
        let places = places(&stream, vcpus).unwrap();
        assert_eq!(places.len(), usize::from(vcpus));
        for place in places {
            // After it comes XCR0 as it is at a reset. Before it are the registers for the
            // system time and TSC_AUX, and 40 of machine checks, every fourth with all bits.
            assert_eq!(number_at(&stream, place), 0);
            assert_eq!(number_at(&stream, place + REGISTER), 1);
            let banks = place - 42 * REGISTER;
            for bank in 0..40 {
                let wanted = if bank % 4 == 0 { u64::MAX } else { 0 };
                assert_eq!(number_at(&stream, banks + bank * REGISTER), wanted, "{bank}");
            }
        }
    }
}

#[test]
fn the_wall_clock_is_forgotten_and_nothing_else_and_the_guest_counts_on() {
    let qemu = Qemu::find().unwrap();
    for vcpus in [1, 3] {
        let mut host = counter_host("");
        host.plan.vcpus = vcpus;
        let mut machine = qemu.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        wait_for_count(&host, 1);
        machine.pause().unwrap();
        let dir = host.snapshot_dir("snapshot");
        machine.save(&dir).unwrap();
        end(&*machine);

        let path = dir.join("vmstate");
        let saved = fs::read(&path).unwrap();
        let places = places(&saved, vcpus).unwrap();
        let wanted = want_clocks(&path, &places);
        let changed = wanted.iter().zip(&saved).filter(|(one, other)| one != other).count();
        assert_eq!(changed, 3 * places.len());

        // QEMU has taken what is in the register, and saves it again. A save of ours has not.
        let machine = qemu.restore(&host.plan, &dir).unwrap();
        let by_qemu = save_by_qemu(&host, machine.process());
        end(&*machine);
        let mut machine = qemu.restore(&host.plan, &dir).unwrap();
        let again = host.snapshot_dir("again");
        machine.save(&again).unwrap();
        end(&*machine);
        let by_us = fs::read(again.join("vmstate")).unwrap();
        for place in &places {
            assert_eq!(number_at(&by_qemu, *place), SOMEWHERE);
            assert_eq!(number_at(&by_us, *place), 0);
        }

        let state = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(read(&state).unwrap(), wanted);
        forget(&state, &wanted, &places).unwrap();
        assert!(fs::read(&path).unwrap() == saved, "these bytes and no others");

        let mut machine = qemu.restore(&host.plan, &dir).unwrap();
        machine.resume().unwrap();
        wait_for_count(&host, last_count(&host) + 2);
        assert_whole(&host);
    }
}

#[test]
fn what_is_nought_already_is_not_written() {
    let host = Host::new();
    let path = host.path("vmstate");
    let stream = state_of(1);
    fs::write(&path, &stream).unwrap();
    let places = places(&stream, 1).unwrap();
    // A descriptor that is for reading only.
    forget(&File::open(&path).unwrap(), &stream, &places).unwrap();
    // This one would have to be, and cannot.
    let mut stream = stream;
    stream[places[0]] = 1;
    forget(&File::open(&path).unwrap(), &stream, &places).unwrap_err();
}

#[test]
fn a_second_register_and_one_that_has_moved_are_found() {
    let stream = state_of(1);
    let [place] = places(&stream, 1).unwrap()[..] else { panic!() };
    // What is XCR0 now may be the wall clock by its other number then.
    let two = described(&stream, |description| {
        let fields = cpu(description)["fields"].as_array_mut().unwrap();
        let next = fields.iter_mut().find(|field| field["name"] == "env.xcr0").unwrap();
        next["name"] = "env.wall_clock_new_msr".into();
    });
    assert_eq!(places(&two, 1), Ok(vec![place, place + REGISTER]));
    // And it may be in a part that is not always there, as the frequency is.
    let moved = described(&stream, |description| {
        wall_clock(description)["name"] = "env.other".into();
        let part = cpu(description)["subsections"].as_array_mut().unwrap().last_mut().unwrap();
        let fields = part["fields"].as_array_mut().unwrap();
        let last = fields.last_mut().unwrap();
        assert_eq!(last["size"], REGISTER);
        last["name"] = "env.wall_clock_msr".into();
    });
    let [place] = places(&moved, 1).unwrap()[..] else { panic!() };
    // The footer of the CPU's section is after it, and the next section after that.
    assert_eq!(moved[place + REGISTER], 0x7e);
    assert_eq!(moved[place + REGISTER + 5], 0x04);
}

#[test]
fn a_state_that_is_cut_off_is_not_known() {
    let stream = state_of(1);
    let places_of = |bytes: usize| places(&stream[..bytes], 1);
    for bytes in (0..stream.len()).step_by(997).chain([stream.len() - 1]) {
        places_of(bytes).expect_err(&format!("of {bytes} bytes"));
    }
    for other in [1, 2, 9] {
        places(&[stream.as_slice(), &vec![0x06; other]].concat(), 1).unwrap_err();
    }
    // What is before the devices does not matter.
    assert!(places(&stream[100..], 1).is_ok());
}

#[test]
fn what_is_not_as_described_is_not_known() {
    const PLACE: &str = "a device in another place";
    let stream = state_of(1);
    assert_eq!(places(b"", 1), Err("no description at its end"));
    assert_eq!(places(&[0x06; 4096], 1), Err("no description at its end"));
    assert_eq!(places(&fs::read(target_dir().join("counter.elf")).unwrap(), 1).ok(), None);
    assert_eq!(places(&stream, 2), Err("another count of CPUs"));
    assert_eq!(places(&described(&stream, |_| ()), 1), places(&stream, 1));
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit); 11] = [
        ("a description of another form", |all| *all = json!([])),
        ("a description of another form", |all| all["devices"] = json!([{ "name": "cpu" }])),
        ("a description of another form", |all| wall_clock(all)["size"] = json!(-8)),
        ("another count of CPUs", |all| all["devices"] = json!([])),
        ("another count of CPUs", |all| cpu(all)["name"] = "vcpu".into()),
        ("a CPU without wall clock", |all| wall_clock(all)["name"] = "env.wall".into()),
        ("a wall clock of another size", |all| wall_clock(all)["size"] = json!(4)),
        ("a wall clock of another size", |all| wall_clock(all)["array_len"] = json!(1)),
        ("a field of no length", |all| cpu(all)["fields"][0]["size"] = json!(u64::MAX)),
        (PLACE, |all| cpu(all)["fields"][0]["size"] = json!(16)),
        (PLACE, |all| cpu(all)["instance_id"] = json!(7)),
    ];
    for (why, edit) in edits {
        assert_eq!(places(&described(&stream, edit), 1), Err(why));
    }
    let more: [Edit; 3] = [
        |all| all["devices"].as_array_mut().unwrap().last_mut().unwrap()["name"] = "x".into(),
        |all| all["devices"].as_array_mut().unwrap().reverse(),
        |all| drop(all["devices"].as_array_mut().unwrap().pop()),
    ];
    for edit in more {
        assert_eq!(places(&described(&stream, edit), 1), Err(PLACE));
    }
    // Bytes that the way leads past: the last section's number, and the mark before it.
    let at = stream.windows(12).rposition(|bytes| bytes == br#"{"page_size""#).unwrap();
    for back in [7, 10, 11] {
        let mut other = stream.clone();
        other[at - back] ^= 1;
        places(&other, 1).expect_err(&format!("{back} bytes before the description"));
    }
}

#[test]
fn a_state_without_end_is_not_read() {
    let host = Host::new();
    let path = host.path("vmstate");
    let state = File::create_new(&path).unwrap();
    state.set_len((16 << 20) + 1).unwrap();
    let error = read(&File::open(&path).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "it has more than 16777216 bytes");
}
