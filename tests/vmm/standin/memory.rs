//! Guest memory: files in memory, or files of the host where a zone names one.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    thread,
};

use rustix::{
    fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, memfd_create, seek},
    io::Errno,
    process::{Signal, getpid, kill_process},
};

use crate::{
    config::{MemoryConfig, Zone},
    failure::{Failure, Within},
};

const COPY_BYTES: usize = 1 << 20;

/// All of a guest's memory, from address nought on and without a hole.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) regions: Vec<Region>,
}

/// A piece of it.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) file: File,
    /// Whether it is mapped so that the file has what the guest writes.
    pub(crate) shared: bool,
}

impl Memory {
    /// Makes the memory that is described.
    pub(crate) fn make(config: &MemoryConfig) -> Result<Self, Failure> {
        let zones = config.zones.as_deref().unwrap_or_default();
        if config.hugepages || (config.size == 0) == zones.is_empty() {
            return Err(Failure::new("Memory configuration is not valid"));
        }
        let mut regions = Vec::new();
        if zones.is_empty() {
            let (bytes, shared) = (config.size, config.shared);
            regions.push(Region { start: 0, bytes, file: anonymous(bytes)?, shared });
        }
        let mut start = 0;
        for zone in zones {
            regions.push(Region::of_zone(start, zone)?);
            start += zone.size;
        }
        Ok(Self { regions })
    }

    /// Returns its size.
    pub(crate) fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// Reads guest memory, which is in one region.
    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let region = self.region(at)?;
        region.end_where_there_is_no_file(at + bytes.len() as u64)?;
        region.file.read_exact_at(bytes, at - region.start)
    }

    /// Writes guest memory, which is in one region.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let region = self.region(at)?;
        region.end_where_there_is_no_file(at + bytes.len() as u64)?;
        region.file.write_all_at(bytes, at - region.start)
    }

    /// Gives pages back to the host.
    pub(crate) fn punch(&self, at: u64, bytes: u64) -> io::Result<()> {
        let region = self.region(at)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&region.file, flags, at - region.start, bytes)?)
    }

    fn region(&self, at: u64) -> io::Result<&Region> {
        let region = self.regions.iter().find(|r| at >= r.start && at - r.start < r.bytes);
        region.ok_or_else(|| io::Error::other(format!("no memory at {at:#x}")))
    }
}

impl Region {
    fn of_zone(start: u64, zone: &Zone) -> Result<Self, Failure> {
        let bytes = zone.size;
        if zone.hugepages {
            return Err(Failure::new("Memory configuration is not valid"));
        }
        let Some(path) = &zone.file else {
            return Ok(Self { start, bytes, file: anonymous(bytes)?, shared: zone.shared });
        };
        let file = open_backing(path, zone.shared)?;
        if zone.shared {
            return Ok(Self { start, bytes, file, shared: true });
        }
        // Mapped privately, the file is read and never written to.
        let own = anonymous(bytes)?;
        copy_sparse(&file, 0, &own, 0, bytes)?;
        Ok(Self { start, bytes, file: own, shared: false })
    }

    /// Ends the process as the kernel does, where memory up to `end` is used that its file
    /// is too short for. Nobody looks at how long the file is before.
    fn end_where_there_is_no_file(&self, end: u64) -> io::Result<()> {
        if self.file.metadata()?.len() >= end - self.start {
            return Ok(());
        }
        loop {
            // The first only undoes what Rust does about this signal.
            kill_process(getpid(), Signal::BUS)?;
            thread::yield_now();
        }
    }

    /// Says whether a snapshot leaves it out, as its file has it already.
    pub(crate) fn is_persistent(&self) -> io::Result<bool> {
        Ok(self.shared && self.file.metadata()?.nlink() > 0)
    }
}

fn anonymous(bytes: u64) -> Result<File, Failure> {
    let file = File::from(memfd_create("ch_ram", MemfdFlags::CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

fn open_backing(path: &Path, shared: bool) -> Result<File, Failure> {
    path.metadata().within("Failed to stat filesystem")?;
    if path.is_dir() {
        let said = "Using a directory as a backing file for memory is not supported";
        return Err(Failure::new(said));
    }
    let file = OpenOptions::new().read(true).write(shared).open(path);
    file.within("Failed to create shared file")
}

/// Copies what is not a hole. As the real one, it takes the end of a file that is too
/// short for one.
pub(crate) fn copy_sparse(
    from: &File,
    from_at: u64,
    to: &File,
    to_at: u64,
    bytes: u64,
) -> io::Result<()> {
    let (mut at, end) = (from_at, from_at + bytes);
    while at < end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(from, SeekFrom::Hole(data))?.min(end);
        copy_dense(from, data, to, to_at + (data - from_at), hole - data)?;
        at = hole;
    }
    Ok(())
}

/// Copies every byte.
pub(crate) fn copy_dense(
    from: &File,
    from_at: u64,
    to: &File,
    to_at: u64,
    bytes: u64,
) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < bytes {
        let step = usize::try_from(bytes - done).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        from.read_exact_at(&mut buffer[..step], from_at + done)?;
        to.write_all_at(&buffer[..step], to_at + done)?;
        done += step as u64;
    }
    Ok(())
}
