//! Who has which address: one range for all sandboxes of a host, one address for each.
//!
//! Inside, every sandbox is the same: the guest has one address and one MAC, and its
//! gateway another of each, so that a snapshot restores in any namespace and is told
//! nothing. Its namespace translates that to the sandbox's own address, one to one.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer, de::Error as _};

use super::span::read_network;

/// The address of every guest, in the namespace of its sandbox.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The address of its gateway, which is also its resolver.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The length of the prefix that guest and gateway have in common.
pub const GUEST_PREFIX: u8 = 30;
/// The MAC of every guest. Locally administered, as are all of these.
pub const GUEST_MAC: Mac = Mac([0x02, 0xfc, 0, 0, 0, 5]);
/// The MAC of its gateway. It never changes, so what a guest remembers stays true.
pub const GATEWAY_MAC: Mac = Mac([0x02, 0xfc, 0, 0, 0, 6]);

/// Two addresses of a range are of no host, and one is the daemon's.
const RESERVED: u32 = 3;
/// A wider range would be most of a private network.
const PREFIX_MIN: u8 = 8;
/// A narrower range has room for a dozen sandboxes.
const PREFIX_MAX: u8 = 28;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The range of addresses that the sandboxes of one daemon have.
///
/// It also tells this daemon's links and rules from those of every other on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressPlan {
    range: Ipv4Net,
}

/// The address that one sandbox has on its host; its links have names by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxAddress(Ipv4Addr);

/// Why some text is no range for sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` cannot be the range of sandboxes: {why}; write one such as `10.213.0.0/16`")]
pub struct PlanError {
    text: String,
    why: String,
}

impl Default for AddressPlan {
    fn default() -> Self {
        let first = Ipv4Addr::new(10, 213, 0, 0);
        Self { range: Ipv4Net::new(first, 16).expect("a prefix has at most 32 bits") }
    }
}

impl FromStr for AddressPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let refused = |why: &str| PlanError { text: shown(text), why: why.to_owned() };
        let range =
            read_network(text).ok_or_else(|| refused("it is not an IPv4 address and a prefix"))?;
        if range.trunc() != range {
            return Err(refused("it has bits set after its prefix"));
        }
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&range.prefix_len()) {
            return Err(refused(&format!("its prefix is not from {PREFIX_MIN} to {PREFIX_MAX}")));
        }
        let homes = ["10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"];
        let is_private = homes
            .iter()
            .any(|home| home.parse::<Ipv4Net>().expect("these are networks").contains(&range));
        if !is_private {
            return Err(refused(&format!("it is in none of {}", homes.join(", "))));
        }
        Ok(Self { range })
    }
}

impl<'de> Deserialize<'de> for AddressPlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl AddressPlan {
    /// Returns the whole range.
    #[must_use]
    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// Returns the host's own address in the range, which is the only one that may open a
    /// connection to a sandbox.
    #[must_use]
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.range.network().to_bits() + 1)
    }

    /// Returns the number that the kernel groups all links of this range by.
    #[must_use]
    pub fn link_group(&self) -> u32 {
        self.range.network().to_bits()
    }

    /// Returns how many sandboxes have room.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        (u32::MAX >> self.range.prefix_len()) - (RESERVED - 1)
    }

    /// Returns the address of the sandbox that is number `slot`, counted from zero;
    /// `None` past the end of the range.
    #[must_use]
    pub fn address(&self, slot: u32) -> Option<SandboxAddress> {
        let bits = self.range.network().to_bits() + 2 + slot.min(self.capacity());
        (slot < self.capacity()).then_some(SandboxAddress(bits.into()))
    }

    /// Returns the number of the sandbox whose address this is.
    #[must_use]
    pub fn slot(&self, address: SandboxAddress) -> Option<u32> {
        address.0.to_bits().checked_sub(self.range.network().to_bits())?.checked_sub(2)
    }

    /// Returns `address` as that of a sandbox, if it can be one's.
    #[must_use]
    pub fn sandbox(&self, address: Ipv4Addr) -> Option<SandboxAddress> {
        self.address(self.slot(SandboxAddress(address))?)
    }
}

impl fmt::Display for AddressPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.range.fmt(f)
    }
}

impl SandboxAddress {
    /// Returns the address.
    #[must_use]
    pub fn ip(self) -> Ipv4Addr {
        self.0
    }

    /// Returns the name of the sandbox's link on the host, which is its address: at most
    /// 15 bytes, as `dz0ad50002`.
    #[must_use]
    pub fn host_link(self) -> String {
        format!("dz{:08x}", self.0.to_bits())
    }

    /// Returns the address whose link is called `name`.
    #[must_use]
    pub fn of_host_link(name: &str) -> Option<Ipv4Addr> {
        let digits = name.strip_prefix("dz").filter(|digits| digits.len() == 8)?;
        u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)
    }

    /// Returns the MAC of the host's end of the link.
    #[must_use]
    pub fn host_mac(self) -> Mac {
        self.mac(0xfe)
    }

    /// Returns the MAC of the namespace's end of the link.
    #[must_use]
    pub fn inner_mac(self) -> Mac {
        self.mac(0xfd)
    }

    fn mac(self, end: u8) -> Mac {
        let [a, b, c, d] = self.0.octets();
        Mac([0x02, end, a, b, c, d])
    }
}

impl fmt::Display for SandboxAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns the beginning of what somebody wrote, for a message of one line.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_slot_has_an_address_of_its_own_and_none_is_the_hosts() {
        let plan: AddressPlan = "192.168.7.0/28".parse().unwrap();
        assert_eq!(plan.capacity(), 13);
        let addresses: BTreeSet<_> =
            (0..plan.capacity()).map(|slot| plan.address(slot).unwrap()).collect();
        assert_eq!(addresses.len(), 13);
        assert_eq!(addresses.first().unwrap().to_string(), "192.168.7.2");
        assert_eq!(addresses.last().unwrap().to_string(), "192.168.7.14");
        assert_eq!(plan.host_address().to_string(), "192.168.7.1");
        assert_eq!(plan.address(13), None);
        assert_eq!(plan.address(u32::MAX), None);
        for address in addresses {
            assert_eq!(plan.sandbox(address.ip()), Some(address));
            assert_eq!(plan.slot(address).and_then(|slot| plan.address(slot)), Some(address));
        }
        for other in ["192.168.7.0", "192.168.7.1", "192.168.7.15", "192.168.8.2", "0.0.0.0"] {
            assert_eq!(plan.sandbox(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn the_names_and_macs_of_links_are_made_of_the_address() {
        let address = AddressPlan::default().address(3).unwrap();
        assert_eq!(address.to_string(), "10.213.0.5");
        assert_eq!(address.host_link(), "dz0ad50005");
        assert_eq!(SandboxAddress::of_host_link("dz0ad50005"), Some(address.ip()));
        assert_eq!(address.host_mac().to_string(), "02:fe:0a:d5:00:05");
        assert_eq!(address.inner_mac().to_string(), "02:fd:0a:d5:00:05");
        for other in ["dz", "dz0ad5000", "dz0ad500050", "dzzzzzzzzz", "eth0", "dz0ad5000é"] {
            assert_eq!(SandboxAddress::of_host_link(other), None, "{other}");
        }
    }

    #[test]
    fn a_range_that_is_not_private_or_not_a_range_is_refused_with_the_reason() {
        for (text, why) in [
            ("10.0.0.0", "not an IPv4 address and a prefix"),
            ("10.0.0.1/16", "bits set after its prefix"),
            ("010.0.0.0/8", "not an IPv4 address and a prefix"),
            ("0.0.0.0/0", "from 8 to 28"),
            ("10.0.0.0/29", "from 8 to 28"),
            ("8.8.0.0/16", "in none of 10.0.0.0/8"),
            ("172.0.0.0/8", "in none of"),
            ("fd00::/48", "not an IPv4 address"),
            ("\n", "`?` cannot be the range"),
        ] {
            let error = text.parse::<AddressPlan>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        for text in ["10.213.0.0/16", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"] {
            assert_eq!(text.parse::<AddressPlan>().unwrap().to_string(), text);
        }
    }
}
