//! What a sandbox may reach: its nameservers, and the networks that are denied or allowed.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::{Serialize, Serializer};

use super::{
    plan::shown,
    span::{Span, merged, read_network, without},
    special::{never_reachable, why_never_reachable, why_not_public},
};

/// As many as a resolver asks (`MAXNS` of `resolv.conf(5)`).
const NAMESERVERS_MAX: usize = 3;
/// A thousand networks take the kernel some 7 ms to load. Longer lists are of names or of
/// countries, which is not what this is for.
const NETWORKS_MAX: usize = 1024;

/// How far the interface of a sandbox reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Nothing but what is allowed by name.
    Isolated,
    /// The public internet, but for what is denied.
    Internet,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// How far it reaches at all.
    pub reach: Reach,
    /// Who answers its questions for names. Where it is isolated, only those among them
    /// that are allowed.
    pub nameservers: Nameservers,
    /// What it never reaches, whatever is allowed.
    pub denied: Destinations,
    /// What it reaches although it is not of the public internet, or is isolated.
    pub allowed: Destinations,
}

impl NetworkPolicy {
    /// Says whether there is anything to reach beyond the host.
    #[must_use]
    pub fn needs_forwarding(&self) -> bool {
        self.reach == Reach::Internet || !self.allowed.0.is_empty()
    }
}

/// The nameservers of a sandbox: up to three public addresses, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Nameservers(Vec<Ipv4Addr>);

/// A list of networks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Destinations(Vec<Ipv4Net>);

/// Why some text is no list of nameservers or networks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A line is not what it has to be.
    #[error("line {line}: `{text}` {why}")]
    Line {
        /// The line, from 1.
        line: usize,
        /// The beginning of what it says.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// There are more than there may be.
    #[error("there are {count}, and at most {max} are accepted")]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
}

impl Nameservers {
    /// Returns the addresses in the order in which they were written.
    #[must_use]
    pub fn addresses(&self) -> &[Ipv4Addr] {
        &self.0
    }

    /// Reads one nameserver of each of `lines`; blanks around it and empty lines do not count.
    ///
    /// # Errors
    /// For the first line that is none.
    pub fn read<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Self, PolicyError> {
        let addresses: Vec<_> = entries(lines, |entry| {
            let address: Ipv4Addr =
                entry.parse().map_err(|_| no_ipv4(entry, "a nameserver", "`9.9.9.9`"))?;
            match why_not_public(address) {
                None => Ok(address),
                Some(what) => {
                    Err(format!("is not a public address ({what}); a nameserver must be public"))
                }
            }
        })?;
        let mut once: Vec<Ipv4Addr> = Vec::new();
        for address in addresses {
            if !once.contains(&address) {
                once.push(address);
            }
        }
        within(once, NAMESERVERS_MAX).map(Self)
    }
}

impl FromStr for Nameservers {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        Self::read(text.lines())
    }
}

impl Serialize for Nameservers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(&self.0)
    }
}

impl fmt::Display for Nameservers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|address| writeln!(f, "{address}"))
    }
}

impl Destinations {
    /// Reads the networks that a sandbox is never to reach.
    ///
    /// # Errors
    /// For the first line that is no network.
    pub fn denied<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Self, PolicyError> {
        let networks = entries(lines, network)?;
        within(networks, NETWORKS_MAX).map(Self)
    }

    /// Reads the networks that a sandbox is to reach although they are not public.
    ///
    /// # Errors
    /// For the first line that is no network, or is one that nothing may reach.
    pub fn allowed<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Self, PolicyError> {
        let networks = entries(lines, |entry| {
            let network = network(entry)?;
            match why_never_reachable(network.into()) {
                None => Ok(network),
                Some(what) => Err(format!("cannot be allowed: it is {what}")),
            }
        })?;
        within(networks, NETWORKS_MAX).map(Self)
    }

    /// Returns the networks in the order in which they were written.
    #[must_use]
    pub fn networks(&self) -> &[Ipv4Net] {
        &self.0
    }

    /// Returns the first of these networks that is not of `before` and has nothing in it but
    /// what the firewall never lets through: addresses of the `protected` and special ones.
    #[must_use]
    pub fn in_vain(&self, before: &Self, protected: &[Span]) -> Option<Ipv4Net> {
        let never = || never_reachable().into_iter().chain(protected.iter().copied());
        let is_new = |network: &&Ipv4Net| !before.0.contains(network);
        let mut new = self.0.iter().filter(is_new);
        new.find(|network| without([Span::from(**network)], never()).is_empty()).copied()
    }

    /// Returns all that is in them, in order.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        merged(self.0.iter().map(|network| Span::from(*network)))
    }
}

impl fmt::Display for Destinations {
    /// One a line; a network of one address is written as the address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|network| writeln!(f, "{}", written(network)))
    }
}

impl Serialize for Destinations {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(written))
    }
}

fn written(network: &Ipv4Net) -> String {
    match network.prefix_len() {
        32 => network.addr().to_string(),
        _ => network.to_string(),
    }
}

/// Reads one entry a line; blanks around it and empty lines do not count.
fn entries<'a, T>(
    lines: impl Iterator<Item = &'a str>,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, PolicyError> {
    let lines = lines.enumerate().map(|(at, line)| (at + 1, line.trim()));
    lines
        .filter(|(_, entry)| !entry.is_empty())
        .map(|(line, entry)| {
            read(entry).map_err(|why| PolicyError::Line { line, text: shown(entry), why })
        })
        .collect()
}

fn network(entry: &str) -> Result<Ipv4Net, String> {
    let network = match entry.parse::<Ipv4Addr>() {
        Ok(address) => Ipv4Net::from(address),
        Err(_) => {
            read_network(entry).ok_or_else(|| no_ipv4(entry, "a network", "`192.0.2.0/24`"))?
        }
    };
    if network.trunc() == network {
        return Ok(network);
    }
    Err(format!("has bits set after its prefix; write `{}`", network.trunc()))
}

fn no_ipv4(entry: &str, wanted: &str, such_as: &str) -> String {
    if entry.contains(':') {
        return "is IPv6, which sandboxes do not have".to_owned();
    }
    let numbers = entry.split(['.', '/']);
    if numbers.into_iter().any(|number| number.len() > 1 && number.starts_with('0')) {
        return format!("has a number that begins with 0; write {wanted} as {such_as}");
    }
    format!("is not {wanted}; write an IPv4 address, as {such_as}")
}

fn within<T>(list: Vec<T>, max: usize) -> Result<Vec<T>, PolicyError> {
    if list.len() > max {
        return Err(PolicyError::TooMany { count: list.len(), max });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sandbox::network::is_public;

    #[test]
    fn lists_read_back_as_they_were_written_without_what_does_not_count() {
        let nameservers: Nameservers = "\n 9.9.9.9 \n1.1.1.1\n9.9.9.9\n".parse().unwrap();
        assert_eq!(nameservers.to_string(), "9.9.9.9\n1.1.1.1\n");
        assert_eq!("".parse::<Nameservers>().unwrap().addresses(), &[] as &[Ipv4Addr]);
        let denied = Destinations::denied("0.0.0.0/0\n93.184.216.34\n10.0.0.0/8".lines()).unwrap();
        assert_eq!(denied.to_string(), "0.0.0.0/0\n93.184.216.34\n10.0.0.0/8\n");
        assert_eq!(denied.spans(), [Span::ALL]);
    }

    #[test]
    fn a_bad_line_is_named_with_what_is_wrong_with_it() {
        let nameservers = |text: &str| text.parse::<Nameservers>().map(drop);
        let denied = |text: &str| Destinations::denied(text.lines()).map(drop);
        let allowed = |text: &str| Destinations::allowed(text.lines()).map(drop);
        for (result, says) in [
            (nameservers("9.9.9.9\n\n127.0.0.53"), "line 3: `127.0.0.53` is not a public address"),
            (nameservers("168.63.129.16"), "(a cloud's host)"),
            (nameservers("dns.example"), "line 1: `dns.example` is not a nameserver; write"),
            (nameservers("2606:4700::1111"), "is IPv6, which sandboxes do not have"),
            (nameservers("9.9.9.9/32"), "is not a nameserver"),
            (nameservers("1.0.0.1\n1.0.0.2\n1.0.0.3\n1.0.0.4"), "there are 4, and at most 3"),
            (denied("10.0.0.1/8"), "write `10.0.0.0/8`"),
            (denied("10.0.0.0/33"), "is not a network"),
            (denied("010.0.0.0/8"), "line 1: `010.0.0.0/8` has a number that begins with 0; write"),
            (allowed("10.0.0.0/08"), "has a number that begins with 0"),
            (denied("010.0.0.1"), "has a number that begins with 0"),
            (denied("::/0"), "is IPv6"),
            (allowed("169.254.169.254"), "cannot be allowed: it is link-local, with the"),
            (allowed("10.0.0.0/8\n127.0.0.0/8"), "line 2: `127.0.0.0/8` cannot be allowed"),
            (allowed("100.100.100.200"), "metadata"),
            (allowed(&"10.0.0.0/8\n".repeat(1025)), "there are 1025, and at most 1024"),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        }
    }

    #[test]
    fn an_operator_may_allow_a_private_network() {
        assert_eq!(
            Destinations::allowed("10.1.0.0/16\n0.0.0.0/0".lines()).unwrap().networks().len(),
            2
        );
    }

    #[test]
    fn a_network_of_which_nothing_can_be_reached_is_allowed_in_vain() {
        let list = |text: &str| Destinations::allowed(text.lines()).unwrap();
        let protected = ["10.213.0.0/16", "192.168.1.5/32", "192.168.1.4/32"]
            .map(|text| Span::from(text.parse::<Ipv4Net>().unwrap()));
        let none = Destinations::default();
        let in_vain =
            |text: &str| list(text).in_vain(&none, &protected).map(|network| network.to_string());
        assert_eq!(in_vain("10.0.0.0/8\n192.168.1.0/24\n0.0.0.0/0"), None);
        assert_eq!(in_vain("10.1.0.0/16\n10.213.7.0/24").as_deref(), Some("10.213.7.0/24"));
        assert_eq!(in_vain("192.168.1.4/31").as_deref(), Some("192.168.1.4/31"));
        let before = list("10.213.7.0/24");
        assert_eq!(list("10.1.0.0/16\n10.213.7.0/24").in_vain(&before, &protected), None);
    }

    proptest! {
        #[test]
        fn every_public_address_and_no_other_is_accepted_as_a_nameserver(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            let accepted = address.to_string().parse::<Nameservers>().is_ok();
            prop_assert_eq!(accepted, is_public(address), "{}", address);
        }

        #[test]
        fn whatever_is_written_is_refused_in_one_line_or_reads_back(
            text in "\\PC{0,40}|[0-9./\\n]{0,40}",
        ) {
            match Destinations::denied(text.lines()) {
                Ok(list) => {
                    prop_assert_eq!(Destinations::denied(list.to_string().lines()), Ok(list));
                }
                Err(error) => prop_assert!(!error.to_string().contains('\n')),
            }
        }
    }
}
