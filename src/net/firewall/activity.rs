//! Which of the packets that pass are a sign that somebody uses the sandbox. Pure.
//!
//! Everything that passes is counted; activity is what is neither to or from somebody who
//! is ignored, nor on a port that is, nor a TCP segment that says nothing, such as those
//! by which a connection that nobody uses is kept open. Whoever says something on a
//! connection is counted for it, so no use of it is missed by that.

use super::{
    ACTIVE_IN, ACTIVE_OUT, GUEST_IN, GUEST_OUT, HOST_IN, HOST_OUT, PASS_HOST_IN, PASS_HOST_OUT,
    PASS_IN, PASS_OUT,
};
use crate::{
    net::nft::{
        Chain, Rule,
        matcher::{End, accept, count, end_in, port_in, says_nothing, tcp_after_bare_header},
        rule,
    },
    sandbox::network::Ignored,
};

/// The set of addresses whose packets are not activity.
pub(super) const IGNORED: &str = "ignore4";

/// Returns the chains in which packets that pass end, for each of the four that there are.
pub(super) fn chains(ignored: &Ignored) -> [Chain; 4] {
    use End::{Destination, Source};
    [
        // Which end is the other one, and at which end is the port that was opened.
        passes(PASS_OUT, [GUEST_OUT, ACTIVE_OUT], (Destination, Destination), ignored),
        passes(PASS_IN, [GUEST_IN, ACTIVE_OUT], (Source, Source), ignored),
        passes(PASS_HOST_IN, [HOST_IN, ACTIVE_IN], (Source, Destination), ignored),
        passes(PASS_HOST_OUT, [HOST_OUT, ACTIVE_IN], (Destination, Source), ignored),
    ]
}

fn passes(
    name: &'static str,
    [all, active]: [&'static str; 2],
    (other, opened): (End, End),
    ignored: &Ignored,
) -> Chain {
    let mut rules: Vec<Rule> = vec![rule([count(all)])];
    rules.extend(says_nothing().map(|nothing| rule([tcp_after_bare_header(), nothing, accept()])));
    if !ignored.spans().is_empty() {
        rules.push(rule([end_in(other, IGNORED), accept()]));
    }
    for ports in ignored.ports() {
        rules.push(rule([port_in(opened, ports.transport, &ports.range), accept()]));
    }
    rules.push(rule([count(active), accept()]));
    Chain { name, hook: None, rules }
}
