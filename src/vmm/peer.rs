//! What the drivers have in common: a process that was started with a socket to obey on.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Error, Machine, Plan, log::LastWords};
use crate::{sync::Arc, sys::process::Process};

/// How long a VMM whose socket is closed may take to be gone, unless it is not going.
const CLOSED_LIMIT: Duration = Duration::from_secs(2);
/// How long a process that was killed may take to be gone: its memory is given back first.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// A VMM's process, and where to reach it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) process: Arc<Process>,
    pub(super) socket: PathBuf,
    pub(super) last_words: LastWords,
}

impl Peer {
    /// Returns the error for a VMM that has ended, if it has.
    pub(super) fn end(&self, doing: &str) -> Option<Error> {
        self.end_within(CLOSED_LIMIT, doing)
    }

    /// Returns the error for a VMM that cannot be connected to.
    pub(super) fn unreachable(&self, doing: &str, source: io::Error) -> Error {
        // The socket goes when the VMM ends. What else there is, such as no descriptor, says
        // nothing about that.
        let is_closed =
            matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
        let limit = if is_closed { CLOSED_LIMIT } else { Duration::ZERO };
        self.end_within(limit, doing)
            .unwrap_or_else(|| host(format!("connecting to {}", self.socket.display()))(source))
    }

    fn end_within(&self, limit: Duration, doing: &str) -> Option<Error> {
        self.process.wait(limit).map(|exit| Error::Died {
            doing: doing.to_owned(),
            exit,
            said: self.last_words.read(),
        })
    }
}

/// Has `spawn` start a VMM, and `then` bring it to where it is wanted. If anything goes
/// wrong, also there, or the work is called off, the process is ended.
pub(super) fn begin<M: Machine>(
    plan: &Plan,
    doing: &str,
    spawn: impl FnOnce() -> Result<M, Error>,
    then: impl FnOnce(&mut M) -> Result<(), Error>,
) -> Result<M, Error> {
    let called_off = || Error::Cancelled { doing: doing.to_owned() };
    plan.cancel.check().map_err(|_| called_off())?;
    let mut machine = spawn()?;
    // The process is killed if the work is called off, and then whatever is asked of it
    // fails.
    plan.cancel.ends_with(Arc::<Process>::clone(machine.process()));
    let ready = then(&mut machine).and_then(|()| plan.cancel.check().map_err(|_| called_off()));
    let Err(error) = ready else {
        return Ok(machine);
    };
    let process = machine.process();
    process.kill();
    if process.wait(EXIT_LIMIT).is_none() {
        tracing::error!(%process, "it was killed but does not exit");
    }
    plan.cancel.check().map_err(|_| called_off())?;
    Err(error)
}

/// Makes the socket that a VMM is to listen on, in place of one that an earlier VMM left.
/// The VMM inherits it, so whoever connects is in the queue before it has looked, and
/// nobody need try again until it is there.
pub(super) fn listen(socket: &Path) -> Result<UnixListener, Error> {
    let listening = match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        // Too long a path is refused here, in words that say so. That nobody else connects is
        // not left to our umask, as others may get as far as its directory.
        Ok(()) | Err(_) => UnixListener::bind(socket).and_then(|listener| {
            fs::set_permissions(socket, Permissions::from_mode(0o600)).map(|()| listener)
        }),
    };
    listening.map_err(host(format!("making {}", socket.display())))
}

/// Makes the function that turns what the system said while `doing` into an error.
pub(super) fn host(doing: String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { doing, source }
}
