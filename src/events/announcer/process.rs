//! The announcer itself: a process without any of the daemon's files.
//!
//! A few threads take one order each and do it through the mount. More than one, as a
//! file may be locked for long by somebody's write that began just then, and must not
//! hold up the others. The process ends when the daemon does: its socket is at its end.

use std::{io, path::PathBuf, str};

use super::message::{Answer, MESSAGE_MAX_BYTES, Order};
use crate::{
    sync::Arc,
    sys::{
        landlock,
        mount::Device,
        mount_client::{Done, MountClient},
        socket::MessageSocket,
        task::name_process,
    },
};

/// How many orders are done at once: so many files may be locked by writers before the
/// others are held up.
const THREADS: usize = 8;

/// What all threads know.
#[derive(Debug)]
struct Shared {
    mount: PathBuf,
    device: Device,
    socket: MessageSocket,
    files: Vec<String>,
}

/// Runs the announcer until the daemon is gone. Standard input is the socket to it.
///
/// # Errors
/// Where the daemon makes no sense, or the mount does not know us.
pub fn announce(mount: PathBuf, device: Device) -> io::Result<()> {
    name_process(c"dozed-announcer");
    let socket = MessageSocket::from_stdin()?;
    let Some(Order::Register { name, files }) = receive(&socket)? else {
        return Ok(());
    };
    // Whatever comes to be wrong with us, no file of the host's is in danger by it.
    landlock::only_remove_below(&mount)?;
    let shared = Arc::new(Shared { mount, device, socket, files });
    shared.register(&name)?;
    let (tell, told) = std::sync::mpsc::channel();
    for number in 1..THREADS {
        let (shared, name, tell) = (Arc::clone(&shared), name.clone(), tell.clone());
        let thread = std::thread::Builder::new().name(format!("announcer-{number}"));
        // They end with the process.
        drop(thread.spawn(move || {
            let registered = shared.register(&name);
            let is_known = registered.is_ok();
            let is_wanted = tell.send(registered).is_ok() && is_known;
            drop(tell);
            if is_wanted {
                shared.serve();
            }
        })?);
    }
    drop(tell);
    told.iter().collect::<io::Result<()>>()?;
    shared.answer(&Answer::Ready);
    shared.serve();
    Ok(())
}

fn receive(socket: &MessageSocket) -> io::Result<Option<Order>> {
    let mut buffer = [0; MESSAGE_MAX_BYTES];
    let length = socket.receive(&mut buffer, None)?;
    if length == 0 {
        return Ok(None);
    }
    let order = str::from_utf8(&buffer[..length]).ok().and_then(Order::parse);
    order.map(Some).ok_or_else(|| io::Error::other("a request cannot be decoded"))
}

impl Shared {
    /// Looks up the name that only we know, so that the daemon knows this thread.
    fn register(&self, name: &str) -> io::Result<()> {
        let client = MountClient::open(&self.mount, self.device)?;
        if client.register(name)? {
            Ok(())
        } else {
            Err(io::Error::other("the daemon does not know this process"))
        }
    }

    fn answer(&self, answer: &Answer) {
        // Once the daemon is gone nobody wants to know.
        self.socket.send(answer.text().as_bytes()).ok();
    }

    /// Does what it is told until the daemon is gone.
    fn serve(&self) {
        while let Ok(Some(order)) = receive(&self.socket) {
            let (number, done) = match &order {
                Order::Register { .. } => return,
                Order::Touch { number, inode, path } => {
                    (*number, self.client().and_then(|client| client.touch(path, *inode)))
                }
                Order::Remove { number, inode, name } => {
                    let files: Vec<&str> = self.files.iter().map(String::as_str).collect();
                    let removed = |client: MountClient| client.remove_dir(name, *inode, &files);
                    (*number, self.client().and_then(removed))
                }
            };
            self.answer(&match done {
                Ok(Done::Yes | Done::Gone) => Answer::Done { number },
                Err(error) => Answer::Failed { number, why: error.to_string() },
            });
        }
    }

    /// Opens the tree for one order, so that it can be unmounted between two.
    fn client(&self) -> io::Result<MountClient> {
        MountClient::open(&self.mount, self.device)
    }
}
