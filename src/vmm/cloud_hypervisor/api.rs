//! Cloud Hypervisor's language: HTTP on a Unix socket, JSON in it.
//!
//! There is a connection for each call, and a small runtime to drive it: that costs 0.1 ms,
//! and in return nothing is kept for a guest that merely runs, and what an adopted machine
//! is asked takes the same way as what our own is.
//!
//! One thread of the VMM's answers all calls, one after the other, and a snapshot takes as
//! long as it takes. So that no answer comes says nothing about its health: its process
//! does, and the end of that ends the wait, as it closes the connection.

use std::{error::Error as _, io, path::Path, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::vmm::{
    Error,
    peer::{Peer, host},
};

/// For what it does at once, on a host that is busy with other things.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// No answer that we ask for is longer than a tenth of this.
const ANSWER_MAX_BYTES: usize = 1 << 20;
/// How much of what is not understood is quoted.
const QUOTE_MAX_CHARS: usize = 500;

/// One call of the API.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    /// Such as `vm.pause`.
    pub(super) name: &'static str,
    /// Completes "the VMM ended while …".
    pub(super) doing: &'static str,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// A call that did not succeed.
#[derive(Debug)]
pub(super) struct Failed {
    /// Why.
    pub(super) error: Error,
    /// Whether the VMM may have got to know of it.
    pub(super) sent: bool,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// Why there is no answer.
enum Silence {
    /// Nobody listens.
    Unreachable(io::Error),
    /// It broke off, or what came is no HTTP.
    Broken(String),
}

/// Asks for something, which changes nothing.
pub(super) fn get<T: DeserializeOwned>(peer: &Peer, call: Call) -> Result<T, Error> {
    let answer = exchange(peer, Method::GET, call, String::new())?;
    serde_json::from_slice(&answer).map_err(|_| nonsense(call, &String::from_utf8_lossy(&answer)))
}

/// Has something done that needs nothing said about it.
pub(super) fn put(peer: &Peer, call: Call) -> Result<(), Failed> {
    exchange(peer, Method::PUT, call, String::new()).map(drop)
}

/// Has something done that `body` says more of.
pub(super) fn put_with(peer: &Peer, call: Call, body: &impl Serialize) -> Result<(), Failed> {
    let body = serde_json::to_string(body).map_err(|error| Failed {
        error: host(format!("writing the body of {}", call.name))(error.into()),
        sent: false,
    })?;
    exchange(peer, Method::PUT, call, body).map(drop)
}

/// Sends a request, and returns the body of the answer if it is one of success.
fn exchange(peer: &Peer, method: Method, call: Call, body: String) -> Result<Bytes, Failed> {
    let request = Request::builder()
        .method(method)
        .uri(format!("/api/v1/{}", call.name))
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .expect("names of calls are parts of a path");
    let answered = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|source| Failed {
            error: host("preparing to talk to the VMM".to_owned())(source),
            sent: false,
        })?
        .block_on(async {
            tokio::time::timeout(call.limit, converse(&peer.socket, request)).await
        });
    let unsent = matches!(answered, Ok(Err(Silence::Unreachable(_))));
    let answer = match answered {
        Ok(Ok((status, body))) if status.is_success() => return Ok(body),
        Ok(Ok((status, body))) => refusal(call, status, &body),
        // Its end explains more than what came of it.
        Ok(Err(silence)) => peer.end(call.doing).unwrap_or_else(|| match silence {
            Silence::Unreachable(source) => {
                host(format!("connecting to {}", peer.socket.display()))(source)
            }
            Silence::Broken(how) => nonsense(call, &how),
        }),
        Err(_) => Error::TimedOut { command: call.name.to_owned(), limit: call.limit },
    };
    Err(Failed { error: answer, sent: !unsent })
}

async fn converse(
    socket: &Path,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), Silence> {
    let broken = |error: hyper::Error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        Silence::Broken(format!("{error}{cause}"))
    };
    let stream = UnixStream::connect(socket).await.map_err(Silence::Unreachable)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // It ends with the runtime at the latest. What it has to say about a connection that
    // broke, the answer says too.
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES)
        .collect()
        .await
        .map_err(|error| Silence::Broken(error.to_string()))?;
    driver.abort();
    Ok((status, body.to_bytes()))
}

/// Returns the error for a call that was refused, in the VMM's own words: a list of
/// causes, the outermost first, or before v47 one text.
fn refusal(call: Call, status: StatusCode, body: &[u8]) -> Error {
    let said = match serde_json::from_slice::<Vec<String>>(body) {
        Ok(causes) => causes.join(": "),
        Err(_) => quote(&String::from_utf8_lossy(body)),
    };
    let said = if said.is_empty() { format!("it answers {status}") } else { said };
    Error::Refused { command: call.name.to_owned(), said }
}

pub(super) fn nonsense(call: Call, said: &str) -> Error {
    Error::Nonsense { command: call.name.to_owned(), said: quote(said) }
}

fn quote(said: &str) -> String {
    said.chars().take(QUOTE_MAX_CHARS).collect()
}
