//! The daemon's side of the announcer: starts it, gives it tasks, and restarts it.
//!
//! There are two threads. The notifier takes what has changed from the change feed, wakes pollers
//! and sends tasks to the announcer. The supervisor starts the announcer and reads its answers;
//! when the announcer ends, its unfinished tasks go to the next one.

mod message;
mod process;

use std::{fs::File, io, path::PathBuf, str, thread::JoinHandle, time::Duration};

use message::{Answer, MESSAGE_MAX_BYTES, Order};
pub use process::announce;

use super::{ChangeFeed, Wakeup, WatchTarget, feed::Task};
use crate::{
    sandbox::SandboxId,
    sync::{Arc, Mutex, lock},
    sys::{
        clock::{Deadline, pause_for},
        host::random_name,
        mount::Device,
        process::{Launch, Privileges, Process, Program},
        socket::MessageSocket,
        thread::join_by,
    },
};

/// How long an announcer may take to become ready. It starts a program.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long the start of the daemon waits for the first announcer, which takes about 10 ms.
const BEGIN_LIMIT: Duration = Duration::from_secs(2);
/// How long an announcer may take to end after its socket is closed, and after a kill.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How long the threads may take to end. One may be waiting for [`END_LIMIT`].
const THREADS_END_LIMIT: Duration = Duration::from_secs(5);
/// How long the daemon's end waits for the last announcements.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// The pause before a restart of the announcer. It doubles up to [`RESTART_PAUSE_MAX`] while
/// announcers end sooner than that.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause before a restart.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(30);

/// How to start the announcer.
#[derive(Debug, Clone)]
pub struct Announcer {
    /// The program, before the mount and its device.
    pub program: Program,
    /// Where the tree is mounted.
    pub mount: PathBuf,
    /// The device number of it.
    pub device: Device,
    /// The names of the files that a sandbox has.
    pub files: Vec<&'static str>,
}

/// Where a watch target is in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Its path in the tree.
    pub path: String,
    /// Its inode.
    pub inode: u64,
}

/// The threads that notify programs of changes.
#[derive(Debug)]
pub struct Notifier {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    feed: Arc<ChangeFeed>,
    /// The socket to the announcer, while there is one. A leaf lock.
    socket: Mutex<Option<Arc<MessageSocket>>>,
    /// Closed at the end, so that the supervisor does not wait for the next restart.
    wakeup: Wakeup,
    /// Notified when the first announcer is ready, or has failed.
    begun: Wakeup,
}

impl Notifier {
    /// Starts the threads, and returns when the announcer is ready or has failed to start. `wake`
    /// wakes the programs that poll a target, and `locate` returns where a target is. Without an
    /// announcer there are no inotify events.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub fn start(
        feed: Arc<ChangeFeed>,
        announcer: Option<Announcer>,
        wake: impl Fn(WatchTarget) + Send + 'static,
        locate: impl Fn(WatchTarget, Option<&SandboxId>) -> Location + Send + 'static,
    ) -> io::Result<Self> {
        let (wakeup, begun) = Default::default();
        let shared = Arc::new(Shared { feed, socket: Mutex::default(), wakeup, begun });
        shared.feed.open();
        let telling = Arc::clone(&shared);
        let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let mut threads = vec![named("dozed-notifier").spawn(move || {
            while let Some((wakes, tasks)) = telling.feed.wait() {
                wakes.into_iter().for_each(&wake);
                telling.give(tasks.into_iter().map(|task| order(task, &locate)));
            }
        })?];
        if let Some(announcer) = announcer {
            let keeping = Arc::clone(&shared);
            threads.push(named("dozed-announce").spawn(move || keeping.supervise(&announcer))?);
            // From when we serve on, inotify is told of everything.
            shared.begun.wait(BEGIN_LIMIT);
        }
        Ok(Self { shared, threads })
    }

    /// Waits for at most [`FLUSH_LIMIT`] until every change is announced, then ends the
    /// announcer.
    pub fn stop(self) {
        let deadline = Deadline::after(FLUSH_LIMIT);
        while self.shared.is_listening() && self.shared.feed.unannounced() > 0 {
            if deadline.passed() {
                tracing::debug!("some changes were not announced");
                break;
            }
            pause_for(Duration::from_millis(1));
        }
        self.shared.feed.close();
        self.shared.wakeup.close();
        if let Some(socket) = lock(&self.shared.socket).as_ref() {
            socket.end();
        }
        let deadline = Deadline::after(THREADS_END_LIMIT);
        for thread in self.threads {
            join_by(thread, &deadline, "a thread that announces changes");
        }
    }
}

fn order(task: Task, locate: impl Fn(WatchTarget, Option<&SandboxId>) -> Location) -> Order {
    let Task { number, target, id } = task;
    let Location { path, inode } = locate(target, id.as_ref());
    match target {
        WatchTarget::State(_) | WatchTarget::Events(_) | WatchTarget::AllEvents => {
            Order::Touch { number, inode, path }
        }
        WatchTarget::Gone(_) => Order::Remove { number, inode, name: path },
    }
}

impl Shared {
    fn is_listening(&self) -> bool {
        lock(&self.socket).is_some()
    }

    /// Sends orders. If that fails, it ends the announcer, and the next one gets them.
    fn give(&self, orders: impl Iterator<Item = Order>) {
        let socket = lock(&self.socket).clone();
        let Some(socket) = socket else { return };
        for order in orders {
            if let Err(error) = socket.send(order.text().as_bytes()) {
                tracing::debug!(%error, "sending requests to the announcer");
                socket.end();
                return;
            }
        }
    }

    /// Starts an announcer, and restarts it whenever it ends.
    fn supervise(&self, announcer: &Announcer) {
        let mut pause = RESTART_PAUSE;
        loop {
            let lived = crate::sys::clock::Stopwatch::start();
            let ended = self.run_one(announcer);
            self.begun.notify();
            if self.feed.is_closed() {
                return;
            }
            if lived.elapsed() > RESTART_PAUSE_MAX {
                pause = RESTART_PAUSE;
            }
            match ended {
                Ok(()) => tracing::warn!(again_in = ?pause, "the announcer ended"),
                Err(error) => {
                    tracing::warn!(%error, again_in = ?pause, "there are no inotify events");
                }
            }
            if !self.wakeup.wait(pause) {
                return;
            }
            pause = (pause * 2).min(RESTART_PAUSE_MAX);
        }
    }

    /// Starts an announcer and reads its answers until it ends.
    fn run_one(&self, announcer: &Announcer) -> io::Result<()> {
        let (ours, theirs) = MessageSocket::pair()?;
        let ours = Arc::new(ours);
        let name = format!("dozed.{}", random_name()?);
        self.feed.expect_announcer(name.clone());
        let process = start(announcer, theirs)?;
        let files = announcer.files.iter().map(|file| (*file).to_owned()).collect();
        let heard = self.hear(&ours, &Order::Register { name, files });
        *lock(&self.socket) = None;
        ours.end();
        while process.wait(END_LIMIT).is_none() {
            process.kill();
            // One that waits for a file which somebody writes ends when that is done. Its
            // threads stay known until then, so that none of them is taken for a user.
            if self.feed.is_closed() {
                return heard;
            }
        }
        self.feed.announcer_died();
        heard
    }

    fn hear(&self, socket: &Arc<MessageSocket>, registration: &Order) -> io::Result<()> {
        socket.send(registration.text().as_bytes())?;
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
                    if self.feed.is_closed() {
                        return Ok(());
                    }
                    self.feed.announcer_listens();
                    self.begun.notify();
                }
                Some(Answer::Done { number }) => self.feed.done(number),
                Some(Answer::Failed { number, why }) => {
                    tracing::debug!(why, "announcing");
                    self.feed.done(number);
                }
                None => return Err(io::Error::other("the announcer sent an unexpected answer")),
            }
        }
    }
}

/// Starts the process. It inherits its end of the socket and nothing else.
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
