//! Calls, to a VMM that answers what the test wants.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::mpsc,
    thread,
};

use serde_json::{Value, json};

use super::{
    super::api::{Call, Client, Failed},
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
    client: Client,
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
        Self { dir, client: Client::new(Peer { process, socket, last_words }), listener }
    }

    /// Has a call answered by `answer`, after which the connection is closed, and returns
    /// what was asked.
    fn answer<T>(
        &mut self,
        answer: &'static [u8],
        ask: impl FnOnce(&mut Client) -> T,
    ) -> (String, T) {
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
        let got = ask(&mut self.client);
        (server.join().unwrap(), got)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.client.peer.process.kill();
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
    let (_, result) = Scripted::new().answer(answer, |vmm| vmm.put(CALL));
    let Failed { error, sent } = result.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && sent, "{error}");
    error.to_string()
}

#[test]
fn a_call_is_the_request_that_the_program_understands() {
    let mut vmm = Scripted::new();
    let (asked, done) = vmm.answer(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n", |vmm| {
        vmm.put_with(CALL, &json!({ "destination_url": "file:///a, b" }))
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
    let (asked, info) = Scripted::new().answer(answer, |vmm| vmm.get::<Value>(CALL));
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
        let (_, told) = Scripted::new().answer(answer, |vmm| vmm.get::<Value>(CALL));
        let error = told.unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. }), "{error}");
    }
}

#[test]
fn an_answer_without_end_is_not_listened_to() {
    let mut endless = b"HTTP/1.1 200 \r\nContent-Length: 10000000\r\n\r\n".to_vec();
    endless.resize(3 << 20, b'x');
    let (_, told) = Scripted::new().answer(endless.leak(), |vmm| vmm.get::<Value>(CALL));
    let error = told.unwrap_err();
    assert!(matches!(error, Error::Nonsense { .. }), "{error}");
}

#[test]
fn silence_is_waited_for_to_the_limit_and_no_longer() {
    let mut vmm = Scripted::new();
    let call = Call { limit: Duration::from_millis(30), ..CALL };
    let Failed { error, sent } = vmm.client.put(call).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }) && sent, "{error}");
}

#[test]
fn a_vmm_that_ends_is_told_with_its_last_words_and_whether_it_was_asked() {
    let mut vmm = Scripted::new();
    writeln!(File::options().append(true).open(vmm.dir.path().join("vmm.log")).unwrap(), "why")
        .unwrap();
    vmm.client.peer.process.kill();
    let (_, done) = vmm.answer(b"HTTP/1.1 2", |vmm| vmm.put(CALL));
    let Failed { error, sent } = done.unwrap_err();
    assert_eq!(error.to_string(), "the VMM ended while being tested: killed by signal 9: why");
    assert!(sent);
    // Now nobody listens. A child of another test may have the listener until it executes.
    fs::remove_file(&vmm.client.peer.socket).unwrap();
    let Failed { error, sent } = vmm.client.put(CALL).unwrap_err();
    assert!(matches!(error, Error::Died { .. }) && !sent, "{error}");
}

#[test]
fn a_call_can_be_made_from_a_thread_of_the_pool() {
    let mut vmm = Scripted::new();
    let pool = crate::sys::pool::Pool::new();
    let (tell, told) = mpsc::channel();
    let (_, ()) = vmm.answer(b"HTTP/1.1 204 \r\n\r\n", |vmm| {
        let mut client = Client::new(Peer {
            process: Arc::clone(&vmm.peer.process),
            socket: vmm.peer.socket.clone(),
            last_words: log::LastWords::from_now_on(Path::new("/none")),
        });
        pool.run(move || tell.send(client.put(CALL).is_ok()).unwrap()).unwrap();
        assert!(told.recv_timeout(SOON).unwrap());
    });
}

const DONE: &[u8] = b"HTTP/1.1 204 \r\n\r\n";

impl Scripted {
    /// Answers as many calls by each connection as `connections` says, and then closes it and
    /// says so.
    fn serve(&mut self, connections: &'static [usize]) -> mpsc::Receiver<()> {
        let listener = self.listener.take().unwrap();
        let (tell, told) = mpsc::channel();
        let serve = move || {
            for calls in connections {
                let (mut stream, _) = listener.accept().unwrap();
                for _ in 0..*calls {
                    hear(&mut stream);
                    stream.write_all(DONE).unwrap();
                }
                drop(stream);
                tell.send(()).unwrap();
            }
        };
        thread::Builder::new().spawn(serve).unwrap();
        told
    }
}

#[test]
fn what_is_connected_makes_each_call_by_the_one_connection() {
    let mut vmm = Scripted::new();
    let closed = vmm.serve(&[1, 3, 1]);
    // Each by its own before and after.
    vmm.client.put(CALL).unwrap();
    vmm.client.connect().unwrap();
    vmm.client.connect().unwrap();
    for _ in 0..3 {
        vmm.client.put(CALL).unwrap();
    }
    vmm.client.disconnect();
    vmm.client.put(CALL).unwrap();
    assert_eq!(closed.iter().count(), 3);
}

#[test]
fn a_connection_that_the_vmm_closed_is_opened_anew() {
    let mut vmm = Scripted::new();
    let closed = vmm.serve(&[0, 1, 2]);
    vmm.client.connect().unwrap();
    closed.recv_timeout(SOON).unwrap();
    vmm.client.put(CALL).unwrap();
    closed.recv_timeout(SOON).unwrap();
    vmm.client.put(CALL).unwrap();
    vmm.client.put(CALL).unwrap();
    closed.recv_timeout(SOON).unwrap();
}

#[test]
fn a_call_without_an_answer_takes_its_connection_with_it() {
    let mut vmm = Scripted::new();
    let listener = vmm.listener.take().unwrap();
    vmm.client.connect().unwrap();
    let call = Call { limit: Duration::from_millis(30), ..CALL };
    let Failed { error, .. } = vmm.client.put(call).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    // Its answer comes now, and is nobody's.
    let (mut first, _) = listener.accept().unwrap();
    hear(&mut first);
    drop(first.write_all(b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n"));
    vmm.listener = Some(listener);
    let (_, done) = vmm.answer(DONE, |vmm| vmm.put(CALL));
    done.unwrap();
}
