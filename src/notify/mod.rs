//! Who is told when something has changed.
//!
//! So far that is the reaper, by a bell that wakes it before its next tick.

mod bell;

pub use bell::Bell;
