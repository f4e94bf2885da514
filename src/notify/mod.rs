//! Who is told when something has changed.
//!
//! The reaper, by a [`Bell`] that wakes it before its next tick; readers of the [`Log`]
//! of events; and through [`News`] whoever polls or watches the tree. Nobody who changes
//! a sandbox waits for any of them.
//!
//! ```text
//!  lifecycle ── a step was taken ──▶ News ──▶ Log: events, dozed.events
//!                                     │
//!                     thread of ours  ├──▶ poll wake-ups, by whoever serves the tree
//!                                     └──▶ the announcer, a process ──▶ the mount ──▶ inotify
//! ```
//!
//! FUSE has no way for a daemon to tell inotify of a change. But a `utimensat` that comes
//! through the mount is one IN_MODIFY, and an `rmdir` one IN_DELETE. A thread of ours must
//! not make that call: killed in the middle of it, it would wait in the kernel for an
//! answer that only we can give, and so keep the mount from ending. Hence the announcer.

mod announcer;
mod bell;
mod event;
mod log;
mod news;

pub use announcer::{Announcer, Place, Program, Teller, announce};
pub use bell::Bell;
pub use event::{Event, VERSION, What};
pub use log::{Log, Reader, View, Viewer};
pub use news::{Ghost, News, Spot};
