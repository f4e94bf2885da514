//! nftables by netlink: a firewall as a value, and the requests that put it in force.
//!
//! `ruleset` has the value, `matcher` the conditions and actions that rules are made of,
//! `batch` the transaction, `expression` the kernel's form of a rule, `query` what the kernel
//! has. Nothing here knows of sandboxes: it uses the netlink sockets of `sys` and nothing
//! else of this program.

mod batch;
mod expression;
pub(crate) mod matcher;
mod message;
mod query;
mod ruleset;

pub(crate) use batch::{Mode, apply, remove};
pub(crate) use query::{contents, counters, generation, has_table, here, starts};
pub(crate) use ruleset::{
    At, Chain, Direction, Family, Fate, Field, Hook, Kind, Limit, Rule, Ruleset, Set, Table, rule,
};
#[cfg(test)]
pub(crate) use ruleset::{Load, Step};
