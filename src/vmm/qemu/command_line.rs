//! The arguments that QEMU is started with. Pure: a plan goes in, arguments come out.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::RawFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use super::{Accelerator, console};
use crate::vmm::{DiskKind, Plan, PlannedNic};

/// The machine type. It is small, and has nothing that a sandbox does not use.
pub(super) const MACHINE: &str = "microvm";

/// The number of the layout that is made here: which devices there are, and where. A
/// snapshot loads only into the layout that it was saved from, so a change of it gets
/// the next number, and sleepers of the old one are refused with a sentence.
pub(super) const LAYOUT: u32 = 1;

/// How many virtio-mmio devices the machine takes, with the one I/O APIC that KVM gives.
/// TCG would offer a second one with more, but interrupts of its first line are lost.
const TRANSPORTS: usize = 8;
/// The transports that do not go to disks.
const BALLOON_TRANSPORT: usize = 0;
const ENTROPY_TRANSPORT: usize = 1;
/// Only a machine with a network device has this one taken.
const NIC_TRANSPORT: usize = 2;

/// What the machine is to begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beginning<'a> {
    /// The first instruction of this kernel. Its command line, which may have secrets, is not
    /// among the arguments, which everybody on the host may read: QEMU waits until it is told.
    Boot { kernel: &'a Path },
    /// A snapshot. Everything that the kernel's files gave the machine is in its memory
    /// and state, so neither need they be there any more nor be as they were.
    Restore,
}

/// Returns the arguments. QMP listens on the socket that is descriptor 0, and the plan's tap
/// is open as `tap`.
pub(super) fn arguments(
    plan: &Plan,
    accelerator: Accelerator,
    beginning: Beginning<'_>,
    tap: Option<RawFd>,
) -> Vec<OsString> {
    let mut args = Arguments::default();
    args.add("-name", format!("guest={}", plan.token));
    // Nothing that we do not name, and nothing read from a file of the host's.
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.add("-display", "none");
    // A guest that resets its machine leaves, as does one that switches it off.
    args.flag("-no-reboot");
    // Not one instruction before we say so.
    args.flag("-S");
    args.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    args.add_machine(plan, accelerator);
    // It waits for us before it makes anything. Otherwise the main thread accepts our connection
    // while the monitor's thread sets it up, which on a busy host may greet us twice, or read
    // the connection in both threads; see docs/qemu.md.
    args.add("-chardev", "socket,id=qmp,fd=0,server=on,wait=on");
    args.add("-mon", "chardev=qmp,mode=control");
    args.add_console(plan);
    args.add_devices(plan);
    if let Some((nic, tap)) = plan.nic.as_ref().zip(tap) {
        args.add_nic(nic, tap);
    }
    match beginning {
        Beginning::Boot { kernel } => {
            args.flag("--preconfig");
            args.add("-kernel", kernel);
            if let Some(initramfs) = &plan.initramfs {
                args.add("-initrd", initramfs);
            }
        }
        Beginning::Restore => args.add("-incoming", "defer"),
    }
    args.0
}

/// Returns the kernel's command line as the guest is to see it. `tsc_khz` is given where
/// the guest must be told the counter's frequency because it cannot measure it: on this
/// machine without KVM a busy host makes the measurement fail, and the kernel hang.
pub(super) fn kernel_cmdline(cmdline: &str, tsc_khz: Option<u32>) -> String {
    const WORD: &str = "tsc_early_khz=";
    match tsc_khz {
        Some(khz) if !cmdline.split(' ').any(|word| word.starts_with(WORD)) => {
            format!("{cmdline} {WORD}{khz}").trim_start().to_owned()
        }
        Some(_) | None => cmdline.to_owned(),
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn add(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.flag(name);
        self.0.push(value.as_ref().to_owned());
    }

    fn add_machine(&mut self, plan: &Plan, accelerator: Accelerator) {
        self.add("-accel", accelerator.word());
        self.add("-cpu", accelerator.cpu());
        // Debian's kernel finds virtio-mmio devices by ACPI only. A core file of QEMU has no
        // memory of the guest.
        self.add(
            "-machine",
            format!("{MACHINE},acpi=on,rtc=on,ioapic2=off,memory-backend=mem,dump-guest-core=off"),
        );
        // Virtio 1, rather than the draft that came before it.
        self.add("-global", "virtio-mmio.force-legacy=false");
        self.add("-smp", plan.vcpus.to_string());
        self.add("-m", format!("size={}B", plan.memory_bytes));
        // Shared, so that the file is the guest's memory: nothing is copied at a sleep
        // or a wake, and what the guest gives back becomes a hole in it.
        self.add(
            "-object",
            option(
                &format!("memory-backend-file,id=mem,size={}", plan.memory_bytes),
                &[("share", OsStr::new("on")), ("mem-path", plan.memory.as_os_str())],
            ),
        );
    }

    fn add_console(&mut self, plan: &Plan) {
        self.add(
            "-chardev",
            option(
                "pipe,id=serial,logappend=on",
                &[
                    ("path", console::path(&plan.runtime_dir).as_os_str()),
                    ("logfile", plan.console_log.as_os_str()),
                ],
            ),
        );
        self.add("-serial", "chardev:serial");
    }

    fn add_devices(&mut self, plan: &Plan) {
        for (index, disk) in plan.disks.iter().enumerate() {
            // Linux finds the transports from the last to the first, so this one is vda.
            // Past the sixth disk, or with a network device the fifth, the transport is taken,
            // and QEMU says so.
            let transport = TRANSPORTS.saturating_sub(1 + index);
            let read_only = if disk.kind.is_readonly() { "on" } else { "off" };
            // An image that many read is nobody's to lock: by default a lock that a stranger
            // has on it would keep its guests from starting.
            let (driver, locking) = match disk.kind {
                DiskKind::Own => ("file", "auto"),
                DiskKind::Shared => ("file", "off"),
                DiskKind::SharedDevice => ("host_device", "off"),
            };
            // Through the host's page cache, so that memory is given to whoever needs it.
            // A guest's flush is an fdatasync, and so is the end of a pause and of a save:
            // what the guest or a snapshot counts on is on the disk.
            self.add(
                "-blockdev",
                option(
                    &format!(
                        "driver=raw,node-name=disk{index},read-only={read_only},discard=unmap"
                    ),
                    &[
                        ("file.driver", OsStr::new(driver)),
                        ("file.filename", disk.path.as_os_str()),
                        ("file.locking", OsStr::new(locking)),
                    ],
                ),
            );
            // An error of the host's disk is the guest's to deal with. By default QEMU
            // pauses the guest when the host's disk is full, and nobody would resume it.
            self.add(
                "-device",
                format!(
                    "virtio-blk-device,drive=disk{index},bus=virtio-mmio-bus.{transport},\
                     rerror=report,werror=report"
                ),
            );
        }
        self.add("-object", "rng-random,id=entropy,filename=/dev/urandom");
        self.add(
            "-device",
            format!("virtio-rng-device,rng=entropy,bus=virtio-mmio-bus.{ENTROPY_TRANSPORT}"),
        );
        // Without one its transport stays free, so that nothing else has another place.
        if plan.balloon {
            self.add(
                "-device",
                format!(
                    "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on,\
                     bus=virtio-mmio-bus.{BALLOON_TRANSPORT}"
                ),
            );
        }
    }

    fn add_nic(&mut self, nic: &PlannedNic, tap: RawFd) {
        // Its frames go through QEMU, which is shut in, and not through a thread of the
        // kernel's (vhost).
        self.add("-netdev", format!("tap,id=net0,fd={tap},vhost=off"));
        // A guest need not tell its neighbours that it is back: there is one, who knows.
        self.add(
            "-device",
            format!(
                "virtio-net-device,netdev=net0,mac={},guest_announce=off,\
                 bus=virtio-mmio-bus.{NIC_TRANSPORT}",
                nic.mac
            ),
        );
    }
}

/// Appends values to the `start` of an option, in which a comma separates two of them
/// and a comma that belongs to a value is doubled.
fn option(start: &str, values: &[(&str, &OsStr)]) -> OsString {
    let mut bytes = start.as_bytes().to_vec();
    for (key, value) in values {
        bytes.push(b',');
        bytes.extend_from_slice(key.as_bytes());
        bytes.push(b'=');
        for byte in value.as_bytes() {
            bytes.push(*byte);
            if *byte == b',' {
                bytes.push(b',');
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_end_it() {
        assert_eq!(
            option("file", &[("a", OsStr::new("/x,y z")), ("b", OsStr::new(","))]),
            OsStr::new("file,a=/x,,y z,b=,,")
        );
    }

    #[test]
    fn the_counter_frequency_is_told_unless_the_command_line_tells_it() {
        assert_eq!(kernel_cmdline("quiet", Some(7)), "quiet tsc_early_khz=7");
        assert_eq!(kernel_cmdline("", Some(7)), "tsc_early_khz=7");
        assert_eq!(kernel_cmdline("tsc_early_khz=5 quiet", Some(7)), "tsc_early_khz=5 quiet");
        assert_eq!(kernel_cmdline("quiet", None), "quiet");
    }
}
