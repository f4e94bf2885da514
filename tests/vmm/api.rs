//! One stand-in that runs, and the bare HTTP to speak to it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
};

use dozed::sys::process::{Launch, Privileges, Process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{SOON, Standin, open_dir};

/// A stand-in that runs. It is killed at the end.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Arc<Process>,
    socket: PathBuf,
    pub(crate) dir: TempDir,
    /// Keeps its program and its knobs.
    _standin: Standin,
}

impl Running {
    /// Starts the stand-in on a socket of ours.
    pub(crate) fn start(standin: &Standin) -> Self {
        Self::start_in(standin, open_dir("a, b"))
    }

    /// Starts it with a directory that is there already.
    pub(crate) fn start_in(standin: &Standin, dir: TempDir) -> Self {
        Self::start_with(standin, dir, Privileges::Ours)
    }

    /// Starts it with these privileges.
    pub(crate) fn start_with(standin: &Standin, dir: TempDir, privileges: Privileges) -> Self {
        let socket = dir.path().join("api.sock");
        fs::remove_file(&socket).ok();
        let listener = UnixListener::bind(&socket).unwrap();
        let events = format!("path=\"{}\"", dir.path().join("events").display());
        let args = ["--api-socket", "fd=0", "--seccomp", "true", "--event-monitor", &events];
        let args = args.map(Into::into);
        let log = File::create(dir.path().join("log")).unwrap();
        let program = standin.program();
        let stdin = Some(listener.into());
        let launch = Launch { stdin, privileges, ..Launch::new(&program, &args, log) };
        let process = Process::spawn(launch).unwrap();
        Self { process, socket, dir, _standin: standin.clone() }
    }

    /// Kills it, and returns its files.
    pub(crate) fn kill(mut self) -> TempDir {
        self.process.kill();
        self.process.wait(SOON).unwrap();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn get(&self, endpoint: &str) -> (u16, Value) {
        self.ask(&format!("GET /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    }

    pub(crate) fn put(&self, endpoint: &str) -> (u16, Value) {
        self.ask(&format!("PUT /api/v1/{endpoint} HTTP/1.1\r\nContent-Length: 0\r\n\r\n"))
    }

    pub(crate) fn put_with(&self, endpoint: &str, body: &Value) -> (u16, Value) {
        let body = body.to_string();
        let length = body.len();
        let head = format!("PUT /api/v1/{endpoint} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        self.ask(&(head + &body))
    }

    /// Does what has to succeed.
    pub(crate) fn must(&self, endpoint: &str) {
        assert_eq!(self.put(endpoint), (204, Value::Null), "{endpoint}");
    }

    pub(crate) fn must_with(&self, endpoint: &str, body: &Value) {
        assert_eq!(self.put_with(endpoint, body), (204, Value::Null), "{endpoint}");
    }

    /// Sends a request and returns the status and the body of the answer.
    pub(crate) fn ask(&self, request: &str) -> (u16, Value) {
        let answer = self.exchange(request);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if body.is_empty() { Value::Null } else { parse(body) };
        (status, body)
    }

    /// Sends a request and returns all that comes back, up to the end of the answer.
    pub(crate) fn exchange(&self, request: &str) -> String {
        Self::exchange_by(&mut self.connect(), request)
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    /// Does so by a connection that is there.
    pub(crate) fn exchange_by(stream: &mut UnixStream, request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let mut piece = [0; 4096];
        while !is_whole(&answer) {
            let count = match stream.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("after `{answer}`: {error}"),
            };
            answer.push_str(std::str::from_utf8(&piece[..count]).unwrap());
        }
        answer
    }

    /// Boots a guest whose serial port is the file `serial`.
    pub(crate) fn boot(&self, memory: &Value, cmdline: &str) {
        self.must_with("vm.create", &self.config(memory, cmdline));
        self.must("vm.boot");
    }

    pub(crate) fn config(&self, memory: &Value, cmdline: &str) -> Value {
        fs::write(self.path("kernel"), b"\x7fELF").unwrap();
        json!({
            "memory": memory,
            "payload": { "kernel": self.path("kernel"), "cmdline": cmdline },
            "serial": { "mode": "File", "file": self.path("serial") },
            "console": { "mode": "Off" },
        })
    }

    pub(crate) fn printed(&self) -> String {
        fs::read_to_string(self.path("serial")).unwrap_or_default()
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("file://{}", self.path(name).display())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// What is no JSON is a text.
fn parse(body: &str) -> Value {
    serde_json::from_str(body).unwrap_or_else(|_| json!(body))
}

fn is_whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}
