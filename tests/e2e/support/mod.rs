//! What the tests stand on: a daemon of their own, guests, and waiting for conditions.

mod beside;
mod console;
mod descriptors;
mod disk;
mod footprint;
mod guest;
mod host;
mod index;
mod process;
mod setup;
mod silent;
mod stalling;
mod wait;
mod watcher;
mod world;

pub(crate) use descriptors::{leave_descriptors, limit_descriptors};
pub(crate) use disk::{Disk, FileSystem, LoopDevice};
pub(crate) use guest::counter_kernel;
pub(crate) use host::{Host, write_once};
pub(crate) use index::LockedIndex;
pub(crate) use process::{command, example, is_alive, signal};
pub(crate) use setup::Setup;
pub(crate) use silent::{Silence, SilentMount};
pub(crate) use stalling::{StallingDisk, StallingFile};
pub(crate) use wait::{wait_for, wait_until};
pub(crate) use watcher::Watcher;
pub(crate) use world::{World, in_a_world};
