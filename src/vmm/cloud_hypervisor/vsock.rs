//! The socket by which the host reaches a guest.
//!
//! Cloud Hypervisor makes it where its configuration says, at a boot and at a restore: in
//! a directory that is there, and in which there is no such file yet. A restore finds out
//! only after it has read all of the memory, so both are seen to before.
//!
//! The directory is the VMM's to write to, so that whatever is in it may be meant ill.

use std::path::PathBuf;

use super::told;
use crate::{
    sandbox::Owner,
    sys::files::{give_dir, give_socket, let_through, make_private_dir, remove_tree},
    vmm::{Error, Plan, PlannedVsock, peer::host},
};

/// The guest's address. Each guest is behind a socket of its own, so it is the same for all:
/// the first that has no special meaning.
pub(super) const CID: u32 = 3;

/// Returns what the VMM is told of its socket.
pub(super) fn told_path() -> PathBuf {
    told::path(told::RUNTIME).join(PlannedVsock::DIR).join(PlannedVsock::NAME)
}

/// Makes the directory of the socket anew, without what an earlier VMM left in it, for the
/// VMM's user `uid` to write to.
pub(super) fn prepare(plan: &Plan, uid: u32) -> Result<(), Error> {
    let Some(vsock) = &plan.vsock else { return Ok(()) };
    let dir = vsock.dir();
    remove_tree(dir)
        .and_then(|()| make_private_dir(dir))
        .and_then(|()| give_dir(dir, uid))
        .and_then(|()| let_through(dir))
        // What else is in there is for us alone, each by itself.
        .and_then(|()| let_through(&plan.runtime_dir))
        .map_err(host(format!("making {}", dir.display())))
}

/// Gives the socket, which only the VMM's user can connect to at first, to the sandbox's
/// owner. It may be of `before` already.
pub(super) fn give(vsock: &PlannedVsock, before: Option<Owner>) -> Result<(), Error> {
    let Owner { uid, gid } = vsock.owner;
    give_socket(vsock.dir(), PlannedVsock::NAME, before.map(|owner| owner.uid), (uid, gid))
        .map_err(host(format!("giving {} to its owner", vsock.socket().display())))
}
