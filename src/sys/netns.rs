//! Network namespaces: creating, pinning and entering.
//!
//! Work in a namespace is a closure on its own thread, which enters the namespace and exits
//! afterwards, so no thread ever has to return to the host's. The caller gets the result at once;
//! sockets are dropped later, because closing some takes the kernel longer than all the work.

use std::{
    any::Any,
    cell::RefCell,
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use rustix::{
    fs::fstatfs,
    io::Errno,
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use super::{files::make_private_dir, mount};

const OWN: &str = "/proc/thread-self/ns/net";
/// What `fstatfs` says of a namespace's file (`NSFS_MAGIC` of linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;
/// The limit of threads in namespaces, including those that are closing sockets.
const THREADS_MAX: usize = 1024;

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// A network namespace that is kept open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    identity: Identity,
}

/// The unique identity of a namespace since the boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The device of the file.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// Proves that this thread is in the namespace.
pub struct Inside {
    later: RefCell<Vec<Box<dyn Any>>>,
}

impl Inside {
    /// Defers a drop until the caller has its result.
    pub fn drop_later(&self, what: impl Any) {
        self.later.borrow_mut().push(Box::new(what));
    }

    /// Pins the namespace to the new file `path`.
    ///
    /// # Errors
    /// `AlreadyExists`, and errors of mount(2); no file is left then.
    pub fn pin(&self, path: &Path) -> io::Result<Namespace> {
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let pinned = mount_bind(OWN, path).map_err(io::Error::from).and_then(|()| {
            let namespace = Namespace::open(path)?;
            namespace.ok_or_else(|| io::Error::other("it did not stay"))
        });
        pinned.inspect_err(|_| drop(unpin(path)))
    }
}

impl fmt::Debug for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inside")
    }
}

impl Namespace {
    /// Returns this thread's namespace.
    pub fn current() -> io::Result<Self> {
        Self::of(File::open(OWN)?)
    }

    /// Returns the namespace of the process `pid`; `None` if there is no such process.
    pub fn of_process(pid: u32) -> io::Result<Option<Self>> {
        match File::open(format!("/proc/{pid}/ns/net")) {
            Ok(file) => Self::of(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the namespace that is pinned to `path`, if there is one.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let file = match fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // The kernel has the type of the field differ between machines.
        #[allow(clippy::cast_sign_loss, reason = "the number is a magic one, not a count")]
        let magic = fstatfs(&file)?.f_type as u64;
        if magic == NSFS_MAGIC { Self::of(file).map(Some) } else { Ok(None) }
    }

    fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let identity = Identity { device: metadata.dev(), inode: metadata.ino() };
        Ok(Self { file, identity })
    }

    /// Returns its identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns an open file of it.
    pub fn file(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Runs `job` inside it, on its own thread.
    pub fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Inside) -> T + Send + 'static,
    ) -> io::Result<T> {
        let same = Self { file: self.file.try_clone()?, identity: self.identity };
        on_a_thread(move || same.enter(), job)
    }

    /// Moves this thread into it, for good. Async-signal-safe.
    pub(super) fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?)
    }
}

/// Runs `job` inside a new namespace, which is removed afterwards unless it was pinned.
pub fn in_a_new_one<T: Send + 'static>(
    job: impl FnOnce(&Inside) -> T + Send + 'static,
) -> io::Result<T> {
    let unshare = || {
        // SAFETY: of the flags only that for file descriptors is dangerous, and only a
        // network namespace is asked for.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
    };
    on_a_thread(unshare, job)
}

/// Decrements the count of threads, also after a panic.
struct Counted;

impl Counted {
    fn one_more() -> io::Result<Self> {
        if THREADS.fetch_add(1, Ordering::SeqCst) < THREADS_MAX {
            return Ok(Self);
        }
        THREADS.fetch_sub(1, Ordering::SeqCst);
        Err(io::Error::other(format!(
            "{THREADS_MAX} threads are in network namespaces, which is the limit"
        )))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::SeqCst);
    }
}

fn on_a_thread<T: Send + 'static>(
    enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    job: impl FnOnce(&Inside) -> T + Send + 'static,
) -> io::Result<T> {
    let counted = Counted::one_more()?;
    let (answer, wait) = mpsc::sync_channel(1);
    thread::Builder::new().name("dozed-netns".to_owned()).spawn(move || {
        let _counted = counted;
        let inside = Inside { later: RefCell::new(Vec::new()) };
        let done = enter().map(|()| job(&inside));
        // The caller waits for this.
        drop(answer.send(done));
        drop(inside);
    })?;
    match wait.recv() {
        Ok(done) => done,
        Err(mpsc::RecvError) => Err(io::Error::other("the work in the namespace panicked")),
    }
}

/// Creates the directory `path` for pins. Mounts in it are private, so that service managers do not
/// make units of them. Idempotent.
pub fn make_pin_dir(path: &Path) -> io::Result<()> {
    make_private_dir(path)?;
    if mount::mounted_at(path)?.is_none() {
        mount_bind(path, path)?;
    }
    Ok(mount_change(path, MountPropagationFlags::PRIVATE)?)
}

/// Removes a pin, if it exists.
pub fn unpin(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // It is not a mount, or does not exist.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory for pins that goes away with all that is in it.
    struct Pins(tempfile::TempDir);

    impl Pins {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            make_pin_dir(dir.path()).unwrap();
            Self(dir)
        }
    }

    impl Drop for Pins {
        fn drop(&mut self) {
            for entry in fs::read_dir(self.0.path()).unwrap() {
                unpin(&entry.unwrap().path()).unwrap();
            }
            mount::detach(&self.0.path().canonicalize().unwrap()).unwrap();
        }
    }

    #[test]
    fn work_inside_never_moves_the_thread_that_asked_for_it() {
        let here = Namespace::current().unwrap().identity();
        let there = in_a_new_one(|_| Namespace::current().unwrap().identity()).unwrap();
        assert_ne!(there, here);
        assert_eq!(Namespace::current().unwrap().identity(), here);
    }

    #[test]
    fn a_pinned_namespace_is_found_again_and_gone_without_its_pin() {
        let pins = Pins::new();
        let path = pins.0.path().join("a");
        assert!(Namespace::open(&path).unwrap().is_none());
        let pin = path.clone();
        let (made, inside) = in_a_new_one(move |inside| {
            (inside.pin(&pin).unwrap().identity(), Namespace::current().unwrap().identity())
        })
        .unwrap();
        let found = Namespace::open(&path).unwrap().unwrap();
        assert_eq!((found.identity(), inside), (made, made));
        let entered = found.run(|_| Namespace::current().unwrap().identity()).unwrap();
        assert_eq!(entered, made);
        drop(found);
        unpin(&path).unwrap();
        unpin(&path).unwrap();
        assert!(Namespace::open(&path).unwrap().is_none());
        assert!(!path.exists());
    }

    #[test]
    fn a_pin_never_takes_the_place_of_another_file() {
        let pins = Pins::new();
        let path = pins.0.path().join("a");
        fs::write(&path, "mine").unwrap();
        let pin = path.clone();
        let refused = in_a_new_one(move |inside| inside.pin(&pin).map(drop)).unwrap();
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(Namespace::open(&path).unwrap().is_none());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn work_that_panics_is_an_error_and_ends_nothing_else() {
        let here = Namespace::current().unwrap();
        let error = here.run(|_| panic!("on purpose")).unwrap_err();
        assert!(error.to_string().contains("panicked"), "{error}");
        assert_eq!(here.run(|_| 7).unwrap(), 7);
    }

    #[test]
    fn what_is_left_to_be_dropped_is_dropped_after_the_answer() {
        struct Tells(mpsc::Sender<()>, mpsc::Receiver<()>);
        impl Drop for Tells {
            fn drop(&mut self) {
                self.1.recv().unwrap();
                self.0.send(()).unwrap();
            }
        }
        let (dropped, wait) = mpsc::channel();
        let (go_on, held) = mpsc::channel();
        let here = Namespace::current().unwrap();
        // It cannot be dropped before we say so, and we say so after the answer.
        here.run(move |inside| inside.drop_later(Tells(dropped, held))).unwrap();
        go_on.send(()).unwrap();
        wait.recv_timeout(std::time::Duration::from_secs(180)).unwrap();
    }

    #[test]
    fn mounts_in_the_directory_for_pins_are_private_and_made_once() {
        let pins = Pins::new();
        make_pin_dir(pins.0.path()).unwrap();
        let path = pins.0.path().canonicalize().unwrap();
        let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let lines: Vec<_> =
            list.lines().filter(|line| line.split(' ').nth(4) == path.to_str()).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(!lines[0].contains("shared:"), "{lines:?}");
    }
}
