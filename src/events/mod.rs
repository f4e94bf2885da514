//! The change feed: how programs and the reaper learn that a sandbox has changed.
//!
//! A [`Wakeup`] wakes the reaper before its next tick. Readers of `events` and `dozed.events` read
//! the [`EventLog`]. Programs that poll or watch a file of the tree are notified through the
//! [`ChangeFeed`]. Publishing a change never waits for any of them.
//!
//! ```text
//!  lifecycle ── a step was taken ──▶ ChangeFeed ──▶ EventLog: events, dozed.events
//!                                     │
//!                 the notifier thread ├──▶ poll wakeups, sent by the FUSE adapter
//!                                     └──▶ the announcer process ──▶ the mount ──▶ inotify
//! ```
//!
//! FUSE gives a daemon no way to generate an inotify event. But a `utimensat` through the mount
//! generates IN_MODIFY, and an `rmdir` IN_DELETE. A thread of the daemon must not make these
//! calls: if the daemon is killed during one, the thread waits in the kernel for an answer that
//! only the daemon can give, and the mount never ends. So a separate process, the announcer,
//! makes them.

mod announcer;
mod event;
mod feed;
mod log;
mod wakeup;

pub use announcer::{Announcer, Location, Notifier, announce};
pub use event::{Event, VERSION, What};
pub use feed::{ChangeFeed, Tombstone, WatchTarget};
pub use log::{EventLog, Reader, View, Viewer};
pub use wakeup::Wakeup;
