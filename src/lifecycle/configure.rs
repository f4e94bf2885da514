//! What may be set of a sandbox without waking it or putting it to sleep.

use super::{
    Entry, Error, Lifecycle, chain, disks::set_aside_changed_disks, error::net_failed,
    operate::operate, recover::settle,
};
use crate::{
    lifecycle::Held,
    sandbox::{
        Owner, Period, Record, Spec, State, Writer,
        network::{Destinations, Nameservers, Span},
    },
    sync::{Arc, lock},
};

/// A change of what is wanted of a sandbox.
#[derive(Debug, Clone)]
pub enum Policy {
    /// How long without activity before the reaper puts it to sleep.
    IdleAfter(Period),
    /// How long asleep before the reaper deletes it.
    DeleteAfter(Period),
    /// Whether it may not be deleted.
    Pinned(bool),
    /// Its hardware, only while stopped; and what counts as activity. As its owner wrote it.
    Spec(Box<Spec>),
    /// The same, written by somebody who need not be its owner.
    Config(Box<Spec>, Writer),
    /// Whose it is.
    Owner(Owner),
    /// Who answers its guest's questions for names.
    Nameservers(Nameservers),
    /// What its guest never reaches.
    Denied(Destinations),
    /// What its guest reaches though it is not public.
    Allowed(Destinations),
}

impl Policy {
    /// Returns what is set, in a word for the log.
    fn word(&self) -> &'static str {
        match self {
            Self::IdleAfter(_) => "idle_after",
            Self::DeleteAfter(_) => "delete_after",
            Self::Pinned(_) => "pinned",
            Self::Spec(_) | Self::Config(..) => "config",
            Self::Owner(_) => "owner",
            Self::Nameservers(_) => "nameservers",
            Self::Denied(_) => "denied",
            Self::Allowed(_) => "allowed",
        }
    }
}

impl Lifecycle {
    /// Sets one thing, durably.
    ///
    /// # Errors
    /// `NotStopped` for hardware of a sandbox that is not stopped, `NotAllowed` for a network
    /// that cannot be allowed.
    pub fn set(&self, held: &Held, entry: &Arc<Entry>, policy: Policy) -> Result<(), Error> {
        let what = policy.word();
        operate(self, held, entry, |op| {
            let before = entry.record();
            let mut after = Record::clone(&before);
            apply(&mut after, policy.clone());
            check_allowed(self, entry, &before.spec, &after.spec)?;
            if let Policy::Spec(spec) | Policy::Config(spec, _) = &policy
                && !before.spec.is_equal_but_for_activity(spec)
            {
                settle(self, op)?;
                let state = entry.record().state();
                if state != State::Stopped && !before.spec.is_same_machine(spec) {
                    return Err(Error::NotStopped { id: entry.id().clone(), state });
                }
                set_aside_changed_disks(&self.store.home(&before), &before, spec).map_err(
                    |source| {
                        let (doing, id) = ("setting aside a disk of", entry.id().clone());
                        Error::Host { doing, id, source }
                    },
                )?;
            }
            if after != *before {
                let awake_min = self.activity.limits(&after).awake_min;
                let is_new = awake_min != self.activity.limits(&before).awake_min;
                self.records.amend(held, entry, |record| {
                    apply(record, policy);
                    if is_new && record.state() == State::Running {
                        record.waking.stays_awake(record.since, awake_min);
                    }
                })?;
                change_network(self, held, entry, &before)?;
                if after.owner != before.owner {
                    give_vsock(self, entry, after.owner);
                }
                self.reaper_wakeup.notify();
                tracing::info!(id = %entry.id(), cause = %held.cause(), "{what} set");
            }
            Ok(())
        })
    }
}

/// Refuses a network in `allowed` that the firewall would never let through, as it is the
/// sandboxes' or the host's own.
fn check_allowed(
    lifecycle: &Lifecycle,
    entry: &Entry,
    before: &Spec,
    after: &Spec,
) -> Result<(), Error> {
    if after.allowed == before.allowed {
        return Ok(());
    }
    let range = lifecycle.settings.addresses.range();
    let failed = net_failed(entry, "listing the host's addresses for");
    let own = lifecycle.networks.host().host_addresses().map_err(failed)?;
    let protected: Vec<Span> = own.into_iter().map(Span::from).chain([Span::from(range)]).collect();
    let Some(network) = after.allowed.in_vain(&before.allowed, &protected) else {
        return Ok(());
    };
    let why = if range.contains(&network) {
        format!("it is in the range of sandboxes, {range}")
    } else {
        "its addresses belong to the host, which sandboxes cannot reach".to_owned()
    };
    Err(Error::NotAllowed { network: network.to_string(), why })
}

/// Puts a change of what a guest may reach, or of what wakes it, in force, or takes it
/// back.
fn change_network(
    lifecycle: &Lifecycle,
    held: &Held,
    entry: &Entry,
    before: &Record,
) -> Result<(), Error> {
    let after = entry.record();
    let (now, then) = (&after.spec, &before.spec);
    let wakes_as_before = (now.wake_on, &now.wake_ports) == (then.wake_on, &then.wake_ports);
    if wakes_as_before && now.network_policy() == then.network_policy() {
        return Ok(());
    }
    let changed = lifecycle
        .networks
        .give_address(held, entry)
        .and_then(|()| lifecycle.networks.apply(entry, lifecycle.machines.pid(entry.row())))
        .and_then(|()| lifecycle.networks.listen_for(entry));
    changed.or_else(|cause| {
        // What is in force is what it was.
        lifecycle.records.amend(held, entry, |record| {
            record.spec = Arc::clone(&before.spec);
            record.config_by.clone_from(&before.config_by);
        })?;
        Err(cause)
    })
}

/// Has the vsock of a sandbox that runs be its new owner's.
fn give_vsock(lifecycle: &Lifecycle, entry: &Entry, owner: Owner) {
    let Some(live) = lifecycle.machines.get(entry.row()) else { return };
    if let Err(error) = lock(&live.machine).give_vsock(owner) {
        // A VMM that does as it should has it where it was, so this is one that does not.
        tracing::error!(id = %entry.id(), error = chain(&error), "changing the vsock's owner");
    }
}

fn apply(record: &mut Record, policy: Policy) {
    match policy {
        Policy::IdleAfter(period) => record.idle_after = period,
        Policy::DeleteAfter(period) => record.delete_after = period,
        Policy::Pinned(pinned) => record.pinned = pinned,
        Policy::Spec(spec) => apply(record, Policy::Config(spec, record.owner.into())),
        Policy::Config(spec, writer) => {
            record.spec = Arc::from(spec);
            record.config_by = Some(Arc::new(writer));
        }
        Policy::Owner(owner) => record.owner = owner,
        Policy::Nameservers(list) => Arc::make_mut(&mut record.spec).nameservers = list,
        Policy::Denied(list) => Arc::make_mut(&mut record.spec).denied = list,
        Policy::Allowed(list) => Arc::make_mut(&mut record.spec).allowed = list,
    }
}
