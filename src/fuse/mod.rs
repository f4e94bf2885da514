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
//! are told of changes by the announcer, a process of its own; see `notify`. What that
//! does comes in here like anybody's request, and is answered without waiting.

mod adapter;
mod ghosts;
mod polls;
mod spots;
mod translate;
mod waiting;

use std::{
    io,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use adapter::Adapter;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use polls::Polls;
use waiting::Waiting;

use crate::{
    notify::{Announcer, Program, Teller},
    sync::Arc,
    sys::{mount, pool::Pool},
    tree::{File, Tree},
};

/// Threads that read requests. One would do for one client; a second keeps a long
/// listing from holding up the rest.
const SESSION_THREADS: usize = 2;
/// The name of the file system, in mount tables and in `df`.
pub const FS_NAME: &str = "dozed";

/// The tree, mounted.
#[derive(Debug)]
pub struct Mounted {
    mount: PathBuf,
    session: BackgroundSession,
    waiting: Arc<Waiting>,
    watcher: JoinHandle<()>,
    teller: Teller,
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
        config.mount_options = vec![
            MountOption::FSName(FS_NAME.to_owned()),
            MountOption::Subtype(FS_NAME.to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
        ];
        let (news, polls) = (Arc::clone(tree.news()), Arc::new(Polls::default()));
        let adapter = Adapter::new(tree, pool, Arc::clone(&waiting), Arc::clone(&polls))?;
        let session = Session::new(adapter, mount, &config)?.spawn()?;
        let announcer = announcing.map(|program| announcer(program, mount)).transpose()?;
        let wake = move |spot| spots::polled(spot).for_each(|node| polls.wake(node));
        let teller = Teller::start(news, announcer, wake, spots::locate)?;
        Ok(Self { mount: mount.to_owned(), session, waiting, watcher, teller })
    }

    /// Says whether requests are still served; they are not once somebody unmounted it.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self.session.guard.is_finished()
    }

    /// Takes the tree away, also where somebody still uses it.
    ///
    /// # Errors
    /// Where the kernel does not let us.
    pub fn unmount(self) -> io::Result<()> {
        let serving = self.is_serving();
        // It uses the mount, and what has happened is to be told before that ends.
        self.teller.stop();
        let unmounted = self.session.umount_and_join().or_else(|error| {
            // Somebody has a file open in it, or stands in it: it goes when they do.
            tracing::info!(%error, "the mount is in use; detaching it");
            if serving { mount::detach(&self.mount) } else { Ok(()) }
        });
        self.waiting.stop();
        if self.watcher.join().is_err() {
            tracing::error!("the thread that looks for signals panicked");
        }
        unmounted
    }
}

/// Says what the announcer of the tree that was just mounted needs.
fn announcer(program: Program, mount: &Path) -> io::Result<Announcer> {
    // Without touching the mount: it is ours, and so must not be waited for.
    let mount = mount::without_links(mount)?;
    let mounted = mount::mounted_at(&mount)?.ok_or(io::ErrorKind::NotFound)?;
    let files = File::ALL.map(File::name).to_vec();
    Ok(Announcer { program, mount, device: mounted.device, files })
}
