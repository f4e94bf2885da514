//! QEMU's language, as a script would speak it: no more than saving and loading need.

use std::{
    fs::File,
    io::{BufRead, BufReader, IoSlice, Write},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::site::Result;

/// Longer than anything takes, so that a run does not hang.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The name of the file of the devices' state for QEMU.
const STATE: &str = "state";

/// A connection to a QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// What the last event about a migration said.
    migration: String,
}

impl Qmp {
    /// Connects to a QEMU that starts, and makes ready for saving and loading.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self { stream: BufReader::new(stream), migration: String::new() };
        qmp.line()?;
        qmp.run("qmp_capabilities", &json!({}))?;
        let capabilities = json!({ "capabilities": [
            { "capability": "events", "state": true },
            { "capability": "x-ignore-shared", "state": true },
        ] });
        qmp.run("migrate-set-capabilities", &capabilities)?;
        qmp.run("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 50 }))?;
        Ok(qmp)
    }

    /// Loads the devices' state from `file`, or saves it there, as `command` says.
    pub(crate) fn migrate(&mut self, command: &str, file: &File) -> Result<()> {
        self.give(file)?;
        self.run(command, &json!({ "uri": format!("fd:{STATE}") }))?;
        while self.migration != "completed" {
            if self.migration == "failed" {
                return Err(format!("{command} failed").into());
            }
            let line = self.line()?;
            self.note(&line);
        }
        self.migration.clear();
        Ok(())
    }

    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        self.answer(command)
    }

    fn give(&mut self, file: &File) -> Result<()> {
        let request = json!({ "execute": "getfd", "arguments": { "fdname": STATE } });
        let line = format!("{request}\n");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [file.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err("there is no room for a descriptor".into());
        }
        let (socket, bytes) = (self.stream.get_ref(), [IoSlice::new(line.as_bytes())]);
        if sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)? != line.len() {
            return Err("a command was sent in part".into());
        }
        self.answer("getfd")
    }

    fn answer(&mut self, command: &str) -> Result<()> {
        loop {
            let line = self.line()?;
            if line.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = line.get("error") {
                return Err(format!("{command}: {error}").into());
            }
            self.note(&line);
        }
    }

    fn note(&mut self, line: &Value) {
        if line["event"] == "MIGRATION" {
            line["data"]["status"].as_str().unwrap_or_default().clone_into(&mut self.migration);
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err("QEMU closed the connection".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
