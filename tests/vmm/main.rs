//! The drivers of VMMs from outside: one contract for all of them, and what comes of it
//! when a VMM fails.
//!
//! A driver is held against the real program where the machine has it, with a guest that
//! counts. That of Cloud Hypervisor is also held against a stand-in of ours for the
//! program, always, as that can be told to fail; and the stand-in against what the real
//! one was measured to do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod answers;
mod api;
mod contract;
mod daemon;
#[path = "../e2e/support/descriptors.rs"]
mod descriptors;
mod files;
mod matrix;
mod memory_file;
mod network;
mod nic;
mod old_kernel;
mod on_demand;
mod restart;
mod scarce;
mod silence;
mod support;
mod typing;
mod users;
mod vsock;
