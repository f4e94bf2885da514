//! A VMM whose faults are planned, for the model tests of `lifecycle`.
//!
//! Its machines are real processes that sleep, so that killing, adopting and exits are
//! real too; what the guest would do is a count in the memory file, which grows by one
//! at each `resume`, as a guest that runs changes its memory. It refuses what a real
//! VMM refuses.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::{DiskTraffic, Error, Machine, Plan, SAVED_MEMORY, Vmm, VmmIdentity};
use crate::{
    sandbox::{MemoryMode, Owner, RestoreMode, VmmChoice},
    sync::{Arc, Mutex, lock},
    sys::{
        cancel::Cancel,
        clock::{Deadline, pause_for},
        process::{Launch, Process},
    },
};

/// How long a call hangs whose plan says so, unless it is called off: longer than a test waits
/// for anything meanwhile, however busy the machine is.
/// What the fake's processes run.
const PROGRAM: &str = "/bin/sh";
const HANG_MAX: Duration = Duration::from_secs(120);

/// A call of a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    Boot,
    Restore,
    Adopt,
    Connect,
    Pause,
    Resume,
    Save,
    Balloon,
}

/// What happens at a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is refused.
    Refuse,
    /// The disk is full.
    NoSpace,
    /// The VMM dies.
    Die,
    /// It takes until it is called off, or its process ends.
    Hang,
    /// The driver has a bug.
    Panic,
    /// It obeys, and its answer gets lost.
    Unanswered,
}

/// The machines of a host. It outlives the daemons of a test.
#[derive(Debug, Default)]
pub(crate) struct FakeHost {
    /// The machines, by their process. A leaf lock.
    machines: Mutex<HashMap<u32, Known>>,
    faults: Mutex<Vec<(Call, Fault)>>,
    calls: Mutex<Vec<Call>>,
    /// What the last machine was made by.
    plan: Mutex<Option<Plan>>,
    version: Mutex<Option<&'static str>>,
    /// Whether memory is the process's own rather than a file that it maps, where nobody
    /// says which.
    copies_memory: AtomicBool,
    /// Why it runs nothing.
    objection: Mutex<Option<&'static str>>,
    /// What guests do when they are asked for memory.
    guests: Mutex<Guests>,
    /// Whom vsocks were given to, if there are such.
    vsock_owners: Mutex<Option<Vec<Owner>>>,
    /// Whose guest began to run while another machine of the same sandbox still ran.
    doubles: Mutex<Vec<String>>,
}

/// What guests do when they are asked for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Guests {
    /// They give it at once.
    #[default]
    Give,
    /// They have no driver for it.
    Deaf,
    /// They give a byte each time that somebody looks, and so never come to an end.
    Dawdle,
}

/// A machine as it is, whoever drives it.
#[derive(Debug)]
struct Board {
    running: bool,
    connected: bool,
    /// Whether a later caller cannot know that it has not run.
    may_have_run: bool,
    /// How much the balloon is to have, and has.
    balloon: (u64, u64),
    /// Whether its memory is its own.
    copies: bool,
    memory: File,
}

/// What the host knows of a machine without asking it.
#[derive(Debug)]
struct Known {
    /// The word by which the processes of its sandbox are found.
    token: String,
    /// The version of the program that it was started from.
    version: &'static str,
    process: Arc<Process>,
    /// Keeps its process alive; a line ends it in order.
    input: UnixStream,
    /// Held for the length of a save.
    board: Arc<Mutex<Board>>,
}

impl FakeHost {
    /// Plans a fault for the next call of that kind.
    pub(crate) fn fail_next(&self, call: Call, fault: Fault) {
        lock(&self.faults).push((call, fault));
    }

    /// Takes back the faults that were planned and met no call. Returns how many.
    pub(crate) fn forget_faults(&self) -> usize {
        lock(&self.faults).drain(..).count()
    }

    /// Has the guest of a process shut down.
    pub(crate) fn shut_down(&self, pid: u32) {
        let machines = lock(&self.machines);
        // Where it has ended already nobody reads the line.
        let _gone = (&machines[&pid].input).write_all(b"\n");
    }

    /// Kills the VMM of a process, and waits until it is gone.
    pub(crate) fn crash(&self, pid: u32) {
        let process = Arc::clone(&lock(&self.machines)[&pid].process);
        process.kill();
        process.wait(HANG_MAX).expect("what is killed ends");
    }

    /// Returns the processes that live.
    pub(crate) fn living(&self) -> Vec<u32> {
        let machines = lock(&self.machines);
        let living = machines.iter().filter(|(_, known)| known.process.exited().is_none());
        living.map(|(pid, _)| *pid).collect()
    }

    /// Returns whose guest began to run while another machine of the same sandbox still ran.
    pub(crate) fn doubles(&self) -> Vec<String> {
        lock(&self.doubles).clone()
    }

    /// Notes it if a machine begins to run of which another runs.
    fn look_for_double(&self, pid: u32) {
        let machines = lock(&self.machines);
        let token = &machines[&pid].token;
        let others = machines.iter().filter(|(other, known)| {
            **other != pid && known.token == *token && known.process.exited().is_none()
        });
        let boards: Vec<_> = others.map(|(_, known)| Arc::clone(&known.board)).collect();
        let token = token.clone();
        drop(machines);
        if boards.iter().any(|board| lock(board).running) {
            lock(&self.doubles).push(token);
        }
    }

    /// Returns what the last machine was made by.
    pub(crate) fn plan(&self) -> Plan {
        lock(&self.plan).clone().expect("there was a machine")
    }

    /// Returns how often something was called.
    pub(crate) fn count(&self, call: Call) -> usize {
        lock(&self.calls).iter().filter(|made| **made == call).count()
    }

    /// Has the program be of another version from now on.
    pub(crate) fn upgrade(&self, version: &'static str) {
        *lock(&self.version) = Some(version);
    }

    fn version(&self) -> &'static str {
        lock(&self.version).unwrap_or("1.0")
    }

    /// Has it find a reason to run nothing, or none.
    pub(crate) fn object(&self, why: Option<&'static str>) {
        *lock(&self.objection) = why;
    }

    /// Has it keep the memory of its machines to itself from now on.
    pub(crate) fn copy_memory(&self) {
        self.copies_memory.store(true, Ordering::SeqCst);
    }

    /// Has machines of this host have vsocks.
    pub(crate) fn have_vsocks(&self) {
        *lock(&self.vsock_owners) = Some(Vec::new());
    }

    /// Returns whom vsocks were given to.
    pub(crate) fn vsock_owners(&self) -> Vec<Owner> {
        lock(&self.vsock_owners).clone().unwrap_or_default()
    }

    /// Has guests do so when they are asked for memory.
    pub(crate) fn have_guests(&self, guests: Guests) {
        *lock(&self.guests) = guests;
    }

    /// Returns how much the balloon of a process is to have.
    pub(crate) fn balloon_of(&self, pid: u32) -> Option<u64> {
        Some(lock(&lock(&self.machines).get(&pid)?.board).balloon.0)
    }

    /// Returns what the balloons of all machines so far were last asked to have.
    pub(crate) fn balloons(&self) -> Vec<u64> {
        lock(&self.machines).values().map(|known| lock(&known.board).balloon.0).collect()
    }

    /// Returns all calls so far, in order.
    pub(crate) fn calls(&self) -> Vec<Call> {
        lock(&self.calls).clone()
    }

    fn copies_memory(&self, mode: MemoryMode) -> bool {
        match mode {
            MemoryMode::Auto => self.copies_memory.load(Ordering::SeqCst),
            MemoryMode::Shared => true,
            MemoryMode::File => false,
        }
    }

    /// Returns how often the guest of a process was let run, if it is known by that.
    pub(crate) fn runs_of(&self, pid: u32) -> Option<u64> {
        let machines = lock(&self.machines);
        Some(runs_of_memory(&lock(&machines.get(&pid)?.board).memory))
    }

    /// Says whether anything is kept open to the machine of a process.
    pub(crate) fn is_connected(&self, pid: u32) -> bool {
        lock(&self.machines).get(&pid).is_some_and(|known| lock(&known.board).connected)
    }

    /// Says whether the machine of a process runs.
    pub(crate) fn runs(&self, pid: u32) -> bool {
        lock(&self.machines).get(&pid).is_some_and(|known| lock(&known.board).running)
    }

    fn call(&self, call: Call, process: Option<&Process>, cancel: &Cancel) -> Result<(), Error> {
        lock(&self.calls).push(call);
        let fault = {
            let mut faults = lock(&self.faults);
            let planned = faults.iter().position(|(planned, _)| *planned == call);
            planned.map(|planned| faults.remove(planned).1)
        };
        let command = format!("{call:?}");
        if let Some(exit) = process.and_then(Process::exited) {
            return Err(Error::Died { doing: command, exit, said: String::new() });
        }
        match fault {
            None => Ok(()),
            Some(Fault::Refuse) => Err(Error::Refused { command, said: "as planned".into() }),
            Some(Fault::NoSpace) => Err(Error::Host {
                doing: "writing as planned".to_owned(),
                source: io::ErrorKind::StorageFull.into(),
            }),
            Some(Fault::Die) => {
                let exit = process.and_then(|process| {
                    process.kill();
                    process.wait(HANG_MAX)
                });
                let exit = exit.unwrap_or(crate::sys::process::Exit::Unknown);
                Err(Error::Died { doing: command, exit, said: String::new() })
            }
            Some(Fault::Hang) => {
                let deadline = Deadline::after(HANG_MAX);
                let ended = || process.is_some_and(|process| process.exited().is_some());
                while cancel.check().is_ok() && !ended() && !deadline.passed() {
                    pause_for(Duration::from_millis(5));
                }
                Err(Error::Cancelled { doing: command })
            }
            Some(Fault::Panic) => panic!("a bug of the driver, as planned"),
            Some(Fault::Unanswered) => {
                Err(Error::TimedOut { command, limit: Duration::from_secs(1) })
            }
        }
    }
}

/// The driver of one daemon.
#[derive(Debug)]
pub(crate) struct FakeVmm(pub(crate) Arc<FakeHost>);

#[derive(Debug)]
struct FakeMachine {
    host: Arc<FakeHost>,
    board: Arc<Mutex<Board>>,
    process: Arc<Process>,
    cancel: Arc<Cancel>,
}

/// Returns how often the guest of a memory file was let run.
pub(crate) fn runs_in(memory: &Path) -> u64 {
    File::open(memory).map_or(0, |memory| runs_of_memory(&memory))
}

fn runs_of_memory(memory: &File) -> u64 {
    let mut count = [0; 8];
    memory.read_exact_at(&mut count, 0).map_or(0, |()| u64::from_le_bytes(count))
}

impl FakeVmm {
    fn start(&self, plan: &Plan) -> Result<FakeMachine, Error> {
        *lock(&self.0.plan) = Some(plan.clone());
        let failed = |source| Error::Host { doing: "starting a fake".to_owned(), source };
        let log = File::options().append(true).create(true).mode(0o600).open(&plan.vmm_log);
        // A shell that waits for a line, with the token as its name. It ends by itself when
        // the host of the test is gone, and with it the other end.
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let args = ["-c", "read line"].map(OsString::from);
        let launch = Launch {
            name: Some(plan.token.as_ref()),
            stdin: Some(theirs.into()),
            ..Launch::new(Path::new(PROGRAM), &args, log.map_err(failed)?)
        };
        let process = Process::spawn(launch).map_err(failed)?;
        plan.cancel.ends_with(Arc::<Process>::clone(&process));
        let copies = self.0.copies_memory(plan.memory_mode);
        let memory = if copies {
            tempfile::tempfile()
        } else {
            File::options().read(true).write(true).open(&plan.memory)
        };
        let memory = memory.map_err(failed)?;
        memory.set_len(plan.memory_bytes).map_err(failed)?;
        let board = Arc::new(Mutex::new(Board {
            running: false,
            connected: false,
            may_have_run: false,
            balloon: (0, 0),
            copies,
            memory,
        }));
        let known = Known {
            token: plan.token.clone(),
            version: self.0.version(),
            process: Arc::clone(&process),
            input: ours,
            board: Arc::clone(&board),
        };
        lock(&self.0.machines).insert(process.identity().pid, known);
        Ok(FakeMachine {
            host: Arc::clone(&self.0),
            board,
            process,
            cancel: Arc::clone(&plan.cancel),
        })
    }

    fn end(machine: &FakeMachine, error: Error) -> Error {
        machine.process.kill();
        machine.process.wait(HANG_MAX);
        error
    }
}

impl Vmm for FakeVmm {
    fn choice(&self) -> VmmChoice {
        VmmChoice::Qemu
    }

    fn identity(&self) -> Result<Arc<VmmIdentity>, Error> {
        Ok(Arc::new(VmmIdentity {
            name: self.name(),
            version: self.0.version().to_owned(),
            digest: "blake3:0".to_owned(),
            accelerator: "tcg",
            machine: "none".to_owned(),
            cpu: "none".to_owned(),
        }))
    }

    fn program(&self) -> &Path {
        Path::new(PROGRAM)
    }

    fn name(&self) -> &'static str {
        "fake"
    }

    fn has_vsock(&self) -> bool {
        lock(&self.0.vsock_owners).is_some()
    }

    fn lacks(&self, version: &str) -> Vec<&'static str> {
        if version == "1.0" { vec!["it is a fake", "it is an old one"] } else { Vec::new() }
    }

    fn keeps_memory_in_file(&self, mode: MemoryMode) -> bool {
        !self.0.copies_memory(mode)
    }

    fn unfit(&self, _: MemoryMode, _: RestoreMode, _: Option<u32>) -> Option<String> {
        lock(&self.0.objection).map(str::to_owned)
    }

    fn identity_of(&self, process: &Process) -> Result<Arc<VmmIdentity>, Error> {
        let version = lock(&self.0.machines)[&process.identity().pid].version.to_owned();
        Ok(Arc::new(VmmIdentity { version, ..VmmIdentity::clone(&*self.identity()?) }))
    }

    fn reads_kernel_again(&self) -> bool {
        false
    }

    fn takes_user(&self) -> bool {
        true
    }

    fn boot(&self, plan: &Plan) -> Result<Box<dyn Machine>, Error> {
        let machine = self.start(plan)?;
        self.0
            .call(Call::Boot, Some(&machine.process), &plan.cancel)
            .map_err(|error| Self::end(&machine, error))?;
        Ok(Box::new(machine))
    }

    fn restore(&self, plan: &Plan, dir: &Path) -> Result<Box<dyn Machine>, Error> {
        let machine = self.start(plan)?;
        let load = || {
            self.0.call(Call::Restore, Some(&machine.process), &plan.cancel)?;
            let state = fs::read_to_string(dir.join("vmstate")).unwrap_or_default();
            let (state, balloon) = state.split_once(' ').unwrap_or_default();
            let balloon = balloon.parse().unwrap_or_default();
            lock(&machine.board).balloon = (balloon, balloon);
            let runs = runs_in(&dir.join(SAVED_MEMORY));
            let board = lock(&machine.board);
            if board.copies {
                let failed = |source| Error::Host { doing: "loading".to_owned(), source };
                board.memory.write_all_at(&runs.to_le_bytes(), 0).map_err(failed)?;
            }
            let runs = runs.to_string();
            if state == runs {
                Ok(())
            } else {
                let said = format!("devices are of run {state:?} and memory of run {runs}");
                Err(Error::Refused { command: "restore".to_owned(), said })
            }
        };
        load().map_err(|error| Self::end(&machine, error))?;
        Ok(Box::new(machine))
    }

    fn adopt(&self, plan: &Plan, process: Arc<Process>) -> Result<Box<dyn Machine>, Error> {
        self.0.call(Call::Adopt, Some(&process), &plan.cancel)?;
        let board = Arc::clone(&lock(&self.0.machines)[&process.identity().pid].board);
        lock(&board).may_have_run = true;
        let (host, cancel) = (Arc::clone(&self.0), Arc::clone(&plan.cancel));
        Ok(Box::new(FakeMachine { host, board, process, cancel }))
    }
}

impl Machine for FakeMachine {
    fn process(&self) -> &Arc<Process> {
        &self.process
    }

    fn running(&mut self) -> Result<bool, Error> {
        Ok(lock(&self.board).running)
    }

    fn connect(&mut self) -> Result<(), Error> {
        self.host.call(Call::Connect, Some(&self.process), &self.cancel)?;
        lock(&self.board).connected = true;
        Ok(())
    }

    fn disconnect(&mut self) {
        lock(&self.board).connected = false;
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.host.call(Call::Pause, Some(&self.process), &self.cancel)?;
        lock(&self.board).running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let told = self.host.call(Call::Resume, Some(&self.process), &self.cancel);
        self.host.look_for_double(self.process.identity().pid);
        let mut board = lock(&self.board);
        // What did not answer may have obeyed.
        board.may_have_run |= !matches!(told, Err(Error::Refused { .. } | Error::Host { .. }));
        if !matches!(told, Ok(()) | Err(Error::TimedOut { .. })) {
            return told;
        }
        if !board.running {
            board.running = true;
            let failed = |source| Error::Host { doing: "running".to_owned(), source };
            let mut count = [0; 8];
            board.memory.read_exact_at(&mut count, 0).map_err(failed)?;
            let count = u64::from_le_bytes(count) + 1;
            board.memory.write_all_at(&count.to_le_bytes(), 0).map_err(failed)?;
        }
        told
    }

    fn never_ran(&self) -> bool {
        !lock(&self.board).may_have_run
    }

    fn save_bytes(&self) -> u64 {
        0
    }

    fn save(&mut self, dir: &Path) -> Result<(), Error> {
        let board = lock(&self.board);
        if board.running {
            let said = "it is not paused".to_owned();
            return Err(Error::Refused { command: "save".to_owned(), said });
        }
        let mut count = [0; 8];
        let read = board.memory.read_exact_at(&mut count, 0);
        let failed = |source| Error::Host { doing: "saving".to_owned(), source };
        read.map_err(failed)?;
        // What is written before a fault stays: partial files are for the caller to remove.
        let state = format!("{} {}", u64::from_le_bytes(count), board.balloon.0);
        fs::write(dir.join("vmstate"), state).map_err(failed)?;
        if board.copies {
            let copied = File::create_new(dir.join(SAVED_MEMORY)).and_then(|copy| {
                copy.set_len(board.memory.metadata()?.len())?;
                copy.write_all_at(&count, 0)
            });
            copied.map_err(failed)?;
        }
        self.host.call(Call::Save, Some(&self.process), &self.cancel)
    }

    fn lacks(&self) -> Vec<String> {
        Vec::new()
    }

    fn disk_traffic(&self) -> DiskTraffic {
        DiskTraffic::Calls
    }

    fn set_balloon(&mut self, bytes: u64) -> Result<(), Error> {
        self.host.call(Call::Balloon, Some(&self.process), &self.cancel)?;
        lock(&self.board).balloon.0 = bytes;
        Ok(())
    }

    fn balloon_bytes(&mut self) -> Result<u64, Error> {
        if let Some(exit) = self.process.exited() {
            let (doing, said) = ("being looked at".to_owned(), String::new());
            return Err(Error::Died { doing, exit, said });
        }
        let mut board = lock(&self.board);
        let (wanted, has) = board.balloon;
        board.balloon.1 = match *lock(&self.host.guests) {
            Guests::Give => wanted,
            Guests::Deaf => has,
            Guests::Dawdle => wanted.min(has + 1),
        };
        Ok(board.balloon.1)
    }

    fn give_vsock(&mut self, owner: Owner) -> Result<(), Error> {
        lock(&self.host.vsock_owners).get_or_insert_default().push(owner);
        Ok(())
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        Ok(bytes.len())
    }
}
