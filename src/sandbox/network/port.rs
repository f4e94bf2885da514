//! Ports of TCP and UDP, as people write them: `tcp/22`, `udp/5000-5010`, `tcp`.

use std::{fmt, ops::RangeInclusive, str::FromStr};

/// What has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Ports of one transport, from one to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Whose ports they are.
    pub transport: Transport,
    /// The lowest and the highest, both included. No port is zero.
    pub range: RangeInclusive<u16>,
}

impl Ports {
    /// All ports of a transport.
    #[must_use]
    pub const fn all(transport: Transport) -> Self {
        Self { transport, range: 1..=u16::MAX }
    }

    /// Says whether `port` of `transport` is one of them.
    #[must_use]
    pub fn contains(&self, transport: Transport, port: u16) -> bool {
        self.transport == transport && self.range.contains(&port)
    }

    fn is_all(&self) -> bool {
        *self == Self::all(self.transport)
    }
}

impl FromStr for Ports {
    type Err = String;

    /// # Errors
    /// What is wrong with it, as the end of a sentence that begins with it.
    fn from_str(text: &str) -> Result<Self, String> {
        let such_as = "write for example `tcp/22` or `udp/5000-5010`";
        let (name, range) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let transport = match name {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return Err(format!("begins with neither tcp nor udp; {such_as}")),
        };
        let Some(range) = range else { return Ok(Self::all(transport)) };
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let port = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = if digits { text.parse::<u16>().ok() } else { None };
            number
                .filter(|port| *port > 0)
                .ok_or_else(|| format!("has no port from 1 to 65535; {such_as}"))
        };
        let range = port(first)?..=port(last)?;
        if range.is_empty() {
            return Err(format!("ends before it begins; {such_as}"));
        }
        Ok(Self { transport, range })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.range.start(), self.range.end());
        match self.transport {
            transport if self.is_all() => transport.fmt(f),
            transport if first == last => write!(f, "{transport}/{first}"),
            transport => write!(f, "{transport}/{first}-{last}"),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ports_are_read_as_people_write_them() {
        let ports: Ports = "tcp/22".parse().unwrap();
        assert!(ports.contains(Transport::Tcp, 22));
        assert!(!ports.contains(Transport::Udp, 22) && !ports.contains(Transport::Tcp, 23));
        let ports: Ports = "udp/5000-5010".parse().unwrap();
        assert!(ports.contains(Transport::Udp, 5000) && ports.contains(Transport::Udp, 5010));
        assert!(!ports.contains(Transport::Udp, 4999) && !ports.contains(Transport::Udp, 5011));
        let ports: Ports = "tcp".parse().unwrap();
        assert!(ports.contains(Transport::Tcp, 1) && ports.contains(Transport::Tcp, 65_535));
    }

    #[test]
    fn what_is_no_port_is_refused_with_what_to_write() {
        for (text, says) in [
            ("", "begins with neither tcp nor udp; write for example `tcp/22`"),
            ("22", "begins with neither tcp nor udp"),
            ("TCP/22", "begins with neither tcp nor udp"),
            ("icmp", "begins with neither tcp nor udp"),
            ("tcp/", "has no port from 1 to 65535"),
            ("tcp/0", "has no port"),
            ("tcp/+22", "has no port"),
            ("tcp/65536", "has no port"),
            ("udp/1-", "has no port"),
            ("udp/1-2-3", "has no port"),
            ("udp/9-1", "ends before it begins"),
        ] {
            let error = text.parse::<Ports>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn ports_read_back_as_they_are_written(udp: bool, one in 1_u16.., other in 1_u16..) {
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            let ports = Ports { transport, range: one.min(other)..=one.max(other) };
            prop_assert_eq!(ports.to_string().parse(), Ok(ports));
        }
    }
}
