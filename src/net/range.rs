//! Whose a range of addresses is: of one daemon at a time, and of one store.
//!
//! A daemon locks its range in the network namespace that it is in, since that is where its
//! links, routes and rules are: two daemons with nothing in common but the host would take
//! each other's for leftovers of a crash. The lock ends with the daemon and its guests do
//! not, so what a daemon makes on the host also says by which store it was made, and a
//! daemon with another store leaves it alone.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use ipnet::Ipv4Net;

use super::{Error, link::Link};
use crate::{
    sandbox::network::AddressPlan,
    sys::{
        clock::{Deadline, pause_for},
        netns_lock::{Locked, NetnsLock},
    },
};

/// What the lock is called.
const KIND: &str = "range";
/// How every mark begins.
const MARK: &str = "dozed store ";
/// How long a child of a daemon that is gone may have its lock still: from its fork to its
/// exec, on a machine that has other things to do.
const LEFTOVER_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether it has let go.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A range of addresses, and whose what is made for it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) plan: AddressPlan,
    owner: Owner,
}

/// What tells a store from every other on this host, also from a copy of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner(String);

/// Whose a link is, by its mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// This daemon's, or an earlier one's with the same store.
    Ours,
    /// It has no mark, as those that earlier versions made.
    Unmarked,
    /// Somebody else's.
    Others,
}

impl Owner {
    /// Returns the owner that has its store in `dir`.
    ///
    /// # Errors
    /// Those of stat(2).
    pub(super) fn of(dir: &Path) -> io::Result<Self> {
        let found = fs::metadata(dir)?;
        Ok(Self(format!("{MARK}{:x}:{}", found.dev(), found.ino())))
    }

    /// Returns what is written on what it makes.
    pub(super) fn mark(&self) -> &str {
        &self.0
    }

    fn whose(&self, mark: Option<&str>) -> Whose {
        match mark.unwrap_or_default() {
            "" => Whose::Unmarked,
            mark if mark == self.0 => Whose::Ours,
            _ => Whose::Others,
        }
    }
}

impl Range {
    pub(super) fn new(plan: AddressPlan, owner: Owner) -> Self {
        Self { plan, owner }
    }

    /// Returns what is written on what is made for it.
    pub(super) fn mark(&self) -> &str {
        self.owner.mark()
    }

    /// Says whose a link is.
    pub(super) fn whose(&self, link: &Link) -> Whose {
        self.owner.whose(link.alias.as_deref())
    }
}

/// Locks the range in the network namespace of this thread.
///
/// # Errors
/// Where another daemon has one that overlaps it.
pub(super) fn claim(plan: &AddressPlan) -> Result<NetnsLock, Error> {
    let failed = || Error::host("locking the range of addresses");
    let deadline = Deadline::after(LEFTOVER_MAX);
    let lock = NetnsLock::take(KIND, &plan.range().to_string()).map_err(failed())?;
    loop {
        let others = lock.others(KIND).map_err(failed())?;
        let Some(other) = others.into_iter().find(|other| overlaps(plan, &other.subject)) else {
            return Ok(lock);
        };
        if !is_left_over(&other) || deadline.passed() {
            let Locked { subject, pid, .. } = other;
            return Err(Error::RangeInUse { range: *plan, theirs: subject, pid });
        }
        pause_for(LOOK_EVERY);
    }
}

fn overlaps(plan: &AddressPlan, theirs: &str) -> bool {
    let range = plan.range();
    // What is no network is no range of a daemon's.
    theirs.parse::<Ipv4Net>().is_ok_and(|theirs| range.contains(&theirs) || theirs.contains(&range))
}

/// Says whether the daemon is gone, and only a child of it that has not become its program
/// yet has the lock.
fn is_left_over(locked: &Locked) -> bool {
    locked.pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    fn plan(text: &str) -> AddressPlan {
        text.parse().unwrap()
    }

    #[test]
    fn a_range_is_one_daemons_with_all_that_overlap_it() {
        netns::in_a_new_one(|_| {
            let held = claim(&plan("10.213.0.0/16")).unwrap();
            for taken in ["10.213.0.0/16", "10.213.7.0/24", "10.0.0.0/8"] {
                let error = claim(&plan(taken)).unwrap_err().to_string();
                let pid = std::process::id();
                let says = format!("(process {pid}, range 10.213.0.0/16); each needs a `range`");
                assert!(error.starts_with(taken) && error.contains(&says), "{error}");
            }
            let beside = claim(&plan("10.214.0.0/16")).unwrap();
            netns::in_a_new_one(|_| drop(claim(&plan("10.213.0.0/16")).unwrap())).unwrap();
            drop(held);
            drop(claim(&plan("10.213.7.0/24")).unwrap());
            claim(&plan("10.0.0.0/8")).unwrap_err();
            drop(beside);
            drop(claim(&plan("10.0.0.0/8")).unwrap());
        })
        .unwrap();
    }

    #[test]
    fn a_copy_of_a_store_is_another_owner() {
        let temp = tempfile::tempdir().unwrap();
        let dirs = ["a", "b"].map(|name| temp.path().join(name));
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let [one, other] = dirs.map(|dir| Owner::of(&dir).unwrap());
        assert_ne!(one, other);
        assert_eq!(one.whose(Some(one.mark())), Whose::Ours);
        assert_eq!(one.whose(Some(other.mark())), Whose::Others);
        assert_eq!(one.whose(Some("my uplink")), Whose::Others);
        assert_eq!((one.whose(None), one.whose(Some(""))), (Whose::Unmarked, Whose::Unmarked));
    }
}
