//! The checks, one function for each line of the report.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::{Finding, Verdict};
use crate::{
    config, net,
    sandbox::{Spec, network::AddressPlan},
    sys::{command, files, host, kvm, mount},
    vmm::{self, Vmm, cloud_hypervisor::CloudHypervisor},
};

const VERSION_LIMIT: Duration = Duration::from_secs(5);
const DAEMON_LIMIT: Duration = Duration::from_secs(5);
/// Waiting for a pidfd.
const KERNEL_NEEDED: (u32, u32) = (5, 4);
/// Unique inodes of pidfds, by which processes are told apart.
const KERNEL_WANTED: (u32, u32) = (6, 9);
const SPACE_WANTED_BYTES: u64 = 1 << 30;

pub(super) fn kernel() -> Finding {
    judge_kernel(&host::kernel_release())
}

fn judge_kernel(release: &str) -> Finding {
    let subject = "kernel";
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if version < KERNEL_NEEDED {
        let (major, minor) = KERNEL_NEEDED;
        failed(subject, format!("Linux {release} is too old; run {major}.{minor} or later."))
    } else if version < KERNEL_WANTED {
        let (major, minor) = KERNEL_WANTED;
        let says = format!(
            "Linux {release} distinguishes processes only by their start time; \
             {major}.{minor} or later is better."
        );
        lacking(subject, says)
    } else {
        well(subject, format!("Linux {release}."))
    }
}

pub(super) fn user() -> Finding {
    if host::is_root() {
        well("user", "This is root.")
    } else {
        failed("user", "This is not root; run `dozed doctor` and `dozed run` as root.")
    }
}

pub(super) fn fuse() -> Finding {
    match open(Path::new("/dev/fuse")) {
        Ok(()) => well("/dev/fuse", "It can be opened."),
        Err(error) => {
            failed("/dev/fuse", format!("It cannot be opened ({error}); {}.", mend(&error, "fuse")))
        }
    }
}

pub(super) fn qemu(config: &config::Vmm) -> Finding {
    match version("qemu-system-x86_64", config.qemu.as_deref()) {
        Ok(says) => well("qemu", says),
        Err(why) if kvm::usable().is_ok() && find_cloud_hypervisor(config).is_ok() => {
            lacking("qemu", format!("{why}; sandboxes with `vmm` = \"qemu\" cannot run."))
        }
        Err(why) => {
            failed("qemu", format!("{why}; install it (on Debian: `apt install qemu-system-x86`)."))
        }
    }
}

pub(super) fn cloud_hypervisor(config: &config::Vmm) -> Finding {
    let subject = "cloud-hypervisor";
    let says = match version(subject, config.cloud_hypervisor.as_deref()) {
        Ok(says) => says,
        Err(why) => return well(subject, format!("{why}; QEMU is used instead.")),
    };
    match find_cloud_hypervisor(config) {
        Ok(cloud) => {
            let version = cloud.identity().map(|is| is.version.clone()).unwrap_or_default();
            let mut lacks = cloud.lacks(&version);
            lacks.extend(cloud.why_no_users().filter(|_| config.users.is_some()));
            judge_cloud_hypervisor(&says, kvm::usable(), &lacks)
        }
        Err(error) => {
            lacking(subject, format!("{}; QEMU is used instead.", capital(&error.to_string())))
        }
    }
}

fn find_cloud_hypervisor(config: &config::Vmm) -> Result<CloudHypervisor, vmm::Error> {
    config.cloud_hypervisor.clone().map_or_else(CloudHypervisor::find, CloudHypervisor::at)
}

fn judge_cloud_hypervisor(says: &str, kvm: Result<(), String>, lacks: &[&str]) -> Finding {
    let subject = "cloud-hypervisor";
    let used = match kvm {
        Ok(()) => "`vmm = \"auto\"` selects it.",
        Err(_) => "Without hardware virtualisation only `vmm = \"cloud-hypervisor\"` selects it.",
    };
    let says = format!("{says} {used}");
    if lacks.is_empty() {
        well(subject, says)
    } else {
        lacking(subject, format!("{says} Its limitations: {}.", lacks.join("; ")))
    }
}

/// Returns a sentence with path and version of the program, or the start of one that says
/// what is wrong with it.
fn version(name: &str, configured: Option<&Path>) -> Result<String, String> {
    let program = configured
        .map(Path::to_owned)
        .or_else(|| command::find(name))
        .ok_or_else(|| format!("{name} is not installed"))?;
    let place = program.display();
    let output = command::output(&program, &["--version"], VERSION_LIMIT)
        .map_err(|error| format!("{place} does not print its version ({error})"))?;
    let first = output.stdout.lines().next().unwrap_or_default().trim();
    if output.status.success() && !first.is_empty() {
        Ok(format!("{place} is {first}."))
    } else {
        Err(format!("{place} does not run ({})", output.status))
    }
}

pub(super) fn virtualisation() -> Finding {
    let subject = "virtualisation";
    match kvm::usable() {
        Ok(()) => well(subject, "/dev/kvm works with VT-x or AMD-V."),
        Err(why) => {
            let says = format!("{}; for speed, run on a host with VT-x or AMD-V.", capital(&why));
            lacking(subject, says)
        }
    }
}

pub(super) fn store(store: &Path) -> Finding {
    let there = nearest(store);
    let fs_type = match mount::mount_of(&there) {
        Ok(Some(info)) => info.fs_type,
        Ok(None) | Err(_) => "unknown".into(),
    };
    judge_store(store, &fs_type, host::writable(&there))
}

fn judge_store(store: &Path, fs_type: &OsStr, writable: io::Result<()>) -> Finding {
    let kind = fs_type.display();
    let place = store.display();
    let mend = "set `store` to a directory on a local disk";
    if mount::is_network_fs(fs_type) {
        failed("store", format!("{place} is on {kind}, a network file system; {mend}."))
    } else if let Err(error) = writable {
        let mend = if is_denied(&error) { RUN_AS_ROOT } else { mend };
        failed("store", format!("{place} is not writable ({error}); {mend}."))
    } else if fs_type == "tmpfs" || fs_type == "ramfs" {
        let says = format!(
            "{place} is on {kind}, so sleeping sandboxes use RAM and are lost at a reboot; {mend}."
        );
        lacking("store", says)
    } else {
        well("store", format!("{place} is on {kind}."))
    }
}

pub(super) fn space(store: &Path, memory_bytes: u64) -> Finding {
    match files::free_bytes(&nearest(store)) {
        Ok(free) => judge_space(free, memory_bytes),
        Err(error) => {
            lacking("space", format!("Free space could not be read ({error}); check the disk."))
        }
    }
}

fn judge_space(free_bytes: u64, memory_bytes: u64) -> Finding {
    let free = free_bytes >> 20;
    let memory = memory_bytes >> 20;
    if free_bytes < memory_bytes.max(SPACE_WANTED_BYTES) {
        let says = format!(
            "{free} MiB are free, and a sleeping sandbox takes up to {memory} MiB; \
             free some, or set `store` to a directory on a larger disk."
        );
        lacking("space", says)
    } else {
        well("space", format!("{free} MiB are free; a sleeping sandbox takes up to {memory} MiB."))
    }
}

pub(super) fn reflink(store: &Path) -> Finding {
    if files::reflink_works(&nearest(store)) {
        well("reflink", "Copies of disks share their blocks.")
    } else {
        lacking(
            "reflink",
            "Disks are copied in full at the first wake; with the store on XFS or Btrfs, copies \
             share their blocks.",
        )
    }
}

pub(super) fn template(template: &Spec) -> Finding {
    match &template.kernel {
        Some(kernel) => well("template", format!("New sandboxes boot {}.", kernel.display())),
        None => lacking(
            "template",
            "It has no `kernel`, so each sandbox needs one in its `config`; set `kernel` in \
             `[template]` of the configuration.",
        ),
    }
}

pub(super) fn tun() -> Finding {
    match open(Path::new("/dev/net/tun")) {
        Ok(()) => well("/dev/net/tun", "It can be opened."),
        Err(error) => lacking(
            "/dev/net/tun",
            format!(
                "It cannot be opened, so sandboxes get no network ({error}); {}.",
                mend(&error, "tun")
            ),
        ),
    }
}

/// Asks the running daemon, if there is one, which privileges it lacks: its service manager may
/// have taken them away.
pub(super) fn daemon(mount: &Path) -> Option<Finding> {
    let path = mount.join("dozed.status");
    // A hung daemon does not answer.
    let (tell, told) = mpsc::channel();
    let reading = thread::Builder::new().name("dozed-status".to_owned()).spawn(move || {
        tell.send(fs::read_to_string(path)).ok();
    });
    let status = reading.ok().and_then(|_| told.recv_timeout(DAEMON_LIMIT).ok());
    match status {
        Some(Ok(status)) => judge_daemon(&status),
        Some(Err(error)) => no_daemon(mount, &error),
        None => {
            let seconds = DAEMON_LIMIT.as_secs();
            let says = format!("It did not answer within {seconds} s; see its log.");
            Some(lacking("daemon", says))
        }
    }
}

/// Tells a daemon that was killed from one that was never started.
fn no_daemon(mount: &Path, error: &io::Error) -> Option<Finding> {
    let place = mount.display();
    (error.kind() == io::ErrorKind::NotConnected).then(|| {
        lacking("daemon", format!("The daemon that mounted {place} is gone; start dozed again."))
    })
}

fn judge_daemon(status: &str) -> Option<Finding> {
    let value =
        |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    let (pid, lacks) = (value("pid")?, value("lacks")?);
    Some(if lacks == "none" {
        well("daemon", format!("It runs (process {pid}) and has all privileges that it needs."))
    } else {
        let mend = "use the dozed.service that comes with this version, or copy its lines";
        let says = format!(
            "It runs (process {pid}), but lacks {lacks}, so sandboxes get no network; {mend}."
        );
        lacking("daemon", says)
    })
}

/// Checks what networks of sandboxes need; sandboxes without one run in any case.
pub(super) fn networks(range: &AddressPlan) -> impl Iterator<Item = Finding> {
    net::survey(range).into_iter().map(|found| {
        let verdict = if found.is_well { Verdict::Well } else { Verdict::Lacking };
        finding(verdict, found.subject, found.says)
    })
}

/// Returns `path` or its nearest existing ancestor.
fn nearest(path: &Path) -> PathBuf {
    path.ancestors().find_map(|path| path.canonicalize().ok()).unwrap_or_else(|| "/".into())
}

const RUN_AS_ROOT: &str = "run this as root";

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied && !host::is_root()
}

/// Says what to do about a device that cannot be opened.
fn mend(error: &io::Error, module: &str) -> String {
    if is_denied(error) {
        RUN_AS_ROOT.to_owned()
    } else {
        format!("run `modprobe {module}`, or pass the device to the container")
    }
}

fn open(device: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(device).map(drop)
}

/// Returns `text` as the start of a sentence.
fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map(|first| first.to_uppercase().chain(rest).collect()).unwrap_or_default()
}

fn well(subject: &'static str, says: impl Into<String>) -> Finding {
    finding(Verdict::Well, subject, says.into())
}

fn lacking(subject: &'static str, says: impl Into<String>) -> Finding {
    finding(Verdict::Lacking, subject, says.into())
}

fn failed(subject: &'static str, says: impl Into<String>) -> Finding {
    finding(Verdict::Failed, subject, says.into())
}

fn finding(verdict: Verdict, subject: &'static str, says: String) -> Finding {
    Finding { verdict, subject, says }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_both_numbers() {
        for (release, verdict) in [
            ("4.19.0", Verdict::Failed),
            ("5.3.18-default", Verdict::Failed),
            ("5.4", Verdict::Lacking),
            ("6.1.0-18-amd64", Verdict::Lacking),
            ("6.10-rc1", Verdict::Well),
            ("7.0", Verdict::Well),
            ("nonsense", Verdict::Failed),
        ] {
            assert_eq!(judge_kernel(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn room_for_less_than_one_sleeper_is_a_warning() {
        assert_eq!(judge_space(4 << 30, 8 << 30).verdict, Verdict::Lacking);
        assert_eq!(judge_space(1 << 20, 256 << 20).verdict, Verdict::Lacking);
        assert_eq!(judge_space(4 << 30, 256 << 20).verdict, Verdict::Well);
    }

    #[test]
    fn a_store_that_cannot_be_written_or_does_not_last_is_told() {
        let judge = |kind: &str, writable| judge_store(Path::new("/s"), kind.as_ref(), writable);
        assert_eq!(judge("ext4", Ok(())).verdict, Verdict::Well);
        assert_eq!(judge("nfs4", Ok(())).verdict, Verdict::Failed);
        let read_only = judge("ext4", Err(io::ErrorKind::ReadOnlyFilesystem.into()));
        assert_eq!(read_only.verdict, Verdict::Failed);
        assert!(read_only.says.contains("read-only"), "{read_only}");
        assert_eq!(store(Path::new("/dev/shm/store")).verdict, Verdict::Lacking, "a tmpfs");
    }

    #[test]
    fn a_daemon_that_is_forbidden_something_is_told_of() {
        let judge = |lacks: &str| judge_daemon(&format!("version 1\npid 7\nlacks {lacks}\n"));
        assert_eq!(judge("none").unwrap().verdict, Verdict::Well);
        let forbidden = judge("CAP_NET_ADMIN; sockets of AF_NETLINK (no)").unwrap();
        assert_eq!(forbidden.verdict, Verdict::Lacking);
        assert!(forbidden.says.contains("process 7") && forbidden.says.contains("AF_NETLINK (no)"));
        assert_eq!(judge_daemon(""), None, "an older one does not say");
    }

    #[test]
    fn the_doctor_tells_of_a_mount_whose_daemon_is_gone() {
        assert_eq!(daemon(Path::new("/no/such/mount")), None);
        let gone = no_daemon(Path::new("/m"), &io::ErrorKind::NotConnected.into()).unwrap();
        assert_eq!(gone.verdict, Verdict::Lacking);
        assert!(gone.says.contains("mounted /m is gone; start dozed"), "{gone}");
    }

    #[test]
    fn a_device_that_is_missing_is_not_a_matter_of_rights() {
        let missing = mend(&io::ErrorKind::NotFound.into(), "fuse");
        assert!(missing.starts_with("run `modprobe fuse`"), "{missing}");
    }

    #[test]
    fn a_template_without_a_kernel_is_a_warning() {
        let with = Spec { kernel: Some("/k".into()), ..Spec::default() };
        assert_eq!(template(&with).verdict, Verdict::Well);
        assert_eq!(template(&Spec::default()).verdict, Verdict::Lacking);
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let why = version("no-such-program", None).unwrap_err();
        assert_eq!(why, "no-such-program is not installed");
    }

    #[test]
    fn cloud_hypervisor_is_told_to_be_used_or_not_and_what_it_lacks() {
        let judge = |kvm: Result<(), String>, lacks: &[&str]| {
            judge_cloud_hypervisor("/bin/ch is v53.0.", kvm, lacks)
        };
        let used = judge(Ok(()), &[]);
        assert_eq!(used.verdict, Verdict::Well);
        assert_eq!(used.says, "/bin/ch is v53.0. `vmm = \"auto\"` selects it.");
        assert!(judge(Err("no".to_owned()), &[]).says.contains("only `vmm = \"cloud-h"));
        let old = judge(Ok(()), &["it is slow", "it is old"]);
        assert_eq!(old.verdict, Verdict::Lacking);
        assert!(old.says.ends_with("Its limitations: it is slow; it is old."), "{old}");
    }
}
