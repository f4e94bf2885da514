//! What a driver has to know of a sandbox.

use std::path::Path;

use super::{Entry, Error, Lifecycle, error::host_failed, files::Files};
use crate::{
    machines::Live,
    sandbox::{NetMode, Record, Spec},
    snapshot,
    sync::Arc,
    sys::cancel::Cancel,
    vmm::{Machine, Plan, PlannedNic, PlannedVsock, VmmIdentity},
};

/// Says everything that a driver has to know; `run` is the directory of its memory, and
/// `nic` its network device, where one is to be opened.
pub(super) fn plan(
    lifecycle: &Lifecycle,
    record: &Record,
    run: &Path,
    files: &Files,
    nic: Option<PlannedNic>,
    cancel: &Arc<Cancel>,
) -> Result<Plan, Error> {
    let home = lifecycle.store.home(record);
    let made = lifecycle.store.make_runtime_dir(record);
    let runtime_dir = made.map_err(|source| Error::Host {
        doing: "making the directory for the sockets of",
        id: record.id.clone(),
        source,
    })?;
    let disks = record.spec.disks.iter().enumerate();
    let disks = disks.map(|(number, disk)| files.planned(disk, home.disk(number)));
    Ok(Plan {
        id: record.id.clone(),
        token: lifecycle.store.token(record.row),
        user: lifecycle.vmms.user_of(record),
        vcpus: record.spec.vcpus,
        memory_bytes: record.spec.memory_bytes,
        memory_mode: record.spec.memory_mode,
        restore_mode: record.spec.restore_mode,
        kernel: record.spec.kernel.as_deref().and_then(|path| files.path(path)),
        initramfs: record.spec.initramfs.as_deref().and_then(|path| files.path(path)),
        cmdline: record.spec.cmdline.clone(),
        disks: disks.collect(),
        balloon: record.spec.balloon,
        vsock: record.spec.vsock.then(|| PlannedVsock::new(&runtime_dir, record.owner)),
        nic,
        memory: run.join(snapshot::MEMORY),
        runtime_dir,
        console_log: home.console_log(),
        vmm_log: home.vmm_log(),
        held: files.held(),
        cancel: Arc::clone(cancel),
    })
}

pub(super) fn enter(
    lifecycle: &Lifecycle,
    entry: &Entry,
    machine: Box<dyn Machine>,
) -> Result<Arc<Live>, Error> {
    lifecycle.activity.guest_starts(entry.row());
    let added = lifecycle.machines.add(entry.row(), machine);
    added.map_err(host_failed(entry, "watching the VMM of"))
}

/// Says which machine a VMM makes of `spec`, in so far as a snapshot of one does not load
/// into another. What has the devices that there were from the start is called as then.
pub(super) fn machine_of(spec: &Spec, vmm: &VmmIdentity) -> String {
    let balloon = if spec.balloon { "" } else { ", no balloon" };
    let vsock = if spec.vsock { ", vsock" } else { "" };
    let nic = if spec.net == NetMode::None { "" } else { ", network" };
    format!("{}{balloon}{vsock}{nic}", vmm.machine)
}

/// Names a VMM as `status` shows it.
pub(super) fn named(identity: &VmmIdentity) -> Box<str> {
    format!("{} {}", identity.name, identity.version).into()
}
