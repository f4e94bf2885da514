//! The network of each sandbox: a namespace of its own that no guest lies its way out of.
//!
//! ```text
//!   guest ── dztap [source] ─ [by destination] ─ eth0 ═══ dz0ad50002 ── [second check] ── uplink
//!   169.254.0.21          namespace of the sandbox          │        host        │
//!                         169.254.0.22   10.213.0.2 ────────┘        10.213.0.1  masquerade
//! ```
//!
//! Every namespace is the same inside: tap, guest address and MACs. What differs is the
//! sandbox's own address, to which its namespace translates one to one, and the policy.
//! So a snapshot restores in any namespace, and a guest is told nothing of the host.
//!
//! A namespace is pinned to a file only when all of it is in place, its firewall first,
//! so one that is there is whole, and one that is half made is gone with the thread that
//! was making it. Nothing here starts a process, and nothing in here decides when: that
//! is up to `lifecycle`, which holds the sandbox's lock.
//!
//! What is ours is known by more than its name: namespaces by the directory they are
//! pinned in and by the mark inside, links by their group, which is the number of the
//! range of addresses, and by the store that their alias names. Nothing else is ever touched.

use std::{fmt, io, net::Ipv4Addr, os::fd::OwnedFd, path::PathBuf, time::Duration};

use crate::{
    sandbox::{
        SandboxId, Timestamp,
        network::{AddressPlan, Mac, NetworkPolicy, SandboxAddress, WakePorts},
    },
    sync::Arc,
    sys::{netlink::RequestError, netns::Identity},
};

mod conntrack;
#[cfg(test)]
pub(crate) mod fake;
mod firewall;
mod foreign;
mod host;
mod linger;
mod link;
mod linux;
mod namespace;
mod nft;
mod privileges;
mod protected;
mod range;
mod route;
mod survey;
mod upkeep;
mod wake_on_packet;
mod watch;

pub use firewall::TAP;
pub use linux::LinuxNetwork;
pub use privileges::missing_privileges;
pub use survey::{Finding, survey};
pub use wake_on_packet::{OnTrigger, Trigger};

/// Makes and removes the networks of sandboxes.
///
/// # Locking
/// Whoever asks for something of one sandbox holds its lock.
pub trait Network: fmt::Debug + Send + Sync {
    /// Takes the range of addresses for this daemon, until that ends. What comes after this
    /// does so too where it needs it.
    ///
    /// # Errors
    /// `RangeInUse` where another daemon has it, or a part of it.
    fn claim(&self) -> Result<(), Error>;

    /// Sees to it that the network of a sandbox is there and whole, with the firewall as
    /// its policy is now. Where it is there already nothing of it is interrupted.
    ///
    /// What is sent to a sandbox that [`Self::listen`] was said of is held until
    /// [`Self::deliver`]: until a VMM has the guest's device open, it would be lost.
    ///
    /// # Errors
    /// Where it cannot be. What was not there before is not there then.
    fn ensure(&self, wanted: &Wanted) -> Result<Ready, Error>;

    /// Puts a new policy in force. When this returns it holds for every packet, also of
    /// connections that are open. A sandbox without a network has nothing to change: its
    /// policy is in force from its next wake on.
    ///
    /// # Errors
    /// Where it cannot be. The old policy is in force then.
    fn apply_policy(&self, wanted: &Wanted) -> Result<Applied, Error>;

    /// Compares what the host has for networks, and for those of `awake`, in which guests run,
    /// with what was made of it. What is missing of the host's is put back; whose own network
    /// is not as it was made, or has a firewall from before the host's addresses changed, is
    /// returned, to be looked at by [`Self::put_back`].
    ///
    /// Its work is bounded by a few requests for each of `awake`; the inside of a few
    /// namespaces is looked at each time, by turns.
    fn look(&self, awake: &[Known]) -> Looked;

    /// Puts back what is missing of the network of a sandbox in which a guest runs, by the
    /// process `vmm`, with the firewall as its policy is now. What is there stays, and no
    /// connection ends by it. Returns what it was, in words.
    ///
    /// # Errors
    /// Where it cannot be put back, or is another's.
    fn put_back(&self, wanted: &Wanted, vmm: Option<u32>) -> Result<Vec<&'static str>, Error>;

    /// Has `changed` be called whenever somebody, perhaps we, changes something of the host
    /// that is ours, from now on. It only passes the notification on.
    ///
    /// # Errors
    /// Where the kernel does not tell of changes.
    fn watch(&self, changed: Arc<Changed>) -> Result<(), Error>;

    /// Returns the file that the namespace of a sandbox is pinned to, if it is.
    fn namespace(&self, id: &SandboxId) -> Option<PathBuf>;

    /// Opens the guest's device, for a VMM to have as its own. One at a time may.
    ///
    /// # Errors
    /// Where the sandbox has no network, or another has the device open.
    fn open_tap(&self, id: &SandboxId) -> Result<OwnedFd, Error>;

    /// Takes the packets to a sandbox that just fell asleep, or did before the daemon started.
    /// Those from the host that open something to `ports`, or carry data of an open connection,
    /// wake it: there is one trigger for each wake, and whoever receives it says how
    /// that ended. Without `ports` nothing wakes it, and they are refused at once.
    ///
    /// # Errors
    /// Where the host cannot listen for sandboxes. Then only a write wakes it.
    fn listen(
        &self,
        id: &SandboxId,
        address: SandboxAddress,
        ports: Option<&WakePorts>,
    ) -> Result<(), Error>;

    /// Passes on what was held for a sandbox while it woke, in order, and has all else go
    /// to its network. To be said after each wake of one that [`Self::listen`] was said of,
    /// whatever woke it: when a VMM has the guest's device open, and best just before the
    /// guest runs. No packet is lost then, and no answer to what the guest says first.
    ///
    /// # Errors
    /// Where the sandbox has no network, or the route to it cannot be made. What was held
    /// is refused then.
    fn deliver(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error>;

    /// Tells those whose packets were held for a sandbox that its wake failed, or is not to
    /// be. The next packet triggers a wake only after a pause, which doubles each
    /// time.
    fn refuse(&self, address: SandboxAddress);

    /// No longer has packets wake a sandbox, as it is to be deleted.
    fn stop_listening(&self, address: SandboxAddress);

    /// Keeps the network of a sandbox that fell asleep until `until`, so that its
    /// connections outlive a short sleep.
    fn linger(&self, id: &SandboxId, until: Timestamp);

    /// Returns the sandboxes whose networks have lingered for long enough at `now`. Each
    /// is to be removed, if it still sleeps when its lock is held.
    fn lingered(&self, now: Timestamp) -> Vec<SandboxId>;

    /// Returns until when the network of a sandbox is kept, of one that fell asleep.
    fn lingers_until(&self, id: &SandboxId) -> Option<Timestamp>;

    /// Returns when the next network has lingered for long enough.
    fn next_lingered(&self) -> Option<Timestamp>;

    /// Removes the network of a sandbox. It is no error if there is none.
    ///
    /// # Errors
    /// Where something of it stays.
    fn remove(&self, id: &SandboxId, address: SandboxAddress) -> Result<(), Error>;

    /// Removes what is ours and of none of `known`: what a crash left.
    ///
    /// # Locking
    /// Nobody may ask for anything else meanwhile.
    ///
    /// # Errors
    /// Where the host does not say what there is.
    fn reconcile(&self, known: &[Known]) -> Result<Reconciled, Error>;

    /// Returns what passed of the networks of those that have one that is a sign of use, or
    /// why that cannot be told of one of them. Only those are looked into by which anything
    /// has passed since the last time, so this may be asked often and of all who are awake.
    ///
    /// # Errors
    /// Where the kernel does not say it of any.
    fn activity(&self, of: &[Known]) -> Result<Vec<Sampled>, Error>;

    /// Removes what is the host's, if no sandbox has a network now. It is made anew when one is
    /// to have one.
    ///
    /// # Errors
    /// Where something stays.
    fn retire(&self) -> Result<(), Error>;

    /// Says whether the host forwards packets, as it has to for sandboxes that reach anything.
    ///
    /// # Errors
    /// A sentence that says how to have it do so.
    fn forwards(&self) -> Result<(), Error>;

    /// Returns the host's own addresses, which no sandbox reaches.
    ///
    /// # Errors
    /// Where the kernel does not say.
    fn host_addresses(&self) -> Result<Vec<Ipv4Addr>, Error>;

    /// Returns what has passed and what has not. `None`: the sandbox has no network.
    ///
    /// # Errors
    /// Where the kernel does not say.
    fn counters(&self, id: &SandboxId) -> Result<Option<Counters>, Error>;
}

/// What a sandbox is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The sandbox.
    pub id: SandboxId,
    /// Its address, which no other has.
    pub address: SandboxAddress,
    /// The user that its VMM runs as, who may open the guest's device.
    pub tap_owner: u32,
    /// What it may reach.
    pub policy: NetworkPolicy,
}

/// A network that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The file that its namespace is pinned to.
    pub namespace: PathBuf,
    /// What tells the namespace from every other since the host was booted.
    pub identity: Identity,
    /// The name of the guest's device in it. It is there before any guest is.
    pub tap: &'static str,
    /// The MAC that the guest is to have; no other gets through.
    pub mac: Mac,
    /// The address that the guest is to have; no other gets through.
    pub guest: Ipv4Addr,
    /// The prefix of that address.
    pub prefix: u8,
    /// Its gateway and its nameserver.
    pub gateway: Ipv4Addr,
}

/// Whether there was something to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is in force.
    Now,
    /// The sandbox has no network now.
    NotThere,
}

/// A sandbox whose network may be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The sandbox.
    pub id: SandboxId,
    /// Its address.
    pub address: SandboxAddress,
}

/// What a look at the host and at the networks of those that run came to.
#[derive(Debug, Default)]
pub struct Looked {
    /// What was put back of the host's, in words.
    pub put_back: Vec<&'static str>,
    /// Why something of the host's could not be.
    pub failed: Option<Error>,
    /// Whose own network may not be as it was made.
    pub suspects: Vec<SandboxId>,
    /// When to look again at the latest, if that is before the next tick: some firewalls do
    /// not have the host's addresses of today yet.
    pub again_after: Option<Duration>,
}

/// Whoever is told of changes of the host.
pub type Changed = dyn Fn() + Send + Sync;

/// What a look at all that is ours came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// What was removed: names of namespaces and links.
    pub removed: Vec<String>,
    /// The known sandboxes whose network is there.
    pub there: Vec<SandboxId>,
    /// A sentence about each thing that stays although it is of nobody.
    pub left: Vec<String>,
}

/// What passed of a network that is a sign of use: not what is ignored, nor what only keeps
/// a connection open. It is zero when the network is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// Of connections that the host opened, both ways.
    pub inward: Count,
    /// Of connections that the guest opened, both ways.
    pub outward: Count,
}

impl Activity {
    /// Returns the bytes of it, whoever opened the connection.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inward.bytes.saturating_add(self.outward.bytes)
    }
}

/// What one look at the activity of a sandbox's network came to.
pub type Sampled = (SandboxId, Result<Activity, Error>);

/// Packets and bytes, by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Of connections that the guest opened, from it.
    pub guest_out: Count,
    /// Of the same, to it.
    pub guest_in: Count,
    /// Of connections that the host opened, to the guest.
    pub host_in: Count,
    /// Of the same, from it.
    pub host_out: Count,
    /// Of both of the latter what is activity.
    pub active_in: Count,
    /// Of both of the former what is activity.
    pub active_out: Count,
    /// Frames that were not exactly the guest's.
    pub spoofed: Count,
    /// To where the guest may not send.
    pub refused: Count,
    /// Of no connection, or of one that is gone.
    pub invalid: Count,
    /// Of connections that were too many.
    pub excess: Count,
    /// From outside, and not asked for.
    pub unasked: Count,
}

impl Counters {
    /// Returns each count with its name, in an order that never changes.
    #[must_use]
    pub fn by_name(&self) -> [(&'static str, Count); 11] {
        [
            ("guest_out", self.guest_out),
            ("guest_in", self.guest_in),
            ("host_in", self.host_in),
            ("host_out", self.host_out),
            ("spoofed", self.spoofed),
            ("refused", self.refused),
            ("invalid", self.invalid),
            ("excess", self.excess),
            ("unasked", self.unasked),
            ("active_in", self.active_in),
            ("active_out", self.active_out),
        ]
    }
}

/// So much of something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets, or frames.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why a network is not as it is to be.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `net::Error` wherever it is used")]
pub enum Error {
    /// The host said no.
    #[error("{doing}")]
    Host {
        /// Such as `adding the default route`.
        doing: std::borrow::Cow<'static, str>,
        /// What the system said.
        source: io::Error,
    },
    /// The host lacks something that somebody can give it.
    #[error("this host has no network for sandboxes: {lacks}; {remedy}")]
    Lacking {
        /// What it lacks.
        lacks: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A name that we want is taken by what is not ours.
    #[error("{name} exists already and was not made by this daemon")]
    NotOurs {
        /// Such as `the link dz0ad50002`.
        name: String,
    },
    /// Another daemon has the range, or a part of it.
    #[error(
        "{range} is in use by another dozed ({}range {theirs}); each needs a `range` of its own \
         in `[network]`",
        .pid.map(|pid| format!("process {pid}, ")).unwrap_or_default()
    )]
    RangeInUse {
        /// The range of this daemon.
        range: AddressPlan,
        /// The range of the other.
        theirs: String,
        /// The other daemon's process, where it can be told.
        pid: Option<u32>,
    },
    /// The sandbox has no network.
    #[error("the sandbox has no network")]
    NotThere,
    /// Somebody has removed the guest's device, which only its VMM can open anew.
    #[error(
        "another program removed the guest's device; it is created again when the sandbox sleeps \
         and wakes"
    )]
    NoDevice,
    /// Several things went wrong, and these are all.
    #[error("{}", .0.join("; "))]
    Several(Vec<String>),
}

impl From<RequestError> for Error {
    fn from(RequestError { doing, source }: RequestError) -> Self {
        Self::Host { doing, source }
    }
}

impl Error {
    fn host(doing: impl Into<std::borrow::Cow<'static, str>>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Host { doing, source }
    }

    /// Says whether it may be otherwise in a moment, as when a VMM that just ended still
    /// has the guest's device.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        let Self::Host { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock)
    }
}

/// Returns an error with all of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_counter_and_the_sentences_that_people_see() {
        let page = include_str!("../../docs/network.md");
        for (name, _) in Counters::default().by_name() {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
        let lacking = |lacks, remedy| Error::Lacking { lacks, remedy }.to_string();
        let not_ours = Error::NotOurs { name: "the link dz…".to_owned() };
        let in_use =
            Error::RangeInUse {
                range: AddressPlan::default(), theirs: "…".to_owned(), pid: None
            };
        for sentence in [
            Error::NoDevice.to_string(),
            in_use.to_string().replace("(range", "(process N, range"),
            Error::NotOurs { name: "the route to 10.213.…".to_owned() }.to_string(),
            lacking("it does not forward IPv4 packets", "…"),
            lacking("its kernel has no nf_tables", "…"),
            lacking("there is no /dev/net/tun", "…"),
            not_ours.to_string(),
        ] {
            assert!(page.contains(&format!("`{sentence}`")), "{sentence}");
        }
    }
}
