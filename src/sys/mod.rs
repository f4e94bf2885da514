//! Everything that talks to the kernel: processes, files, clocks, mounts.
//!
//! Every unsafe block and every raw system call of the project is in here.

pub mod bounded;
pub mod cancel;
pub mod clock;
pub mod command;
pub mod device_access;
pub mod files;
pub mod fuse_mount;
pub mod growth;
pub mod host;
pub mod idmap;
pub mod kvm;
pub mod landlock;
pub mod mount;
pub mod mount_client;
pub mod netlink;
pub mod netns;
pub mod netns_lock;
pub mod opener;
pub mod pool;
pub mod process;
pub mod runtime;
pub mod socket;
pub mod task;
pub mod thread;
pub mod tsc;
pub mod tun;
pub mod userfaultfd;
