//! Comparing what was made on the host with what is there, and putting back what is missing.
//!
//! ```text
//!   a tick, or a notification of the kernel ─▶ look: the host's part is put back ─▶ suspects
//!   a suspect, with its lock ─▶ put_back: in place, under the guest that runs
//!   a boot, a wake, a change of policy ─▶ the host's part, and the sandbox's own
//! ```
//!
//! A network in which a guest runs is never made anew, since its VMM has the device of the
//! one that is there.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::atomic::Ordering, time::Duration};

use super::{
    Error, Known, Looked, Network as _, Wanted, host,
    link::{self, Link},
    linux::LinuxNetwork,
    namespace::{self, Before, Design},
    protected::InForce,
    range::Range,
    route::{self, Ensured},
};
use crate::{
    sandbox::SandboxId,
    sync::{Arc, lock},
    sys::{
        netlink::Kernel,
        netns::{self, Namespace},
    },
};

/// The inside of so many namespaces is looked at each time, by turns. Only who enters one
/// changes it, which no service of a host does by itself.
const INSIDES_PER_LOOK: usize = 8;
/// How soon is looked again at firewalls that are out of date: the lock of a sandbox may have
/// been taken, or it was being woken. No operation on a sandbox is in a hurry for longer.
const RENEW_AGAIN: Duration = Duration::from_secs(1);
/// For how long after a change of the host's addresses that is done. Ticks do it after that.
const RENEW_FOR: Duration = Duration::from_secs(60);

impl LinuxNetwork {
    /// Says what the namespace of a sandbox is to be now. Whoever does not succeed with it
    /// forgets what is in force.
    pub(super) fn design(&self, wanted: &Wanted) -> Result<Design, Error> {
        let protected = {
            let mut protected = lock(&self.protected);
            let addresses = protected.observe(self.since.elapsed(), &self.host_addresses()?);
            // Noted before anybody sees a later change, so that whoever does finds this
            // firewall out of date.
            let in_force = InForce { generation: None, protected: Arc::clone(&addresses) };
            lock(&self.in_force).insert(wanted.id.clone(), in_force);
            addresses
        };
        Ok(Design::new(&self.plan, protected, wanted, &self.ignored))
    }

    /// Has the next look find the firewall of a sandbox out of date.
    pub(super) fn forget_in_force(&self, id: &SandboxId) {
        lock(&self.in_force).remove(id);
    }

    /// Returns the host's addresses that are to be protected, and when to look again at those
    /// or at firewalls that are out of date.
    fn protected(&self) -> Result<(Arc<[Ipv4Addr]>, Option<Duration>), Error> {
        let mut protected = lock(&self.protected);
        let host = self.host_addresses()?;
        let now = self.since.elapsed();
        let addresses = protected.observe(now, &host);
        let is_new = protected.unchanged_for(now).is_some_and(|time| time < RENEW_FOR);
        let any_out_of_date = || lock(&self.in_force).values().any(|it| it.protected != addresses);
        let renew_in = (is_new && any_out_of_date()).then_some(RENEW_AGAIN);
        let again_after = [protected.narrows_in(now), renew_in].into_iter().flatten().min();
        Ok((addresses, again_after))
    }
}

impl LinuxNetwork {
    /// Puts back what is missing of the host's part. Returns what it was.
    pub(super) fn put_host_back(&self) -> Result<Vec<&'static str>, Error> {
        let range = self.range()?;
        let done = {
            let mut prepared = lock(&self.prepared);
            match prepared.as_mut() {
                Some(in_force) => host::put_back(&range, in_force)?,
                None => host::PutBack::default(),
            }
        };
        let mut what = done.what;
        let (Some(wake_on_packet), Some(on_trigger)) =
            (self.wake_on_packet(), self.on_trigger.as_ref())
        else {
            return Ok(what);
        };
        if done.has_new_device || !wake_on_packet.works() {
            // What was queued in it is lost, and sent again.
            wake_on_packet.abandon();
            self.ensure_listener(on_trigger)?;
            what.push("the listener for packets to sleepers");
        } else if wake_on_packet.route_again()? == Ensured::Added {
            what.push("the route for sleeping sandboxes");
        }
        Ok(what)
    }

    /// Does what [`super::Network::look`] is to do.
    pub(super) fn look_at(&self, awake: &[Known]) -> Looked {
        let mut looked = Looked::default();
        if lock(&self.prepared).is_none() {
            if awake.is_empty() {
                return looked;
            }
            looked.failed = self.prepare().err();
        }
        match self.put_host_back() {
            Ok(what) => looked.put_back = what,
            Err(error) => looked.failed = Some(error),
        }
        if awake.is_empty() && lock(&self.in_force).is_empty() {
            return looked;
        }
        match self.suspects(awake) {
            Ok((suspects, again_after)) => {
                looked.suspects = suspects;
                looked.again_after = again_after;
            }
            Err(error) => looked.failed = Some(error),
        }
        looked
    }

    fn suspects(&self, awake: &[Known]) -> Result<(Vec<SandboxId>, Option<Duration>), Error> {
        let (protected, again_after) = self.protected()?;
        if awake.is_empty() {
            return Ok((Vec::new(), again_after));
        }
        let range = self.range()?;
        let kernel = link::here()?;
        let links: BTreeMap<String, Link> =
            link::list(&kernel)?.into_iter().map(|link| (link.name.clone(), link)).collect();
        let first = self.turn.fetch_add(INSIDES_PER_LOOK, Ordering::Relaxed) % awake.len();
        let mut suspects = Vec::new();
        for (at, known) in awake.iter().enumerate() {
            let is_its_turn = (at + awake.len() - first) % awake.len() < INSIDES_PER_LOOK;
            let link = links.get(&known.address.host_link());
            // One that cannot be looked at says nothing of the others.
            let is_well = !is_its_turn
                && self.protects(&known.id, &protected)
                && self.is_well(&kernel, &range, known, link).unwrap_or(false);
            if !is_well {
                suspects.push(known.id.clone());
            }
        }
        Ok((suspects, again_after))
    }

    /// Says whether the firewall of a sandbox protects just these addresses of the host.
    fn protects(&self, id: &SandboxId, addresses: &[Ipv4Addr]) -> bool {
        lock(&self.in_force).get(id).is_some_and(|it| *it.protected == *addresses)
    }

    fn is_well(
        &self,
        kernel: &Kernel,
        range: &Range,
        known: &Known,
        link: Option<&Link>,
    ) -> Result<bool, Error> {
        let Some(link) = link.filter(|link| host::is_of_a_sandbox(range, link)) else {
            return Ok(false);
        };
        let is_routed = || {
            let way = route::way_to(kernel, known.address.ip())?;
            let is_by_link = way.is_some_and(|way| way.is_ours && way.device == Some(link.index));
            Ok::<_, Error>(is_by_link || self.is_queueing(known.address))
        };
        Ok(namespace::is_connected(kernel, range, link, known.address)?
            && is_routed()?
            && self.open(&known.id)?.is_some())
    }

    /// Does what [`super::Network::put_back`] is to do.
    pub(super) fn put_back_of(
        &self,
        wanted: &Wanted,
        vmm: Option<u32>,
    ) -> Result<Vec<&'static str>, Error> {
        self.prepare()?;
        let inside = self.put_inside_back(wanted, vmm);
        let (namespace, mut what) = inside.inspect_err(|_| self.forget_in_force(&wanted.id))?;
        if self.open(&wanted.id)?.is_none() {
            self.pin_again(wanted, &namespace)?;
            what.push("the pin of its namespace");
        }
        what.extend(self.connect_again(wanted)?);
        Ok(what)
    }

    /// Puts back what is missing in the namespace of a sandbox, and the firewall in force if
    /// it is out of date. Returns the namespace, pinned or not, and what was put back.
    fn put_inside_back(
        &self,
        wanted: &Wanted,
        vmm: Option<u32>,
    ) -> Result<(Namespace, Vec<&'static str>), Error> {
        let before = lock(&self.in_force).get(&wanted.id).cloned();
        let design = self.design(wanted)?;
        let protected = Arc::clone(&design.protected);
        let of_vmm = vmm.map(Namespace::of_process).transpose();
        let of_vmm = of_vmm.map_err(Error::host("looking for the namespace of its VMM"))?.flatten();
        let pinned = self.open(&wanted.id)?;
        let is_proven = match (&pinned, &of_vmm) {
            (Some(pinned), Some(of_vmm)) => pinned.identity() == of_vmm.identity(),
            (None, _) | (_, None) => false,
        };
        let namespace = pinned.or(of_vmm).ok_or(Error::NotThere)?;
        if before.as_ref().is_some_and(|it| it.protected != protected) {
            tracing::info!(id = %wanted.id, "the firewall follows the host's addresses");
        }
        let generation = before
            .filter(|it| it.protected == protected)
            .and_then(|it| it.generation)
            .and_then(|(of, number)| (of == namespace.identity()).then_some(number));
        let link = wanted.address.host_link();
        let outer = host::own_link(&link::here()?, &self.range()?, &link);
        // What has the name and is another's stays, and is an error later.
        let has_outer = !matches!(outer, Ok(None));
        let before = Before { is_proven, generation, has_outer };
        let inside = namespace::put_back(&namespace, design, before)?;
        let generation = Some((namespace.identity(), inside.generation));
        lock(&self.in_force).insert(wanted.id.clone(), InForce { generation, protected });
        Ok((namespace, inside.what))
    }

    /// Pins a namespace that its VMM is in, and that nothing else leads to.
    fn pin_again(&self, wanted: &Wanted, namespace: &Namespace) -> Result<(), Error> {
        let pin = self.pin(&wanted.id);
        netns::make_pin_dir(&self.pins)
            .and_then(|()| netns::unpin(&pin))
            .and_then(|()| namespace.run(move |inside| inside.pin(&pin).map(drop))?)
            .map_err(Error::host("pinning the namespace"))
    }

    /// Puts back the host's end of a sandbox's link, and its route.
    fn connect_again(&self, wanted: &Wanted) -> Result<Vec<&'static str>, Error> {
        let (links, range) = (link::here()?, self.range()?);
        let address = wanted.address;
        let mut what = Vec::new();
        let outer = host::own_link(&links, &range, &address.host_link())?;
        let outer = outer.ok_or(Error::NotThere)?;
        if !namespace::is_connected(&links, &range, &outer, address)? {
            namespace::connect(&links, &range, address)?;
            what.push("the link");
        }
        if !self.is_queueing(address)
            && namespace::route(&links, &range.plan, address)? == Ensured::Added
        {
            what.push("the route");
        }
        Ok(what)
    }

    /// Says what was put back of the host's, if anything was.
    pub(super) fn tell_host_put_back(what: &[&str]) {
        if !what.is_empty() {
            tracing::warn!(
                what = what.join(", "),
                "restored what another program changed or \
                                                    removed"
            );
        }
    }
}
