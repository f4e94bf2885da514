//! What a sandbox is: its name, states, hardware, policy and record.
//!
//! Everything here is pure: no I/O, no clock, no locks. The rules that other rooms
//! must agree on (which step leads where, what a valid id is, what `5m` means, when
//! a sandbox counts as idle) are each written once, here.

mod activity;
mod cause;
mod id;
pub mod network;
mod period;
mod phase;
mod record;
mod spec;
mod state;
pub mod text;
mod time;
mod users;
mod waking;

pub use activity::{Activity, ActivityKeys, AwakeMin, Signal, SignalSet};
pub use cause::{Actor, Cause};
pub use id::{IdError, SandboxId};
pub use period::{Period, PeriodError};
pub use phase::{Mismatched, Phase, ProcessIdentity, Refused, SnapshotFacts, Step};
pub use record::{Owner, Record, RowId, Writer};
pub use spec::{
    Disk, FileCheck, FileRole, MemoryMode, NetMode, RestoreMode, Spec, SpecDocument, SpecError,
    VmmChoice,
};
pub(crate) use spec::{line_of, memory_from_text};
pub use state::State;
pub use time::Timestamp;
pub use users::{Users, UsersError};
pub use waking::{Waking, day_of};
