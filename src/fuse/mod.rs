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
//! waits for the daemon, both wait for ever. So a name that the reaper deleted is
//! remembered for at most a second, and is ENOENT or ENODEV to whoever uses it.

mod adapter;
mod translate;
mod waiting;

use std::{
    io,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use adapter::Adapter;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use waiting::Waiting;

use crate::{
    sync::Arc,
    sys::{mount, pool::Pool},
    tree::Tree,
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
}

impl Mounted {
    /// Mounts the tree.
    ///
    /// # Errors
    /// Where the kernel or the mount point does not let us.
    pub fn mount(tree: Arc<Tree>, mount: &Path, pool: Arc<Pool>) -> io::Result<Self> {
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
        let adapter = Adapter::new(tree, pool, Arc::clone(&waiting));
        let session = Session::new(adapter, mount, &config)?.spawn()?;
        Ok(Self { mount: mount.to_owned(), session, waiting, watcher })
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
