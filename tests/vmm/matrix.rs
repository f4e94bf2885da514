//! Whatever goes wrong at whichever call of a boot, a sleep or a wake: the sandbox ends in
//! the state that the contract says, its `error` is of use, and nothing is left over.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
};

use serde_json::{Value, json};

use crate::{
    daemon::Daemon,
    files::{assert_whole, counts_in},
    support::eventually,
};

const ID: &str = "web-1";
/// Longer than any limit that the driver has for a machine of this size that has started.
const STALL_MILLIS: u32 = 40_000;
/// Longer than the limit for a process that is starting.
const START_STALL_MILLIS: u32 = 70_000;
/// Longer than the limit for a call that takes no time, and so short that the next call,
/// which waits for its end, does not come to its own limit.
const SHORT_STALL_MILLIS: u32 = 15_000;
/// A guest that is asked for memory before it sleeps, and has some.
const INFLATING: &str = "memory = \"256MiB\"\ninflate_before_sleep = true\n";

/// What goes wrong at a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It is refused.
    Refused,
    /// It is not done, and there is no answer, to this and to anything after.
    Silence,
    /// It is done, and so late that nobody waits for the answer any more.
    Stall,
    /// It is done, and half of the answer comes.
    Half,
    /// It is not done, and what comes is no HTTP.
    Nonsense,
    /// The process dies before it does it.
    Death,
    /// The process dies when it has done it.
    LateDeath,
}

const FAULTS: [Fault; 7] = [
    Fault::Refused,
    Fault::Silence,
    Fault::Stall,
    Fault::Half,
    Fault::Nonsense,
    Fault::Death,
    Fault::LateDeath,
];

impl Fault {
    fn knob(self, endpoint: &str) -> Value {
        let act = match self {
            Self::Refused => {
                json!({ "error": { "status": 500, "chain": ["Error from API", "as planned"] } })
            }
            Self::Silence => json!("hang"),
            Self::Stall if endpoint == "vm.resize" => json!({ "slow": SHORT_STALL_MILLIS }),
            Self::Stall if endpoint == "vmm.ping" => json!({ "slow": START_STALL_MILLIS }),
            Self::Stall => json!({ "slow": STALL_MILLIS }),
            Self::Half => json!("half"),
            Self::Nonsense => json!({ "say": "SSH-2.0-OpenSSH_9.2\r\n" }),
            Self::Death => json!("die"),
            Self::LateDeath => json!("die-after"),
        };
        json!([{ "endpoint": endpoint, "act": act }])
    }

    /// A word that `error` has to have in it.
    fn told(self, endpoint: &str) -> &str {
        match self {
            Self::Refused => "as planned",
            Self::Silence | Self::Stall | Self::Half | Self::Nonsense => endpoint,
            Self::Death | Self::LateDeath => "killed by signal 9",
        }
    }

    /// Whether it takes a limit to find it out.
    fn is_waited_for(self) -> bool {
        matches!(self, Self::Silence | Self::Stall)
    }

    /// Whether what was asked is done, of which an answer to another question tells.
    fn is_found_out(self, endpoint: &str) -> bool {
        matches!(endpoint, "vm.boot" | "vm.resume") && matches!(self, Self::Stall | Self::Half)
    }

    fn is_death(self) -> bool {
        matches!(self, Self::Death | Self::LateDeath)
    }
}

/// The release that all faults are tried with.
const RELEASE: &str = "53.0";
/// The oldest, and the next: they answer otherwise, and need not be waited for otherwise.
const OTHERS: [&str; 2] = ["44.0", "54.0.0"];

/// What is tried of a kind of operation: a call that fails, how, and in which release.
#[derive(Debug, Clone, Copy)]
struct Cell<'a> {
    endpoint: &'a str,
    fault: Fault,
    version: &'static str,
}

/// Tries each fault at each endpoint, all at once: most of the time is waiting for limits.
/// The other releases have those faults for which nobody waits, after that.
fn try_all(endpoints: &[&str], cell: impl Fn(Cell<'_>) + Sync) {
    let at_once = |version: &'static str, faults: &[Fault]| {
        thread::scope(|scope| {
            for endpoint in endpoints {
                for &fault in faults {
                    let cell = &cell;
                    let named = thread::Builder::new().name(format!("{endpoint} {fault:?}"));
                    let of = Cell { endpoint, fault, version };
                    named.spawn_scoped(scope, move || cell(of)).unwrap();
                }
            }
        });
    };
    at_once(RELEASE, &FAULTS);
    let swift = FAULTS.map(|fault| (fault, fault.is_waited_for()));
    let swift: Vec<Fault> =
        swift.into_iter().filter_map(|(f, waits)| (!waits).then_some(f)).collect();
    for version in OTHERS {
        at_once(version, &swift);
    }
}

/// Has the daemon do what is to fail; returns the error, and puts the VMM right again.
fn fail(daemon: &Daemon, verb: &str, endpoint: &str, fault: Fault) -> io::Error {
    daemon.standin.set_faults(&fault.knob(endpoint));
    let failed = daemon.write(ID, verb);
    daemon.standin.set_faults(&json!([]));
    let Err(error) = failed else {
        panic!("{verb} succeeds although {endpoint} fails: {fault:?}");
    };
    let told = daemon.read(ID, "error");
    let context = format!("{endpoint} {fault:?}: {error}: {told}");
    assert!(told.contains(fault.told(endpoint)), "{context}");
    assert_eq!(told.lines().count(), 1, "{context}");
    error
}

/// Has the daemon do what is to succeed although an answer does not come.
fn succeed_in_spite_of(daemon: &Daemon, verb: &str, endpoint: &str, fault: Fault) {
    daemon.standin.set_faults(&fault.knob(endpoint));
    succeed(daemon, verb);
    daemon.standin.set_faults(&json!([]));
}

/// Has the daemon do what is to succeed.
fn succeed(daemon: &Daemon, verb: &str) {
    if let Err(error) = daemon.write(ID, verb) {
        panic!("{verb}: {error}: {}\n{}", daemon.read(ID, "error"), daemon.log());
    }
    assert_eq!(daemon.read(ID, "error"), "ok");
}

fn wait_for_lines(daemon: &Daemon, more: usize) {
    let lines = || counts_in(&daemon.read(ID, "console")).len();
    let wanted = lines() + more;
    eventually("the count", || (lines() >= wanted).then_some(()));
}

/// Boots the sandbox, and waits until its guest counts.
fn boot(daemon: &Daemon) {
    daemon.make(ID);
    succeed(daemon, "wake");
    wait_for_lines(daemon, 2);
}

/// Shows that the sandbox, which runs, is none the worse for it, and goes.
fn sleeps_wakes_and_goes(daemon: &Daemon) {
    wait_for_lines(daemon, 2);
    succeed(daemon, "sleep");
    assert_eq!(daemon.state(ID), "snapshotted");
    assert!(daemon.vmms().is_empty());
    succeed(daemon, "wake");
    wait_for_lines(daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
    goes(daemon);
}

fn goes(daemon: &Daemon) {
    daemon.remove(ID);
    eventually("the end of the VMM", || daemon.vmms().is_empty().then_some(()));
}

#[test]
fn a_boot_that_fails_leaves_a_stopped_sandbox_that_boots() {
    try_all(
        &["vmm.ping", "vm.create", "vm.info", "vm.boot"],
        |Cell { endpoint, fault, version }| {
            let daemon = Daemon::start(version);
            daemon.make(ID);
            let before = (daemon.files("store"), daemon.files("run"));
            if fault.is_found_out(endpoint) {
                succeed_in_spite_of(&daemon, "wake", endpoint, fault);
                sleeps_wakes_and_goes(&daemon);
                return;
            }
            fail(&daemon, "wake", endpoint, fault);
            let context = format!("v{version} {endpoint} {fault:?}: {}", daemon.log());
            assert_eq!(daemon.state(ID), "stopped", "{context}");
            assert!(daemon.vmms().is_empty(), "{context}");
            // It has a directory now, which is empty.
            let mut after = (daemon.files("store"), daemon.files("run"));
            after.0.retain(|path| path != Path::new("sandboxes/1"));
            assert_eq!(after, before, "{context}");
            succeed(&daemon, "wake");
            wait_for_lines(&daemon, 2);
            goes(&daemon);
        },
    );
}

/// Returns the files of the store and the runtime directory, but for the note that a sync was
/// begun: a sleep that fails after it leaves it, and the next one writes all files anew.
fn files(daemon: &Daemon) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut store = daemon.files("store");
    store.retain(|name| !name.ends_with("unsynced"));
    (store, daemon.files("run"))
}

#[test]
fn a_sleep_that_fails_leaves_a_guest_that_runs_unless_its_vmm_died() {
    try_all(&["vm.pause", "vm.snapshot"], |Cell { endpoint, fault, version }| {
        let daemon = Daemon::start(version);
        boot(&daemon);
        let before = files(&daemon);
        fail(&daemon, "sleep", endpoint, fault);
        let context = format!("v{version} {endpoint} {fault:?}: {}", daemon.log());
        if fault.is_death() {
            assert_eq!(daemon.state(ID), "stopped", "{context}");
            assert!(daemon.vmms().is_empty(), "{context}");
            goes(&daemon);
        } else if fault == Fault::Silence {
            // Nobody can say whether the guest runs, so it is neither lost nor said to be
            // awake. The next that is asked of it looks again; to be deleted it need not
            // answer.
            assert_eq!(daemon.state(ID), "snapshotting", "{context}");
            assert_eq!(daemon.vmms().len(), 1, "{context}");
            assert_eq!(files(&daemon), before, "{context}");
            goes(&daemon);
        } else {
            assert_eq!(daemon.state(ID), "running", "{context}");
            assert_eq!(files(&daemon), before, "{context}");
            sleeps_wakes_and_goes(&daemon);
        }
    });
}

#[test]
fn a_wake_that_fails_leaves_a_sandbox_that_wakes_unless_its_guest_may_have_run() {
    try_all(
        &["vmm.ping", "vm.restore", "vm.info", "vm.resume"],
        |Cell { endpoint, fault, version }| {
            let daemon = Daemon::start(version);
            boot(&daemon);
            succeed(&daemon, "sleep");
            let before = (daemon.files("store"), daemon.files("run"));
            let printed = daemon.read(ID, "console");
            if fault.is_found_out(endpoint) {
                succeed_in_spite_of(&daemon, "wake", endpoint, fault);
                sleeps_wakes_and_goes(&daemon);
                return;
            }
            fail(&daemon, "wake", endpoint, fault);
            let context = format!("v{version} {endpoint} {fault:?}: {}", daemon.log());
            // The oldest lets its vCPUs run before it may still refuse.
            let did_not_run = fault == Fault::Refused && version != "44.0";
            if endpoint == "vm.resume" && !did_not_run && !fault.is_death() {
                // Its guest may run, so it is not killed, and asked again.
                assert_eq!(daemon.vmms().len(), 1, "{context}");
                if fault == Fault::Silence {
                    assert_eq!(daemon.state(ID), "restoring", "{context}");
                    goes(&daemon);
                } else {
                    succeed(&daemon, "wake");
                    sleeps_wakes_and_goes(&daemon);
                }
                return;
            }
            assert!(daemon.vmms().is_empty(), "{context}");
            // A guest that may have run does not wake once more from the same snapshot.
            if endpoint == "vm.resume" && !did_not_run {
                assert_eq!(daemon.state(ID), "stopped", "{context}");
                goes(&daemon);
                return;
            }
            assert_eq!(daemon.state(ID), "snapshotted", "{context}");
            assert_eq!((daemon.files("store"), daemon.files("run")), before, "{context}");
            assert_eq!(daemon.read(ID, "console"), printed, "{context}");
            succeed(&daemon, "wake");
            sleeps_wakes_and_goes(&daemon);
        },
    );
}

#[test]
fn a_guest_that_cannot_be_asked_for_memory_sleeps_unless_its_vmm_is_gone() {
    try_all(&["vm.resize"], |Cell { endpoint, fault, version }| {
        let daemon = Daemon::start_with(version, INFLATING);
        boot(&daemon);
        let before = (daemon.files("store"), daemon.files("run"));
        let context =
            |daemon: &Daemon| format!("v{version} {endpoint} {fault:?}: {}", daemon.log());
        match fault {
            Fault::Refused | Fault::Stall | Fault::Half | Fault::Nonsense => {
                daemon.standin.set_faults(&fault.knob(endpoint));
                succeed(&daemon, "sleep");
                daemon.standin.set_faults(&json!([]));
                assert_eq!(daemon.state(ID), "snapshotted", "{}", context(&daemon));
                succeed(&daemon, "wake");
                sleeps_wakes_and_goes(&daemon);
            }
            Fault::Silence => {
                // It answers nothing any more, as one that is silent to a pause.
                daemon.standin.set_faults(&fault.knob(endpoint));
                daemon.write(ID, "sleep").unwrap_err();
                daemon.standin.set_faults(&json!([]));
                assert_eq!(daemon.state(ID), "snapshotting", "{}", context(&daemon));
                assert_eq!((daemon.files("store"), daemon.files("run")), before);
                goes(&daemon);
            }
            Fault::Death | Fault::LateDeath => {
                fail(&daemon, "sleep", endpoint, fault);
                assert_eq!(daemon.state(ID), "stopped", "{}", context(&daemon));
                assert!(daemon.vmms().is_empty(), "{}", context(&daemon));
                goes(&daemon);
            }
        }
    });
}

#[test]
fn a_guest_that_cannot_be_given_its_memory_back_is_awake_unless_its_vmm_is_gone() {
    try_all(&["vm.resize"], |Cell { endpoint, fault, version }| {
        let daemon = Daemon::start_with(version, INFLATING);
        boot(&daemon);
        succeed(&daemon, "sleep");
        daemon.standin.set_faults(&fault.knob(endpoint));
        // A VMM that dies of it does so beside the wake, and `error` may tell of it by now.
        daemon.write(ID, "wake").unwrap();
        daemon.standin.set_faults(&json!([]));
        if fault.is_death() {
            let stopped = || (daemon.state(ID) == "stopped").then_some(());
            eventually("the end to be told", stopped);
            assert!(daemon.read(ID, "error").contains("killed by signal 9"));
            assert!(daemon.vmms().is_empty());
            goes(&daemon);
        } else if fault == Fault::Silence {
            assert_eq!(daemon.state(ID), "running", "{}", daemon.log());
            goes(&daemon);
        } else {
            assert_eq!(daemon.state(ID), "running", "{}", daemon.log());
            sleeps_wakes_and_goes(&daemon);
        }
    });
}

#[test]
fn the_balloon_of_a_guest_grows_before_its_pause_and_is_let_go_after_its_resume() {
    let daemon = Daemon::start_with("53.0", INFLATING);
    boot(&daemon);
    let before = daemon.standin.calls().len();
    succeed(&daemon, "sleep");
    succeed(&daemon, "wake");
    let calls = daemon.standin.calls().split_off(before);
    // Looks are as many as it takes.
    let acts: Vec<_> = calls.iter().filter(|call| call.starts_with("PUT")).collect();
    let spare = (256 - 64 - 8) << 20;
    let expected = [
        &format!("PUT vm.resize {{\"desired_balloon\":{spare}}}"),
        "PUT vm.pause ",
        "PUT vm.snapshot ",
        "PUT vm.restore ",
        "PUT vm.resume ",
        "PUT vm.resize {\"desired_balloon\":0}",
    ];
    assert_eq!(acts.len(), expected.len(), "{acts:#?}");
    for (act, expected) in acts.iter().zip(expected) {
        assert!(act.starts_with(expected), "{act} is no {expected}");
    }
    sleeps_wakes_and_goes(&daemon);
}
