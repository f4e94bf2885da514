//! What the disks of a guest have read and written, by what the kernel counts of its VMM.

use std::io;

use super::Live;
use crate::{
    sandbox::{NetMode, Spec},
    vmm::DiskTraffic,
};

/// What a VMM reads and writes before each frame of the guest's device: the header of virtio 1.
const FRAME_HEADER_BYTES: u64 = 12;

impl Live {
    /// Returns the bytes that its disks have read and written; `None` where it has none. `tap` is
    /// the name of its network device.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn disk_bytes(&self, spec: &Spec, tap: &str) -> io::Result<Option<u64>> {
        if spec.disks.is_empty() {
            return Ok(None);
        }
        let all = self.process.io()?;
        match self.disk_traffic {
            DiskTraffic::Calls => {
                let has_net = spec.net != NetMode::None;
                let frames = if has_net { self.process.frames(tap)? } else { None };
                let of_frames = frames.map_or(0, |frames| {
                    frames.bytes.saturating_add(frames.count.saturating_mul(FRAME_HEADER_BYTES))
                });
                Ok(Some(all.call_bytes.saturating_sub(of_frames)))
            }
            DiskTraffic::Blocks { vcpus: None } => Ok(Some(all.block_bytes)),
            DiskTraffic::Blocks { vcpus: Some(prefix) } => {
                // These are counted later than all together, so the difference may be a little
                // less than it was a moment ago, and never more.
                let of_memory = self.process.io_of_threads(prefix)?;
                Ok(Some(all.block_bytes.saturating_sub(of_memory.block_bytes)))
            }
        }
    }
}
