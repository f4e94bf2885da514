//! The command line, as the real program takes it.
//!
//! What describes a VM on the command line is refused: the driver does that by the API.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use clap::{Arg, ArgAction, Command};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::knobs::{Knobs, RESTORE_MODES, SOCKET_LOCK};

/// What the program was told.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) api_socket: Option<Target>,
    pub(crate) event_monitor: Option<Target>,
    pub(crate) no_shutdown: bool,
    pub(crate) version: bool,
}

/// A file by its path, or one that was inherited.
#[derive(Debug)]
pub(crate) enum Target {
    Path(PathBuf),
    Fd(i32),
}

/// The values of a list such as `path=/a,fd=3`.
#[derive(Debug, Default)]
struct Values {
    path: Option<String>,
    fd: Option<String>,
}

impl Arguments {
    /// Parses the command line. Where it is wrong, clap ends the process with 2, as it
    /// does in the real program; a wrong value is an error of ours.
    pub(crate) fn parse(knobs: &Knobs) -> Result<Self, String> {
        let found = command(knobs).get_matches();
        let text = |name: &str| found.get_one::<String>(name);
        if let Some(log) = text("log-file") {
            File::create(log).map_err(|error| format!("Error creating log file: {error}"))?;
        }
        Ok(Self {
            api_socket: text("api-socket").map(|text| api_socket(text)).transpose()?,
            event_monitor: text("event-monitor").map(|text| event_monitor(text)).transpose()?,
            no_shutdown: found.try_get_one("no-shutdown").is_ok_and(|on| on == Some(&true)),
            version: found.get_flag("version"),
        })
    }
}

impl Target {
    /// Takes the inherited descriptor of that number.
    pub(crate) fn inherited(number: i32) -> Result<OwnedFd, String> {
        let ourselves = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| e.to_string())?;
        pidfd_getfd(ourselves.as_fd(), number, PidfdGetfdFlags::empty())
            .map_err(|error| format!("file descriptor {number}: {error}"))
    }
}

fn command(knobs: &Knobs) -> Command {
    let mut seccomp = vec!["true", "false", "log"];
    if knobs.has(SOCKET_LOCK) {
        seccomp.push("errno");
    }
    let mut command = Command::new("cloud-hypervisor")
        .about("Launch a cloud-hypervisor VMM.")
        .arg_required_else_help(true)
        .arg(Arg::new("api-socket").long("api-socket").num_args(1))
        .arg(Arg::new("event-monitor").long("event-monitor").num_args(1))
        .arg(Arg::new("log-file").long("log-file").num_args(1))
        .arg(Arg::new("seccomp").long("seccomp").num_args(1).value_parser(seccomp))
        .arg(Arg::new("v").short('v').action(ArgAction::Count))
        .arg(Arg::new("version").short('V').long("version").action(ArgAction::SetTrue));
    if knobs.has(RESTORE_MODES) {
        command = command
            .arg(Arg::new("no-shutdown").long("no-shutdown").action(ArgAction::SetTrue))
            .arg(Arg::new("log-format").long("log-format").num_args(1));
    }
    command
}

/// What cannot be parsed is passed over here, so that a path ends at its first comma.
fn api_socket(text: &str) -> Result<Target, String> {
    let (values, _) = Values::parse(text);
    match (values.fd, values.path) {
        (Some(fd), _) => {
            let number = fd.parse().map_err(|error| format!("Error parsing --api-socket: {error}"));
            number.map(Target::Fd)
        }
        (None, Some(path)) => Ok(Target::Path(path.into())),
        (None, None) => Ok(Target::Path(text.into())),
    }
}

fn event_monitor(text: &str) -> Result<Target, String> {
    let failed = |error: String| format!("Error parsing --event-monitor: {error}");
    let (values, parsed) = Values::parse(text);
    parsed.map_err(failed)?;
    match (values.fd, values.path) {
        (Some(fd), _) => fd.parse().map(Target::Fd).map_err(|error| failed(error.to_string())),
        (None, Some(path)) => Ok(Target::Path(path.into())),
        (None, None) => Err(failed("path or fd required".to_owned())),
    }
}

impl Values {
    /// Returns what was found up to the first mistake, and the mistake.
    fn parse(text: &str) -> (Self, Result<(), String>) {
        let mut values = Self::default();
        for part in split(text) {
            let (key, value) = part.split_once('=').unwrap_or((&part, ""));
            let slot = match key {
                "path" => &mut values.path,
                "fd" => &mut values.fd,
                unknown => {
                    let unknown = format!("unknown option: {unknown}");
                    return (values, Err(unknown));
                }
            };
            *slot = Some(value.trim().to_owned());
        }
        (values, Ok(()))
    }
}

/// Splits at commas that are not in quotes, which it takes away.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for letter in text.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => parts.push(String::new()),
            letter => parts.last_mut().expect("there is one").push(letter),
        }
    }
    parts
}
