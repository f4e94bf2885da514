//! One Cloud Hypervisor, and what it can be asked to do.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::IgnoredAny;

use super::{
    allowance::Allowance,
    api::{self, ANSWER_LIMIT, Call, Client, Failed},
    body::{Info, Ping, Resize, RestoreSource, SnapshotTarget, State, VmConfig},
    confinement,
    console::{self, Console},
    identity::{ExecName, Identity},
    memory_file,
    restore_mode::STILL_LOADING,
    saved::{CONFIG_FILE, MEMORY_FILE, SMALL_FILE_MAX_BYTES, STATE_FILE},
    told,
    version::{OLDEST, Version},
    view, vsock,
};
use crate::{
    sandbox::{Owner, RestoreMode},
    sync::Arc,
    sys::{
        clock::{self, Deadline, Stopwatch},
        files::{
            self, check_plain, give_dir, is_image_locked, open_image, open_regular_to_append,
            read_regular, take_back,
        },
        host::own_ids,
        process::{Launch, Process},
    },
    vmm::{
        DiskKind, DiskTraffic, Error, Machine, Plan, PlannedVsock, SAVED_MEMORY,
        log::{self, LastWords},
        nic,
        peer::{Peer, begin, host, listen},
    },
};

/// For a process that is starting, which takes 4 ms alone on a CPU. With a hundred wakes at
/// once on two it is many seconds. One that ends meanwhile is not waited for.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A pause waits for the disks to be through with what they do.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// A boot reads kernel and initial RAM file system; a resume waits for each vCPU, and for
/// whatever the VMM is still busy with.
const RUN_LIMIT: Duration = Duration::from_secs(30);
/// How fast memory is written and read at the least: a disk that is slower is not well.
const MEMORY_MIN_BYTES_PER_SECOND: u64 = 32 << 20;
/// A process that has just ended gives up the locks on its disks when its last I/O is
/// through, some milliseconds later. How long we wait for it, and how often we look.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// What the names of the threads that run its vCPUs begin with.
const VCPU_THREADS: &str = "vcpu";

/// How often a machine that is still loading is asked whether it is through: soon, for a
/// small one, and not so often that a large one has nothing else to do.
const LOADING_LOOK_FIRST: Duration = Duration::from_millis(20);
const LOADING_LOOK_MOST: Duration = Duration::from_millis(500);

/// Has glibc make no more pools of memory for threads. Before it makes the ninth it counts the
/// CPUs, by a file that the filters of those threads do not let them open: the VMM, and its
/// guest, would be dead (v53, in the thread that answers the API). `arena_get2` of glibc's
/// malloc; mallopt(3) has the variable.
const ENVIRONMENT: [(&str, &str); 1] = [("MALLOC_ARENA_MAX", "1")];

/// A Cloud Hypervisor that runs one sandbox, or is about to.
#[derive(Debug)]
pub(super) struct CloudMachine {
    client: Client,
    /// The user that it runs as.
    uid: u32,
    /// Why that is ours, where it was to be another.
    why_ours: Option<String>,
    home: PathBuf,
    runtime_dir: PathBuf,
    console_log: PathBuf,
    typing: Allowance,
    known_for: Stopwatch,
    memory_bytes: u64,
    /// Whether its memory is in a file of the store.
    in_file: bool,
    /// How memory that is in none came back, if it was woken.
    restore_mode: RestoreMode,
    /// The disks that the guest may write to.
    disks: Vec<PathBuf>,
    vsock: Option<PlannedVsock>,
    version: Version,
    /// Whether the guest may have run in this process.
    may_have_run: bool,
}

impl CloudMachine {
    /// Starts one that has the machine's configuration and has not made it.
    pub(super) fn boot(program: &Path, plan: &Plan) -> Result<Self, Error> {
        let memory = memory_file::prepare(plan)?;
        let spawn = || Self::spawn(program, plan, None);
        let create = |machine: &mut Self| machine.create(plan, memory.as_deref());
        let machine = begin(plan, "starting", spawn, create)?;
        for lack in machine.lacks() {
            tracing::warn!(id = %plan.id, "{lack}");
        }
        Ok(machine)
    }

    /// Starts one that has loaded the snapshot in `dir`, and is paused.
    pub(super) fn restore(program: &Path, plan: &Plan, dir: &Path) -> Result<Self, Error> {
        let memory = memory_file::prepare(plan)?;
        let spawn = || Self::spawn(program, plan, Some(dir));
        begin(plan, "loading the snapshot", spawn, |machine| {
            machine.load(plan, dir, memory.as_deref())
        })
    }

    /// Takes over one that is there already. If it is busy with a snapshot that nobody
    /// wants any more, that is waited for.
    pub(super) fn adopt(plan: &Plan, process: Arc<Process>) -> Result<Self, Error> {
        let last_words = LastWords::from_now_on(&plan.vmm_log);
        let doing = "being adopted".to_owned();
        let uid = process.user().map_err(|error| match process.exited() {
            Some(exit) => Error::Died { doing, exit, said: last_words.read() },
            None => host(doing)(error),
        })?;
        let why_ours = plan
            .user
            .filter(|user| *user != uid && uid == own_ids().0)
            .map(|_| "it was started so (the log of its boot has the reason)".to_owned());
        let mut machine = Self::over(process, last_words, plan, uid);
        machine.why_ours = why_ours;
        machine.may_have_run = true;
        let limit = memory_limit(plan.memory_bytes);
        machine.version = machine.ping("being adopted", limit)?;
        // The daemon that had it made may have died before it gave the vsock away. Of one
        // that has not been made yet there is none.
        if let Some(vsock) = &machine.vsock
            && vsock.socket().symlink_metadata().is_ok()
            && let Err(error) = vsock::give(vsock, None)
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(id = %plan.id, error, "adopting a vsock");
        }
        Ok(machine)
    }

    fn over(process: Arc<Process>, last_words: LastWords, plan: &Plan, uid: u32) -> Self {
        let writable = plan.disks.iter().filter(|disk| disk.kind == DiskKind::Own);
        Self {
            client: Client::new(Peer {
                process,
                socket: socket_path(&plan.runtime_dir),
                last_words,
            }),
            uid,
            why_ours: None,
            home: told::home(plan).to_owned(),
            runtime_dir: plan.runtime_dir.clone(),
            console_log: plan.console_log.clone(),
            typing: Allowance::new(len_of(&plan.console_log)),
            known_for: Stopwatch::start(),
            memory_bytes: plan.memory_bytes,
            in_file: memory_file::is_wanted(plan.memory_mode),
            restore_mode: plan.restore_mode,
            disks: writable.map(|disk| disk.path.clone()).collect(),
            vsock: plan.vsock.clone(),
            version: OLDEST,
            may_have_run: false,
        }
    }

    fn spawn(program: &Path, plan: &Plan, snapshot: Option<&Path>) -> Result<Self, Error> {
        let identity = Identity::prepare(program, plan, snapshot)?;
        let is_another = identity.is_another();
        match Self::spawn_as(identity, program, plan) {
            Err(Error::Host { source, .. }) if is_another => {
                let ours = Identity::prepare_ours(program, plan, snapshot, &source)?;
                Self::spawn_as(ours, program, plan)
            }
            spawned => spawned,
        }
    }

    fn spawn_as(identity: Identity, program: &Path, plan: &Plan) -> Result<Self, Error> {
        let (log, last_words) = log::open(&plan.vmm_log)
            .map_err(host(format!("opening {}", plan.vmm_log.display())))?;
        let stdout = open_regular_to_append(&plan.console_log)
            .map_err(host(format!("opening {}", plan.console_log.display())))?;
        let Console { master, terminal } = console::prepare(&plan.runtime_dir)
            .map_err(host("making a terminal for the console".to_owned()))?;
        let listener = OwnedFd::from(listen(&socket_path(&plan.runtime_dir))?);
        let args = [
            "--api-socket".to_owned(),
            format!("fd={}", listener.as_raw_fd()),
            "--seccomp".to_owned(),
            "true".to_owned(),
        ]
        .map(OsString::from);
        let exec = ExecName::make(program, plan, identity.uid)?;
        let namespace = plan.nic.as_ref().map(|nic| nic::lend(nic, identity.uid)).transpose()?;
        let process = Process::spawn(Launch {
            // Its arguments have no room for a word of ours, so its name is the token.
            name: Some(OsStr::new(&plan.token)),
            environment: &ENVIRONMENT,
            stdin: Some(master),
            stdout: Some(stdout),
            inherited: vec![terminal, listener],
            placed: identity.placed,
            privileges: identity.privileges,
            devices: identity.devices,
            namespace,
            ..Launch::new(&exec.path, &args, log)
        })
        .map_err(host(format!("starting {}", program.display())))?;
        let mut machine = Self::over(process, last_words, plan, identity.uid);
        machine.why_ours = identity.why_ours;
        // What it is made by and then let run by need not be opened twice.
        machine.client.keep();
        Ok(machine)
    }

    /// Waits until it answers, and learns what it can do.
    fn greet(&mut self) -> Result<(), Error> {
        self.version = self.ping("starting", START_LIMIT)?;
        Ok(())
    }

    /// Refuses a network device to a version that would set an address on the host's end.
    fn check_nic(&self, plan: &Plan, command: &str) -> Result<(), Error> {
        if plan.nic.is_none() || self.version.leaves_taps_alone() {
            return Ok(());
        }
        let said = "this version cannot have a network; use v49 or later".to_owned();
        Err(Error::Refused { command: command.to_owned(), said })
    }

    fn ping(&mut self, doing: &'static str, limit: Duration) -> Result<Version, Error> {
        let call = Call { name: "vmm.ping", doing, limit };
        let ping: Ping = self.client.get(call)?;
        let version = Version::parse(&ping.version);
        version
            .filter(|version| *version >= OLDEST)
            .ok_or_else(|| api::nonsense(call, &format!("it is version {}", ping.version)))
    }

    fn create(&mut self, plan: &Plan, memory_file: Option<&Path>) -> Result<(), Error> {
        wait_for_disks(plan)?;
        // It shuts itself in to what is there by then.
        vsock::prepare(plan, self.uid)?;
        self.greet()?;
        self.check_nic(plan, "vm.create")?;
        let config = VmConfig::new(plan, memory_file, self.version, confinement::rules());
        let call = Call { name: "vm.create", doing: "starting", limit: ANSWER_LIMIT };
        Ok(self.client.put_with(call, &config)?)
    }

    /// Loads the snapshot in `dir`. What a restore needs of the host is looked at before
    /// memory is read, which takes its time.
    fn load(&mut self, plan: &Plan, dir: &Path, memory_file: Option<&Path>) -> Result<(), Error> {
        wait_for_disks(plan)?;
        vsock::prepare(plan, self.uid)?;
        self.greet()?;
        self.check_nic(plan, "vm.restore")?;
        let view = view::make(plan, dir, memory_file, self.uid)?;
        let source = RestoreSource::new(url(&view)?, plan.restore_mode, self.version)
            .map_err(|said| Error::Refused { command: "vm.restore".to_owned(), said })?;
        let limit = memory_limit(self.memory_bytes);
        let call = Call { name: "vm.restore", doing: "loading the snapshot", limit };
        self.client.put_with(call, &source)?;
        self.open_vsock()?;
        view::remove(plan)
    }

    /// Lets the sandbox's owner connect to the vsock that was just made, if there is one.
    fn open_vsock(&self) -> Result<(), Error> {
        self.vsock.as_ref().map_or(Ok(()), |vsock| vsock::give(vsock, None))
    }

    fn info(&mut self, doing: &'static str, limit: Duration) -> Result<Info, Error> {
        self.client.get(Call { name: "vm.info", doing, limit })
    }

    fn state(&mut self, doing: &'static str) -> Result<State, Error> {
        Ok(self.info(doing, RUN_LIMIT)?.state)
    }

    /// Lets the vCPUs run, which are in `state`.
    fn run_from(&mut self, state: State) -> Result<(), Failed> {
        let call = |name| Call { name, doing: "resuming", limit: RUN_LIMIT };
        match state {
            State::Running => Ok(()),
            State::Created => self.client.put(call("vm.boot")),
            State::Paused | State::Shutdown | State::BreakPoint => {
                self.client.put(call("vm.resume"))
            }
        }
    }

    /// Asks it again to let the vCPUs run that were in `state`, where its answer got lost: it
    /// may have obeyed. It answers in turn, so by then it is through with the first request.
    fn run_again(&mut self, state: State, failed: Failed) -> Result<(), Failed> {
        let is_lost = match &failed.error {
            Error::Host { .. } | Error::Nonsense { .. } | Error::TimedOut { .. } => failed.sent,
            Error::Missing { .. }
            | Error::Refused { .. }
            | Error::Died { .. }
            | Error::Cancelled { .. } => false,
        };
        if !is_lost {
            return Err(failed);
        }
        tracing::warn!(process = %self.client.peer.process, error = %failed.error, "asking again");
        match self.state("resuming") {
            Ok(State::Running) => Ok(()),
            Ok(now) if now == state => self.run_from(now),
            Ok(_) | Err(_) => Err(failed),
        }
    }

    /// Has it write a snapshot. It refuses to, unless it is paused, and as long as it is still
    /// loading what its guest was woken from, which it goes on with while it is paused.
    fn save_when_loaded(&mut self, target: &SnapshotTarget) -> Result<(), Error> {
        let limit = memory_limit(self.memory_bytes);
        let call = Call { name: "vm.snapshot", doing: "saving its state", limit };
        let deadline = Deadline::after(limit);
        let mut look = LOADING_LOOK_FIRST;
        loop {
            match self.client.put_with(call, target).map_err(Error::from) {
                Err(Error::Refused { said, .. }) if said.contains(STILL_LOADING) => {}
                done => return done,
            }
            if deadline.passed() {
                let command = "loading what the guest was woken from".to_owned();
                return Err(Error::TimedOut { command, limit });
            }
            clock::pause_for(look);
            look = (look * 2).min(LOADING_LOOK_MOST);
        }
    }

    fn save_files(&self, dir: &Path) -> Result<(), Error> {
        for disk in &self.disks {
            // It writes through the page cache. What the guest's memory counts on as
            // written has to be there as long as the memory is.
            open_image(disk)
                .and_then(|disk| disk.sync_data())
                .map_err(host(format!("syncing {}", disk.display())))?;
        }
        for name in [CONFIG_FILE, STATE_FILE] {
            // They are written by one call each, which writes as much as it can.
            let path = dir.join(name);
            let text = read_regular(&path, SMALL_FILE_MAX_BYTES)
                .map_err(host(format!("reading {}", path.display())))?;
            if serde_json::from_slice::<IgnoredAny>(&text).is_err() {
                return Err(Error::Nonsense {
                    command: "vm.snapshot".to_owned(),
                    said: format!("it wrote only {} bytes of {name}", text.len()),
                });
            }
            if self.in_file && name == STATE_FILE {
                memory_file::keep_from_changing(&path, &text)?;
            }
        }
        if self.in_file {
            return memory_file::refuse_copy(&dir.join(MEMORY_FILE));
        }
        files::rename(&dir.join(MEMORY_FILE), &dir.join(SAVED_MEMORY))
            .map_err(host(format!("naming the memory in {}", dir.display())))
    }
}

impl Machine for CloudMachine {
    fn process(&self) -> &Arc<Process> {
        &self.client.peer.process
    }

    fn running(&mut self) -> Result<bool, Error> {
        Ok(self.state("telling its state")? == State::Running)
    }

    fn connect(&mut self) -> Result<(), Error> {
        self.client.connect()
    }

    fn disconnect(&mut self) {
        self.client.disconnect();
    }

    fn pause(&mut self) -> Result<(), Error> {
        let call = Call { name: "vm.pause", doing: "pausing", limit: PAUSE_LIMIT };
        match self.client.put(call) {
            Err(Failed { error: error @ Error::Refused { .. }, .. }) => {
                if self.state("pausing")? == State::Paused { Ok(()) } else { Err(error) }
            }
            done => Ok(done?),
        }
    }

    fn resume(&mut self) -> Result<(), Error> {
        let had_run = self.may_have_run;
        let state = self.state("resuming")?;
        self.may_have_run = true;
        let told = self.run_from(state).or_else(|failed| self.run_again(state, failed));
        let Err(Failed { error, sent }) = told else {
            // What was only a configuration has been made just now, and its socket with it.
            return if state == State::Created { self.open_vsock() } else { Ok(()) };
        };
        let refused = matches!(error, Error::Refused { .. });
        if !sent || (refused && self.version.resumes_vcpus_last()) {
            self.may_have_run = had_run;
        }
        Err(error)
    }

    fn never_ran(&self) -> bool {
        !self.may_have_run
    }

    fn save_bytes(&self) -> u64 {
        if self.in_file {
            return 0;
        }
        // What loads on demand has all of its memory when it is through.
        if !self.version.saves_sparsely() || self.restore_mode == RestoreMode::OnDemand {
            return self.memory_bytes;
        }
        // All that it has of such files is the guest's memory.
        self.client.peer.process.memfd_bytes().unwrap_or(self.memory_bytes)
    }

    fn save(&mut self, dir: &Path) -> Result<(), Error> {
        let target = SnapshotTarget { destination_url: url(&told::in_home(&self.home, dir))? };
        give_dir(dir, self.uid).map_err(host(format!("giving {} to the VMM", dir.display())))?;
        let saved = self.save_when_loaded(&target);
        // It may be under the guest's thumb by now, and have put anything there; so first of
        // all it loses the directory, and nothing is opened that it did not make there.
        take_back(dir).map_err(host(format!("taking {} back", dir.display())))?;
        saved?;
        check_plain(dir, self.uid)
            .map_err(host(format!("looking at what it left in {}", dir.display())))?;
        self.save_files(dir)
    }

    fn lacks(&self) -> Vec<String> {
        let why = self.why_ours.iter();
        why.map(|why| format!("its VMM runs as root without privileges, because {why}")).collect()
    }

    fn disk_traffic(&self) -> DiskTraffic {
        // By io_uring, or the older asynchronous I/O where the kernel has that switched off.
        let vcpus = self.in_file.then_some(VCPU_THREADS);
        DiskTraffic::Blocks { vcpus }
    }

    fn set_balloon(&mut self, bytes: u64) -> Result<(), Error> {
        let call = Call { name: "vm.resize", doing: "resizing its balloon", limit: ANSWER_LIMIT };
        Ok(self.client.put_with(call, &Resize { desired_balloon: bytes })?)
    }

    fn balloon_bytes(&mut self) -> Result<u64, Error> {
        let info = self.info("telling the size of its balloon", ANSWER_LIMIT)?;
        Ok(self.memory_bytes.saturating_sub(info.memory_actual_size))
    }

    fn give_vsock(&mut self, owner: Owner) -> Result<(), Error> {
        let Some(vsock) = &mut self.vsock else { return Ok(()) };
        let before = std::mem::replace(&mut vsock.owner, owner);
        vsock::give(vsock, Some(before))
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        let (printed, lived) = (len_of(&self.console_log), self.known_for.elapsed());
        let allowed = self.typing.take(bytes.len(), printed, lived);
        let bytes = bytes.get(..allowed).unwrap_or(bytes);
        let taken = console::type_in(&self.client.peer.process, &self.runtime_dir, bytes)
            .map_err(host("typing on the console".to_owned()))?;
        self.typing.give_back(allowed - taken);
        Ok(taken)
    }
}

/// Returns the length of a file; none is as good as an empty one.
fn len_of(file: &Path) -> u64 {
    file.symlink_metadata().map_or(0, |meta| meta.len())
}

fn socket_path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("api.sock")
}

/// Returns how long it may take to write or read so much memory.
fn memory_limit(bytes: u64) -> Duration {
    RUN_LIMIT + Duration::from_secs(bytes / MEMORY_MIN_BYTES_PER_SECOND)
}

/// Names a directory as Cloud Hypervisor wants it: it takes off the `file://`, and what
/// is left is the path, whatever is in it.
fn url(dir: &Path) -> Result<String, Error> {
    dir.to_str().map(|dir| format!("file://{dir}")).ok_or_else(|| Error::Refused {
        command: "vm.snapshot".to_owned(),
        said: format!("{} cannot be written in UTF-8", dir.display()),
    })
}

/// Makes sure that the sandbox's own disks are there, and waits until nobody has them who is
/// about to end. Of a boot that failed for a lock the VMM cannot be rid of, and a restore reads
/// all of the memory before it looks. Of those that it shares the file systems are not asked,
/// which may not answer.
fn wait_for_disks(plan: &Plan) -> Result<(), Error> {
    let deadline = Deadline::after(LOCK_LIMIT);
    for disk in plan.disks.iter().filter(|disk| disk.kind == DiskKind::Own) {
        let locked = || {
            is_image_locked(&disk.path)
                .map_err(host(format!("looking at the disk {}", disk.path.display())))
        };
        while locked()? {
            if deadline.passed() {
                let error = io::Error::new(io::ErrorKind::WouldBlock, "another VMM has it");
                return Err(host(format!("taking the disk {}", disk.path.display()))(error));
            }
            clock::pause_for(LOCK_LOOK);
        }
    }
    Ok(())
}
