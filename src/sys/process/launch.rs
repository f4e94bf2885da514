//! How a process is started: what it inherits, and who it is.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    process::{Gid, Resource, Rlimit, Uid, setrlimit, setsid},
    thread::{
        CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{OwnDevices, Place, Process, reserve_places};
use crate::{sync::Arc, sys::netns::Namespace};

/// What it takes to use everybody's files as their owners may.
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::FOWNER);

/// A program, and what it is told first.
#[derive(Debug, Clone)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Its first arguments, without the name of the program.
    pub args: Vec<OsString>,
}

/// What to start a process with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program, by its absolute path: nothing is searched for.
    pub program: &'a Path,
    /// Its arguments, without the name of the program.
    pub args: &'a [OsString],
    /// What it is told that its name is (`argv[0]`); its path if that is `None`.
    pub name: Option<&'a OsStr>,
    /// Its environment, all of it.
    pub environment: &'a [(&'a str, &'a str)],
    /// Its standard input; `/dev/null` if there is none.
    pub stdin: Option<OwnedFd>,
    /// Where its standard output goes; to `log` if that is `None`.
    pub stdout: Option<File>,
    /// What it inherits besides, by the numbers that these have here.
    pub inherited: Vec<OwnedFd>,
    /// The same, of what others have too, and keep open.
    pub lent: Vec<Arc<OwnedFd>>,
    /// What it inherits by numbers that are the same in every process.
    pub placed: Vec<(Place, OwnedFd)>,
    /// Whether it has our privileges.
    pub privileges: Privileges,
    /// The devices that it has as its own.
    pub devices: Option<OwnDevices>,
    /// The network namespace that it is in, if that is not ours.
    pub namespace: Option<Namespace>,
    /// Where its standard error goes.
    pub log: File,
}

/// What a process may do beyond what its user may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Privileges {
    /// What we may.
    Ours,
    /// Nothing, for good: it has no capability, and no program that it becomes gives it any.
    /// It is our user, but for that.
    None,
    /// Nothing, and it is another user.
    NoneAs(User),
    /// To use everybody's files as their owners may, and no more than that, for good.
    Files,
}

/// A user whose only group of its own has the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The number of both.
    pub uid: u32,
    /// The groups that it is in besides.
    pub groups: Vec<u32>,
}

impl<'a> Launch<'a> {
    /// Returns what starts `program` with no input, and with all that it says in `log`.
    #[must_use]
    pub fn new(program: &'a Path, args: &'a [OsString], log: File) -> Self {
        Self {
            program,
            args,
            name: None,
            environment: &[],
            stdin: None,
            stdout: None,
            inherited: Vec::new(),
            lent: Vec::new(),
            placed: Vec::new(),
            privileges: Privileges::Ours,
            devices: None,
            namespace: None,
            log,
        }
    }
}

impl Process {
    /// Starts a process: in a session of its own, so that a Ctrl-C for us is not for it, and
    /// that the kernel does not end it (SIGHUP) where it is stopped when we end; with `/` as
    /// its directory, and with no environment and no file of ours but those of `launch`. It
    /// leaves no core file, which would have all of its memory in it.
    ///
    /// # Errors
    /// Where the program cannot be started; no process is left then.
    pub fn spawn(launch: Launch<'_>) -> io::Result<Arc<Self>> {
        #[allow(clippy::disallowed_methods, reason = "this is the module that the ban points to")]
        let mut command = Command::new(launch.program);
        command
            .args(launch.args)
            .env_clear()
            .envs(launch.environment.iter().copied())
            .current_dir("/")
            .stdin(launch.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(launch.stdout.map_or_else(|| launch.log.try_clone(), Ok)?)
            .stderr(launch.log);
        if let Some(name) = launch.name {
            command.arg0(name);
        }
        // The steps of the child, in their order.
        before_exec(&mut command, || Ok(setsid().map(drop)?));
        close_on_exec(&mut command);
        before_exec(&mut command, forbid_core_files);
        // Whatever comes of it, our copies are closed when this is over.
        let (inherited, lent, placed) = (launch.inherited, launch.lent, launch.placed);
        keep_on_exec(&mut command, &inherited);
        keep_on_exec(&mut command, &lent);
        if !placed.is_empty() {
            reserve_places()?;
            put_in_place(&mut command, &placed);
        }
        if let Some(devices) = launch.devices {
            before_exec(&mut command, move || devices.enter());
        }
        if let Some(namespace) = launch.namespace {
            // The child has one thread, so nobody else is moved.
            before_exec(&mut command, move || namespace.enter());
        }
        match launch.privileges {
            Privileges::Ours => {}
            Privileges::None => give_up_privileges(&mut command, CapabilitySet::empty(), None),
            Privileges::NoneAs(user) => {
                give_up_privileges(&mut command, CapabilitySet::empty(), Some(&user));
            }
            Privileges::Files => give_up_privileges(&mut command, FILES, None),
        }
        let mut child = command.spawn()?;
        // Nobody but us reaps our child, so its number is its own until then.
        Self::hold_child(child.id()).inspect_err(|_| {
            if child.kill().is_ok() {
                // A process that was sent SIGKILL ends, so this does not hang.
                let _status = child.wait();
            }
        })
    }
}

/// Has the child do something when it has its standard files, before it becomes its
/// program. `step` may do only what is safe in a signal handler: make system calls, and
/// neither allocate nor lock.
fn before_exec(
    command: &mut Command,
    step: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: between fork and exec only what is safe in a signal handler is allowed, and
    // all steps in this module are no more than that.
    unsafe { command.pre_exec(step) };
}

/// Has this process, and whoever it starts, leave no core file when it crashes.
///
/// # Errors
/// Those of setrlimit(2).
pub fn forbid_core_files() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
}

/// Has the child close, when it becomes its program, whatever it inherited beyond its
/// three standard files. All that we open closes itself; what whoever started us left
/// open, such as a shell's hold on an `awake` file, does not.
fn close_on_exec(command: &mut Command) {
    before_exec(command, || {
        const FIRST_TO_CLOSE: libc::c_uint = 3;
        // SAFETY: the call takes no pointers and changes nothing but the flags of our
        // own descriptors; whoever owns them does not depend on what happens at exec.
        let done = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                FIRST_TO_CLOSE,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    });
}

/// Has the child keep these when it becomes its program, by the numbers that they have.
fn keep_on_exec(command: &mut Command, inherited: &[impl AsRawFd]) {
    let numbers: Vec<_> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    before_exec(command, move || {
        for number in &numbers {
            // SAFETY: the call takes no pointers and changes nothing but the flags of a
            // descriptor that is open, as whoever called `spawn` keeps it until it returns.
            let done = unsafe { libc::fcntl(*number, libc::F_SETFD, 0) };
            if done == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    });
}

/// Has the child keep these by numbers that were taken for that, so that none of these, nor
/// anything that the child needs until then, has one of them.
fn put_in_place(command: &mut Command, placed: &[(Place, OwnedFd)]) {
    let pairs: Vec<(RawFd, RawFd)> =
        placed.iter().map(|(place, file)| (file.as_raw_fd(), place.descriptor())).collect();
    before_exec(command, move || {
        for (from, to) in &pairs {
            // SAFETY: the call takes no pointers. It closes what has the number `to`, which
            // is the placeholder and nobody's, and makes one that stays open.
            let done = unsafe { libc::dup2(*from, *to) };
            if done == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    });
}

/// Has the child give up all privileges but these before it becomes its program, and become
/// `user`, if that is another.
fn give_up_privileges(command: &mut Command, kept: CapabilitySet, user: Option<&User>) {
    let user = user.map(|user| {
        let groups: Vec<_> = user.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        (Uid::from_raw(user.uid), Gid::from_raw(user.uid), groups)
    });
    before_exec(command, move || {
        if let Some((uid, gid, groups)) = &user {
            // In this order: who is not root any more cannot change groups. These are
            // those of the one thread that the child has.
            set_thread_groups(groups)?;
            set_thread_res_gid(*gid, *gid, *gid)?;
            set_thread_res_uid(*uid, *uid, *uid)?;
        }
        // Becoming a program gives root all of its capabilities again, but not with this.
        set_no_new_privs(true)?;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
        set_capabilities(None, sets)?;
        Ok(())
    });
}
