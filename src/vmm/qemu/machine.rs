//! One QEMU, and what it can be asked to do.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    Accelerator,
    command_line::{self, Beginning},
    console, firmware,
    qmp::{ANSWER_LIMIT, CONNECT_LIMIT, Connection, Migration, Qmp, START_LIMIT},
    wall_clock,
};
use crate::{
    sandbox::Owner,
    sync::Arc,
    sys::{
        clock::{self, Deadline},
        files::open_regular,
        process::{Launch, Process},
    },
    vmm::{
        DiskTraffic, Error, Machine, Plan,
        log::{self, LastWords},
        nic,
        peer::{Peer, begin, host, listen},
    },
};

/// The file in a snapshot's directory that the devices' state is in. Memory is in none:
/// its file is the guest's memory itself.
const STATE_FILE: &str = "vmstate";
/// The name by which QEMU knows the descriptor of that file.
const STATE_FD: &str = "vmstate";

/// A machine is made in some 50 ms, with files that may be on a slow disk.
const MACHINE_LIMIT: Duration = Duration::from_secs(30);
/// A pause ends with the disks flushed, and a disk may have much to write.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// A save flushes the disks once more, and writes some hundred KiB; a load reads them.
const STATE_LIMIT: Duration = Duration::from_secs(30);
/// How long a save that is over, or was called off, may take to be tidied up.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// How often to look meanwhile; QEMU tells nobody.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// How long a guest that has just begun may be in its firmware, which takes some 10 ms.
/// One that is there for longer has nothing to boot, and nothing to lose.
const FIRMWARE_LIMIT: Duration = Duration::from_secs(2);
/// How long it is left to run before it is looked at again.
const FIRMWARE_LOOK: Duration = Duration::from_millis(2);

/// A QEMU that runs one sandbox, or is about to.
#[derive(Debug)]
pub(super) struct QemuMachine {
    peer: Peer,
    runtime_dir: PathBuf,
    memory_bytes: u64,
    vcpus: u8,
    /// Whether a connection is kept for the next command.
    keeps: bool,
    kept: Option<Connection>,
    /// Whether it was told to save since it last ran, as far as we know.
    saved: bool,
    /// Whether it was seen outside of its firmware, to which it never returns.
    is_past_firmware: bool,
}

/// What QEMU says of itself.
struct Status {
    running: bool,
    word: String,
}

impl QemuMachine {
    /// Starts a QEMU that waits for commands, and hands it to `then`. If anything goes
    /// wrong, also there, the process is ended.
    pub(super) fn start(
        program: &Path,
        accelerator: Accelerator,
        plan: &Plan,
        beginning: Beginning<'_>,
        then: impl FnOnce(&Self) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let doing = match beginning {
            Beginning::Boot { .. } => "starting",
            Beginning::Restore => "loading the snapshot",
        };
        let spawn = || Self::spawn(program, accelerator, plan, beginning);
        begin(plan, doing, spawn, |machine| then(machine))
    }

    fn spawn(
        program: &Path,
        accelerator: Accelerator,
        plan: &Plan,
        beginning: Beginning<'_>,
    ) -> Result<Self, Error> {
        let socket = socket_path(&plan.runtime_dir);
        let nic = plan.nic.as_ref().map(nic::open).transpose()?;
        let tap = nic.as_ref().map(|(_, tap)| tap.as_raw_fd());
        let args = command_line::arguments(plan, accelerator, beginning, tap);
        let (log, last_words) = log::open(&plan.vmm_log)
            .map_err(host(format!("opening {}", plan.vmm_log.display())))?;
        console::prepare(&plan.runtime_dir)
            .map_err(host(format!("making {}", console::path(&plan.runtime_dir).display())))?;
        let stdin = Some(listen(&socket)?.into());
        let (namespace, tap) = nic.unzip();
        let process = Process::spawn(Launch {
            stdin,
            inherited: tap.into_iter().collect(),
            lent: plan.held.clone(),
            namespace,
            ..Launch::new(program, &args, log)
        })
        .map_err(host(format!("starting {}", program.display())))?;
        Ok(Self {
            peer: Peer { process, socket, last_words },
            runtime_dir: plan.runtime_dir.clone(),
            memory_bytes: plan.memory_bytes,
            vcpus: plan.vcpus,
            keeps: false,
            kept: None,
            saved: false,
            // A pause waits for the firmware, so no snapshot is of it, but of a machine that
            // never leaves it.
            is_past_firmware: matches!(beginning, Beginning::Restore),
        })
    }

    /// Takes over a QEMU that is there already.
    ///
    /// # Errors
    /// Where it does not answer.
    pub(super) fn adopt(plan: &Plan, process: Arc<Process>) -> Result<Self, Error> {
        let peer = Peer {
            process,
            socket: socket_path(&plan.runtime_dir),
            last_words: LastWords::from_now_on(&plan.vmm_log),
        };
        Qmp::open(&peer, "being adopted", CONNECT_LIMIT)?;
        // An earlier daemon may have died in the middle of a save.
        let runtime_dir = plan.runtime_dir.clone();
        Ok(Self {
            peer,
            runtime_dir,
            memory_bytes: plan.memory_bytes,
            vcpus: plan.vcpus,
            keeps: false,
            kept: None,
            saved: true,
            is_past_firmware: false,
        })
    }

    /// Gives the kernel its command line, and waits until QEMU has made the machine.
    pub(super) fn configure(&self, cmdline: &str) -> Result<(), Error> {
        let mut qmp = Qmp::open(&self.peer, "starting", START_LIMIT)?;
        let append = json!({ "path": "/machine", "property": "append", "value": cmdline });
        qmp.run("qom-set", &append, ANSWER_LIMIT)?;
        qmp.run("x-exit-preconfig", &Value::Null, MACHINE_LIMIT)?;
        set_up_migration(&mut qmp)
    }

    /// Loads the snapshot in `dir`. The machine is paused then.
    pub(super) fn load(&self, dir: &Path) -> Result<(), Error> {
        const COMMAND: &str = "migrate-incoming";
        let state = dir.join(STATE_FILE);
        let file = open_regular(&state).map_err(host(format!("opening {}", state.display())))?;
        let mut qmp = Qmp::open(&self.peer, "loading the snapshot", START_LIMIT)?;
        set_up_migration(&mut qmp)?;
        qmp.hand_over(STATE_FD, file.as_fd())?;
        let uri = json!({ "uri": format!("fd:{STATE_FD}") });
        qmp.run(COMMAND, &uri, ANSWER_LIMIT)?;
        match qmp.wait_for_migration(COMMAND, STATE_LIMIT)? {
            Migration::Completed => Ok(()),
            Migration::Failed | Migration::Underway => Err(refusal(&mut qmp, COMMAND)),
        }
    }

    /// Does `work` by the connection that is kept, if one is, and by a new one otherwise.
    fn talk<T>(
        &mut self,
        doing: &'static str,
        work: impl FnOnce(&mut Qmp<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut qmp = Qmp::over(&self.peer, self.kept.take(), doing)?;
        let done = work(&mut qmp);
        self.kept = qmp.into_kept().filter(|_| self.keeps);
        done
    }

    /// Has QEMU forget a save that failed, where it has not done so by itself.
    fn take_back_save(&mut self) {
        if self.peer.process.exited().is_some() {
            return;
        }
        if let Err(error) = self.talk("taking back a save", call_off_migration) {
            let process = &self.peer.process;
            // Why the save failed is told by the caller. A resume tries this again.
            tracing::warn!(%process, %error, "a failed save is not tidied up");
        }
    }
}

fn status(qmp: &mut Qmp<'_>) -> Result<Status, Error> {
    const COMMAND: &str = "query-status";
    let answer = qmp.run(COMMAND, &Value::Null, ANSWER_LIMIT)?;
    match (answer["running"].as_bool(), answer["status"].as_str()) {
        (Some(running), Some(word)) => Ok(Status { running, word: word.to_owned() }),
        (None, _) | (_, None) => {
            Err(Error::Nonsense { command: COMMAND.to_owned(), said: answer.to_string() })
        }
    }
}

/// Writes the state of a machine of so many CPUs to a new file in `dir`.
fn write_state(qmp: &mut Qmp<'_>, dir: &Path, vcpus: u8) -> Result<(), Error> {
    const COMMAND: &str = "migrate";
    // QEMU would pause it itself, and let it run again afterwards.
    if status(qmp)?.running {
        return Err(Error::Refused {
            command: COMMAND.to_owned(),
            said: "the machine is not paused".to_owned(),
        });
    }
    let path = dir.join(STATE_FILE);
    let state = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(host(format!("making {}", path.display())))?;
    qmp.hand_over(STATE_FD, state.as_fd())?;
    qmp.forget_migrations();
    let uri = json!({ "uri": format!("fd:{STATE_FD}") });
    qmp.run(COMMAND, &uri, ANSWER_LIMIT)?;
    match qmp.wait_for_migration(COMMAND, STATE_LIMIT)? {
        Migration::Completed => keep_from_changing(qmp, &state, &path, vcpus),
        Migration::Failed | Migration::Underway => Err(refusal(qmp, COMMAND)),
    }
}

/// Makes the state that was saved fit memory that must not change when it is loaded.
fn keep_from_changing(
    qmp: &mut Qmp<'_>,
    state: &File,
    path: &Path,
    vcpus: u8,
) -> Result<(), Error> {
    let stream = wall_clock::read(state).map_err(host(format!("reading {}", path.display())))?;
    match wall_clock::places(&stream, vcpus) {
        Ok(places) => wall_clock::forget(state, &stream, &places)
            .map_err(host(format!("writing {}", path.display()))),
        Err(why) if may_use_kvm(qmp) => Err(Error::Nonsense {
            command: "migrate".to_owned(),
            said: format!(
                "the CPU state that it wrote has an unknown format ({why}); use another version \
                 of QEMU, or vmm = \"cloud-hypervisor\""
            ),
        }),
        // Nobody writes a wall clock, so none has to be forgotten.
        Err(_) => Ok(()),
    }
}

/// Waits until QEMU is done with a save. It says so a moment before it changes its
/// status. A resume in between would be overtaken by that, and vCPUs run that QEMU
/// takes for paused.
fn end_save(qmp: &mut Qmp<'_>) -> Result<(), Error> {
    let deadline = Deadline::after(SETTLE_LIMIT);
    while status(qmp)?.word == "finish-migrate" {
        if deadline.passed() {
            let command = "migrate".to_owned();
            return Err(Error::TimedOut { command, limit: SETTLE_LIMIT });
        }
        clock::pause_for(SETTLE_LOOK);
    }
    Ok(())
}

/// Lets the vCPUs run; `saved` says whether the machine may have been told to save.
fn let_run(qmp: &mut Qmp<'_>, saved: bool) -> Result<(), Error> {
    if saved {
        end_save(qmp)?;
    }
    match qmp.run("cont", &Value::Null, ANSWER_LIMIT) {
        // As when a daemon died while it saved.
        Err(Error::Refused { .. }) => {
            call_off_migration(qmp)?;
            qmp.run("cont", &Value::Null, ANSWER_LIMIT).map(drop)
        }
        answer => answer.map(drop),
    }
}

impl Machine for QemuMachine {
    fn process(&self) -> &Arc<Process> {
        &self.peer.process
    }

    fn running(&mut self) -> Result<bool, Error> {
        self.talk("telling its status", |qmp| Ok(status(qmp)?.running))
    }

    fn connect(&mut self) -> Result<(), Error> {
        self.keeps = true;
        self.talk("being reached", |_| Ok(()))
    }

    fn disconnect(&mut self) {
        self.keeps = false;
        self.kept = None;
    }

    fn pause(&mut self) -> Result<(), Error> {
        let mut is_past_firmware = self.is_past_firmware;
        let paused = self.talk("pausing", |qmp| pause(qmp, &mut is_past_firmware));
        self.is_past_firmware = is_past_firmware;
        paused
    }

    fn resume(&mut self) -> Result<(), Error> {
        const DOING: &str = "resuming";
        let saved = self.saved;
        let mut qmp = Qmp::over(&self.peer, self.kept.take(), DOING)?;
        let told = let_run(&mut qmp, saved);
        self.kept = qmp.into_kept().filter(|_| self.keeps);
        match told {
            // It may have obeyed, so it is asked by another connection.
            Err(lost @ (Error::Host { .. } | Error::Nonsense { .. } | Error::TimedOut { .. })) => {
                tracing::warn!(process = %self.peer.process, error = %lost, "asking again");
                self.talk(
                    DOING,
                    |qmp| {
                        if status(qmp)?.running { Ok(()) } else { let_run(qmp, saved) }
                    },
                )?;
            }
            done => done?,
        }
        self.saved = false;
        Ok(())
    }

    fn never_ran(&self) -> bool {
        false
    }

    fn save_bytes(&self) -> u64 {
        0
    }

    fn save(&mut self, dir: &Path) -> Result<(), Error> {
        self.saved = true;
        let vcpus = self.vcpus;
        self.talk("saving its state", |qmp| write_state(qmp, dir, vcpus))
            .inspect_err(|_| self.take_back_save())
    }

    fn lacks(&self) -> Vec<String> {
        Vec::new()
    }

    fn disk_traffic(&self) -> DiskTraffic {
        // By preadv(2) and pwritev(2) of its threads, as long as nobody says `aio=`.
        DiskTraffic::Calls
    }

    fn set_balloon(&mut self, bytes: u64) -> Result<(), Error> {
        // It is told what is to be left to the guest, and says no to nothing at all.
        let left = self.memory_bytes.saturating_sub(bytes);
        self.talk("resizing its balloon", |qmp| {
            qmp.run("balloon", &json!({ "value": left }), ANSWER_LIMIT).map(drop)
        })
    }

    fn balloon_bytes(&mut self) -> Result<u64, Error> {
        const COMMAND: &str = "query-balloon";
        let answer = self.talk("telling the size of its balloon", |qmp| {
            qmp.run(COMMAND, &Value::Null, ANSWER_LIMIT)
        })?;
        let left = answer["actual"].as_u64().ok_or_else(|| Error::Nonsense {
            command: COMMAND.to_owned(),
            said: answer.to_string(),
        })?;
        Ok(self.memory_bytes.saturating_sub(left))
    }

    fn give_vsock(&mut self, _: Owner) -> Result<(), Error> {
        Ok(())
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        console::type_in(&self.runtime_dir, bytes).map_err(host("typing on the console".to_owned()))
    }
}

/// Stops the vCPUs, once the guest has left its firmware.
fn pause(qmp: &mut Qmp<'_>, is_past_firmware: &mut bool) -> Result<(), Error> {
    if *is_past_firmware {
        return qmp.run("stop", &Value::Null, PAUSE_LIMIT).map(drop);
    }
    let was_running = status(qmp)?.running;
    let deadline = Deadline::after(FIRMWARE_LIMIT);
    loop {
        qmp.run("stop", &Value::Null, PAUSE_LIMIT)?;
        if !was_running || deadline.passed() || !is_in_firmware(qmp)? {
            *is_past_firmware = was_running;
            return Ok(());
        }
        qmp.run("cont", &Value::Null, ANSWER_LIMIT)?;
        clock::pause_for(FIRMWARE_LOOK);
    }
}

fn socket_path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("qmp.sock")
}

/// Has memory left where it is, its state told by events, nobody told of its end, and no
/// limit to its speed, which is otherwise 128 MiB/s. QEMU keeps to it for as long as it
/// lives, so a save need not say it again.
fn set_up_migration(qmp: &mut Qmp<'_>) -> Result<(), Error> {
    let capabilities = json!({ "capabilities": [
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "events", "state": true },
    ] });
    qmp.run("migrate-set-capabilities", &capabilities, ANSWER_LIMIT)?;
    // What is loaded is where it was, so nobody has to be told; QEMU would tell them by frames
    // that are no guest's.
    let parameters = json!({ "max-bandwidth": 1_u64 << 50, "announce-rounds": 0 });
    qmp.run("migrate-set-parameters", &parameters, ANSWER_LIMIT)?;
    Ok(())
}

/// Returns the error for a migration that failed, with QEMU's reason.
fn refusal(qmp: &mut Qmp<'_>, command: &str) -> Error {
    let said = qmp
        .run("query-migrate", &Value::Null, ANSWER_LIMIT)
        .map(|answer| answer["error-desc"].as_str().unwrap_or("it gives no reason").to_owned());
    match said {
        Ok(said) => Error::Refused { command: command.to_owned(), said },
        Err(error) => error,
    }
}

/// Says whether guests of this QEMU are run by KVM. The process may have been started by
/// an earlier daemon, on a host that was another then. Who does not say so is taken to be.
fn may_use_kvm(qmp: &mut Qmp<'_>) -> bool {
    let told = qmp.run("query-kvm", &Value::Null, ANSWER_LIMIT);
    told.map_or(true, |answer| answer["enabled"] != json!(false))
}

/// Says whether the first CPU of a paused machine executes firmware.
fn is_in_firmware(qmp: &mut Qmp<'_>) -> Result<bool, Error> {
    let command = json!({ "command-line": "info registers" });
    let told = qmp.run("human-monitor-command", &command, ANSWER_LIMIT)?;
    Ok(told.as_str().and_then(firmware::is_firmware).unwrap_or(false))
}

/// Ends a migration that is still under way, so that the machine can be resumed.
fn call_off_migration(qmp: &mut Qmp<'_>) -> Result<(), Error> {
    const COMMAND: &str = "migrate_cancel";
    let deadline = Deadline::after(SETTLE_LIMIT);
    loop {
        let answer = qmp.run("query-migrate", &Value::Null, ANSWER_LIMIT)?;
        // There is no status if there never was a migration.
        let status = answer["status"].as_str().unwrap_or("none");
        if Migration::from_word(status) != Migration::Underway {
            return Ok(());
        }
        if deadline.passed() {
            return Err(Error::TimedOut { command: COMMAND.to_owned(), limit: SETTLE_LIMIT });
        }
        qmp.run(COMMAND, &Value::Null, ANSWER_LIMIT)?;
        clock::pause_for(SETTLE_LOOK);
    }
}
