//! A sandbox's place in the network and what it may reach there, as values.
//!
//! Which addresses are special is written once, in `special.rs`: what people write is
//! checked against it here, and the firewall's list of public addresses is made of it.

mod ignored;
mod plan;
mod policy;
mod port;
mod span;
mod special;
mod wake_on;

pub use ignored::Ignored;
pub use plan::{
    AddressPlan, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX, Mac,
    PlanError, SandboxAddress,
};
pub use policy::{Destinations, Nameservers, NetworkPolicy, PolicyError, Reach};
pub use port::{Ports, Transport};
pub use span::{Span, merged, without};
pub use special::{is_public, never_reachable, public_spans, why_not_public};
pub use wake_on::{WakeOn, WakePorts};
