//! The socket by which the host reaches the guest: who connects says `CONNECT PORT`, and is
//! answered `OK`, with another number, if the guest listens there, and cut off if it does
//! not. Nobody is answered while the guest does not run.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
    thread,
};

use rustix::net::{Shutdown, shutdown};

use crate::{
    config::Vsock as Config,
    failure::{Failure, Within},
    guest::Awake,
};

/// The only port that the guest listens on. What it hears there it says back.
const PORT: &str = "52";
/// The first number on the host's side.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The longest line is `CONNECT 4294967295` and its end.
const LINE_MAX_BYTES: usize = 19;

/// The socket, as long as there is a machine.
#[derive(Debug)]
pub(crate) struct Vsock {
    listener: Arc<UnixListener>,
    path: PathBuf,
}

impl Vsock {
    /// Makes the socket, which must not be there, in a directory, which must.
    pub(crate) fn listen(config: &Config) -> Result<Self, Failure> {
        let listener = UnixListener::bind(&config.socket)
            .within("Error binding to the host-side Unix socket")
            .within("Cannot create virtio-vsock backend")?;
        Ok(Self { listener: Arc::new(listener), path: config.socket.clone() })
    }

    /// Has a guest answer.
    pub(crate) fn serve(&self, guest: &Awake) -> io::Result<()> {
        let (listener, guest) = (Arc::clone(&self.listener), guest.clone());
        thread::Builder::new().name("vsock".to_owned()).spawn(move || {
            let mut host_port = FIRST_HOST_PORT;
            // It ends with the listener.
            while let Ok((stream, _)) = listener.accept() {
                guest.wait();
                // Who hangs up in the middle is not missed.
                talk(stream, host_port).ok();
                host_port += 1;
            }
        })?;
        Ok(())
    }

    /// Removes the socket, as an orderly end does.
    pub(crate) fn remove(&self) {
        fs::remove_file(&self.path).ok();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        shutdown(&self.listener, Shutdown::Both).expect("it is a socket");
    }
}

fn talk(mut stream: UnixStream, host_port: u32) -> io::Result<()> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < LINE_MAX_BYTES {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    if line != format!("CONNECT {PORT}\n").into_bytes() {
        return Ok(());
    }
    writeln!(stream, "OK {host_port}")?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    Ok(())
}
