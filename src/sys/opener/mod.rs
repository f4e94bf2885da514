//! Processes that open files for us which somebody else has named, and copy them.
//!
//! A path may lead to a file system that does not answer, and whoever looks there waits for it,
//! some also after they were killed. It may even lead to the tree that we serve, so that we
//! would wait for ourselves. So we never look there. A process does that has no file of ours,
//! not even our connection to the kernel, and the rights of who named the path. It sends back
//! what it opened:
//!
//! ```text
//! daemon ── path ──→ opener            a socket pair; the opener ends when our end closes
//!        ←─ sizes, first bytes, file ──
//!        ── length, image, new file ──→ to read an image may be to wait, too
//!        ←─ copying … copied ──
//! ```
//!
//! One that does not answer is killed, and forgotten: it is reaped whenever it ends.

mod answer;
mod process;

use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    str::FromStr,
    time::Duration,
};

use answer::{Answer, CopyRequest};
pub use process::serve;

use crate::{
    sandbox::Writer,
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::{
        cancel::{Cancel, Victim},
        clock::Deadline,
        files::{ANSWER_LIMIT, Opened, START_BYTES, no_answer},
        host::own_ids,
        process::{ExitWatch, Launch, Privileges, Process, Program},
        socket::MessageSocket,
    },
};

/// The limit of openers for the paths of one user, including those that cannot exit.
const OPENERS_MAX: usize = 16;

/// How long a copy may stand still: longer than the kernel has writers wait for a disk that is
/// busy with what others write.
pub const COPY_STALL_LIMIT: Duration = Duration::from_secs(30);

/// The longest answer: sizes as text, and the first bytes or a sentence.
const ANSWER_MAX_BYTES: usize = START_BYTES + 256;

/// Whose rights a file is opened with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rights {
    /// Ours: all files may be read.
    Ours,
    /// Those of whoever wrote its path.
    Of(Writer),
}

/// Starts openers, a bounded number for each user.
#[derive(Debug)]
pub struct Openers {
    program: Program,
    places: Arc<Places>,
    watch: ExitWatch,
}

/// A process that opens files, owned by the thread that started it.
#[derive(Debug)]
pub struct Opener {
    peer: Arc<Peer>,
    /// When [`ANSWER_LIMIT`] for all that it opens is over.
    deadline: Deadline,
    has_timed_out: Cell<bool>,
}

/// A process that opens files, and the way to talk to it.
#[derive(Debug)]
struct Peer {
    process: Arc<Process>,
    socket: MessageSocket,
}

/// Who has how many openers.
#[derive(Debug, Default)]
struct Places {
    /// By user. A leaf lock.
    used: Mutex<HashMap<u32, usize>>,
    freed: Condvar,
}

impl Openers {
    /// `program` is run with the rights as its argument, and calls [`serve`].
    pub fn new(program: Program) -> io::Result<Self> {
        let places = Arc::new(Places::default());
        let ended = Arc::clone(&places);
        let watch = ExitWatch::start(move |uid, _| {
            ended.free(u32::try_from(uid).expect("each is watched by its user's number"));
        })?;
        Ok(Self { program, places, watch })
    }

    /// Starts an opener.
    pub fn start(&self, rights: &Rights) -> io::Result<Opener> {
        let deadline = Deadline::after(ANSWER_LIMIT);
        let uid = rights.uid();
        self.places.take(uid, &deadline)?;
        let started = self.spawn(rights).and_then(|peer| {
            self.watch.watch(uid.into(), &peer.process).inspect_err(|_| peer.kill())?;
            Ok(Opener { peer: Arc::new(peer), deadline, has_timed_out: Cell::new(false) })
        });
        started.inspect_err(|_| self.places.free(uid))
    }

    fn spawn(&self, rights: &Rights) -> io::Result<Peer> {
        let (ours, theirs) = MessageSocket::pair()?;
        let mut args = self.program.args.clone();
        args.push(rights.to_string().into());
        let nowhere = File::options().write(true).open("/dev/null")?;
        let process = Process::spawn(Launch {
            name: Some("dozed".as_ref()),
            stdin: Some(theirs.into_fd()),
            privileges: match rights {
                Rights::Ours => Privileges::Files,
                // It gives them up itself, once it is the other user.
                Rights::Of(_) => Privileges::Ours,
            },
            ..Launch::new(&self.program.path, &args, nowhere)
        })?;
        Ok(Peer { process, socket: ours })
    }
}

impl Opener {
    /// Makes it fail at once when the operation is cancelled.
    pub fn ends_with(&self, cancel: &Cancel) {
        cancel.ends_with(Arc::clone(&self.peer) as Arc<dyn Victim>);
    }

    /// Opens a regular file or a block device for reading.
    ///
    /// # Errors
    /// Those of [`open_machine_file`](crate::sys::files::open_machine_file), and `TimedOut`
    /// where all that was opened so far takes longer than [`ANSWER_LIMIT`].
    pub fn open(&self, path: &Path) -> io::Result<Opened> {
        if self.has_timed_out.get() {
            return Err(no_answer());
        }
        let name = path.as_os_str().as_bytes();
        if name.len() >= process::PATH_MAX_BYTES {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        // A path is never empty.
        if name.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.peer.socket.send(name)?;
        let mut buffer = [0; ANSWER_MAX_BYTES];
        let (answer, files) = self.answer(&mut buffer, self.deadline.left(), no_answer)?;
        match answer {
            Answer::Failed(error) => Err(error),
            Answer::Opened { is_device, size, start } => {
                let file = files.into_iter().next();
                let file = file.ok_or_else(|| io::Error::other("no file came with its sizes"))?;
                Ok(Opened { file: Arc::new(file), is_device, size, start: start.to_vec() })
            }
            Answer::Copying | Answer::Copied => Err(has_failed()),
        }
    }

    /// Fills `target`, an empty file, with what is in a file that was opened with the same rights.
    /// `progress` is called for each piece.
    pub fn copy(
        &self,
        source: &Opened,
        target: &File,
        progress: &mut dyn FnMut(),
    ) -> io::Result<()> {
        let request = CopyRequest { bytes: source.size.bytes };
        let files = [source.file.as_fd(), target.as_fd()];
        self.peer.socket.send_files(&request.bytes(), &files)?;
        loop {
            let mut buffer = [0; ANSWER_MAX_BYTES];
            match self.answer(&mut buffer, COPY_STALL_LIMIT, has_stalled)?.0 {
                Answer::Copying => progress(),
                Answer::Copied => return Ok(()),
                Answer::Failed(error) => return Err(error),
                Answer::Opened { .. } => return Err(has_failed()),
            }
        }
    }

    /// Waits for the next answer; where there is none within `limit` there never is one.
    fn answer<'b>(
        &self,
        buffer: &'b mut [u8],
        limit: Duration,
        late: fn() -> io::Error,
    ) -> io::Result<(Answer<'b>, Vec<OwnedFd>)> {
        let received = self.peer.socket.receive_files(buffer, Some(limit));
        let (length, files) = received.map_err(|error| {
            if error.kind() != io::ErrorKind::TimedOut {
                return error;
            }
            self.has_timed_out.set(true);
            late()
        })?;
        let answer = Answer::parse(&buffer[..length]).ok_or_else(has_failed)?;
        Ok((answer, files))
    }
}

fn has_failed() -> io::Error {
    io::Error::other("the process that opens files has failed")
}

fn has_stalled() -> io::Error {
    let limit = COPY_STALL_LIMIT.as_secs();
    let why = format!("nothing of it was copied for {limit} s; its file system does not answer");
    io::Error::new(io::ErrorKind::TimedOut, why)
}

impl Drop for Opener {
    fn drop(&mut self) {
        // It has nothing to finish, and may take long to exit.
        self.peer.process.kill();
    }
}

impl Victim for Peer {
    fn kill(&self) {
        self.process.kill();
        // It may not be gone by that, and whoever waits for its answer is not to.
        self.socket.end();
    }
}

impl Places {
    fn take(&self, uid: u32, deadline: &Deadline) -> io::Result<()> {
        let is_full = |used: &mut HashMap<u32, usize>| {
            used.get(&uid).is_some_and(|count| *count >= OPENERS_MAX)
        };
        let used = lock(&self.used);
        let mut used = wait_while_within(&self.freed, used, deadline.left(), is_full);
        if is_full(&mut used) {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "{OPENERS_MAX} processes that open files for user {uid} wait for file systems \
                     that do not answer"
                ),
            ));
        }
        *used.entry(uid).or_default() += 1;
        Ok(())
    }

    fn free(&self, uid: u32) {
        let mut used = lock(&self.used);
        if let Some(count) = used.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                used.remove(&uid);
            }
        }
        self.freed.notify_all();
    }
}

impl Rights {
    fn uid(&self) -> u32 {
        match self {
            Self::Ours => own_ids().0,
            Self::Of(writer) => writer.uid,
        }
    }
}

/// `ours`, or the numbers of a user and of groups, `1000:100:4:24`.
impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours => f.write_str("ours"),
            Self::Of(writer) => writer.fmt(f),
        }
    }
}

impl FromStr for Rights {
    type Err = <Writer as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "ours" { Ok(Self::Ours) } else { text.parse().map(Self::Of) }
    }
}

#[cfg(test)]
pub(crate) mod tests;
