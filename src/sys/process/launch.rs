//! Starts processes: their files, user and privileges.

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

use super::{FixedFd, OwnDevices, Process, reserve_fixed_fds};
use crate::{sync::Arc, sys::netns::Namespace};

/// The capabilities to use all files like their owners.
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::FOWNER);

/// A program and its first arguments.
#[derive(Debug, Clone)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Its first arguments, without the name of the program.
    pub args: Vec<OsString>,
}

/// The parameters of a process.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Its absolute path.
    pub program: &'a Path,
    /// Its arguments, without the name of the program.
    pub args: &'a [OsString],
    /// `argv[0]`; by default its path.
    pub name: Option<&'a OsStr>,
    /// Its whole environment.
    pub environment: &'a [(&'a str, &'a str)],
    /// Its standard input; `/dev/null` if there is none.
    pub stdin: Option<OwnedFd>,
    /// Its standard output; `log` by default.
    pub stdout: Option<File>,
    /// Further files that it inherits, with the same numbers.
    pub inherited: Vec<OwnedFd>,
    /// The same, for shared files.
    pub lent: Vec<Arc<OwnedFd>>,
    /// Files that it inherits with fixed numbers.
    pub placed: Vec<(FixedFd, OwnedFd)>,
    /// Its privileges.
    pub privileges: Privileges,
    /// Device nodes in a mount namespace of its own.
    pub devices: Option<OwnDevices>,
    /// Its network namespace, if another.
    pub namespace: Option<Namespace>,
    /// Where its standard error goes.
    pub log: File,
}

/// The privileges of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Privileges {
    /// Those of the daemon.
    Ours,
    /// None, and it cannot gain any; the same user.
    None,
    /// None, as another user.
    NoneAs(User),
    /// Only to use all files like their owners.
    Files,
}

/// A user with a group of the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The number of both.
    pub uid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

impl<'a> Launch<'a> {
    /// Returns parameters with no input and with all output in `log`.
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
    /// Starts a process in a new session, so that neither Ctrl-C nor a SIGHUP at the daemon's exit
    /// reaches it; with `/` as its directory, only the environment and files of `launch`, and no
    /// core file, which would contain its memory.
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
        // Our copies are closed in any case.
        let (inherited, lent, placed) = (launch.inherited, launch.lent, launch.placed);
        keep_on_exec(&mut command, &inherited);
        keep_on_exec(&mut command, &lent);
        if !placed.is_empty() {
            reserve_fixed_fds()?;
            pass_fixed_fds(&mut command, &placed);
        }
        if let Some(devices) = launch.devices {
            before_exec(&mut command, move || devices.enter());
        }
        if let Some(namespace) = launch.namespace {
            // The child has only one thread.
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
        // Only this process reaps the child, so its pid is valid until then.
        Self::hold_child(child.id()).inspect_err(|_| {
            if child.kill().is_ok() {
                // SIGKILL was sent, so this does not hang.
                let _status = child.wait();
            }
        })
    }
}

/// Adds a step between fork and exec. `step` must be async-signal-safe: only system calls, no
/// allocation, no locks.
fn before_exec(
    command: &mut Command,
    step: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: between fork and exec only async-signal-safe code is allowed, and all steps in this
    // module are.
    unsafe { command.pre_exec(step) };
}

/// Disables core files of this process and its children.
pub fn forbid_core_files() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
}

/// Closes, at the exec, all inherited files except the three standard ones. The daemon's own files
/// have CLOEXEC; files of its parent, such as a shell's hold on an `awake` file, may not.
fn close_on_exec(command: &mut Command) {
    before_exec(command, || {
        const FIRST_TO_CLOSE: libc::c_uint = 3;
        // SAFETY: the call takes no pointers and changes only flags of descriptors, which matter
        // only at exec.
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

/// Keeps these files across the exec, with their numbers.
fn keep_on_exec(command: &mut Command, inherited: &[impl AsRawFd]) {
    let numbers: Vec<_> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    before_exec(command, move || {
        for number in &numbers {
            // SAFETY: the call takes no pointers and changes only the flags of a descriptor that
            // the caller of `spawn` keeps open.
            let done = unsafe { libc::fcntl(*number, libc::F_SETFD, 0) };
            if done == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    });
}

/// Keeps these files across the exec, with fixed numbers, which nothing else in the child uses.
fn pass_fixed_fds(command: &mut Command, placed: &[(FixedFd, OwnedFd)]) {
    let pairs: Vec<(RawFd, RawFd)> =
        placed.iter().map(|(place, file)| (file.as_raw_fd(), place.descriptor())).collect();
    before_exec(command, move || {
        for (from, to) in &pairs {
            // SAFETY: the call takes no pointers. It replaces only the placeholder that has the
            // number `to`.
            let done = unsafe { libc::dup2(*from, *to) };
            if done == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    });
}

/// Drops all other privileges before the exec, and changes to `user`, if another.
fn give_up_privileges(command: &mut Command, kept: CapabilitySet, user: Option<&User>) {
    let user = user.map(|user| {
        let groups: Vec<_> = user.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        (Uid::from_raw(user.uid), Gid::from_raw(user.uid), groups)
    });
    before_exec(command, move || {
        if let Some((uid, gid, groups)) = &user {
            // In this order: only root can change groups. The child has only one thread.
            set_thread_groups(groups)?;
            set_thread_res_gid(*gid, *gid, *gid)?;
            set_thread_res_uid(*uid, *uid, *uid)?;
        }
        // Otherwise root would regain all capabilities at the exec.
        set_no_new_privs(true)?;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
        set_capabilities(None, sets)?;
        Ok(())
    });
}
