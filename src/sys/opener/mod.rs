//! Processes that open files for us which somebody else has named.
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
//! ```
//!
//! One that does not answer is killed, and forgotten: it is reaped whenever it ends.

mod process;

use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    str::{self, FromStr},
};

pub use process::serve;

use crate::{
    sandbox::Writer,
    sync::{Arc, Condvar, Mutex, lock, wait_while_within},
    sys::{
        cancel::{Cancel, Victim},
        clock::Deadline,
        files::{ANSWER_LIMIT, ImageSize, Opened, START_BYTES, no_answer},
        host::own_ids,
        process::{ExitWatch, Launch, Privileges, Process, Program},
        socket::MessageSocket,
    },
};

/// How many openers there are at a time for the paths of one user: those that a file system
/// keeps from ending count too. More than a host of many cores starts sandboxes at once.
const OPENERS_MAX: usize = 16;

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

/// A process that opens files, for as long as this is held. It is of the thread that started it.
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
    /// Makes what starts openers, by a program that is told whose rights to have and calls
    /// [`serve`].
    ///
    /// # Errors
    /// Where the system gives no thread to hear of their ends.
    pub fn new(program: Program) -> io::Result<Self> {
        let places = Arc::new(Places::default());
        let ended = Arc::clone(&places);
        let watch = ExitWatch::start(move |uid, _| {
            ended.free(u32::try_from(uid).expect("each is watched by its user's number"));
        })?;
        Ok(Self { program, places, watch })
    }

    /// Starts an opener.
    ///
    /// # Errors
    /// Where it cannot be started, and `TimedOut` where the user has too many that wait.
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
    /// Has it fail at once if the operation that it opens files for is or was called off.
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
        // No path has no bytes, and no message either.
        if name.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.peer.socket.send(name)?;
        let mut buffer = [0; ANSWER_MAX_BYTES];
        let received = self.peer.socket.receive_file(&mut buffer, Some(self.deadline.left()));
        let (length, file) = received.map_err(|error| {
            if error.kind() != io::ErrorKind::TimedOut {
                return error;
            }
            self.has_timed_out.set(true);
            no_answer()
        })?;
        let answer = Answer::parse(&buffer[..length]);
        match answer.ok_or_else(|| io::Error::other("the process that opens files has failed"))? {
            Answer::Failed(error) => Err(error),
            Answer::Opened { size, start } => {
                let file = file.ok_or_else(|| io::Error::other("no file came with its sizes"))?;
                Ok(Opened { file: Arc::new(file), size, start: start.to_vec() })
            }
        }
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        // It has nothing to finish. One that waits for a file system may take long to be gone.
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

/// What an opener says of a path. A line of text, and then bytes up to the end of the message.
#[derive(Debug)]
enum Answer<'a> {
    /// `opened DEVICE BYTES ALLOCATED_BYTES`, and the first bytes of it. The file comes along.
    Opened { size: ImageSize, start: &'a [u8] },
    /// `failed ERRNO`, and a sentence where that is nought.
    Failed(io::Error),
}

impl<'a> Answer<'a> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Opened { size: ImageSize { device, bytes, allocated_bytes }, start } => {
                let head = format!("opened {device} {bytes} {allocated_bytes}\n");
                [head.as_bytes(), start].concat()
            }
            Self::Failed(error) => match error.raw_os_error() {
                Some(errno) => format!("failed {errno}\n").into_bytes(),
                None => format!("failed 0\n{error}").into_bytes(),
            },
        }
    }

    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let (head, rest) = (str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]);
        let mut words = head.split(' ');
        let what = words.next()?;
        let mut number = || words.next()?.parse().ok();
        match what {
            "opened" => {
                let (device, bytes, allocated_bytes) = (number()?, number()?, number()?);
                Some(Self::Opened {
                    size: ImageSize { device, bytes, allocated_bytes },
                    start: rest,
                })
            }
            "failed" => match i32::try_from(number()?).ok()? {
                0 => {
                    let why = String::from_utf8_lossy(rest).into_owned();
                    Some(Self::Failed(io::Error::new(io::ErrorKind::InvalidInput, why)))
                }
                errno => Some(Self::Failed(io::Error::from_raw_os_error(errno))),
            },
            _ => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
