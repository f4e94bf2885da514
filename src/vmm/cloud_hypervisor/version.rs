//! What a version of Cloud Hypervisor can do. It ignores what it does not know, so what
//! is only hoped for is not asked of it.

/// The first release whose answers this driver was held against.
pub(super) const OLDEST: Version = Version { major: 44, minor: 0 };

/// A version, as far as releases differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    major: u32,
    minor: u32,
}

impl Version {
    /// Reads `53.0.0`, and `v53.0-246-gae44c2971` of what is between two releases.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches('v');
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0);
        Some(Self { major, minor })
    }

    /// Whether it can be told that an image is raw. One that cannot looks for itself, and a
    /// guest can write the header of another format into its disk.
    pub(super) fn is_told_image_types(self) -> bool {
        self >= Self { major: 50, minor: 1 }
    }

    /// Whether it writes, and reads, only the memory that the guest has touched.
    pub(super) fn saves_sparsely(self) -> bool {
        self >= Self { major: 52, minor: 0 }
    }

    /// Whether it can be told how to load memory.
    pub(super) fn has_restore_modes(self) -> bool {
        self >= Self { major: 52, minor: 0 }
    }

    /// Whether it leaves the address of a tap alone that it was told none for. One that does
    /// not may not set one either, and ends.
    pub(super) fn leaves_taps_alone(self) -> bool {
        self >= Self { major: 49, minor: 0 }
    }

    /// Whether it saves all of the memory of a guest that was woken on demand. The first that
    /// loads so leaves out of a snapshot what the guest has not wanted yet.
    pub(super) fn saves_while_loading_on_demand(self) -> bool {
        self >= Self { major: 53, minor: 0 }
    }

    /// Whether it lets the vCPUs run as the last act of a resume. Before, one that failed
    /// may have let them run.
    pub(super) fn resumes_vcpus_last(self) -> bool {
        self >= Self { major: 52, minor: 0 }
    }

    /// Returns a sentence for each thing that it lacks.
    pub(super) fn lacks(self) -> Vec<&'static str> {
        [
            (
                self.saves_sparsely(),
                "a snapshot takes the time and disk space of all of the memory (v52 and later \
                 save only what the guest has touched)",
            ),
            (
                self.is_told_image_types(),
                "it detects the format of a disk from its contents, which its guest can change \
                 (v50.1 and later are told that it is raw)",
            ),
            (
                self.leaves_taps_alone(),
                "sandboxes with a network do not run on it, because it would change the address \
                 of the guest's device (v49 and later do not)",
            ),
            (
                self.resumes_vcpus_last(),
                "a wake that fails in its last step loses the guest (with v52 and later it stays \
                 asleep)",
            ),
        ]
        .into_iter()
        .filter_map(|(has, lack)| (!has).then_some(lack))
        .collect()
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "v{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_program_and_its_answers_write_them() {
        let version = |major, minor| Some(Version { major, minor });
        assert_eq!(Version::parse("53.0.0"), version(53, 0));
        assert_eq!(Version::parse("v50.1"), version(50, 1));
        assert_eq!(Version::parse("v53.0-246-gae44c2971\n"), version(53, 0));
        assert_eq!(Version::parse("52"), version(52, 0));
        assert_eq!(Version::parse("unknown"), None);
        assert_eq!(Version::parse(""), None);
    }

    #[test]
    fn what_a_version_lacks_is_told_and_the_newest_lacks_nothing() {
        assert_eq!(Version::parse("44.0").unwrap().lacks().len(), 4);
        assert_eq!(Version::parse("49.0").unwrap().lacks().len(), 3);
        assert_eq!(Version::parse("50.0").unwrap().lacks().len(), 3);
        assert_eq!(Version::parse("51.1").unwrap().lacks().len(), 2);
        assert!(Version::parse("52.0").unwrap().lacks().is_empty());
        assert!(Version::parse("100.0").unwrap().lacks().is_empty());
    }
}
