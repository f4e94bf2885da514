//! Who or what changes a sandbox.

use std::fmt;

/// A process that asked for something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// The process, in the daemon's pid namespace; `None` where it cannot be seen from there.
    pub pid: Option<u32>,
    /// What the process calls itself, as far as the kernel keeps it.
    pub command: Option<Box<str>>,
    /// The user.
    pub uid: u32,
}

/// Who or what changes a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// Somebody wrote to one of its files, or changed whose it is.
    Write(Actor),
    /// Somebody opened its `awake`, to hold it.
    Hold(Actor),
    /// Somebody made it.
    Mkdir(Actor),
    /// Somebody removed it.
    Rmdir(Actor),
    /// A packet came for it, which opens this, such as `tcp/22 from 10.213.0.1`.
    Packet(Box<str>),
    /// It was idle for longer than its `idle_after`.
    Idle,
    /// It slept for longer than its `delete_after`.
    Stale,
    /// Its guest shut down, or its VMM died.
    GuestExit,
    /// Something was cut off, and the daemon brings it to an end.
    Reconcile,
}

impl Cause {
    /// Returns the word that the cause begins with.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Write(_) => "write",
            Self::Hold(_) => "hold",
            Self::Mkdir(_) => "mkdir",
            Self::Rmdir(_) => "rmdir",
            Self::Packet(_) => "packet",
            Self::Idle => "idle",
            Self::Stale => "stale",
            Self::GuestExit => "guest-exit",
            Self::Reconcile => "reconcile",
        }
    }

    /// Returns the process that asked for it, if one did.
    #[must_use]
    pub fn actor(&self) -> Option<&Actor> {
        match self {
            Self::Write(actor) | Self::Hold(actor) | Self::Mkdir(actor) | Self::Rmdir(actor) => {
                Some(actor)
            }
            Self::Packet(_) | Self::Idle | Self::Stale | Self::GuestExit | Self::Reconcile => None,
        }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(pid) = self.pid {
            write!(f, "pid {pid} ")?;
        }
        if let Some(command) = &self.command {
            write!(f, "({command}) ")?;
        }
        write!(f, "uid {}", self.uid)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        if let Self::Packet(opens) = self {
            write!(f, " to {opens}")?;
        }
        self.actor().map_or(Ok(()), |actor| write!(f, " by {actor}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_names_the_process_as_far_as_it_is_known() {
        let known = Actor { pid: Some(123), command: Some("bash".into()), uid: 1000 };
        let hidden = Actor { pid: None, command: None, uid: 7 };
        assert_eq!(Cause::Write(known).to_string(), "write by pid 123 (bash) uid 1000");
        assert_eq!(Cause::Rmdir(hidden).to_string(), "rmdir by uid 7");
        let packet = Cause::Packet("tcp/22 from 10.213.0.1".into());
        assert_eq!(packet.to_string(), "packet to tcp/22 from 10.213.0.1");
        assert_eq!(Cause::GuestExit.to_string(), "guest-exit");
    }
}
