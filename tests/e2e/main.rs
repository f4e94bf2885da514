//! The real daemon with real guests: each promise of the contract, shown from outside.
//!
//! Every test has a daemon of its own, on a store and a mount of its own, so that they
//! run beside one another. When a test is over, whatever it was about, `support::Host`
//! checks that nothing is left of its sandboxes: no process, mount, file, descriptor or
//! thread. Needs root, FUSE and QEMU.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod activity;
mod bad_disk;
mod block_device;
mod contract;
mod copy;
mod cost;
mod crash;
mod damage;
mod deletion;
mod document;
mod hold;
mod index;
mod linux;
mod looking;
mod loss;
mod mixed;
mod mounts;
mod network;
mod opening;
mod poll;
mod reaper;
mod recipes;
mod road;
mod room;
mod space;
mod stalled;
mod stuck;
mod support;
mod torn_log;
mod unit;
mod watch;
