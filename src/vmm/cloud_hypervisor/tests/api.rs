//! Calls, to a VMM that answers what the test wants.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread,
};

use serde_json::{Value, json};

use super::{
    super::api::{Call, Failed, get, put, put_with},
    *,
};
use crate::{
    sys::process::Launch,
    vmm::{log, peer::Peer},
};

const CALL: Call = Call { name: "vm.test", doing: "being tested", limit: SOON };

/// A VMM that is a process which does nothing, and a thread which answers one call.
struct Scripted {
    dir: TempDir,
    peer: Peer,
    listener: Option<UnixListener>,
}

impl Scripted {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let (log, last_words) = log::open(&dir.path().join("vmm.log")).unwrap();
        let listener = Some(UnixListener::bind(&socket).unwrap());
        let args = ["-c", "exec sleep 1000"].map(Into::into);
        let process = Process::spawn(Launch::new(Path::new("/bin/sh"), &args, log)).unwrap();
        Self { dir, peer: Peer { process, socket, last_words }, listener }
    }

    /// Has a call answered by `answer`, after which the connection is closed, and returns
    /// what was asked.
    fn answer<T>(&mut self, answer: &'static [u8], ask: impl FnOnce(&Peer) -> T) -> (String, T) {
        let listener = self.listener.take().unwrap();
        let server = thread::Builder::new()
            .spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let asked = hear(&mut stream);
                // Who is answered too much hangs up.
                drop(stream.write_all(answer));
                asked
            })
            .unwrap();
        let got = ask(&self.peer);
        (server.join().unwrap(), got)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.peer.process.kill();
    }
}

/// Reads a request with its body.
fn hear(stream: &mut UnixStream) -> String {
    let mut heard = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).unwrap();
        heard.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&heard).to_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .split("content-length: ")
            .nth(1)
            .map_or(0, |rest| rest.lines().next().unwrap().parse::<usize>().unwrap());
        if body.len() >= length {
            return String::from_utf8(heard).unwrap();
        }
    }
}

fn refusal(answer: &'static [u8]) -> String {
    let (_, result) = Scripted::new().answer(answer, |peer| put(peer, CALL));
    let Failed { error, sent } = result.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && sent, "{error}");
    error.to_string()
}

#[test]
fn a_call_is_the_request_that_the_program_understands() {
    let mut vmm = Scripted::new();
    let (asked, done) = vmm.answer(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n", |peer| {
        put_with(peer, CALL, &json!({ "destination_url": "file:///a, b" }))
    });
    done.unwrap();
    let (head, body) = asked.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("PUT /api/v1/vm.test HTTP/1.1\r\n"), "{head}");
    assert!(head.to_lowercase().contains("content-length: 34"), "{head}");
    assert_eq!(body, r#"{"destination_url":"file:///a, b"}"#);
}

#[test]
fn what_is_told_is_read_whatever_else_is_told() {
    let answer =
        b"HTTP/1.1 200 \r\nContent-Length: 35\r\n\r\n{\"state\": \"Paused\", \"other\": [1,2]}";
    let (asked, info) = Scripted::new().answer(answer, |peer| get::<Value>(peer, CALL));
    assert!(asked.starts_with("GET /api/v1/vm.test HTTP/1.1\r\n"), "{asked}");
    assert_eq!(info.unwrap()["state"], "Paused");
}

#[test]
fn a_refusal_is_told_in_the_words_of_the_vmm() {
    let chain = b"HTTP/1.1 500 \r\nContent-Length: 22\r\n\r\n[\"outer\",\"the reason\"]";
    assert_eq!(refusal(chain), "the VMM refused vm.test: outer: the reason");
    // As before v47.
    let text = b"HTTP/1.1 400 \r\nContent-Length: 9\r\n\r\nbad words";
    assert_eq!(refusal(text), "the VMM refused vm.test: bad words");
    let nothing = b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n";
    assert_eq!(refusal(nothing), "the VMM refused vm.test: it answers 404 Not Found");
}

#[test]
fn what_makes_no_sense_is_an_error_and_nothing_more() {
    for answer in [
        &b""[..],
        b"QMP",
        b"HTTP/1.1 200 \r\nContent-Length: 50\r\n\r\n{\"state\"",
        b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 204 \r\n\r\n",
    ] {
        let (_, told) = Scripted::new().answer(answer, |peer| get::<Value>(peer, CALL));
        let error = told.unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. }), "{error}");
    }
}

#[test]
fn an_answer_without_end_is_not_listened_to() {
    let mut endless = b"HTTP/1.1 200 \r\nContent-Length: 10000000\r\n\r\n".to_vec();
    endless.resize(3 << 20, b'x');
    let (_, told) = Scripted::new().answer(endless.leak(), |peer| get::<Value>(peer, CALL));
    let error = told.unwrap_err();
    assert!(matches!(error, Error::Nonsense { .. }), "{error}");
}

#[test]
fn silence_is_waited_for_to_the_limit_and_no_longer() {
    let vmm = Scripted::new();
    let call = Call { limit: Duration::from_millis(30), ..CALL };
    let Failed { error, sent } = put(&vmm.peer, call).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }) && sent, "{error}");
}

#[test]
fn a_vmm_that_ends_is_told_with_its_last_words_and_whether_it_was_asked() {
    let mut vmm = Scripted::new();
    writeln!(File::options().append(true).open(vmm.dir.path().join("vmm.log")).unwrap(), "why")
        .unwrap();
    vmm.peer.process.kill();
    let (_, done) = vmm.answer(b"HTTP/1.1 2", |peer| put(peer, CALL));
    let Failed { error, sent } = done.unwrap_err();
    assert_eq!(error.to_string(), "the VMM ended while being tested: killed by signal 9: why");
    assert!(sent);
    // Now nobody listens.
    let Failed { error, sent } = put(&vmm.peer, CALL).unwrap_err();
    assert!(matches!(error, Error::Died { .. }) && !sent, "{error}");
}

#[test]
fn a_call_can_be_made_from_a_thread_of_the_pool() {
    let mut vmm = Scripted::new();
    let pool = crate::sys::pool::Pool::new();
    let (tell, told) = std::sync::mpsc::channel();
    let (_, ()) = vmm.answer(b"HTTP/1.1 204 \r\n\r\n", |peer| {
        let peer = Peer {
            process: Arc::clone(&peer.process),
            socket: peer.socket.clone(),
            last_words: log::LastWords::from_now_on(Path::new("/none")),
        };
        pool.run(move || tell.send(put(&peer, CALL).is_ok()).unwrap()).unwrap();
        assert!(told.recv_timeout(SOON).unwrap());
    });
}
