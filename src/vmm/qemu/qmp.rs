//! QEMU's language: a line of JSON each way, and events in between.
//!
//! There is a connection for each operation. It costs 0.1 ms, and in return there is no
//! descriptor for each running sandbox, nobody has to read the events that QEMU sends
//! while nothing is asked of it, what an adopted machine is asked takes the same way as
//! what our own is, and an answer that comes too late goes down with its connection.
//!
//! The exception is a machine that is connected (`Machine::connect`): its connection is kept,
//! so that a process that has no descriptor left can still resume it. QEMU serves one
//! connection at a time, so whatever is asked meanwhile is asked by this one.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    sockopt,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    sys::{clock::Deadline, socket::send_with},
    vmm::{Error, peer::Peer},
};

/// For a QEMU that is starting, which takes 25 ms alone on a CPU. Beside 75 guests that are busy
/// it was more than 15 s on two. One that ends meanwhile is not waited for.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);
/// For a QEMU that runs, on a host that is busy with other things.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// For what QEMU does at once, on a host that is busy with other things.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// No line that we ask for is longer than a hundredth of this.
const LINE_MAX_BYTES: usize = 256 * 1024;

/// A connection to a QEMU that is ready for commands.
#[derive(Debug)]
pub(super) struct Qmp<'a> {
    peer: &'a Peer,
    /// What we are about, for the message should QEMU end meanwhile.
    doing: &'static str,
    connection: Connection,
}

/// A connection that commands can be sent by.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Whether each command so far had its answer. If not, what comes next may be the
    /// answer to an earlier one.
    is_in_step: bool,
    /// What was received and is not yet a whole line.
    received: Vec<u8>,
    /// The status in the last `MIGRATION` event. It may come before the answer to the
    /// command that set it off.
    migration: Option<Migration>,
}

/// How far a migration is, which is what saving and loading are to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Migration {
    Underway,
    Completed,
    Failed,
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Greeting {
        #[serde(rename = "QMP")]
        _qmp: Greeting,
    },
    Answer {
        #[serde(rename = "return")]
        value: Value,
    },
    Refusal {
        error: Refusal,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Greeting {
    #[serde(rename = "version")]
    _version: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

impl<'a> Qmp<'a> {
    /// Connects and agrees on the language. `doing` completes "the VMM ended while …".
    pub(super) fn open(
        peer: &'a Peer,
        doing: &'static str,
        limit: Duration,
    ) -> Result<Self, Error> {
        let deadline = Deadline::after(limit);
        let stream = connect_within(&peer.socket, limit).map_err(|source| {
            if source.kind() == io::ErrorKind::WouldBlock {
                return timed_out("connect", limit);
            }
            peer.unreachable(doing, source)
        })?;
        let connection =
            Connection { stream, is_in_step: true, received: Vec::new(), migration: None };
        let mut qmp = Self { peer, doing, connection };
        let greeting = qmp.read_line("connect", &deadline, limit)?;
        match parse(&greeting) {
            Some(Line::Greeting { .. }) => {}
            Some(Line::Answer { .. } | Line::Refusal { .. } | Line::Event { .. }) | None => {
                return Err(nonsense("connect", &greeting));
            }
        }
        qmp.run("qmp_capabilities", &Value::Null, deadline.left())?;
        Ok(qmp)
    }

    /// Goes on with the connection `kept`, or opens one.
    pub(super) fn over(
        peer: &'a Peer,
        kept: Option<Connection>,
        doing: &'static str,
    ) -> Result<Self, Error> {
        match kept {
            Some(connection) => Ok(Self { peer, doing, connection }),
            None => Self::open(peer, doing, CONNECT_LIMIT),
        }
    }

    /// Returns the connection, if commands can still be sent by it.
    pub(super) fn into_kept(self) -> Option<Connection> {
        Some(self.connection).filter(|connection| connection.is_in_step)
    }

    /// Forgets how earlier migrations ended.
    pub(super) fn forget_migrations(&mut self) {
        self.connection.migration = None;
    }

    /// Runs `command` and returns its answer.
    pub(super) fn run(
        &mut self,
        command: &str,
        arguments: &Value,
        limit: Duration,
    ) -> Result<Value, Error> {
        self.run_with(command, arguments, None, limit)
    }

    /// Hands `fd` over under the name `name`.
    pub(super) fn hand_over(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.run_with("getfd", &json!({ "fdname": name }), Some(fd), ANSWER_LIMIT)?;
        Ok(())
    }

    /// Waits until the migration that was set off is over.
    pub(super) fn wait_for_migration(
        &mut self,
        command: &str,
        limit: Duration,
    ) -> Result<Migration, Error> {
        let deadline = Deadline::after(limit);
        loop {
            match self.connection.migration {
                Some(over @ (Migration::Completed | Migration::Failed)) => return Ok(over),
                Some(Migration::Underway) | None => {}
            }
            let line = self.read_line(command, &deadline, limit)?;
            match parse(&line) {
                Some(Line::Event { event, data }) => self.note(&event, &data),
                Some(Line::Greeting { .. } | Line::Answer { .. } | Line::Refusal { .. }) | None => {
                    return Err(nonsense(command, &line));
                }
            }
        }
    }

    fn run_with(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value, Error> {
        let answer = self.exchange(command, arguments, fd, limit);
        if !matches!(answer, Ok(_) | Err(Error::Refused { .. })) {
            self.connection.is_in_step = false;
        }
        answer
    }

    fn exchange(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value, Error> {
        let deadline = Deadline::after(limit);
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        self.send(command, &format!("{request}\n"), fd, limit)?;
        loop {
            let line = self.read_line(command, &deadline, limit)?;
            match parse(&line) {
                Some(Line::Answer { value }) => return Ok(value),
                Some(Line::Refusal { error }) => {
                    return Err(Error::Refused { command: command.to_owned(), said: error.desc });
                }
                Some(Line::Event { event, data }) => self.note(&event, &data),
                Some(Line::Greeting { .. }) | None => return Err(nonsense(command, &line)),
            }
        }
    }

    fn note(&mut self, event: &str, data: &Value) {
        if event == "MIGRATION" {
            self.connection.migration = data["status"].as_str().map(Migration::from_word);
        }
    }

    fn send(
        &mut self,
        command: &str,
        line: &str,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(), Error> {
        let stream = &mut self.connection.stream;
        let sent = stream
            .set_write_timeout(Some(at_least_a_moment(limit)))
            .and_then(|()| match fd {
                None => Ok(0),
                Some(fd) => send_with(stream, line.as_bytes(), fd, SendFlags::empty()),
            })
            .and_then(|sent| {
                let rest = line.as_bytes().get(sent..).unwrap_or_default();
                stream.write_all(rest)
            });
        sent.map_err(|error| self.broken(command, error, limit))
    }

    fn read_line(
        &mut self,
        command: &str,
        deadline: &Deadline,
        limit: Duration,
    ) -> Result<String, Error> {
        let mut searched = 0;
        loop {
            let end = self.connection.received.iter().skip(searched).position(|b| *b == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.connection.received.drain(..=searched + end).collect();
                return Ok(String::from_utf8_lossy(line.trim_ascii()).into_owned());
            }
            searched = self.connection.received.len();
            if searched > LINE_MAX_BYTES {
                return Err(nonsense(command, "a line without end"));
            }
            let left = deadline.left();
            if left.is_zero() {
                return Err(timed_out(command, limit));
            }
            let mut chunk = [0; 4096];
            let stream = &mut self.connection.stream;
            let count = stream
                .set_read_timeout(Some(at_least_a_moment(left)))
                .and_then(|()| stream.read(&mut chunk));
            match count {
                Ok(0) => return Err(self.closed(command)),
                Ok(count) => self.connection.received.extend(chunk.iter().take(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(command, error, limit)),
            }
        }
    }

    /// Returns what it means that QEMU closed its end.
    fn closed(&self, command: &str) -> Error {
        let end = self.peer.end(self.doing);
        end.unwrap_or_else(|| nonsense(command, "the end of the connection"))
    }

    /// Returns what it means that the connection failed with `error`.
    fn broken(&self, command: &str, error: io::Error, limit: Duration) -> Error {
        if error.kind() == io::ErrorKind::WouldBlock {
            timed_out(command, limit)
        } else if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        {
            self.closed(command)
        } else {
            Error::Host {
                doing: format!("talking to {}", self.peer.socket.display()),
                source: error,
            }
        }
    }
}

impl Migration {
    /// Reads a status as QEMU writes it. Those in between are many and grow in number.
    pub(super) fn from_word(word: &str) -> Self {
        match word {
            "completed" => Self::Completed,
            "failed" | "cancelled" | "none" => Self::Failed,
            _ => Self::Underway,
        }
    }
}

fn parse(line: &str) -> Option<Line> {
    serde_json::from_str(line).ok()
}

fn nonsense(command: &str, said: &str) -> Error {
    /// So much of a line is enough to see what it is.
    const SHOWN_CHARS: usize = 200;
    Error::Nonsense { command: command.to_owned(), said: said.chars().take(SHOWN_CHARS).collect() }
}

fn timed_out(command: &str, limit: Duration) -> Error {
    Error::TimedOut { command: command.to_owned(), limit }
}

/// A timeout of nought would mean none.
fn at_least_a_moment(limit: Duration) -> Duration {
    limit.max(Duration::from_millis(1))
}

/// Connects, which waits where QEMU's queue of two is full, so there is a limit.
fn connect_within(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let stream: OwnedFd =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&stream, sockopt::Timeout::Send, Some(limit))?;
    connect(&stream, &address)?;
    Ok(stream.into())
}
