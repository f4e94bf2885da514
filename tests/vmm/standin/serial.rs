//! The serial port: a file, a socket, the standard output or nothing.
//!
//! The standard output goes with the standard input, if that is a terminal: its master may
//! be given. A file is emptied whenever it is opened. A socket is made, and not where something is
//! already; the last to connect has it, and what nobody reads is kept or lost by version.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
};

use crate::{
    config::{Console, ConsoleMode},
    failure::{Failure, Within},
};

/// What is kept for a reader that does not come. More is lost, the oldest first.
const KEPT_MAX_BYTES: usize = 1 << 20;
/// A line that somebody types, and no longer.
const HEARD_MAX_BYTES: usize = 4096;

/// A guest's serial port.
#[derive(Debug)]
pub(crate) struct Serial {
    port: Mutex<Port>,
    /// Whether output is kept while nobody reads.
    keeps: bool,
}

#[derive(Debug)]
struct Port {
    out: Out,
    kept: VecDeque<u8>,
    typed: Vec<u8>,
}

#[derive(Debug)]
enum Out {
    Nothing,
    File(File),
    Stdout,
    /// The socket's path, and who is connected.
    Socket(PathBuf, Option<UnixStream>),
}

impl Serial {
    /// Opens what the description says.
    pub(crate) fn open(console: &Console, keeps: bool) -> Result<Arc<Self>, Failure> {
        let missing = || Failure::new("there is no path for the console");
        let mut listener = None;
        let out = match console.mode {
            ConsoleMode::Off | ConsoleMode::Null => Out::Nothing,
            ConsoleMode::Tty => Out::Stdout,
            ConsoleMode::File => {
                Out::File(File::create(console.file.as_ref().ok_or_else(missing)?)?)
            }
            ConsoleMode::Socket => {
                let path = console.socket.clone().ok_or_else(missing)?;
                listener = Some(UnixListener::bind(&path)?);
                Out::Socket(path, None)
            }
            ConsoleMode::Pty => return Err(Failure::new("the stand-in has no terminals")),
        };
        let port = Mutex::new(Port { out, kept: VecDeque::new(), typed: Vec::new() });
        let serial = Arc::new(Self { port, keeps });
        if console.mode == ConsoleMode::Tty && io::stdin().is_terminal() {
            serial.listen_to_stdin()?;
        }
        if let Some(listener) = listener {
            let serial = Arc::clone(&serial);
            thread::Builder::new()
                .name("serial-manager".to_owned())
                .spawn(move || serial.accept(&listener))
                .within("Error spawning SerialManager thread")?;
        }
        Ok(serial)
    }

    /// Prints what the guest sends.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let mut port = self.lock();
        match &mut port.out {
            Out::Nothing => {}
            Out::File(file) => drop(file.write_all(bytes)),
            Out::Stdout => drop(io::stdout().write_all(bytes)),
            Out::Socket(_, None) if !self.keeps => {}
            Out::Socket(..) => {
                port.kept.extend(bytes);
                let over = port.kept.len().saturating_sub(KEPT_MAX_BYTES);
                port.kept.drain(..over);
                port.flush();
            }
        }
    }

    /// Returns the lines that were typed.
    pub(crate) fn heard(&self) -> Vec<String> {
        let mut port = self.lock();
        let mut lines = Vec::new();
        while let Some(end) = port.typed.iter().position(|byte| [b'\n', b'\r'].contains(byte)) {
            let line: Vec<u8> = port.typed.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line[..end]).into_owned());
        }
        lines
    }

    /// Removes the socket, as a port that is closed in an orderly way does.
    pub(crate) fn close(&self) {
        if let Out::Socket(path, _) = &self.lock().out {
            fs::remove_file(path).ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().expect("nobody panics with it")
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            let Ok((stream, reader)) = stream.and_then(|it| Ok((it.try_clone()?, it))) else {
                continue;
            };
            let mut port = self.lock();
            if let Out::Socket(_, client) = &mut port.out
                && let Some(before) = client.replace(stream)
            {
                before.shutdown(std::net::Shutdown::Both).ok();
            }
            port.flush();
            drop(port);
            let serial = Arc::clone(self);
            let reading = thread::Builder::new().name("serial-reader".to_owned());
            reading.spawn(move || serial.listen(reader)).expect("a thread can be had");
        }
    }

    fn listen(&self, mut client: UnixStream) {
        let mut input = [0; 64];
        while let Ok(count @ 1..) = client.read(&mut input) {
            self.hear(&input[..count]);
        }
    }

    /// Takes what is typed at the standard input. As the real one does, it sets it not to
    /// block, for all who have it open, and gives up at the first error.
    fn listen_to_stdin(self: &Arc<Self>) -> Result<(), Failure> {
        let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let flags = fcntl_getfl(&input)? | OFlags::NONBLOCK;
        fcntl_setfl(&input, flags)?;
        let serial = Arc::clone(self);
        thread::Builder::new()
            .name("serial-manager".to_owned())
            .spawn(move || {
                let mut bytes = [0; 64];
                loop {
                    let ready = poll(&mut [PollFd::new(&input, PollFlags::IN)], None);
                    let count = ready.ok().and_then(|_| input.read(&mut bytes).ok());
                    let Some(count @ 1..) = count else {
                        return;
                    };
                    serial.hear(&bytes[..count]);
                }
            })
            .within("Error spawning SerialManager thread")?;
        Ok(())
    }

    fn hear(&self, bytes: &[u8]) {
        let mut port = self.lock();
        if port.typed.len() < HEARD_MAX_BYTES {
            port.typed.extend_from_slice(bytes);
        }
    }
}

impl Port {
    /// Sends what is kept, as far as the reader takes it now.
    fn flush(&mut self) {
        let Out::Socket(_, client @ Some(_)) = &mut self.out else {
            return;
        };
        while let Some(stream) = client
            && !self.kept.is_empty()
        {
            let (head, _) = self.kept.as_slices();
            match rustix::net::send(&*stream, head, rustix::net::SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.kept.drain(..sent)),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => *client = None,
            }
        }
    }
}
