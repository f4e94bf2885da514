//! The host's own addresses, which no guest reaches, as they change while guests run. Pure:
//! the time is given.
//!
//! An address that the host gets is protected at once. One that it loses is let go at once,
//! too, unless the set was narrowed or made exact a moment ago: then it stays for a while. So
//! the rules of all guests are not replaced each time that an address comes and goes.

use std::{net::Ipv4Addr, time::Duration};

use crate::{sync::Arc, sys::netns::Identity};

/// For so long an address stays protected that the host had and lost, after the last time
/// that the set was exact. Longer than a DHCP client takes to move to another address.
const NARROW_AFTER: Duration = Duration::from_secs(5);

/// The addresses that are protected.
#[derive(Debug, Default)]
pub(super) struct Protected {
    addresses: Arc<[Ipv4Addr]>,
    /// When it was last changed to what the host had at that time.
    exact_at: Option<Duration>,
    changed_at: Option<Duration>,
    /// Whether the host has lost some of them.
    is_wide: bool,
}

impl Protected {
    /// Takes note of the addresses that the host has at `now`, which are sorted, and returns
    /// those that are to be protected.
    pub(super) fn observe(&mut self, now: Duration, host: &[Ipv4Addr]) -> Arc<[Ipv4Addr]> {
        let may_narrow =
            self.exact_at.is_none_or(|exact| now.saturating_sub(exact) >= NARROW_AFTER);
        let is_lost = |address: &Ipv4Addr| host.binary_search(address).is_err();
        self.is_wide = !may_narrow && self.addresses.iter().any(is_lost);
        let mut wanted = host.to_vec();
        if self.is_wide {
            wanted.extend(self.addresses.iter().copied());
            wanted.sort_unstable();
            wanted.dedup();
        }
        if *self.addresses != *wanted {
            self.addresses = wanted.into();
            self.changed_at = Some(now);
            if !self.is_wide {
                self.exact_at = Some(now);
            }
        }
        Arc::clone(&self.addresses)
    }

    /// Returns in how long addresses may be let go that the host has lost, if it has.
    pub(super) fn narrows_in(&self, now: Duration) -> Option<Duration> {
        let exact = self.exact_at.filter(|_| self.is_wide)?;
        Some((exact + NARROW_AFTER).saturating_sub(now))
    }

    /// Returns how long ago it last changed.
    pub(super) fn unchanged_for(&self, now: Duration) -> Option<Duration> {
        self.changed_at.map(|changed| now.saturating_sub(changed))
    }
}

/// What is known of the firewall of a sandbox.
#[derive(Debug, Clone)]
pub(super) struct InForce {
    /// The namespace and the number of its firewall, if that is known to be as it is to be.
    pub(super) generation: Option<(Identity, u32)>,
    /// The host's addresses that it protects, or is about to.
    pub(super) protected: Arc<[Ipv4Addr]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const C: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

    /// Runs through what the host has second by second, and returns what is protected.
    fn at_each_second(host: &[&[Ipv4Addr]]) -> Vec<Vec<Ipv4Addr>> {
        let mut protected = Protected::default();
        let seconds = (100..).map(Duration::from_secs);
        host.iter().zip(seconds).map(|(host, now)| protected.observe(now, host).to_vec()).collect()
    }

    #[test]
    fn what_the_host_gets_is_protected_at_once() {
        assert_eq!(
            at_each_second(&[&[A], &[A, B], &[A, B, C]]),
            [vec![A], vec![A, B], vec![A, B, C]]
        );
        assert_eq!(at_each_second(&[&[A], &[B], &[C]]), [vec![A], vec![A, B], vec![A, B, C]]);
    }

    #[test]
    fn what_the_host_loses_is_let_go_at_once_unless_the_set_has_just_changed() {
        let long_ago: [&[Ipv4Addr]; 7] = [&[A, B], &[A, B], &[A, B], &[A, B], &[A, B], &[A], &[A]];
        assert_eq!(at_each_second(&long_ago)[4..], [vec![A, B], vec![A], vec![A]]);
        let just_now: [&[Ipv4Addr]; 7] = [&[A, B], &[A], &[A], &[A], &[A], &[A], &[A]];
        let protected = at_each_second(&just_now);
        assert_eq!(protected[..5], vec![vec![A, B]; 5]);
        assert_eq!(protected[5..], vec![vec![A]; 2]);
    }

    #[test]
    fn an_address_that_comes_and_goes_changes_the_set_twice_in_each_while() {
        let mut protected = Protected::default();
        let mut changes = 0;
        let mut before = protected.observe(Duration::ZERO, &[A]);
        for tenth in 1..1000_u64 {
            let now = Duration::from_millis(100 * tenth);
            let host: &[Ipv4Addr] = if tenth % 2 == 0 { &[A] } else { &[A, B] };
            let after = protected.observe(now, host);
            assert!(host.iter().all(|address| after.contains(address)));
            changes += u32::from(before != after);
            before = after;
        }
        assert!(changes <= 2 * 100 / 5, "{changes}");
    }

    #[test]
    fn a_host_with_another_address_each_time_has_no_more_protected_than_it_had_lately() {
        let mut protected = Protected::default();
        for tenth in 0..1000_u32 {
            let now = Duration::from_millis(100 * u64::from(tenth));
            let host = [Ipv4Addr::from_bits(A.to_bits() + tenth)];
            assert!(protected.observe(now, &host).len() <= 50);
        }
    }

    #[test]
    fn it_says_when_addresses_may_be_let_go() {
        let second = Duration::from_secs;
        let mut protected = Protected::default();
        protected.observe(second(1), &[A, B]);
        assert_eq!(protected.narrows_in(second(1)), None);
        protected.observe(second(3), &[A]);
        assert_eq!(protected.narrows_in(second(3)), Some(second(3)));
        assert_eq!(protected.unchanged_for(second(3)), Some(second(2)));
        assert_eq!(protected.observe(second(6), &[A])[..], [A]);
        assert_eq!(protected.narrows_in(second(6)), None);
    }
}
