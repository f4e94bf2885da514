//! A thread that reports when files grow.

use std::{
    collections::HashMap,
    fmt, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    thread::{self, JoinHandle},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};

use crate::sync::{Arc, Mutex, lock};

/// Room for some dozens of events; what does not fit is read by the next look.
const BUFFER_BYTES: usize = 4096;

/// Reports files that grow, each once.
pub struct GrowthWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    inotify: OwnedFd,
    stop: OwnedFd,
    /// The tag of each file that is watched. A leaf lock.
    tags: Mutex<HashMap<i32, u64>>,
}

impl GrowthWatch {
    /// Starts the thread, which calls `tell` with a file's tag when that was written to.
    pub fn start(tell: impl Fn(u64) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            tags: Mutex::default(),
        });
        let watching = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("dozed-growth".to_owned())
            .spawn(move || watching.run(&tell))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Has the next write to a file told, and then no more. A file has one tag.
    pub fn watch(&self, tag: u64, path: &Path) -> io::Result<()> {
        // Held so that the thread finds the tag of what happens at once.
        let mut tags = lock(&self.shared.tags);
        let flags = WatchFlags::MODIFY | WatchFlags::ONESHOT;
        tags.insert(inotify::add_watch(&self.shared.inotify, path, flags)?, tag);
        Ok(())
    }
}

impl Shared {
    fn run(&self, tell: &dyn Fn(u64)) {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        loop {
            let mut fds = [&self.inotify, &self.stop].map(|fd| PollFd::new(fd, PollFlags::IN));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "no longer notified of files that grow");
                    return;
                }
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            let mut events = Reader::new(&self.inotify, &mut buffer);
            while let Ok(event) = events.next() {
                // One is also told that the watch is over; by then its tag is gone.
                if let Some(tag) = self.tag(event.wd(), event.events()) {
                    tell(tag);
                }
            }
        }
    }

    fn tag(&self, watch: i32, events: ReadFlags) -> Option<u64> {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            tracing::warn!("missed files that grew");
        }
        lock(&self.tags).remove(&watch)
    }
}

impl Drop for GrowthWatch {
    fn drop(&mut self) {
        // It fails only if the eventfd is full, and so readable.
        let _written = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of `tell` was reported where it happened.
            let _ended = thread.join();
        }
    }
}

impl fmt::Debug for GrowthWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrowthWatch")
            .field("watched", &lock(&self.shared.tags).len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, sync::mpsc, time::Duration};

    use super::*;

    const SOON: Duration = Duration::from_secs(180);

    #[test]
    fn a_file_that_grows_is_told_of_once_for_each_time_that_it_is_watched() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, told) = mpsc::channel();
        let watch = GrowthWatch::start(move |tag| tell.send(tag).unwrap()).unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut file = File::create(&a).unwrap();
        let mut other = File::create(&b).unwrap();
        assert!(watch.watch(1, &dir.path().join("absent")).is_err());
        for _ in 0..3 {
            watch.watch(7, &a).unwrap();
            watch.watch(7, &a).unwrap();
            file.write_all(b"x").unwrap();
            assert_eq!(told.recv_timeout(SOON), Ok(7));
            file.write_all(b"nobody watches").unwrap();
        }
        watch.watch(8, &b).unwrap();
        other.write_all(b"x").unwrap();
        // That this is the next shows that the unwatched writes were not told.
        assert_eq!(told.recv_timeout(SOON), Ok(8));
        drop(watch);
        assert!(told.recv().is_err());
    }
}
