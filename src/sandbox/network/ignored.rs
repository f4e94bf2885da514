//! Which packets are no sign that anybody uses a sandbox.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer, de::Error as _};

use super::{
    plan::shown,
    port::Ports,
    span::{Span, merged, read_network},
};

/// As many as anybody writes by hand. Each port is two rules more for each packet.
const ENTRIES_MAX: usize = 32;

/// Packets that pass and are not activity, by who is at the other end of their connection,
/// or by the port that it was opened to: the key `ignore` of `[network]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ignored {
    networks: Vec<Ipv4Net>,
    ports: Vec<Ports>,
}

impl Ignored {
    /// Makes a list of what people wrote: addresses, networks and ports.
    ///
    /// # Errors
    /// A sentence about the first entry that is none of these, or about the list.
    pub fn new<T: AsRef<str>>(entries: &[T]) -> Result<Self, String> {
        if entries.len() > ENTRIES_MAX {
            let count = entries.len();
            return Err(format!("has {count} entries, and at most {ENTRIES_MAX} are accepted"));
        }
        let mut ignored = Self::default();
        for entry in entries.iter().map(AsRef::as_ref) {
            let refused = |why: &str| Err(format!("`{}` {why}", shown(entry)));
            let address = entry.parse::<Ipv4Addr>().map(Ipv4Net::from);
            if let Some(network) = address.ok().or_else(|| read_network(entry)) {
                if network.trunc() != network {
                    return refused(&format!(
                        "has bits set after its prefix; write `{}`",
                        network.trunc()
                    ));
                }
                ignored.networks.push(network);
            } else if entry.starts_with("tcp") || entry.starts_with("udp") {
                match entry.parse::<Ports>() {
                    Ok(ports) => ignored.ports.push(ports),
                    Err(why) => return refused(&why),
                }
            } else {
                return refused(
                    "is not an address, a network or a port; write for example `10.0.0.9` or \
                     `tcp/9100`",
                );
            }
        }
        Ok(ignored)
    }

    /// Returns the addresses, in order.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        merged(self.networks.iter().map(|network| Span::from(*network)))
    }

    /// Returns the ports, in the order in which they were written.
    #[must_use]
    pub fn ports(&self) -> &[Ports] {
        &self.ports
    }
}

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let entries = Vec::<String>::deserialize(input)?;
        Self::new(&entries).map_err(|why| D::Error::custom(format!("`ignore` {why}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Document {
        ignore: Ignored,
    }

    #[test]
    fn addresses_networks_and_ports_are_ignored() {
        let text = "ignore = ['10.213.0.1', 'udp/161', '192.0.2.0/24', 'tcp/9100-9101']";
        let ignored = toml::from_str::<Document>(text).unwrap().ignore;
        let spans: Vec<_> = ignored.spans().iter().map(ToString::to_string).collect();
        assert_eq!(spans, ["10.213.0.1", "192.0.2.0-192.0.2.255"]);
        let ports: Vec<_> = ignored.ports().iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["udp/161", "tcp/9100-9101"]);
        assert_eq!(toml::from_str::<Document>("ignore = []").unwrap().ignore, Ignored::default());
    }

    #[test]
    fn what_is_neither_is_refused_in_a_sentence() {
        let many = format!("ignore = [{}]", "'tcp/1', ".repeat(ENTRIES_MAX + 1));
        for (text, says) in [
            (
                "ignore = ['keepalive']",
                "`ignore` `keepalive` is not an address, a network or a port;",
            ),
            ("ignore = ['10.0.0.1/8']", "`10.0.0.1/8` has bits set after its prefix; write `10."),
            ("ignore = ['tcp/0']", "`tcp/0` has no port from 1 to 65535"),
            ("ignore = ['010.0.0.0/8']", "is not an address"),
            ("ignore = ['::1']", "is not an address"),
            (many.as_str(), "has 33 entries, and at most 32"),
        ] {
            let error = toml::from_str::<Document>(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
