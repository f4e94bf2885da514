//! `dozed` puts idle microVMs to sleep and wakes them again, through a filesystem.
//!
//! It mounts a directory in which each sandbox is a directory. `echo sleep > state`
//! snapshots the sandbox's VM to disk and frees all it used; `echo wake > state` brings
//! it back where it was. A reaper sleeps the idle ones and deletes the stale ones.
//! Every operation goes through `lifecycle`, under the sandbox's own lock.
//!
//! The rooms, in reading order. Each uses only those below it; `tests/tidy` checks.

pub mod activity;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod events;
pub mod fuse;
pub mod index;
pub mod lifecycle;
pub mod lock;
pub mod machines;
pub mod net;
pub mod reaper;
pub mod sandbox;
pub mod snapshot;
mod sync;
pub mod sys;
pub mod tree;
pub mod vmm;
