//! The socket by which the host reaches a guest of Cloud Hypervisor.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
};

use dozed::{
    sandbox::Owner,
    sys::command,
    vmm::{PlannedVsock, Vmm, cloud_hypervisor::CloudHypervisor},
};
use rustix::{
    process::Uid,
    thread::{set_thread_groups, set_thread_res_uid},
};

use crate::{
    daemon::Daemon,
    files::{Host, assert_whole, end},
    support::{SOON, Standin, counter_guest},
};

const ID: &str = "web-1";
/// A user without privileges, and one who is a stranger.
const OWNER: u32 = 1234;
const STRANGER: u32 = 4321;
const KEYS: &str = "memory = \"64MiB\"\nvsock = true\n";

/// Says something to a port of the guest, and returns what comes back.
fn says(socket: &Path, port: u32, text: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "CONNECT {port}\n{text}")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Does something as a user who may do nothing special.
fn as_user<T: Send>(user: u32, act: impl FnOnce() -> T + Send) -> T {
    let unprivileged = move || {
        let user = Uid::from_raw(user);
        set_thread_groups(&[]).unwrap();
        // Of this thread only, which ends with it.
        set_thread_res_uid(user, user, user).unwrap();
        act()
    };
    thread::scope(|scope| scope.spawn(unprivileged).join().unwrap())
}

fn succeeds(daemon: &Daemon, verb: &str) {
    if let Err(error) = daemon.write(ID, verb) {
        panic!("{verb}: {error}: {}\n{}", daemon.read(ID, "error"), daemon.log());
    }
}

/// Returns what `status` says of the vsock.
fn told(daemon: &Daemon) -> String {
    let status = daemon.read(ID, "status");
    status.lines().find_map(|line| line.strip_prefix("vsock ")).unwrap().to_owned()
}

#[test]
fn the_owner_reaches_the_guest_after_a_boot_and_after_each_wake_and_a_stranger_never() {
    let daemon = Daemon::start_with("53.0", KEYS);
    daemon.make(ID);
    chown(daemon.path("mount").join(ID), Some(OWNER), Some(OWNER)).unwrap();
    assert_eq!(told(&daemon), "none");
    for _ in 0..5 {
        succeeds(&daemon, "wake");
        let socket = told(&daemon);
        let socket = Path::new(&socket);
        assert_eq!(socket, daemon.path("run/1/vsock/vsock.sock"));
        let heard = as_user(OWNER, || says(socket, 52, "hello")).unwrap();
        assert!(heard.starts_with("OK ") && heard.ends_with("\nhello"), "{heard}");
        assert_eq!(as_user(OWNER, || says(socket, 53, "hello")).unwrap_or_default(), "");
        let refused = as_user(STRANGER, || says(socket, 52, "hello")).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        // Nobody but us may talk to the VMM, or look around.
        for theirs in ["run/1/api.sock", "run", "run/1", "run/1/vsock"] {
            let path = daemon.path(theirs);
            as_user(OWNER, || fs::read_dir(&path).map(drop)).unwrap_err();
            as_user(OWNER, || UnixStream::connect(&path)).unwrap_err();
        }
        succeeds(&daemon, "sleep");
        assert_eq!(told(&daemon), "none");
        assert!(!daemon.path("run/1").exists());
    }
    daemon.remove(ID);
}

#[test]
fn a_sandbox_without_a_vsock_keeps_everybody_out() {
    let daemon = Daemon::start("53.0");
    daemon.make(ID);
    succeeds(&daemon, "wake");
    assert_eq!(told(&daemon), "none");
    // The one above is ours alone; in the other the VMM's group may go to what it knows.
    for (dir, mode) in [("run", 0o700), ("run/1", 0o710)] {
        assert_eq!(daemon.path(dir).metadata().unwrap().mode() & 0o7777, mode, "{dir}");
    }
    assert!(!daemon.path("run/1/vsock").exists());
}

#[test]
fn a_vsock_goes_to_the_new_owner_with_the_sandbox() {
    let mut daemon = Daemon::start_with("53.0", KEYS);
    daemon.make(ID);
    succeeds(&daemon, "wake");
    let socket = daemon.path("run/1/vsock/vsock.sock");
    let dir = daemon.path("mount").join(ID);
    for (owner, other) in [(OWNER, STRANGER), (STRANGER, OWNER)] {
        chown(&dir, Some(owner), Some(owner)).unwrap();
        assert!(as_user(owner, || says(&socket, 52, "hello")).unwrap().ends_with("hello"));
        as_user(other, || says(&socket, 52, "hello")).unwrap_err();
    }
    daemon.kill();
    daemon.start_again();
    assert!(as_user(STRANGER, || says(&socket, 52, "hello")).unwrap().ends_with("hello"));
    chown(&dir, Some(OWNER), Some(OWNER)).unwrap();
    assert!(as_user(OWNER, || says(&socket, 52, "hello")).unwrap().ends_with("hello"));
}

/// The driver alone, against each program that there is.
fn drivers() -> Vec<(CloudHypervisor, Option<Standin>)> {
    let mut drivers = Vec::new();
    for version in ["44.0", "53.0", "54.0.0"] {
        let standin = Standin::new(version);
        drivers.push((CloudHypervisor::at(standin.program()).unwrap(), Some(standin)));
    }
    if command::find("cloud-hypervisor").is_some() {
        drivers.push((CloudHypervisor::find().unwrap(), None));
    }
    drivers
}

fn host_with_vsock() -> Host {
    let mut host = Host::new(&counter_guest(), "");
    let owner = Owner { uid: OWNER, gid: OWNER };
    host.plan.vsock = Some(PlannedVsock::new(&host.plan.runtime_dir, owner));
    host
}

fn socket(host: &Host) -> std::path::PathBuf {
    host.plan.vsock.as_ref().unwrap().socket()
}

/// Claims that there is a socket which its owner can connect to.
fn assert_open(host: &Host) {
    let path = socket(host);
    // The directory of a sandbox's files is made private, and here it is above its sockets.
    fs::set_permissions(host.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let meta = path.symlink_metadata().unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!((meta.uid(), meta.gid()), (OWNER, OWNER));
    as_user(OWNER, || UnixStream::connect(&path)).unwrap();
}

#[test]
fn what_an_earlier_vmm_left_in_the_directory_is_in_nobody_s_way() {
    for (vmm, _standin) in drivers() {
        let host = host_with_vsock();
        let dir = host.plan.vsock.as_ref().unwrap().dir().to_owned();
        let outside = host.path("outside");
        let litter = |what: usize| {
            fs::remove_dir_all(&dir).ok();
            fs::create_dir_all(&dir).unwrap();
            match what {
                0 => drop(UnixListener::bind(socket(&host)).unwrap()),
                1 => symlink(&outside, socket(&host)).unwrap(),
                2 => fs::create_dir_all(socket(&host).join("deep")).unwrap(),
                _ => {
                    fs::remove_dir(&dir).unwrap();
                    symlink(&outside, &dir).unwrap();
                }
            }
        };
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("vsock.sock"), "").unwrap();
        litter(0);
        let mut machine = vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        for what in 0..=3 {
            assert_open(&host);
            host.wait_for_count(host.last_count() + 1);
            machine.pause().unwrap();
            let saved = host.snapshot_dir(&format!("snapshot {what}"));
            machine.save(&saved).unwrap();
            end(&*machine);
            litter(what);
            machine = vmm.restore(&host.plan, &saved).unwrap();
            assert_open(&host);
            machine.resume().unwrap();
        }
        // No link was followed: neither by what removes nor by what gives away.
        assert_eq!(fs::metadata(outside.join("vsock.sock")).unwrap().uid(), 0);
        host.wait_for_count(host.last_count() + 2);
        assert_whole(&host.console());
    }
}

#[test]
fn a_snapshot_without_a_vsock_does_not_load_into_a_machine_with_one() {
    for (vmm, _standin) in drivers() {
        let mut host = Host::new(&counter_guest(), "");
        let mut machine = vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        host.wait_for_count(1);
        machine.pause().unwrap();
        let saved = host.snapshot_dir("snapshot");
        machine.save(&saved).unwrap();
        end(&*machine);
        host.plan.vsock = host_with_vsock().plan.vsock.clone();
        let error = vmm.restore(&host.plan, &saved).unwrap_err();
        assert!(
            error.to_string().contains("only one of snapshot and sandbox has a vsock"),
            "{error}"
        );
        assert!(host.processes().is_empty());
    }
}

#[test]
fn an_adopted_machine_is_its_owner_s_to_reach() {
    for (vmm, _standin) in drivers() {
        let host = host_with_vsock();
        let mut machine = vmm.boot(&host.plan).unwrap();
        machine.resume().unwrap();
        // As if the daemon had died before it gave the socket away.
        let vmm_uid = host.plan.user.unwrap_or(0);
        chown(socket(&host), Some(vmm_uid), Some(vmm_uid)).unwrap();
        let process = std::sync::Arc::clone(machine.process());
        drop(machine);
        let mut machine = vmm.adopt(&host.plan, process).unwrap();
        assert_open(&host);
        machine.give_vsock(Owner { uid: STRANGER, gid: STRANGER }).unwrap();
        let path = socket(&host);
        as_user(STRANGER, || UnixStream::connect(&path)).unwrap();
        as_user(OWNER, || UnixStream::connect(&path)).unwrap_err();
    }
}
