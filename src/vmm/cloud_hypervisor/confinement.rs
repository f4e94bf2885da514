//! What a Cloud Hypervisor may use of the host's files.
//!
//! It is started without any capability, so that it may use what its user may and no more.
//! And it shuts itself in by Landlock once it has its configuration: to the files that this
//! names, which it adds by itself, and to the directories here.

use super::{body::LandlockRule, told};
use crate::sys::landlock;

/// The version of Landlock that it asks for, and does not start without.
const LANDLOCK_NEEDED: u32 = 3;

/// Says whether this host lets it shut itself in.
pub(super) fn is_possible() -> bool {
    landlock::abi() >= LANDLOCK_NEEDED
}

/// Returns the directories that it may use: the sandbox's own, in which its snapshots and
/// writable disks are, and that of its sockets, where the snapshot is that it loads. Both
/// are there for as long as it lives, which it insists on. `None` where the host has no
/// Landlock.
pub(super) fn rules() -> Option<Vec<LandlockRule>> {
    is_possible().then(|| {
        vec![
            LandlockRule { path: told::path(told::HOME), access: "rw" },
            LandlockRule { path: told::path(told::RUNTIME), access: "r" },
        ]
    })
}
