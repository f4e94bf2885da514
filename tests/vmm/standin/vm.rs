//! A VM: its guest, its devices, and the state it is in.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use dozed::sys::clock::Stopwatch;
use rustix::fs::{FlockOperation, fcntl_lock};

use crate::{
    api::stall,
    config::{Disk, ImageType, Payload, VmConfig},
    failure::{Failure, Within},
    guest::{Guest, Registers},
    knobs::Knobs,
    memory::{Memory, copy_dense},
    serial::Serial,
    server::Waker,
    tap,
    vsock::Vsock,
};

/// How much is loaded at a time of what nobody demands.
const FILL_BYTES: usize = 1 << 20;
/// How often to look whether the test still wants it to go on loading.
const LOADING_LOOK: Duration = Duration::from_millis(10);

/// What state a VM is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VmState {
    Created,
    Running,
    Shutdown,
    Paused,
}

impl VmState {
    /// Refuses a step that a VM cannot take.
    pub(crate) fn check(self, to: Self) -> Result<(), Failure> {
        let possible = match self {
            Self::Created => to != Self::Created,
            Self::Running => matches!(to, Self::Paused | Self::Shutdown),
            Self::Shutdown => to == Self::Running,
            Self::Paused => matches!(to, Self::Running | Self::Shutdown),
        };
        let said = format!("Invalid transition: InvalidStateTransition({self:?}, {to:?})");
        if possible { Ok(()) } else { Err(Failure::new(&said)) }
    }
}

/// A VM that was made.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) state: VmState,
    pub(crate) guest: Guest,
    pub(crate) memory: Arc<Memory>,
    serial: Arc<Serial>,
    disks: Vec<(Disk, File)>,
    vsock: Option<Vsock>,
    /// Nobody else has them meanwhile.
    _taps: Vec<Option<OwnedFd>>,
    /// Whether memory is still being filled behind the guest.
    pub(crate) filling: Arc<AtomicBool>,
}

impl Vm {
    /// Makes a VM whose guest does not run. The memory is there already: a mistake in the
    /// devices is found only after all of it was read.
    pub(crate) fn make(
        config: &VmConfig,
        memory: Memory,
        registers: Registers,
        state: VmState,
        serial: Arc<Serial>,
        (knobs, waker): (&Knobs, Waker),
    ) -> Result<Self, Failure> {
        config.validate()?;
        let disks = config.disks.iter().flatten().map(open_disk);
        let disks = disks.collect::<Result<_, _>>().within("Error from device manager")?;
        // A boot comes after it has shut itself in, and a restore before.
        let shut_in = config.landlock_enable && state == VmState::Created;
        let taps = config.net.iter().flatten().map(|net| tap::open(net, shut_in, knobs));
        let taps = taps.collect::<Result<Vec<_>, _>>().within("Error from device manager")?;
        let vsock = config.vsock.as_ref().map(Vsock::listen).transpose();
        let vsock = vsock.within("Error from device manager")?;
        let memory = Arc::new(memory);
        let reports = config.balloon.as_ref().is_some_and(|balloon| balloon.free_page_reporting);
        let (its_memory, port) = (Arc::clone(&memory), Arc::clone(&serial));
        let guest = Guest::new(registers, its_memory, port, waker, reports)?;
        if let Some(vsock) = &vsock {
            vsock.serve(&guest.awake())?;
        }
        let filling = Arc::new(AtomicBool::new(false));
        Ok(Self { state, guest, memory, serial, disks, vsock, _taps: taps, filling })
    }

    /// Locks the disks, against other processes.
    pub(crate) fn lock_disks(&self) -> Result<(), Failure> {
        for (disk, image) in &self.disks {
            let (word, operation) = if disk.readonly {
                ("Read", FlockOperation::NonBlockingLockShared)
            } else {
                ("Write", FlockOperation::NonBlockingLockExclusive)
            };
            let path = disk.path.as_deref().unwrap_or(Path::new(""));
            let said = format!("Failed to get {word} lock for disk image: {}", path.display());
            fcntl_lock(image, operation)
                .map_err(|_| Failure::new("The file is already locked"))
                .within(&said)
                .within("Error locking disk image")
                .within("Error locking disk images: Another instance likely holds a lock")?;
        }
        Ok(())
    }

    /// Lets the guest run, or stops it.
    pub(crate) fn go(&mut self, to: VmState) {
        self.guest.set_running(to == VmState::Running);
        self.state = to;
    }

    /// Fills all of memory in the background, holes as well, which takes as long as `knobs` say.
    pub(crate) fn fill(&self, knobs: Knobs) -> Result<(), Failure> {
        let (memory, filling) = (Arc::clone(&self.memory), Arc::clone(&self.filling));
        let brake = self.guest.brake();
        filling.store(true, Ordering::SeqCst);
        thread::Builder::new().name("prefault".to_owned()).spawn(move || {
            for region in &memory.regions {
                for at in (0..region.bytes).step_by(FILL_BYTES) {
                    let bytes = (region.bytes - at).min(FILL_BYTES as u64);
                    // What the guest writes meanwhile would be lost.
                    brake
                        .hold(|| copy_dense(&region.file, at, &region.file, at, bytes))
                        .expect("memory can be written to");
                }
            }
            let since = Stopwatch::start();
            while since.elapsed() < knobs.loading() {
                stall(LOADING_LOOK);
            }
            filling.store(false, Ordering::SeqCst);
        })?;
        Ok(())
    }

    /// Ends it in an orderly way, which removes its sockets.
    pub(crate) fn shut_down(self) {
        self.guest.set_running(false);
        self.serial.close();
        if let Some(vsock) = self.vsock {
            vsock.remove();
        }
    }
}

/// Refuses a kernel that is not there or is none.
pub(crate) fn check_payload(payload: &Payload) -> Result<(), Failure> {
    if let Some(initramfs) = &payload.initramfs {
        File::open(initramfs).within("Cannot open initramfs file")?;
    }
    let Some(kernel) = &payload.kernel else {
        return Err(Failure::new("the stand-in has no firmware"));
    };
    let mut head = Vec::new();
    let file = File::open(kernel).within("Cannot open kernel file")?;
    file.take(0x206).read_to_end(&mut head)?;
    if head.starts_with(b"\x7fELF") || head.get(0x202..) == Some(b"HdrS") {
        return Ok(());
    }
    Err(Failure::new("Invalid Elf magic number").within("Cannot load the kernel into memory"))
}

fn open_disk(disk: &Disk) -> Result<(Disk, File), Failure> {
    let path = disk.path.as_ref().ok_or_else(|| Failure::new("No disk path was specified"))?;
    let image = OpenOptions::new().read(true).write(!disk.readonly).open(path);
    let image = image.within("Cannot open disk path")?;
    match disk.image_type {
        ImageType::Raw | ImageType::Unknown => Ok((disk.clone(), image)),
        ImageType::Qcow2 | ImageType::FixedVhd | ImageType::Vhdx => {
            Err(Failure::new("the stand-in has raw images only").within("Cannot open disk path"))
        }
    }
}
