//! What besides a write wakes a sandbox that sleeps.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    plan::shown,
    port::{Ports, Transport},
};

/// As many services as one guest has, and more. Each takes eight bytes of each sleeper.
const PORTS_MAX: usize = 16;

/// Whether packets wake a sandbox: the key `wake_on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WakeOn {
    /// They do not.
    #[default]
    None,
    /// A packet that opens something to one of its [`WakePorts`] does.
    Packet,
}

/// To which ports packets wake a sandbox: the key `wake_ports`.
///
/// Of TCP only the segment that opens a connection counts, so all ports may be meant at
/// once, and by default are. Of UDP every datagram counts, so ports have to be named.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WakePorts(Box<[Ports]>);

impl WakePorts {
    /// Makes a list of what people wrote.
    ///
    /// # Errors
    /// A sentence about the first entry that is none, or about the list.
    pub fn new<T: AsRef<str>>(entries: &[T]) -> Result<Self, String> {
        if entries.is_empty() {
            return Err("names no port; leave it out for every port of TCP".to_owned());
        }
        if entries.len() > PORTS_MAX {
            let count = entries.len();
            return Err(format!("has {count} entries, and at most {PORTS_MAX} are accepted"));
        }
        let ports = entries.iter().map(|entry| {
            let entry = entry.as_ref();
            let refused = |why: &str| format!("`{}` {why}", shown(entry));
            let ports: Ports = entry.parse().map_err(|why: String| refused(&why))?;
            if ports == Ports::all(Transport::Udp) {
                return Err(refused("names no port; write for example `udp/53`"));
            }
            Ok(ports)
        });
        ports.collect::<Result<_, _>>().map(Self)
    }

    /// Says whether a packet that opens something to this port wakes.
    #[must_use]
    pub fn contain(&self, transport: Transport, port: u16) -> bool {
        self.0.iter().any(|ports| ports.contains(transport, port))
    }
}

impl Default for WakePorts {
    fn default() -> Self {
        Self([Ports::all(Transport::Tcp)].into())
    }
}

impl fmt::Display for WakePorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, ports) in self.0.iter().enumerate() {
            write!(f, "{}{ports}", if at > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

impl Serialize for WakePorts {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_seq(self.0.iter().map(ToString::to_string))
    }
}

impl<'de> Deserialize<'de> for WakePorts {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let entries = Vec::<String>::deserialize(input)?;
        Self::new(&entries).map_err(|why| D::Error::custom(format!("`wake_ports` {why}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Document {
        #[serde(default)]
        wake_on: WakeOn,
        #[serde(default)]
        wake_ports: WakePorts,
    }

    #[test]
    fn nothing_wakes_by_default_and_every_connection_where_only_packets_are_named() {
        assert_eq!(toml::from_str::<Document>("").unwrap().wake_on, WakeOn::None);
        let document: Document = toml::from_str("wake_on = 'packet'").unwrap();
        assert_eq!(document.wake_on, WakeOn::Packet);
        assert!(document.wake_ports.contain(Transport::Tcp, 22));
        assert!(!document.wake_ports.contain(Transport::Udp, 53));
    }

    #[test]
    fn ports_are_a_list_that_reads_back() {
        let text = "wake_on = \"packet\"\nwake_ports = [\"tcp/22\", \"udp/53-54\", \"tcp\"]\n";
        let document: Document = toml::from_str(text).unwrap();
        assert!(document.wake_ports.contain(Transport::Udp, 54));
        assert!(!document.wake_ports.contain(Transport::Udp, 55));
        assert_eq!(document.wake_ports.to_string(), "tcp/22, udp/53-54, tcp");
        assert_eq!(toml::to_string(&document).unwrap(), text);
    }

    #[test]
    fn what_cannot_wake_is_refused_in_a_sentence() {
        let many = format!("wake_ports = [{}]", "'tcp/1', ".repeat(PORTS_MAX + 1));
        for (text, says) in [
            ("wake_on = 'ring'", "expected `none` or `packet`"),
            ("wake_ports = []", "`wake_ports` names no port; leave it out for every port of TCP"),
            ("wake_ports = ['udp']", "`udp` names no port; write for example `udp/53`"),
            ("wake_ports = ['udp/1-65535']", "`udp/1-65535` names no port"),
            ("wake_ports = ['tcp/1', '80']", "`wake_ports` `80` begins with neither tcp nor udp"),
            ("wake_ports = [22]", "expected a string"),
            (many.as_str(), "has 17 entries, and at most 16 are accepted"),
        ] {
            let error = toml::from_str::<Document>(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
