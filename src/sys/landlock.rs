//! Whether processes can shut themselves in to some paths (`landlock(7)`).

/// Returns the version of Landlock that the kernel has; 0 if it has none, or it is off.
#[must_use]
pub fn abi() -> u32 {
    const GIVE_VERSION: libc::c_uint = 1;
    let no_attributes = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no attributes, and wants null and 0 for them;
    // it makes nothing and returns a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, no_attributes, 0_usize, GIVE_VERSION)
    };
    u32::try_from(version).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_one_that_a_kernel_could_have() {
        // They were at 7 in 2025, and have come one or two a year.
        assert!(abi() < 100, "{}", abi());
        assert_eq!(abi(), abi());
    }
}
