//! The networks of sandboxes from outside, each test in a host of its own: a network
//! namespace with an uplink to a small internet, in which servers count what reaches them.
//! The guest is this program: it writes raw frames to the tap, and reads what comes.
//!
//! They need root, `/dev/net/tun` and nf_tables, and fail where these are missing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod activity;
mod addresses;
mod change;
mod destination;
mod firewalls;
mod guest;
mod host;
mod inbound;
mod leak;
mod life;
mod spoof;
mod survey;
mod upkeep;
mod wake_on_packet;
