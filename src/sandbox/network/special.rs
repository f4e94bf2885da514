//! The one table of IPv4 addresses that are not the public internet.
//!
//! It feeds both the check of what people write and the firewall, so the two cannot
//! disagree. The firewall's list is a positive one: an address that nobody thought of
//! is refused only if it is in this table, so the table has whole registries.

use std::net::Ipv4Addr;

use super::span::{Span, merged, without};

/// Whether the file `allowed` may open a special range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// It is somebody's network, which an operator may want a sandbox to reach.
    MayBeAllowed,
    /// Nothing good comes of reaching it: it is the host itself, or what gives the host
    /// its credentials.
    Never,
}

/// A range with a meaning of its own.
struct Special {
    first: [u8; 4],
    prefix: u8,
    what: &'static str,
    opening: Opening,
}

const fn special(first: [u8; 4], prefix: u8, what: &'static str, opening: Opening) -> Special {
    Special { first, prefix, what, opening }
}

/// IANA's registry of special-purpose addresses (RFC 6890 and its updates), multicast, and
/// what clouds answer on inside a range or, in one case, on an address that looks public.
/// Where one range is within another the narrower one comes first.
const TABLE: [Special; 21] = {
    use Opening::{MayBeAllowed, Never};
    [
        special([100, 100, 100, 200], 32, "a cloud's metadata service", Never),
        special([192, 0, 0, 192], 32, "a cloud's metadata service", Never),
        special([168, 63, 129, 16], 32, "a cloud's host", Never),
        special([0, 0, 0, 0], 8, "this network", Never),
        special([10, 0, 0, 0], 8, "a private network", MayBeAllowed),
        special([100, 64, 0, 0], 10, "a carrier's shared network", MayBeAllowed),
        special([127, 0, 0, 0], 8, "loopback", Never),
        special([169, 254, 0, 0], 16, "link-local, with the metadata service", Never),
        special([172, 16, 0, 0], 12, "a private network", MayBeAllowed),
        special([192, 0, 0, 0], 24, "protocol assignments", MayBeAllowed),
        special([192, 0, 2, 0], 24, "documentation", MayBeAllowed),
        special([192, 31, 196, 0], 24, "AS112", MayBeAllowed),
        special([192, 52, 193, 0], 24, "multicast tunnels", MayBeAllowed),
        special([192, 88, 99, 0], 24, "6to4 relays", MayBeAllowed),
        special([192, 168, 0, 0], 16, "a private network", MayBeAllowed),
        special([192, 175, 48, 0], 24, "AS112", MayBeAllowed),
        special([198, 18, 0, 0], 15, "benchmarks", MayBeAllowed),
        special([198, 51, 100, 0], 24, "documentation", MayBeAllowed),
        special([203, 0, 113, 0], 24, "documentation", MayBeAllowed),
        special([224, 0, 0, 0], 4, "multicast", Never),
        special([240, 0, 0, 0], 4, "reserved, with broadcast", Never),
    ]
};

impl Special {
    fn span(&self) -> Span {
        let first = u32::from_be_bytes(self.first);
        let size_minus_one = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        Span { first: first.into(), last: (first | size_minus_one).into() }
    }
}

/// Returns what `address` is if it is not of the public internet.
#[must_use]
pub fn why_not_public(address: Ipv4Addr) -> Option<&'static str> {
    TABLE.iter().find(|special| special.span().contains(address)).map(|special| special.what)
}

/// Says whether `address` is of the public internet.
#[must_use]
pub fn is_public(address: Ipv4Addr) -> bool {
    why_not_public(address).is_none()
}

/// Returns the public internet, in order.
#[must_use]
pub fn public_spans() -> Vec<Span> {
    without([Span::ALL], TABLE.iter().map(Special::span))
}

/// Returns what no sandbox reaches whatever its policy says, in order.
#[must_use]
pub fn never_reachable() -> Vec<Span> {
    merged(TABLE.iter().filter(|special| special.opening == Opening::Never).map(Special::span))
}

/// Returns what all of `span` is if it is never reachable.
pub(super) fn why_never_reachable(span: Span) -> Option<&'static str> {
    let mut never = TABLE.iter().filter(|special| special.opening == Opening::Never);
    never.find(|special| special.span().covers(span)).map(|special| special.what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the addresses at which something may change, and those beside them.
    fn edges() -> Vec<Ipv4Addr> {
        let ends = TABLE.iter().flat_map(|special| [special.span().first, special.span().last]);
        ends.flat_map(|end| {
            let bits = end.to_bits();
            [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(Ipv4Addr::from_bits)
        })
        .collect()
    }

    fn in_list(address: Ipv4Addr) -> bool {
        public_spans().iter().any(|span| span.contains(address))
    }

    #[test]
    fn the_check_and_the_list_of_the_firewall_agree_at_every_edge() {
        for address in edges() {
            assert_eq!(is_public(address), in_list(address), "{address}");
        }
    }

    proptest! {
        #[test]
        fn the_check_and_the_list_of_the_firewall_agree(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            prop_assert_eq!(is_public(address), in_list(address), "{}", address);
        }

        #[test]
        fn what_the_standard_library_knows_to_be_special_is_in_the_table(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            let special = address.is_private()
                || address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_broadcast()
                || address.is_documentation()
                || address.is_unspecified();
            prop_assert!(!(special && is_public(address)), "{}", address);
        }
    }

    #[test]
    fn addresses_that_only_look_public_are_special() {
        for text in [
            "168.63.129.16",
            "100.100.100.200",
            "192.88.99.1",
            "192.0.0.9",
            "192.0.0.192",
            "224.0.0.251",
            "239.255.255.255",
            "255.255.255.255",
            "198.19.255.255",
            "0.1.2.3",
            "192.175.48.1",
            "100.127.255.255",
            "172.31.255.255",
            "169.254.169.254",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
        for text in ["1.1.1.1", "8.8.8.8", "168.63.129.15", "172.32.0.0", "100.128.0.0"] {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn a_narrow_range_comes_before_the_wide_one_that_it_is_in() {
        for (at, special) in TABLE.iter().enumerate() {
            assert_eq!(special.span().first.octets(), special.first, "{}", special.what);
            let hidden = TABLE[..at].iter().any(|before| before.span().covers(special.span()));
            assert!(!hidden, "{:?} is never found", special.first);
        }
    }
}
