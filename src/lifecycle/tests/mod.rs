//! Model tests of the operations.

use std::time::Duration;

use super::{
    CrashPoint, Error, Fault as Comes, Outcome, Policy, Signal, Wait, Why,
    testing::{Host, PATIENCE, Pages, actor, content, crash, name, sector, start, wait_for},
};
use crate::{
    sandbox::{Disk, MemoryMode, Owner, Spec, State},
    snapshot::MEMORY,
    vmm::fake::{Call, Fault},
};

mod balloon;
mod called;
mod copied;
mod crashes;
mod deletion;
mod disks;
mod evidence;
mod failures;
mod files;
mod mixed;
mod network;
mod roads;
mod unsettled;
mod vsock;
