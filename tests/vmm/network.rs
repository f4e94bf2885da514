//! Networks for machines, on a host of the test's own.

use dozed::{
    net::{LinuxNetwork, Network, Ready, Wanted},
    sandbox::network::{AddressPlan, Destinations, NetworkPolicy, Reach, SandboxAddress},
    sys::netns::{self, Namespace},
    vmm::PlannedNic,
};
use tempfile::TempDir;

/// The networks of a host. Its own namespace is the one that the test's thread is in.
pub(crate) struct Networks {
    network: LinuxNetwork,
    plan: AddressPlan,
    _runtime: TempDir,
}

/// Runs `test` on a new host.
pub(crate) fn on_a_host(test: impl FnOnce(&Networks) + Send + 'static) {
    netns::in_a_new_one(|_| {
        let runtime = tempfile::tempdir().unwrap();
        let plan = AddressPlan::default();
        let network = LinuxNetwork::new(plan, runtime.path());
        test(&Networks { network, plan, _runtime: runtime });
    })
    .unwrap();
}

impl Networks {
    /// Returns what the sandbox of the test is to have, with a tap that is `owner`'s.
    pub(crate) fn wanted(&self, owner: u32) -> Wanted {
        Wanted {
            id: "web-1".parse().unwrap(),
            address: self.address(),
            tap_owner: owner,
            policy: NetworkPolicy {
                reach: Reach::Isolated,
                nameservers: "9.9.9.9".parse().unwrap(),
                denied: Destinations::default(),
                allowed: Destinations::default(),
            },
        }
    }

    pub(crate) fn address(&self) -> SandboxAddress {
        self.plan.address(0).unwrap()
    }

    /// Makes the network, or sees to it that it is as wanted.
    pub(crate) fn ensure(&self, wanted: &Wanted) -> Ready {
        self.network.ensure(wanted).unwrap()
    }

    /// Makes the network anew.
    pub(crate) fn renew(&self, wanted: &Wanted) -> Ready {
        let before = self.ensure(wanted).identity;
        self.network.remove(&wanted.id, wanted.address).unwrap();
        let ready = self.ensure(wanted);
        assert_ne!(ready.identity, before);
        ready
    }

    /// Says whether nobody has the tap open.
    pub(crate) fn is_free(&self, wanted: &Wanted) -> bool {
        match self.network.open_tap(&wanted.id) {
            Ok(_) => true,
            Err(error) if error.is_transient() => false,
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for Networks {
    /// What is pinned would stay.
    fn drop(&mut self) {
        let dismantled = self.network.dismantle();
        if !std::thread::panicking() {
            dismantled.unwrap();
        }
    }
}

/// Returns the network device of a machine in this network.
pub(crate) fn nic(ready: &Ready) -> PlannedNic {
    let (namespace, tap) = (ready.namespace.clone(), ready.tap.to_owned());
    PlannedNic { namespace, tap, mac: ready.mac }
}

/// Returns the namespace of a network.
pub(crate) fn namespace(ready: &Ready) -> Namespace {
    Namespace::open(&ready.namespace).unwrap().unwrap()
}
