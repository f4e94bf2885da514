//! The guest's network device: a tap in a namespace, which one VMM has at a time.
//!
//! A VMM with privileges makes a tap that is not there, and says nothing, and one without
//! them may only open its own. So a tap is looked at before: it is there, it is nobody's,
//! and it is given to whoever the VMM runs as.

use std::{io, os::fd::OwnedFd, time::Duration};

use super::{Error, PlannedNic, peer::host};
use crate::sys::{
    clock::{self, Deadline},
    netns::Namespace,
    tun::{self, Device},
};

/// A process that has just ended closes its tap a moment before or after it is gone. How
/// long we wait for it, and how often we look.
const BUSY_LIMIT: Duration = Duration::from_secs(2);
const BUSY_LOOK: Duration = Duration::from_millis(5);

/// Opens the namespace, and in it the tap, for as long as it is open nobody else's.
///
/// # Errors
/// `Host` where either is not there, or another keeps the tap.
pub(super) fn open(nic: &PlannedNic) -> Result<(Namespace, OwnedFd), Error> {
    let namespace = enterable(nic)?;
    let tap = in_namespace(nic, &namespace, |_| Ok(()))?;
    Ok((namespace, tap))
}

/// Opens the namespace, and sees to it that the user `uid` can open the tap in it, and that
/// nobody else has it open.
///
/// # Errors
/// As for [`open`].
pub(super) fn lend(nic: &PlannedNic, uid: u32) -> Result<Namespace, Error> {
    let namespace = enterable(nic)?;
    in_namespace(nic, &namespace, move |tap| tun::give(tap, uid))?;
    Ok(namespace)
}

fn enterable(nic: &PlannedNic) -> Result<Namespace, Error> {
    let opened = Namespace::open(&nic.namespace).and_then(|namespace| {
        namespace.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is none"))
    });
    opened.map_err(host(format!("opening the network namespace {}", nic.namespace.display())))
}

fn in_namespace(
    nic: &PlannedNic,
    namespace: &Namespace,
    then: impl FnOnce(&OwnedFd) -> io::Result<()> + Send + 'static,
) -> Result<OwnedFd, Error> {
    let name = nic.tap.clone();
    let opened = namespace.run(move |_| {
        let tap = open_when_free(&name)?;
        then(&tap).map(|()| tap)
    });
    let doing = || format!("taking the tap {} in {}", nic.tap, nic.namespace.display());
    opened.and_then(|opened| opened).map_err(host(doing()))
}

fn open_when_free(name: &str) -> io::Result<OwnedFd> {
    let deadline = Deadline::after(BUSY_LIMIT);
    loop {
        match tun::open(name, Device::Tap) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && !deadline.passed() => {
                clock::pause_for(BUSY_LOOK);
            }
            opened => return opened,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fs, path::PathBuf};

    use super::*;
    use crate::{
        sandbox::network::GUEST_MAC,
        sys::{mount, netns},
    };

    const TAP: &str = "tap7";

    /// A pinned namespace with a tap in it, and nothing else.
    pub(in crate::vmm) struct Pinned {
        dir: tempfile::TempDir,
        pub(in crate::vmm) nic: PlannedNic,
    }

    impl Pinned {
        pub(in crate::vmm) fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            netns::make_pin_dir(dir.path()).unwrap();
            let namespace = dir.path().join("a");
            let pin = namespace.clone();
            netns::in_a_new_one(move |inside| {
                tun::make(TAP, Device::Tap, 0).unwrap();
                inside.pin(&pin).map(drop)
            })
            .unwrap()
            .unwrap();
            Self { dir, nic: PlannedNic { namespace, tap: TAP.to_owned(), mac: GUEST_MAC } }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
    }

    impl Drop for Pinned {
        fn drop(&mut self) {
            netns::unpin(&self.nic.namespace).unwrap();
            mount::detach(&self.dir.path().canonicalize().unwrap()).unwrap();
        }
    }

    fn told(error: &Error) -> String {
        format!("{error}: {}", std::error::Error::source(error).unwrap())
    }

    #[test]
    fn a_tap_that_somebody_is_about_to_leave_is_waited_for() {
        let pinned = Pinned::new();
        let (_, first) = open(&pinned.nic).unwrap();
        let nic = pinned.nic.clone();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| lend(&nic, 1000).map(drop));
            // Long enough that it most likely looks once in vain.
            clock::pause_for(4 * BUSY_LOOK);
            drop(first);
            second.join().unwrap().unwrap();
        });
        drop(open(&pinned.nic).unwrap());
    }

    #[test]
    fn a_tap_that_somebody_keeps_is_refused_with_its_name() {
        let pinned = Pinned::new();
        let _kept = open(&pinned.nic).unwrap();
        for refused in [open(&pinned.nic).map(drop), lend(&pinned.nic, 1000).map(drop)] {
            let refused = refused.unwrap_err();
            let Error::Host { source, .. } = &refused else { panic!("{refused}") };
            assert_eq!(source.kind(), io::ErrorKind::ResourceBusy);
            assert!(told(&refused).starts_with("taking the tap tap7 in /"), "{}", told(&refused));
        }
    }

    #[test]
    fn what_is_not_there_is_not_made() {
        let pinned = Pinned::new();
        let nic = PlannedNic { tap: "tap8".to_owned(), ..pinned.nic.clone() };
        let missing = told(&lend(&nic, 1000).unwrap_err());
        assert!(missing.ends_with("there is no tap8"), "{missing}");
        let links =
            enterable(&nic).unwrap().run(|_| fs::read_to_string("/proc/thread-self/net/dev"));
        let links = links.unwrap().unwrap();
        assert!(links.contains("tap7:") && !links.contains("tap8"), "{links}");

        let nic = PlannedNic { namespace: pinned.path("none"), ..nic };
        let missing = told(&open(&nic).unwrap_err());
        assert!(missing.starts_with("opening the network namespace /"), "{missing}");
    }
}
