//! How the memory of a snapshot comes back, by what is asked for and what a version can do.

use super::{memory_file, version::Version};
use crate::sandbox::{MemoryMode, RestoreMode};

/// What a version says to a snapshot while it is still loading what its guest was woken from.
pub(super) const STILL_LOADING: &str = "on-demand memory restore is still in progress";

/// Returns why there is no such machine; nothing if there is. `faults_served` says whether
/// the VMM may serve the page faults of its guest.
pub(super) fn objection(
    memory: MemoryMode,
    restore: RestoreMode,
    version: Version,
    faults_served: impl FnOnce() -> bool,
) -> Option<String> {
    let in_file = memory_file::is_wanted(memory);
    match restore {
        RestoreMode::Auto | RestoreMode::Copy => None,
        RestoreMode::OnDemand | RestoreMode::CopyOnWrite if in_file => Some(
            "memory that is in a file is not read at a wake; use restore_mode = \"auto\"".into(),
        ),
        RestoreMode::OnDemand if !version.saves_while_loading_on_demand() => Some(format!(
            "restore_mode = \"on-demand\" takes cloud-hypervisor v53.0 or later, and this is \
             {version}; use \"auto\""
        )),
        RestoreMode::OnDemand if !faults_served() => Some(
            "restore_mode = \"on-demand\" takes sysctl vm.unprivileged_userfaultfd=1, or a \
             /dev/userfaultfd that the VMM's user may open; or use \"auto\""
                .into(),
        ),
        RestoreMode::OnDemand => None,
        RestoreMode::CopyOnWrite => Some(format!(
            "restore_mode = \"copy-on-write\" takes a cloud-hypervisor later than v53.0 and a \
             dozed that knows it, and this is {version}; use \"auto\""
        )),
    }
}

/// Returns the word for it that is said to a version, if the version knows any.
///
/// # Errors
/// Says what the version cannot do, since one that does not know a word passes over it.
pub(super) fn word(restore: RestoreMode, version: Version) -> Result<Option<&'static str>, String> {
    match restore {
        // Loading page by page would fill all of the memory in the background, holes too,
        // and refuse the next snapshot until that is done.
        RestoreMode::Auto | RestoreMode::Copy => Ok(version.has_restore_modes().then_some("Copy")),
        RestoreMode::OnDemand if version.saves_while_loading_on_demand() => Ok(Some("OnDemand")),
        RestoreMode::OnDemand | RestoreMode::CopyOnWrite => {
            Err(format!("{version} does not restore as `restore_mode` says"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn a_version_is_told_a_word_only_if_it_knows_it() {
        use RestoreMode::{Auto, Copy, CopyOnWrite, OnDemand};
        for (mode, text, told) in [
            (Auto, "44.0", Ok(None)),
            (Copy, "51.1", Ok(None)),
            (Auto, "52.0", Ok(Some("Copy"))),
            (Copy, "54.0", Ok(Some("Copy"))),
            (OnDemand, "53.0", Ok(Some("OnDemand"))),
            (OnDemand, "52.0", Err(())),
            (OnDemand, "51.1", Err(())),
            (CopyOnWrite, "53.0", Err(())),
            (CopyOnWrite, "54.0", Err(())),
        ] {
            assert_eq!(word(mode, version(text)).map_err(drop), told, "{mode:?} {text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_it_would_take() {
        use MemoryMode::{Auto, File, Shared};
        use RestoreMode::{Copy, CopyOnWrite, OnDemand};
        for (memory, restore, text, served, says) in [
            (File, OnDemand, "53.0", true, Some("memory that is in a file")),
            (File, Copy, "44.0", false, None),
            (Shared, OnDemand, "52.0", true, Some("takes cloud-hypervisor v53.0 or later")),
            (Auto, OnDemand, "53.0", false, Some("vm.unprivileged_userfaultfd=1")),
            (Auto, OnDemand, "53.0", true, None),
            (Auto, CopyOnWrite, "54.0", true, Some("later than v53.0")),
            (Auto, RestoreMode::Auto, "44.0", false, None),
        ] {
            let said = objection(memory, restore, version(text), || served);
            let fits = match (&said, says) {
                (Some(said), Some(says)) => said.contains(says),
                (said, says) => said.is_none() && says.is_none(),
            };
            assert!(fits, "{memory:?} {restore:?} {text}: {said:?}");
        }
    }
}
