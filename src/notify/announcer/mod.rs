//! The daemon's side of the announcer: starting it, giving it orders, and starting it anew.
//!
//! Two threads. The teller takes what has changed and hands it on: to whoever wakes
//! pollers, and to the announcer. The keeper starts the announcer and hears what it did;
//! when it dies, what it had not done is given to the next one.

mod message;
mod process;

use std::{ffi::OsString, fs::File, io, path::PathBuf, str, thread::JoinHandle, time::Duration};

use message::{Answer, MESSAGE_MAX_BYTES, Order};
pub use process::announce;

use super::{Bell, News, Spot, news::Task};
use crate::{
    sandbox::SandboxId,
    sync::{Arc, Mutex, lock},
    sys::{
        clock::{Deadline, pause_for},
        host::random_name,
        mount::Device,
        process::{Launch, Privileges, Process},
        socket::MessageSocket,
        thread::join_by,
    },
};

/// How long an announcer may take until it is ready. It has to start a program.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long the start of the daemon waits for the first one. It takes some ten milliseconds.
const BEGIN_LIMIT: Duration = Duration::from_secs(2);
/// How long one may take to end once its socket is closed, before it is killed, and then.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How long our own threads may take to end: one may just be waiting for [`END_LIMIT`].
const THREADS_END_LIMIT: Duration = Duration::from_secs(5);
/// How long the last news may take at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// The pause before an announcer that died is started anew, and the longest one; it
/// doubles while they do not live longer than that.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
/// See [`RESTART_PAUSE`].
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(30);

/// The program that the announcer is.
#[derive(Debug, Clone)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Its arguments before the mount and its device.
    pub args: Vec<OsString>,
}

/// What the announcer is to do its work with.
#[derive(Debug, Clone)]
pub struct Announcer {
    /// The program.
    pub program: Program,
    /// Where the tree is mounted.
    pub mount: PathBuf,
    /// The device number of it.
    pub device: Device,
    /// The names of the files that a sandbox has.
    pub files: Vec<&'static str>,
}

/// Where a spot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its path in the tree.
    pub path: String,
    /// Its inode.
    pub inode: u64,
}

/// Whoever tells of what has changed.
#[derive(Debug)]
pub struct Teller {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    news: Arc<News>,
    /// The socket to the announcer, while there is one. A leaf lock.
    socket: Mutex<Option<Arc<MessageSocket>>>,
    /// Closed at the end, so that the keeper does not rest.
    bell: Bell,
    /// Rung when the first announcer is ready, or has failed.
    begun: Bell,
}

impl Teller {
    /// Starts telling, and returns when that works, or for now does not. `wake` wakes those
    /// who poll a spot, and `locate` says where one is. Without an announcer inotify is told
    /// nothing.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub fn start(
        news: Arc<News>,
        announcer: Option<Announcer>,
        wake: impl Fn(Spot) + Send + 'static,
        locate: impl Fn(Spot, Option<&SandboxId>) -> Place + Send + 'static,
    ) -> io::Result<Self> {
        let (bell, begun) = Default::default();
        let shared = Arc::new(Shared { news, socket: Mutex::default(), bell, begun });
        shared.news.open();
        let telling = Arc::clone(&shared);
        let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let mut threads = vec![named("dozed-teller").spawn(move || {
            while let Some((wakes, tasks)) = telling.news.wait() {
                wakes.into_iter().for_each(&wake);
                telling.give(tasks.into_iter().map(|task| order(task, &locate)));
            }
        })?];
        if let Some(announcer) = announcer {
            let keeping = Arc::clone(&shared);
            threads.push(named("dozed-keeper").spawn(move || keeping.keep(&announcer))?);
            // From when we serve on, inotify is told of everything.
            shared.begun.wait(BEGIN_LIMIT);
        }
        Ok(Self { shared, threads })
    }

    /// Waits until all that has changed was announced, but only for a moment; then ends
    /// the announcer.
    pub fn stop(self) {
        let deadline = Deadline::after(FLUSH_LIMIT);
        while self.shared.is_listening() && self.shared.news.unannounced() > 0 {
            if deadline.passed() {
                tracing::debug!("not everything was announced");
                break;
            }
            pause_for(Duration::from_millis(1));
        }
        self.shared.news.close();
        self.shared.bell.close();
        if let Some(socket) = lock(&self.shared.socket).as_ref() {
            socket.end();
        }
        let deadline = Deadline::after(THREADS_END_LIMIT);
        for thread in self.threads {
            join_by(thread, &deadline, "a thread that announces changes");
        }
    }
}

fn order(task: Task, locate: impl Fn(Spot, Option<&SandboxId>) -> Place) -> Order {
    let Task { number, spot, id } = task;
    let Place { path, inode } = locate(spot, id.as_ref());
    match spot {
        Spot::State(_) | Spot::Events(_) | Spot::AllEvents => Order::Touch { number, inode, path },
        Spot::Gone(_) => Order::Remove { number, inode, name: path },
    }
}

impl Shared {
    fn is_listening(&self) -> bool {
        lock(&self.socket).is_some()
    }

    /// Sends orders. Where that fails the announcer is ended: the next one gets them.
    fn give(&self, orders: impl Iterator<Item = Order>) {
        let socket = lock(&self.socket).clone();
        let Some(socket) = socket else { return };
        for order in orders {
            if let Err(error) = socket.send(order.text().as_bytes()) {
                tracing::debug!(%error, "giving orders to the announcer");
                socket.end();
                return;
            }
        }
    }

    /// Sees to it that there is an announcer.
    fn keep(&self, announcer: &Announcer) {
        let mut pause = RESTART_PAUSE;
        loop {
            let lived = crate::sys::clock::Stopwatch::start();
            let ended = self.keep_one(announcer);
            self.begun.ring();
            if self.news.is_closed() {
                return;
            }
            if lived.elapsed() > RESTART_PAUSE_MAX {
                pause = RESTART_PAUSE;
            }
            match ended {
                Ok(()) => tracing::warn!(again_in = ?pause, "the announcer ended"),
                Err(error) => {
                    tracing::warn!(%error, again_in = ?pause, "inotify is told nothing");
                }
            }
            if !self.bell.wait(pause) {
                return;
            }
            pause = (pause * 2).min(RESTART_PAUSE_MAX);
        }
    }

    /// Starts an announcer and hears of what it does, until it ends.
    fn keep_one(&self, announcer: &Announcer) -> io::Result<()> {
        let (ours, theirs) = MessageSocket::pair()?;
        let ours = Arc::new(ours);
        let name = format!("dozed.{}", random_name()?);
        self.news.expect_announcer(name.clone());
        let process = start(announcer, theirs)?;
        let files = announcer.files.iter().map(|file| (*file).to_owned()).collect();
        let heard = self.hear(&ours, &Order::Greet { name, files });
        *lock(&self.socket) = None;
        ours.end();
        while process.wait(END_LIMIT).is_none() {
            process.kill();
            // One that waits for a file which somebody writes ends when that is done. Its
            // threads stay known until then, so that none of them is taken for a user.
            if self.news.is_closed() {
                return heard;
            }
        }
        self.news.announcer_died();
        heard
    }

    fn hear(&self, socket: &Arc<MessageSocket>, greeting: &Order) -> io::Result<()> {
        socket.send(greeting.text().as_bytes())?;
        let mut buffer = [0; MESSAGE_MAX_BYTES];
        let mut limit = Some(START_LIMIT);
        loop {
            let length = socket.receive(&mut buffer, limit)?;
            if length == 0 {
                return Ok(());
            }
            let answer = str::from_utf8(&buffer[..length]).ok().and_then(Answer::parse);
            match answer {
                Some(Answer::Ready) => {
                    limit = None;
                    *lock(&self.socket) = Some(Arc::clone(socket));
                    if self.news.is_closed() {
                        return Ok(());
                    }
                    self.news.announcer_listens();
                    self.begun.ring();
                }
                Some(Answer::Done { number }) => self.news.done(number),
                Some(Answer::Failed { number, why }) => {
                    tracing::debug!(why, "announcing");
                    self.news.done(number);
                }
                None => return Err(io::Error::other("the announcer makes no sense")),
            }
        }
    }
}

/// Starts the process, with nothing of ours but its end of the socket.
fn start(announcer: &Announcer, socket: MessageSocket) -> io::Result<Arc<Process>> {
    let Device { major, minor } = announcer.device;
    let mut args = announcer.program.args.clone();
    args.extend([announcer.mount.clone().into(), format!("{major}:{minor}").into()]);
    let nowhere = File::options().write(true).open("/dev/null")?;
    let mut launch = Launch::new(&announcer.program.path, &args, nowhere);
    launch.name = Some("dozed".as_ref());
    launch.stdin = Some(socket.into_fd());
    launch.privileges = Privileges::Files;
    Process::spawn(launch)
}
