//! The kernel side, as thin as it can be: fuser's types to tree calls and back.
//!
//! A session thread never waits: what may take long runs as a job on the pool and
//! answers from there, so that one slow sandbox never delays `ls`, `cat` or another's
//! write. A panic in one request answers it with EIO and is no more than that.
//!
//! A blocked writer that is signalled gets EINTR while its operation goes on; see
//! [`waiting`].
//!
//! Nothing in this process may make the kernel wait for the mount: no call into it, and
//! no notification that takes a directory's lock, as to make it forget a name does. If
//! the daemon is killed while a thread of its waits for such a lock, and whoever has it
//! waits for the daemon, both wait for ever. So inotify and the kernel's memory of names
//! are told of changes by the announcer, a process of its own; see `events`. What that
//! does comes in here like anybody's request, and is answered without waiting.

mod adapter;
mod jobs;
mod lanes;
mod mount_point;
mod once;
mod polls;
mod tombstone;
mod translate;
mod waiting;
mod watch_target;

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread::JoinHandle,
    time::Duration,
};

use adapter::Adapter;
use fuser::{BackgroundSession, Config, Session, SessionACL};
pub use mount_point::{Unfit, check_mount_point};
use polls::Polls;
use waiting::Waiting;

use crate::{
    events::{Announcer, Notifier},
    sync::Arc,
    sys::{
        clock::Deadline,
        fuse_mount::Unmounted,
        mount::{self, Device, MountWatch},
        pool::Pool,
        process::Program,
        thread::join_by,
    },
    tree::{File, Tree},
};

/// Threads that read requests. One would do for one client; a second keeps a long
/// listing from holding up the rest.
const SESSION_THREADS: usize = 2;
/// How long the session may take to end once its connection is cut. It takes milliseconds; a
/// thread that is at work for somebody ends its work first.
const SESSION_END_LIMIT: Duration = Duration::from_secs(5);

/// The tree, mounted.
#[derive(Debug)]
pub struct Mounted {
    /// Without symbolic links.
    mount: PathBuf,
    device: Device,
    watch: MountWatch,
    /// Whether the mounts have changed since they were last looked at.
    is_unsure: AtomicBool,
    session: BackgroundSession,
    waiting: Arc<Waiting>,
    watcher: JoinHandle<()>,
    notifier: Notifier,
}

impl Mounted {
    /// Mounts the tree. Without a program that announces, inotify is told only of what comes
    /// through the mount.
    ///
    /// # Errors
    /// Where the kernel or the mount point does not let us.
    pub fn mount(
        tree: Arc<Tree>,
        mount: &Path,
        pool: Arc<Pool>,
        announcing: Option<Program>,
    ) -> io::Result<Self> {
        let (waiting, watcher) = Waiting::start()?;
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(SESSION_THREADS);
        let (feed, polls) = (Arc::clone(tree.feed()), Arc::new(Polls::default()));
        // Without touching the mount: it is ours, and so must not be waited for.
        let mount = mount::without_links(mount)?;
        let (connection, unmounted) = Unmounted::create(mount::TREE_NAME)?;
        let device = unmounted.device();
        tree.mounted_as(device);
        let adapter = Adapter::new(tree, pool, Arc::clone(&waiting), Arc::clone(&polls))?;
        let session = Session::from_fd(adapter, connection, SessionACL::All, config)?.spawn()?;
        let watch = MountWatch::start()?;
        mount_point::mount_tree(&unmounted, &mount)?;
        // It would keep others from unmounting the tree.
        drop(unmounted);
        let announcer = announcing.map(|program| announcer(program, &mount, device));
        let wake = move |target| watch_target::polled(target).for_each(|node| polls.wake(node));
        let notifier = Notifier::start(feed, announcer, wake, watch_target::locate)?;
        let is_unsure = AtomicBool::new(false);
        Ok(Self { mount, device, watch, is_unsure, session, waiting, watcher, notifier })
    }

    /// Says whether the tree is served and where it was mounted; it is not once somebody
    /// unmounted it, though another mount namespace may still have it.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        if self.session.guard.is_finished() {
            return false;
        }
        if self.watch.has_changed() {
            self.is_unsure.store(true, Ordering::Relaxed);
        }
        if !self.is_unsure.load(Ordering::Relaxed) {
            return true;
        }
        // Where the kernel does not list the mounts, we go on, and look again.
        let mounted = self.is_mounted();
        self.is_unsure.store(mounted.is_err(), Ordering::Relaxed);
        mounted.unwrap_or(true)
    }

    fn is_mounted(&self) -> io::Result<bool> {
        let mounts = mount::mounts_at(&self.mount)?;
        Ok(mounts.iter().any(|found| found.device == self.device))
    }

    /// Ends the tree and takes it away, also where somebody still uses it, and where other
    /// mount namespaces or bind mounts have it. Whoever waits for an answer gets an error.
    ///
    /// # Errors
    /// Where the kernel does not let us, or another mount covers it. Once this process ends,
    /// so does the tree.
    pub fn unmount(self) -> io::Result<()> {
        let is_mounted = self.is_mounted().unwrap_or(true);
        // It uses the mount, and what has happened is to be told before that ends.
        self.notifier.stop();
        let unmounted = if is_mounted { self::unmount(&self.mount, self.device) } else { Ok(()) };
        self.waiting.stop();
        let deadline = Deadline::after(SESSION_END_LIMIT);
        if unmounted.is_ok() {
            join_by(self.session.guard, &deadline, "the session");
        }
        join_by(self.watcher, &deadline, "the thread that looks for signals");
        unmounted
    }
}

/// Cuts the connection of the tree and takes it away, unless something covers it.
fn unmount(mount: &Path, device: Device) -> io::Result<()> {
    match mount::mounted_at(mount)? {
        Some(found) if found.device == device => mount::abort(mount),
        Some(_) | None => Err(io::Error::other("something else is mounted over the tree")),
    }
}

/// Says what the announcer of the tree that was just mounted needs.
fn announcer(program: Program, mount: &Path, device: Device) -> Announcer {
    let files = File::ALL.map(File::name).to_vec();
    Announcer { program, mount: mount.to_owned(), device, files }
}
