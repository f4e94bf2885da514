//! Cloud Hypervisor's language: HTTP on a Unix socket, JSON in it.
//!
//! There is a connection for each call: that costs 0.1 ms, and in return nothing is kept for
//! a guest that merely runs, and what an adopted machine is asked takes the same way as what
//! our own is. Where a call must not fail for want of a descriptor, a connection is opened
//! before and kept ([`Client::connect`]); the server answers any number of requests by one.
//! If it has closed it, the next call opens another.
//!
//! One thread of the VMM's answers all calls, one after the other, and a snapshot takes as
//! long as it takes. So that no answer comes says nothing about its health: its process
//! does, and the end of that ends the wait, as it closes the connection.

use std::{
    error::Error as _,
    future::poll_fn,
    io,
    path::Path,
    pin::{Pin, pin},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::{
    sys::runtime,
    vmm::{
        Error,
        peer::{Peer, host},
    },
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

/// What a VMM is asked by.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) peer: Peer,
    /// Whether a connection is kept for the next call.
    keeps: bool,
    kept: Option<Connection>,
}

/// A connection by which one request after the other is sent.
#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// What moves the bytes, until the connection ends.
    driver: Option<Pin<Box<Driver>>>,
}

type Driver = http1::Connection<TokioIo<UnixStream>, Full<Bytes>>;

impl Client {
    /// Asks `peer`, by a connection for each call.
    pub(super) fn new(peer: Peer) -> Self {
        Self { peer, keeps: false, kept: None }
    }

    /// Keeps the connection of the next call for those after it.
    pub(super) fn keep(&mut self) {
        self.keeps = true;
    }

    /// Opens the connection that is kept, if it is not there already.
    pub(super) fn connect(&mut self) -> Result<(), Error> {
        const CALL: Call = Call { name: "connect", doing: "being reached", limit: ANSWER_LIMIT };
        self.keep();
        if self.kept.is_none() {
            let opened = runtime::within(CALL.limit, Connection::open(&self.peer.socket));
            self.kept = Some(self.heard(CALL, opened)?);
        }
        Ok(())
    }

    /// Closes the connection that is kept, and keeps none any more.
    pub(super) fn disconnect(&mut self) {
        self.keeps = false;
        self.kept = None;
    }

    /// Asks for something, which changes nothing.
    pub(super) fn get<T: DeserializeOwned>(&mut self, call: Call) -> Result<T, Error> {
        let answer = self.exchange(Method::GET, call, String::new())?;
        serde_json::from_slice(&answer)
            .map_err(|_| nonsense(call, &String::from_utf8_lossy(&answer)))
    }

    /// Has something done that needs nothing said about it.
    pub(super) fn put(&mut self, call: Call) -> Result<(), Failed> {
        self.exchange(Method::PUT, call, String::new()).map(drop)
    }

    /// Has something done that `body` says more of.
    pub(super) fn put_with(&mut self, call: Call, body: &impl Serialize) -> Result<(), Failed> {
        let body = serde_json::to_string(body).map_err(|error| Failed {
            error: host(format!("writing the body of {}", call.name))(error.into()),
            sent: false,
        })?;
        self.exchange(Method::PUT, call, body).map(drop)
    }

    /// Sends a request, and returns the body of the answer if it is one of success.
    fn exchange(&mut self, method: Method, call: Call, body: String) -> Result<Bytes, Failed> {
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{}", call.name))
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("names of calls are parts of a path");
        let kept = self.kept.take();
        let answered = runtime::within(call.limit, converse(kept, &self.peer.socket, request));
        let (status, body, connection) = self.heard(call, answered)?;
        self.kept = connection.filter(|_| self.keeps);
        if status.is_success() {
            return Ok(body);
        }
        Err(Failed { error: refusal(call, status, &body), sent: true })
    }

    /// Returns what was heard in the end, or what it means that nothing was.
    fn heard<T>(
        &self,
        call: Call,
        heard: io::Result<Option<Result<T, Silence>>>,
    ) -> Result<T, Failed> {
        let silence = match heard {
            Ok(Some(Ok(heard))) => return Ok(heard),
            Ok(Some(Err(silence))) => silence,
            Ok(None) => {
                let error = Error::TimedOut { command: call.name.to_owned(), limit: call.limit };
                return Err(Failed { error, sent: true });
            }
            Err(source) => {
                let error = host("preparing to talk to the VMM".to_owned())(source);
                return Err(Failed { error, sent: false });
            }
        };
        Err(match silence {
            Silence::Unreachable(source) => {
                Failed { error: self.peer.unreachable(call.doing, source), sent: false }
            }
            // Its end explains more than what came of it.
            Silence::Broken(how) => {
                let end = self.peer.end(call.doing);
                Failed { error: end.unwrap_or_else(|| nonsense(call, &how)), sent: true }
            }
        })
    }
}

impl Connection {
    async fn open(socket: &Path) -> Result<Self, Silence> {
        let stream = UnixStream::connect(socket).await.map_err(Silence::Unreachable)?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        Ok(Self { sender, driver: Some(Box::pin(driver)) })
    }

    /// Says whether the next request can be sent, as far as is known: the VMM may have closed
    /// its end.
    async fn is_open(&mut self) -> bool {
        let Self { sender, driver } = self;
        driven(driver, async {
            // What has happened since the last call is heard of in this turn.
            tokio::task::yield_now().await;
            sender.ready().await.is_ok()
        })
        .await
    }

    async fn ask(&mut self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), Silence> {
        let Self { sender, driver } = self;
        driven(driver, async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES)
                .collect()
                .await
                .map_err(|error| Silence::Broken(error.to_string()))?;
            Ok((status, body.to_bytes()))
        })
        .await
    }
}

/// Does `work` while the bytes of its connection are moved.
async fn driven<T>(driver: &mut Option<Pin<Box<Driver>>>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        let over = driver.as_mut().is_some_and(|driver| driver.as_mut().poll(context).is_ready());
        if over {
            // What it has to say about a connection that broke, the answer says too.
            *driver = None;
        }
        work.as_mut().poll(context)
    })
    .await
}

/// Sends `request` by the connection `kept`, or by a new one. Returns the answer, and the
/// connection if it can be used again.
async fn converse(
    kept: Option<Connection>,
    socket: &Path,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes, Option<Connection>), Silence> {
    let open = match kept {
        // One that is over gives its descriptor back before another is opened.
        Some(mut kept) => kept.is_open().await.then_some(kept),
        None => None,
    };
    let mut connection = match open {
        Some(open) => open,
        None => Connection::open(socket).await?,
    };
    let (status, body) = connection.ask(request).await?;
    let is_open = connection.driver.is_some();
    Ok((status, body, Some(connection).filter(|_| is_open)))
}

fn broken(error: hyper::Error) -> Silence {
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    Silence::Broken(format!("{error}{cause}"))
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
