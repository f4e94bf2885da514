//! Who a VMM runs as, in a whole daemon: a user of its own for each sandbox, whatever the
//! modes of the files and of the directories above them are, and one that is not trusted.

use std::{
    ffi::CStr,
    fs::{self, Permissions},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use dozed::{
    sys::command,
    vmm::{Vmm, cloud_hypervisor::CloudHypervisor},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Pid, Signal, kill_process},
};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    daemon::{Daemon, Setup},
    files::{Host, assert_whole, counts_in, end},
    old_kernel::spawn_without,
    support::{SOON, Standin, counter_guest, eventually, open_dir},
};

const ID: &str = "web-1";

fn setup(vmm: &str) -> Setup<'_> {
    Setup { vmm, ..Setup::default() }
}

/// Returns a line of what the kernel says of a process, with one blank between words.
fn fact(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns who the only VMM is.
fn user(daemon: &Daemon) -> u32 {
    let vmms = daemon.vmms();
    assert_eq!(vmms.len(), 1, "{}", daemon.log());
    user_of(vmms[0])
}

fn user_of(pid: u32) -> u32 {
    let ids = fact(pid, "Uid:");
    let uid = ids.split(' ').next().unwrap();
    assert_eq!(ids, [uid; 4].join(" "));
    assert_eq!(fact(pid, "Gid:"), ids);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(fact(pid, set), "0000000000000000");
    }
    assert_eq!(fact(pid, "NoNewPrivs:"), "1");
    uid.parse().unwrap()
}

fn succeed(daemon: &Daemon, id: &str, verb: &str) {
    if let Err(error) = daemon.write(id, verb) {
        panic!("{verb}: {error}: {}\n{}", daemon.read(id, "error"), daemon.log());
    }
}

fn wait_for_lines(daemon: &Daemon, more: usize) {
    let lines = || counts_in(&daemon.read(ID, "console")).len();
    let wanted = lines() + more;
    eventually("the count", || (lines() >= wanted).then_some(()));
}

/// Kills the only VMM, and waits until that is known.
fn lose(daemon: &Daemon) {
    let pid = i32::try_from(daemon.vmms()[0]).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    eventually("the end", || (daemon.state(ID) == "stopped").then_some(()));
}

#[test]
fn each_vmm_is_a_user_of_its_own() {
    let daemon = Daemon::with(setup("users = \"70000-79999\""));
    for id in ["a", "b"] {
        daemon.make(id);
        succeed(&daemon, id, "wake");
    }
    let vmms = daemon.vmms();
    let users: Vec<_> = vmms.iter().map(|pid| user_of(*pid)).collect();
    assert_eq!(users.len(), 2);
    assert!(users[0] != users[1], "{users:?}");
    assert!(users.iter().all(|uid| (70_000..80_000).contains(uid)), "{users:?}");
    for pid in vmms {
        // What it is called is what `ps` and `top` show.
        assert_eq!(fact(pid, "Name:"), "cloud-hyperviso");
    }
}

#[test]
fn a_sandbox_keeps_its_user_until_it_is_deleted() {
    let mut daemon = Daemon::with(setup("users = \"70000-70000\""));
    daemon.make(ID);
    succeed(&daemon, ID, "wake");
    assert_eq!(user(&daemon), 70_000);
    wait_for_lines(&daemon, 2);
    succeed(&daemon, ID, "sleep");
    succeed(&daemon, ID, "wake");
    assert_eq!(user(&daemon), 70_000);
    daemon.kill();
    daemon.start_again();
    succeed(&daemon, ID, "sleep");
    daemon.kill();
    daemon.start_again();
    succeed(&daemon, ID, "wake");
    assert_eq!(user(&daemon), 70_000);
    wait_for_lines(&daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
    lose(&daemon);
    succeed(&daemon, ID, "wake");
    assert_eq!(user(&daemon), 70_000);

    daemon.make("other");
    let error = daemon.write("other", "wake").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(122), "{error}");
    assert_eq!(daemon.state("other"), "stopped");
    assert_eq!(
        daemon.read("other", "error"),
        "there is no user id for other: other sandboxes have all of 70000-70000 ([vmm] users); \
         delete some, or widen it"
    );
    daemon.remove(ID);
    succeed(&daemon, "other", "wake");
    assert_eq!(user(&daemon), 70_000);
}

#[test]
fn files_and_directories_may_be_roots_alone() {
    in_closed_directories("");
}

#[test]
fn the_file_that_memory_is_in_may_be_in_roots_directories_too() {
    in_closed_directories("memory_mode = \"file\"\n");
}

fn in_closed_directories(template: &str) {
    let disks = "[[template.disks]]\npath = \"DIR/own.img\"\n\
                 [[template.disks]]\npath = \"DIR/base.img\"\nreadonly = true\n";
    let template = format!("{template}{disks}");
    let mut daemon = Daemon::with(Setup {
        closed: true,
        template: &template,
        ..setup("users = \"70000-79999\"")
    });
    daemon.make(ID);
    succeed(&daemon, ID, "wake");
    assert!((70_000..80_000).contains(&user(&daemon)), "{}", daemon.log());
    wait_for_lines(&daemon, 2);
    for _ in 0..3 {
        succeed(&daemon, ID, "sleep");
        succeed(&daemon, ID, "wake");
    }
    daemon.kill();
    daemon.start_again();
    succeed(&daemon, ID, "sleep");
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
    assert!((70_000..80_000).contains(&user(&daemon)));
    // What is everybody's is nobody else's after it.
    for name in ["kernel", "own.img", "base.img"] {
        let meta = fs::metadata(daemon.path(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (0, 0, 0o600), "{name}");
    }
    let home = daemon.path("store/sandboxes/1");
    let meta = fs::metadata(home.join("disk-0.img")).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o777), (user(&daemon), 0o600));
    for name in ["console.log", "vmm.log"] {
        assert_eq!(fs::metadata(home.join(name)).unwrap().uid(), 0, "{name}");
    }
    daemon.remove(ID);
    assert!(daemon.files("run").iter().all(|path| path == Path::new("lock")));
}

#[test]
fn files_of_a_sandboxs_owner_are_shown_to_a_vmm_that_is_neither_the_owner_nor_root() {
    const OWNER: u32 = 65_532;
    let daemon = Daemon::with(setup("users = \"70000-79999\""));
    let dir = open_dir("owners-");
    let own = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(OWNER), Some(OWNER)).unwrap();
        path
    };
    let (kernel, disk) =
        (own("kernel", &fs::read(counter_guest()).unwrap()), own("disk", &[7; 4096]));
    daemon.make(ID);
    chown(daemon.path("mount").join(ID), Some(OWNER), Some(OWNER)).unwrap();
    let config = format!(
        "kernel = {kernel:?}\ninitramfs = {disk:?}\n[[disks]]\npath = {disk:?}\nreadonly = true\n"
    );
    // What its owner writes is opened with the owner's rights.
    let text = dir.path().join("config");
    fs::write(&text, config).unwrap();
    fs::set_permissions(&text, Permissions::from_mode(0o644)).unwrap();
    let copy = format!("cat {text:?} > {:?}", daemon.path("mount").join(ID).join("config"));
    let owner = OWNER.to_string();
    let words = ["--reuid", &owner, "--regid", &owner, "--clear-groups", "sh", "-c", &copy];
    let written = command::output(Path::new("/usr/bin/setpriv"), &words, SOON).unwrap();
    assert!(written.status.success(), "{written:?}: {}", daemon.read(ID, "error"));
    for _ in 0..2 {
        succeed(&daemon, ID, "wake");
        wait_for_lines(&daemon, 2);
        assert!((70_000..80_000).contains(&user(&daemon)), "{}", daemon.log());
        succeed(&daemon, ID, "sleep");
    }
    // What was loaded at the boot may be somebody else's by the time of a wake, and a disk not.
    chown(&kernel, Some(0), Some(0)).unwrap();
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
    succeed(&daemon, ID, "sleep");
    chown(&disk, Some(0), Some(0)).unwrap();
    let error = daemon.write(ID, "wake").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
    assert_eq!(daemon.state(ID), "snapshotted");
    assert!(daemon.read(ID, "error").contains("cannot open "), "{}", daemon.read(ID, "error"));
    let meta = fs::metadata(&disk).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o600), "nothing is given away");
}

#[test]
fn users_can_be_switched_off_and_on_again_with_sleepers_there() {
    let mut daemon = Daemon::with(setup("users = \"70000-79999\""));
    daemon.make(ID);
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    let first = user(&daemon);
    for (users, wanted) in
        [("off", 0..1), ("70000-79999", first..first + 1), ("80000-80009", 80_000..80_010)]
    {
        succeed(&daemon, ID, "sleep");
        daemon.kill();
        daemon.set_vmm(&format!("users = {users:?}"));
        daemon.start_again();
        succeed(&daemon, ID, "wake");
        assert!(wanted.contains(&user(&daemon)), "{users}: {}", daemon.log());
        wait_for_lines(&daemon, 2);
    }
    // A guest that runs goes on as who it is, also to sleep.
    daemon.kill();
    daemon.set_vmm("users = \"off\"");
    daemon.start_again();
    assert!((80_000..80_010).contains(&user(&daemon)));
    succeed(&daemon, ID, "sleep");
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    assert_eq!(user(&daemon), 0);
    assert_whole(&daemon.read(ID, "console"));
}

#[test]
fn a_vmm_that_leaves_something_else_than_files_gets_nothing_touched() {
    let daemon = Daemon::with(setup("users = \"70000-79999\""));
    daemon.make(ID);
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    let victim = daemon.path("victim");
    fs::write(&victim, b"{}").unwrap();
    fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
    let before = fs::metadata(&victim).unwrap();
    let told = [
        ("symlink", "is not a regular file"),
        ("fifo", "is not a regular file"),
        ("hard-link", "has a second hard link"),
    ];
    for (what, told) in told {
        for name in ["config.json", "state.json", "memory-ranges", "zzz"] {
            daemon.standin.set_faults(&json!([{
                "endpoint": "vm.snapshot",
                "act": { "leave": { "what": what, "name": name, "to": victim } },
            }]));
            daemon.write(ID, "sleep").unwrap_err();
            let error = daemon.read(ID, "error");
            assert!(error.contains(told), "{what} {name}: {error}");
            assert_eq!(daemon.state(ID), "running");
            let files = daemon.files("store");
            let left = files.iter().filter(|path| path.to_string_lossy().contains("partial"));
            assert_eq!(left.count(), 0, "{files:?}");
            wait_for_lines(&daemon, 1);
        }
    }
    let after = fs::metadata(&victim).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"{}");
    assert_eq!((before.uid(), before.mode()), (after.uid(), after.mode()));
    assert_eq!((before.mtime(), before.nlink()), (after.mtime(), after.nlink()));
    daemon.standin.set_faults(&json!([]));
    succeed(&daemon, ID, "sleep");
    succeed(&daemon, ID, "wake");
    wait_for_lines(&daemon, 2);
    assert_whole(&daemon.read(ID, "console"));
    let kvm = fs::metadata("/dev/kvm");
    assert!(kvm.map_or(true, |kvm| kvm.uid() == 0 && kvm.file_type().is_char_device()));
}

#[test]
fn a_vmm_that_cannot_be_its_own_user_is_root_without_privileges_and_says_so() {
    let standin = Standin::new("53.0");
    let vmm = CloudHypervisor::at(standin.program()).unwrap();
    let ramfs = Ramfs::new();
    let kernel = ramfs.secret_kernel();
    let host = Host::new(&kernel, "");
    let claim = |machine: &dyn dozed::vmm::Machine| {
        let lacks = machine.lacks();
        assert_eq!(lacks.len(), 1, "{lacks:?}");
        assert!(
            lacks[0].starts_with("its VMM runs as root without privileges, because "),
            "{lacks:?}"
        );
        assert_eq!(user_of(machine.process().identity().pid), 0);
        lacks[0].clone()
    };

    let mut machine = vmm.boot(&host.plan).unwrap();
    let why = claim(&*machine);
    assert!(why.contains("/kernel cannot be shown to a user of its own: "), "{why}");
    machine.resume().unwrap();
    host.wait_for_count(2);
    let mut adopted = vmm.adopt(&host.plan, machine.process().clone()).unwrap();
    claim(&*adopted);
    adopted.pause().unwrap();
    let saved = host.snapshot_dir("saved");
    adopted.save(&saved).unwrap();
    end(&*adopted);

    // It is one of its own again as soon as it can be.
    fs::set_permissions(&kernel, Permissions::from_mode(0o644)).unwrap();
    let mut machine = vmm.restore(&host.plan, &saved).unwrap();
    drop(ramfs);
    assert_eq!(machine.lacks(), Vec::<String>::new());
    assert_eq!(Some(user_of(machine.process().identity().pid)), host.plan.user);
    machine.resume().unwrap();
    host.wait_for_count(host.last_count() + 2);
    host.assert_whole();
    // Where that was not asked for nothing is lacking.
    let plan = dozed::vmm::Plan { user: None, ..host.plan.clone() };
    let adopted = vmm.adopt(&plan, machine.process().clone()).unwrap();
    assert_eq!(adopted.lacks(), Vec::<String>::new());
}

#[test]
fn status_tells_of_a_vmm_that_is_not_its_own_user_also_after_a_restart() {
    let mut daemon = Daemon::with(setup("users = \"70000-79999\""));
    let ramfs = Ramfs::new();
    daemon.make(ID);
    let config = format!(
        "vmm = \"cloud-hypervisor\"\nmemory = \"64MiB\"\nkernel = {:?}\n",
        ramfs.secret_kernel()
    );
    fs::write(daemon.path("mount").join(ID).join("config"), config).unwrap();
    succeed(&daemon, ID, "wake");
    let sentence = "its VMM runs as root without privileges, because ";
    let lacks = |daemon: &Daemon| {
        let status = daemon.read(ID, "status");
        let lacks = status.lines().find_map(|line| line.strip_prefix("lacks ")).unwrap();
        lacks.to_owned()
    };
    assert!(lacks(&daemon).contains(sentence), "{}", lacks(&daemon));
    assert_eq!(daemon.log().matches(sentence).count(), 1, "{}", daemon.log());
    daemon.kill();
    daemon.start_again();
    // A VMM that a busy host keeps from answering is taken over after the tree is served.
    eventually("the sentence", || lacks(&daemon).contains(sentence).then_some(()));
    succeed(&daemon, ID, "sleep");
    assert!(!lacks(&daemon).contains(sentence), "{}", lacks(&daemon));
}

#[test]
fn a_daemon_that_may_not_change_users_runs_guests_as_root_without_privileges() {
    /// `setresuid`, `setfsuid`, and `fchown`, on x86-64.
    const CALLS: [i64; 3] = [117, 122, 93];
    for call in CALLS {
        let daemon = Daemon::start_by("53.0", |dir| spawn_without(dir, call, Errno::PERM));
        daemon.make(ID);
        for verb in ["wake", "sleep", "wake"] {
            succeed(&daemon, ID, verb);
        }
        wait_for_lines(&daemon, 2);
        assert_eq!(user(&daemon), 0, "{call}");
        let status = daemon.read(ID, "status");
        assert!(status.contains("its VMM runs as root without privileges, because "), "{status}");
        assert_whole(&daemon.read(ID, "console"));
    }
}

/// A file system that shows no file as another user's.
struct Ramfs(TempDir);

impl Ramfs {
    fn new() -> Self {
        let dir = open_dir("ramfs");
        mount("none", dir.path(), "ramfs", MountFlags::empty(), None::<&CStr>).unwrap();
        Self(dir)
    }

    /// Makes a kernel that only root may read.
    fn secret_kernel(&self) -> PathBuf {
        let kernel = self.0.path().join("kernel");
        fs::copy(counter_guest(), &kernel).unwrap();
        fs::set_permissions(&kernel, Permissions::from_mode(0o600)).unwrap();
        kernel
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        unmount(self.0.path(), UnmountFlags::DETACH).ok();
    }
}
