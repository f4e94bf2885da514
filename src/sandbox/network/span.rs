//! Runs of IPv4 addresses: what is left of the one when the other is taken out.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// All addresses from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The lowest address.
    pub first: Ipv4Addr,
    /// The highest address, not below `first`.
    pub last: Ipv4Addr,
}

impl Span {
    /// Every address there is.
    pub const ALL: Self = Self { first: Ipv4Addr::UNSPECIFIED, last: Ipv4Addr::BROADCAST };

    /// Says whether `address` is in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address)
    }

    /// Says whether all of `other` is in it.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

impl From<Ipv4Net> for Span {
    fn from(net: Ipv4Net) -> Self {
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl From<Ipv4Addr> for Span {
    fn from(address: Ipv4Addr) -> Self {
        Self { first: address, last: address }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return self.first.fmt(f);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Returns the same addresses in as few spans as it takes, in order. The kernel wants
/// them so: it refuses two spans of one set that overlap.
#[must_use]
pub fn merged(spans: impl IntoIterator<Item = Span>) -> Vec<Span> {
    let mut spans: Vec<Span> = spans.into_iter().collect();
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::new();
    for span in spans {
        match merged.last_mut() {
            Some(before) if after(before.last).is_none_or(|next| span.first <= next) => {
                before.last = before.last.max(span.last);
            }
            Some(_) | None => merged.push(span),
        }
    }
    merged
}

/// Returns the addresses of `spans` that are not in `taken`, in order.
#[must_use]
pub fn without(
    spans: impl IntoIterator<Item = Span>,
    taken: impl IntoIterator<Item = Span>,
) -> Vec<Span> {
    let taken = merged(taken);
    let mut left = Vec::new();
    for span in merged(spans) {
        let mut first = Some(span.first);
        for hole in taken.iter().filter(|hole| hole.last >= span.first && hole.first <= span.last) {
            if let Some(start) = first
                && let Some(end) = before(hole.first)
                && start <= end
            {
                left.push(Span { first: start, last: end });
            }
            first = after(hole.last);
        }
        if let Some(start) = first
            && start <= span.last
        {
            left.push(Span { first: start, last: span.last });
        }
    }
    left
}

/// Reads a network as people write it: an IPv4 address, a slash and a length in decimal. Numbers
/// with zeros before them, which some programs take for octal, are none.
pub(super) fn read_network(text: &str) -> Option<Ipv4Net> {
    let (address, prefix) = text.split_once('/')?;
    let is_plain = prefix == "0" || !prefix.starts_with(['0', '+']);
    let prefix: u8 = prefix.parse().ok().filter(|_| is_plain)?;
    Ipv4Net::new(address.parse().ok()?, prefix).ok()
}

/// Returns the address after this one, if it is not the last.
#[must_use]
pub(crate) fn after(address: Ipv4Addr) -> Option<Ipv4Addr> {
    address.to_bits().checked_add(1).map(Ipv4Addr::from_bits)
}

fn before(address: Ipv4Addr) -> Option<Ipv4Addr> {
    address.to_bits().checked_sub(1).map(Ipv4Addr::from_bits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span() -> impl Strategy<Value = Span> {
        // Few addresses, at both ends and in the middle, so that spans touch and overlap.
        let address =
            prop_oneof![0_u32..8, 2_147_483_640_u32..2_147_483_648, 4_294_967_288_u32..=u32::MAX];
        (address.clone(), address).prop_map(|(one, other)| Span {
            first: one.min(other).into(),
            last: one.max(other).into(),
        })
    }

    fn probes() -> impl Iterator<Item = Ipv4Addr> {
        (0_u32..9)
            .chain(2_147_483_639..2_147_483_649)
            .chain(4_294_967_287..=u32::MAX)
            .map(Ipv4Addr::from)
    }

    proptest! {
        #[test]
        fn merging_keeps_the_addresses_and_leaves_gaps_between_the_spans(
            spans in prop::collection::vec(span(), 0..6),
        ) {
            let merged = merged(spans.clone());
            for probe in probes() {
                let was = spans.iter().any(|span| span.contains(probe));
                prop_assert_eq!(merged.iter().any(|span| span.contains(probe)), was, "{}", probe);
            }
            for pair in merged.windows(2) {
                prop_assert!(after(pair[0].last).unwrap() < pair[1].first);
            }
        }

        #[test]
        fn what_is_taken_out_is_out_and_all_else_stays(
            spans in prop::collection::vec(span(), 0..5),
            taken in prop::collection::vec(span(), 0..5),
        ) {
            let left = without(spans.clone(), taken.clone());
            for probe in probes() {
                let wanted = spans.iter().any(|span| span.contains(probe))
                    && !taken.iter().any(|span| span.contains(probe));
                prop_assert_eq!(left.iter().any(|span| span.contains(probe)), wanted, "{}", probe);
            }
        }
    }

    #[test]
    fn a_network_is_read_in_one_form_only() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32"] {
            assert_eq!(read_network(text).map(|net| net.to_string()).as_deref(), Some(text));
        }
        for text in
            ["010.0.0.0/8", "10.0.0.00/8", "10.0.0.0/08", "10.0.0.0/+8", "10.0.0.0/33", "10.0.0.0"]
        {
            assert_eq!(read_network(text), None, "{text}");
        }
    }

    #[test]
    fn a_span_is_shown_as_nft_shows_it() {
        let net: Ipv4Net = "10.0.0.0/8".parse().unwrap();
        assert_eq!(Span::from(net).to_string(), "10.0.0.0-10.255.255.255");
        assert_eq!(Span::from(Ipv4Addr::LOCALHOST).to_string(), "127.0.0.1");
    }
}
