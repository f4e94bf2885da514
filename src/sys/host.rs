//! Facts about the host and the identity of this process.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    sync::OnceLock,
};

use rustix::fs::{Access, access};

/// Returns the release of the running kernel, such as `6.1.0-18-amd64`.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Returns whether this process is root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns whether this process has CAP_NET_ADMIN.
#[must_use]
pub fn may_configure_networks() -> bool {
    let sets = rustix::thread::capabilities(None);
    sets.is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::NET_ADMIN))
}

/// Checks that files can be created in `dir`.
pub fn writable(dir: &Path) -> io::Result<()> {
    Ok(access(dir, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// The first processor's entry is shorter.
const CPUINFO_MAX_BYTES: u64 = 4096;

/// Returns the model name of the first processor, or `unknown` if it has none.
pub fn cpu_model() -> io::Result<&'static str> {
    // It never changes, and the kernel generates the file for each reader.
    static KNOWN: OnceLock<String> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(known);
    }
    let mut cpuinfo = Vec::new();
    File::open("/proc/cpuinfo")?.take(CPUINFO_MAX_BYTES).read_to_end(&mut cpuinfo)?;
    let cpuinfo = String::from_utf8_lossy(&cpuinfo);
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown", |(_, name)| name.trim()).to_owned();
    Ok(KNOWN.get_or_init(|| model))
}

/// Returns the user and the group that we act as.
#[must_use]
pub fn own_ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Returns 32 random hexadecimal digits.
pub fn random_name() -> std::io::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(name.chars().filter(char::is_ascii_hexdigit).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_the_same_here_as_in_proc() {
        let told = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(kernel_release(), told.trim());
    }

    #[test]
    fn a_directory_that_is_not_there_is_told_from_one_that_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        assert!(writable(dir.path()).is_ok());
        assert!(writable(Path::new("/no/such")).is_err());
    }
}
