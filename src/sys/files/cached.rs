//! What the kernel caches of a file, and making it forget.

use std::{fs::File, io, os::fd::AsRawFd};

/// Asks the kernel to forget what it caches of `file`. What is dirty stays.
pub fn drop_cache(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// The number of cachestat(2), the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of linux/mman.h. A length of nought means up to the end.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// `struct cachestat` of linux/mman.h, in pages.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Returns how many bytes of `file` are in the page cache; `None` where the kernel does
/// not tell (before Linux 6.5).
#[must_use]
pub fn cached_bytes(file: &File) -> Option<u64> {
    let range = Range { offset: 0, len: 0 };
    let mut counts = Counts::default();
    // SAFETY: the call reads `range` and fills `counts`, both of which are laid out as the
    // kernel's and outlive it; it keeps no pointer.
    let done = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut counts, 0)
    };
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    (done == 0).then(|| counts.cached * page)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_on_the_disk_is_forgotten_when_we_ask() {
        let temp =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let mut file = File::create(temp.path().join("file")).unwrap();
        file.write_all(&[1; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        let Some(cached) = cached_bytes(&file) else {
            let release = crate::sys::host::kernel_release();
            assert!(release.starts_with("5.") || release.starts_with("6."), "{release}");
            return;
        };
        assert_eq!(cached, 1 << 20);
        drop_cache(&file).unwrap();
        assert_eq!(cached_bytes(&file), Some(0));
    }
}
