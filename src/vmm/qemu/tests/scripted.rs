//! A QEMU that says what the test wants it to say.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    thread,
};

use super::{
    qmp::{Migration, Qmp},
    *,
};
use crate::sys::process::Launch;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}"#;
const OK: &str = r#"{"return": {}}"#;

/// What the other side does, in turn.
#[derive(Debug, Clone, Copy)]
enum Act {
    Say(&'static str),
    /// Reads a line, which has this in it.
    Hear(&'static str),
    /// Says so much of a line that never ends.
    Babble(usize),
    /// Says nothing more, until the other end hangs up.
    Hang,
}

use Act::{Babble, Hang, Hear, Say};

/// Has each connection to the socket of `host` go as one of `scripts` says.
fn act(host: &Host, scripts: Vec<Vec<Act>>) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(host.plan.runtime_dir.join("qmp.sock")).unwrap();
    thread::Builder::new()
        .spawn(move || {
            for script in scripts {
                let (stream, _) = listener.accept().unwrap();
                perform(script, stream);
            }
        })
        .unwrap()
}

fn perform(script: Vec<Act>, mut stream: UnixStream) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    for act in script {
        match act {
            Say(line) => writeln!(stream, "{line}\r").unwrap(),
            Hear(part) => {
                let line = lines.next().unwrap().unwrap();
                assert!(line.contains(part), "{line} has no {part}");
            }
            // The other end hangs up in the middle.
            Babble(bytes) => drop(stream.write_all(&vec![b'x'; bytes])),
            Hang => assert!(lines.next().is_none()),
        }
    }
}

/// A process that stands for the scripted QEMU's, and stays until it is killed or the process
/// of the tests has ended.
fn stand_in(host: &Host) -> Arc<Process> {
    let (log, _) = log::open(&host.plan.vmm_log).unwrap();
    let until = format!("--pid={}", std::process::id());
    let args = [&until, "-f", "/dev/null"].map(Into::into);
    Process::spawn(Launch::new(Path::new("/usr/bin/tail"), &args, log)).unwrap()
}

/// Opens a connection that goes as `acts` says, and does with it what `then` does.
fn talk<T>(
    acts: &[Act],
    limit: Duration,
    then: impl FnOnce(&mut Qmp<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let host = Host::new();
    let process = stand_in(&host);
    let peer = peer(&host, &process);
    let actor = act(&host, vec![acts.to_vec()]);
    let result = Qmp::open(&peer, "testing", limit).and_then(|mut qmp| then(&mut qmp));
    actor.join().unwrap();
    process.kill();
    process.wait(SOON).unwrap();
    result
}

const INTRODUCTION: [Act; 3] = [Say(GREETING), Hear("qmp_capabilities"), Say(OK)];

fn query(qmp: &mut Qmp<'_>) -> Result<serde_json::Value, Error> {
    qmp.run("query-status", &serde_json::Value::Null, SOON)
}

#[test]
fn events_before_an_answer_are_passed_over() {
    let event = Say(r#"{"timestamp": {"seconds": 1}, "event": "RESUME"}"#);
    let acts = [
        event,
        Hear(r#"{"execute":"query-status"}"#),
        event,
        event,
        Say(r#"{"return": {"running": true}}"#),
    ];
    let answer = talk(&[INTRODUCTION.as_slice(), &acts].concat(), SOON, query).unwrap();
    assert_eq!(answer["running"], true);
}

#[test]
fn the_end_of_a_migration_may_be_told_before_the_answer() {
    let acts = [
        Hear("migrate"),
        Say(r#"{"event": "MIGRATION", "data": {"status": "active"}}"#),
        Say(r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#),
        Say(OK),
        Hang,
    ];
    let over = talk(&[INTRODUCTION.as_slice(), &acts].concat(), SOON, |qmp| {
        qmp.run("migrate", &serde_json::Value::Null, SOON)?;
        qmp.wait_for_migration("migrate", SOON)
    });
    assert_eq!(over.unwrap(), Migration::Completed);
}

#[test]
fn a_refusal_is_told_in_its_words() {
    let acts =
        [Hear("query-status"), Say(r#"{"error": {"class": "GenericError", "desc": "not today"}}"#)];
    let error = talk(&[INTRODUCTION.as_slice(), &acts].concat(), SOON, query).unwrap_err();
    assert_eq!(error.to_string(), "the VMM refused query-status: not today");
}

#[test]
fn what_makes_no_sense_is_an_error_and_nothing_more() {
    for greeting in ["HTTP/1.1 400 Bad Request", "{}", "[]", OK, r#"{"QMP": 7}"#, ""] {
        let error = talk(&[Say(greeting)], SOON, query).unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. }), "{greeting}: {error}");
    }
    let acts = [Hear("query-status"), Say(GREETING)];
    let error = talk(&[INTRODUCTION.as_slice(), &acts].concat(), SOON, query).unwrap_err();
    assert!(matches!(error, Error::Nonsense { .. }), "{error}");
    let error = talk(&[Babble(1 << 20)], SOON, query).unwrap_err();
    assert!(error.to_string().ends_with("a line without end"), "{error}");
}

#[test]
fn silence_is_waited_for_to_the_limit_and_no_longer() {
    let limit = Duration::from_secs(1);
    for acts in [vec![Hang], vec![Say(GREETING), Hear("qmp"), Hang]] {
        let error = talk(&acts, limit, query).unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }
}

#[test]
fn a_process_that_ends_is_told_with_its_last_words() {
    let host = Host::new();
    let process = stand_in(&host);
    let peer = peer(&host, &process);
    fs::write(&host.plan.vmm_log, "out of luck\n").unwrap();
    let actor = act(&host, vec![vec![Say(GREETING)]]);
    process.kill();
    let error = Qmp::open(&peer, "testing", SOON).unwrap_err();
    assert_eq!(error.to_string(), "the VMM ended while testing: killed by signal 9: out of luck");
    actor.join().unwrap();
    // Now nobody listens.
    let error = Qmp::open(&peer, "testing", SOON).unwrap_err();
    assert!(matches!(error, Error::Died { .. }), "{error}");
}

#[test]
fn a_resume_calls_off_what_a_dead_daemon_was_saving() {
    let refused = Say(r#"{"error": {"desc": "Migration is not finalized yet"}}"#);
    let status = |line| [Hear("query-migrate"), Say(line)];
    let host = Host::new();
    let acts = [
        INTRODUCTION.as_slice(),
        &[Hear("query-status"), Say(r#"{"return": {"running": false, "status": "paused"}}"#)],
        &[Hear("cont"), refused],
        &status(r#"{"return": {"status": "active"}}"#),
        &[Hear("migrate_cancel"), Say(OK)],
        &status(r#"{"return": {"status": "cancelling"}}"#),
        &[Hear("migrate_cancel"), Say(OK)],
        &status(r#"{"return": {"status": "cancelled"}}"#),
        &[Hear("cont"), Say(OK)],
    ];
    let actor = act(&host, vec![INTRODUCTION.to_vec(), acts.concat()]);
    let qemu = Qemu::find().unwrap();
    let mut machine = qemu.adopt(&host.plan, stand_in(&host)).unwrap();
    machine.resume().unwrap();
    actor.join().unwrap();
}

const RUNS: Act = Say(r#"{"return": {"running": true, "status": "running"}}"#);
const IS_PAUSED: Act = Say(r#"{"return": {"running": false, "status": "paused"}}"#);

#[test]
fn a_resume_whose_answer_is_lost_is_asked_for_by_another_connection() {
    let lost = [Hear("query-status"), IS_PAUSED, Hear("cont")];
    let obeyed = [Hear("query-status"), RUNS, Hang];
    let not_obeyed =
        [Hear("query-status"), IS_PAUSED, Hear("query-status"), IS_PAUSED, Hear("cont"), Say(OK)];
    for after in [obeyed.as_slice(), &not_obeyed] {
        let host = Host::new();
        let scripts = [&[], lost.as_slice(), after].map(|acts| [&INTRODUCTION, acts].concat());
        let actor = act(&host, scripts.to_vec());
        let mut machine = Qemu::find().unwrap().adopt(&host.plan, stand_in(&host)).unwrap();
        machine.resume().unwrap();
        drop(machine);
        actor.join().unwrap();
    }
}

#[test]
fn what_was_paused_is_saved_and_resumed_by_the_same_connection() {
    let host = Host::new();
    let paused = [Hear("query-status"), IS_PAUSED, Hear("stop"), Say(OK)];
    let failed =
        [Hear("query-status"), IS_PAUSED, Hear("getfd"), Say(OK), Hear("migrate"), Say(OK)];
    let told = [
        Say(r#"{"event": "MIGRATION", "data": {"status": "failed"}}"#),
        Hear("query-migrate"),
        Say(r#"{"return": {"status": "failed", "error-desc": "as planned"}}"#),
        Hear("query-migrate"),
        Say(r#"{"return": {"status": "failed"}}"#),
    ];
    let resumed = [Hear("query-status"), IS_PAUSED, Hear("cont"), Say(OK), Hang];
    let acts = [INTRODUCTION.as_slice(), &paused, &failed, &told, &resumed].concat();
    let actor = act(&host, vec![INTRODUCTION.to_vec(), acts]);
    let mut machine = Qemu::find().unwrap().adopt(&host.plan, stand_in(&host)).unwrap();
    machine.connect().unwrap();
    machine.pause().unwrap();
    let error = machine.save(&host.snapshot_dir("snapshot")).unwrap_err();
    assert!(error.to_string().contains("as planned"), "{error}");
    machine.resume().unwrap();
    machine.disconnect();
    // That hangs up, and not the end of the machine.
    actor.join().unwrap();
}

/// Saves by a QEMU that writes nothing, and then answers so when it is asked for KVM.
fn save_nothing(told_of_kvm: &'static str, after: Vec<Vec<Act>>) -> (Host, Result<(), Error>) {
    let host = Host::new();
    let acts = [
        INTRODUCTION.as_slice(),
        &[Hear("query-status"), Say(r#"{"return": {"running": false, "status": "paused"}}"#)],
        &[Hear("getfd"), Say(OK), Hear("migrate"), Say(OK)],
        &[Say(r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#)],
        &[Hear(r#"{"execute":"query-kvm"}"#), Say(told_of_kvm), Hang],
    ];
    let scripts = [vec![INTRODUCTION.to_vec(), acts.concat()], after].concat();
    let actor = act(&host, scripts);
    let qemu = Qemu::find().unwrap();
    let mut machine = qemu.adopt(&host.plan, stand_in(&host)).unwrap();
    let saved = machine.save(&host.snapshot_dir("snapshot"));
    if saved.is_err() {
        machine.resume().unwrap();
    }
    actor.join().unwrap();
    (host, saved)
}

#[test]
fn a_state_of_another_form_is_no_snapshot_with_kvm_and_the_guest_runs_on() {
    let over = [Hear("query-migrate"), Say(r#"{"return": {"status": "completed"}}"#), Hang];
    let resume = [
        Hear("query-status"),
        Say(r#"{"return": {"running": false, "status": "postmigrate"}}"#),
        Hear("cont"),
        Say(OK),
        Hang,
    ];
    let told = [
        r#"{"return": {"enabled": true, "present": true}}"#,
        r#"{"return": {}}"#,
        r#"{"error": {"class": "CommandNotFound", "desc": "The command is not there"}}"#,
    ];
    for told in told {
        let after = [over.as_slice(), &resume].map(|acts| [&INTRODUCTION, acts].concat());
        let (_host, saved) = save_nothing(told, after.to_vec());
        assert_eq!(
            saved.unwrap_err().to_string(),
            "unexpected answer of the VMM to migrate: the CPU state that it wrote has an unknown \
             format (no description at its end); use another version of QEMU, or vmm = \
             \"cloud-hypervisor\""
        );
    }
}

#[test]
fn a_state_of_another_form_is_good_enough_without_kvm() {
    let (host, saved) =
        save_nothing(r#"{"return": {"enabled": false, "present": true}}"#, Vec::new());
    saved.unwrap();
    assert!(host.path("snapshot/vmstate").exists());
}

#[test]
fn a_vmm_that_never_answers_is_ended_when_the_work_is_called_off() {
    let host = Host::new();
    let program = host.path("silent");
    fs::write(&program, "#!/bin/sh\nkill -STOP $$\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let qemu =
        Qemu { program: Program::new(program, parse_version), accelerator: Accelerator::Tcg };
    let dir = host.snapshot_dir("snapshot");
    fs::write(dir.join("vmstate"), b"").unwrap();
    let error = thread::scope(|scope| {
        let caller = thread::Builder::new()
            .spawn_scoped(scope, || {
                eventually("the process", || host.processes().pop());
                host.plan.cancel.call_off();
            })
            .unwrap();
        let error = qemu.restore(&host.plan, &dir).unwrap_err();
        caller.join().unwrap();
        error
    });
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(host.processes().is_empty());

    // And what is called off before it began is not begun.
    let error = qemu.restore(&host.plan, &dir).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
}
