//! The api socket: one thread, which takes one request at a time and answers it before it
//! looks at the next. So nothing is answered while a snapshot is written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FlockOperation, fcntl_lock},
};

use crate::{
    api::{self, Calls, Reply},
    arguments::Target,
    http::{self, Parsed, Response},
    knobs::{CONFIG_400, Knobs, SOCKET_LOCK},
    vmm::Vmm,
};

/// More are told so and turned away.
const CONNECTIONS_MAX: usize = 10;
const BODY_MAX_BYTES: usize = 4 << 20;
const OLD_BODY_MAX_BYTES: usize = 51_200;

/// The server.
#[derive(Debug)]
pub(crate) struct Server {
    listener: Option<UnixListener>,
    /// The socket, if we made it, and what keeps others from it.
    path: Option<PathBuf>,
    _lock: Option<File>,
    connections: Vec<Connection>,
    woken: UnixStream,
    waker: Waker,
}

/// Tells the server what the guest did.
#[derive(Debug, Clone)]
pub(crate) struct Waker(Arc<UnixStream>);

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Whether it was told to go on with its body.
    told: bool,
    over: bool,
}

impl Waker {
    /// The guest turned the machine off.
    pub(crate) fn power_off(&self) {
        (&*self.0).write_all(b"o").expect("the server is there");
    }
}

impl Server {
    /// Takes the socket that was inherited, or makes one.
    pub(crate) fn open(target: Option<&Target>, knobs: &Knobs) -> Result<Self, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
        let (mut path, mut lock) = (None, None);
        let listener = match target {
            None => None,
            Some(Target::Fd(number)) => Some(UnixListener::from(Target::inherited(*number)?)),
            Some(Target::Path(socket)) => {
                if knobs.has(SOCKET_LOCK) {
                    lock = Some(lock_socket(socket)?);
                    fs::remove_file(socket).ok();
                }
                let listener = UnixListener::bind(socket);
                path = Some(socket.clone());
                Some(
                    listener
                        .map_err(|error| format!("Error binding API server socket: {error}"))?,
                )
            }
        };
        let (connections, waker) = (Vec::new(), Waker(Arc::new(theirs)));
        Ok(Self { listener, path, _lock: lock, connections, woken: ours, waker })
    }

    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Answers until the VMM is told to end, or its guest ends it.
    pub(crate) fn serve(&mut self, vmm: &mut Vmm) {
        let limit = if vmm.knobs.has(CONFIG_400) { BODY_MAX_BYTES } else { OLD_BODY_MAX_BYTES };
        let mut calls = Calls::default();
        while !vmm.over {
            let ready = self.wait();
            for (connection, flags) in self.connections.iter_mut().zip(&ready[2..]) {
                // One that hung up, if only by half, is not listened to any more.
                if flags.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
                    connection.over = true;
                } else if flags.contains(PollFlags::IN) && !vmm.over {
                    connection.serve(vmm, &mut calls, limit);
                }
            }
            self.connections.retain(|connection| !connection.over);
            if !ready[0].is_empty() && !vmm.over {
                self.woken.read_exact(&mut [0]).expect("the other end is ours");
                vmm.powered_off();
            }
            if !ready[1].is_empty() {
                self.accept();
            }
        }
        if let Some(path) = &self.path {
            fs::remove_file(path).ok();
        }
    }

    /// Returns what is ready: the waker, the listener, and each connection.
    fn wait(&self) -> Vec<PollFlags> {
        let wanted = PollFlags::IN | PollFlags::RDHUP;
        let mut fds = vec![PollFd::new(&self.woken, PollFlags::IN)];
        match &self.listener {
            Some(listener) => fds.push(PollFd::new(listener, PollFlags::IN)),
            None => fds.push(PollFd::new(&self.woken, PollFlags::empty())),
        }
        fds.extend(self.connections.iter().map(|one| PollFd::new(&one.stream, wanted)));
        while let Err(error) = poll(&mut fds, None) {
            assert_eq!(error, rustix::io::Errno::INTR);
        }
        fds.iter().map(PollFd::revents).collect()
    }

    fn accept(&mut self) {
        let Some(Ok((mut stream, _))) = self.listener.as_ref().map(UnixListener::accept) else {
            return;
        };
        if self.connections.len() >= CONNECTIONS_MAX {
            let body = Some("{ \"error\": \"Too many open connections\" }".to_owned());
            stream.write_all(&Response { status: 503, body }.bytes()).ok();
            return;
        }
        self.connections.push(Connection { stream, buffer: vec![], told: false, over: false });
    }
}

impl Connection {
    /// Reads what has come, and answers each request that is whole.
    fn serve(&mut self, vmm: &mut Vmm, calls: &mut Calls, limit: usize) {
        let mut piece = [0; 1024];
        match self.stream.read(&mut piece) {
            Ok(count @ 1..) => self.buffer.extend_from_slice(&piece[..count]),
            Ok(0) | Err(_) => self.over = true,
        }
        while !self.over && !self.buffer.is_empty() && !vmm.over {
            match http::parse(&mut self.buffer, limit) {
                Ok(Parsed::Part { expects }) => {
                    if expects && !self.told {
                        self.told = true;
                        self.send(b"HTTP/1.1 100 \r\nConnection: keep-alive\r\n\r\n");
                    }
                    return;
                }
                Ok(Parsed::Whole(request)) => {
                    self.told = false;
                    match api::answer(vmm, calls, &request) {
                        Reply::Whole(bytes) => self.send(&bytes),
                        Reply::Last(bytes) => {
                            self.send(&bytes);
                            self.over = true;
                        }
                    }
                }
                Err(said) => {
                    self.buffer.clear();
                    self.send(&Response::unparsed(&said).bytes());
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        // Who asked may be gone.
        self.over |= self.stream.write_all(bytes).is_err();
    }
}

/// Keeps others from a socket that is in use.
fn lock_socket(socket: &Path) -> Result<File, String> {
    let mut path = socket.to_owned().into_os_string();
    path.push(".lock");
    let made: io::Result<File> =
        OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let lock = made.map_err(|error| format!("Error creating API server socket: {error}"))?;
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| format!("API socket {} is already in use", socket.display()))?;
    Ok(lock)
}
