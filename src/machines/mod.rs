//! The VMMs that are alive, and what limits them.
//!
//! This room knows processes and VMMs. It never takes a sandbox's lock, never changes a record,
//! and does not know what a sleep or a wake is: `lifecycle` calls it step by step.
//!
//! ```text
//!  Vmms       which driver runs a sandbox      Admission  who may start: slots, memory budget
//!  Table      the VMMs that are alive          Exits      reports those that ended
//!  balloon    memory that a guest can spare    ConsoleLog what a guest printed
//! ```

mod admission;
pub(crate) mod balloon;
mod console;
mod error;
mod exits;
mod table;
mod traffic;
mod vmms;

pub(crate) use admission::{Admission, Slot};
pub use console::{ConsoleExtent, ConsoleLog};
pub use error::Error;
pub(crate) use exits::{Ended, end};
pub(crate) use table::{Live, Table, remove_sockets};
pub(crate) use vmms::Vmms;
