//! With real children: `sleep` and small scripts of `sh`.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::Write,
    ops::Deref,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
};

use super::*;
use crate::sys::{
    netns::{self, Namespace},
    tun,
};

/// No wait of these tests is as long on any machine.
const SOON: Duration = Duration::from_secs(180);

/// A child that does not outlive its test, not even a failed one.
struct Child(Arc<Process>);

impl Deref for Child {
    type Target = Arc<Process>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        self.wait(SOON);
    }
}

fn null() -> File {
    File::options().write(true).open("/dev/null").unwrap()
}

fn start(args: &[&str], stdin: Option<OwnedFd>) -> Arc<Process> {
    let args: Vec<OsString> = args.iter().map(OsString::from).collect();
    Process::spawn(Launch { stdin, ..Launch::new(Path::new("/bin/sh"), &args, null()) }).unwrap()
}

fn spawn(args: &[&str], stdin: Option<OwnedFd>) -> Child {
    Child(start(args, stdin))
}

fn script(text: &str) -> Child {
    spawn(&["-c", text], None)
}

/// A process that stays until it is killed.
fn sleeper() -> Child {
    script("exec /bin/sleep 1000")
}

/// A process with `word` as an argument, which stays until what comes with it is dropped,
/// and then leaves with code 3.
fn sleeper_called(word: &str) -> (Child, io::PipeWriter) {
    let (read, write) = io::pipe().unwrap();
    let args = ["-c", "read line; exit 3"].map(OsString::from);
    let launch = Launch {
        name: Some(word.as_ref()),
        stdin: Some(read.into()),
        ..Launch::new(Path::new("/bin/sh"), &args, null())
    };
    (Child(Process::spawn(launch).unwrap()), write)
}

/// Finds the processes of a name, whatever they run.
fn named(token: &str) -> Vec<Arc<Process>> {
    let any = [String::new()];
    let search = Search { programs: &any, is_user: &|_| true, prefix: token };
    Process::find(&search).unwrap().into_iter().map(|(process, _)| process).collect()
}

/// A word that no other process of this machine has in its command line.
fn new_token() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("dozed-test-{}-{count}-", std::process::id())
}

/// Waits for `found`, which looks at the world again each time.
fn eventually<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(SOON);
    loop {
        if let Some(it) = found() {
            return it;
        }
        assert!(!deadline.passed(), "it does not come");
        clock::pause_for(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_child_is_told_from_one_that_left() {
    let killed = sleeper();
    assert_eq!(killed.exited(), None);
    killed.kill();
    assert_eq!(killed.wait(SOON), Some(Exit::Signal(9)));
    assert_eq!(killed.exited(), Some(Exit::Signal(9)), "it is remembered");
    killed.kill();
    assert_eq!(script("exit 7").wait(SOON), Some(Exit::Code(7)));
}

#[test]
fn a_wait_ends_at_its_limit() {
    let child = sleeper();
    assert_eq!(child.wait(Duration::from_millis(5)), None);
    assert_eq!(child.wait(Duration::ZERO), None);
}

#[test]
fn a_child_that_is_dropped_after_it_left_is_no_zombie() {
    let child = start(&["-c", "exit 0"], None);
    let pid = child.identity().pid;
    eventually(|| has_ended(child.as_fd()).unwrap().then_some(()));
    drop(child);
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let error = Process::spawn(Launch::new(Path::new("/no/such"), &[], null())).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_child_inherits_no_file_and_no_environment_and_has_its_own_group() {
    let leak = rustix::io::dup(io::stderr()).unwrap();
    let child = sleeper();
    let pid = child.identity().pid;
    // While the program is being loaded it has files open that are its own.
    eventually(|| {
        let mut fds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        fds.sort();
        (fds == ["0", "1", "2"]).then_some(())
    });
    drop(leak);
    let environ = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    // The shell that became `sleep` sets this one by itself.
    assert!(environ.is_empty() || environ == "PWD=/\0", "{environ:?}");
    let group = rustix::process::getpgid(Some(pid_of(pid).unwrap())).unwrap();
    assert_eq!(group, pid_of(pid).unwrap());
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(cwd, Path::new("/"));
}

#[test]
fn a_child_reads_what_it_was_given_as_standard_input() {
    let (read, mut write) = io::pipe().unwrap();
    let child = spawn(&["-c", "read code; exit $code"], Some(read.into()));
    write.write_all(b"5\n").unwrap();
    assert_eq!(child.wait(SOON), Some(Exit::Code(5)));
}

#[test]
fn a_process_is_adopted_by_its_identity_and_by_no_other() {
    let token = new_token();
    let (child, stay) = sleeper_called(&token);
    let known = child.identity().clone();
    assert!(known.pidfs_inode.is_some(), "this kernel has no pidfs");
    let adopted = Process::adopt(&known, &token).unwrap().unwrap();
    assert_eq!(adopted.identity(), &known);

    let other_inode =
        ProcessIdentity { pidfs_inode: known.pidfs_inode.map(|inode| inode + 1), ..known.clone() };
    let other_boot = ProcessIdentity { boot_id: "another".into(), ..known.clone() };
    for wrong in [other_inode, other_boot] {
        assert!(Process::adopt(&wrong, &token).unwrap().is_none());
    }

    // As a kernel without pidfs left it.
    let by_start = ProcessIdentity { pidfs_inode: None, ..known.clone() };
    assert!(Process::adopt(&by_start, &token).unwrap().is_some());
    assert!(Process::adopt(&by_start, "another").unwrap().is_none());
    let other_start = ProcessIdentity { start_ticks: known.start_ticks + 1, ..by_start };
    assert!(Process::adopt(&other_start, &token).unwrap().is_none());

    drop(stay);
    assert_eq!(adopted.wait(SOON), Some(Exit::Code(3)), "from a zombie");
    assert!(Process::adopt(&known, &token).unwrap().is_none(), "a zombie");
    assert_eq!(child.wait(SOON), Some(Exit::Code(3)));
    assert!(Process::adopt(&known, &token).unwrap().is_none(), "nobody");
}

#[test]
fn how_somebody_elses_child_ended_is_told_after_it_was_reaped() {
    let token = new_token();
    let (read, write) = io::pipe().unwrap();
    let parent = spawn(
        &[
            "-c",
            "exec 3<&0; /bin/sh -c 'read line; exit 7' -name \"$0\" <&3 & wait; exec sleep 1000",
            &token,
        ],
        Some(read.into()),
    );
    let grandchild = eventually(|| {
        named(&token).into_iter().find(|found| found.identity().pid != parent.identity().pid)
    });
    drop(write);
    assert!(poll_pidfd(grandchild.as_fd(), SOON).unwrap());
    let pid = grandchild.identity().pid;
    eventually(|| (!PathBuf::from(format!("/proc/{pid}")).exists()).then_some(()));
    assert_eq!(grandchild.exited(), Some(Exit::Code(7)));
}

#[test]
fn a_process_is_found_by_its_token_while_it_lives() {
    let token = new_token();
    let (child, _stay) = sleeper_called(&format!("{token}:7:"));
    // These have the word too, and not as their name.
    let (_other, _stays) = sleeper_called(&format!("x{token}"));
    let _args = spawn(&["-c", "read line", &token, &format!("guest={token}")], None);
    let found = named(&token);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].identity(), child.identity());
    let find = |program: &str, uid| {
        let programs = [program.to_owned()];
        let search = Search { programs: &programs, is_user: &|is| is == uid, prefix: &token };
        Process::find(&search).unwrap().into_iter().map(|(_, name)| name).collect::<Vec<_>>()
    };
    let shell = Path::new("/bin/sh").canonicalize().unwrap();
    let shell = shell.file_name().unwrap().to_str().unwrap();
    let ours = crate::sys::host::own_ids().0;
    assert_eq!(find(shell, ours), [format!("{token}:7:")]);
    assert_eq!(find("qemu-system", ours), [""; 0], "it runs another program");
    assert_eq!(find(shell, ours + 1), [""; 0], "it is somebody else's");
    child.kill();
    child.wait(SOON).unwrap();
    assert!(named(&token).is_empty());
}

#[test]
fn a_process_is_known_by_the_files_that_it_has_open() {
    let dir = tempfile::tempdir().unwrap();
    let (own, copy) = (dir.path().join("own"), dir.path().join("copy"));
    let log = File::create(&own).unwrap();
    fs::write(&copy, "").unwrap();
    let args = ["-c", "exec sleep 1000"].map(OsString::from);
    let child = Process::spawn(Launch::new(Path::new("/bin/sh"), &args, log)).unwrap();
    let child = Child(child);
    let ids = |path: &Path| HashSet::from([FileId::of(path).unwrap()]);
    assert!(child.has_open(&ids(&own)).unwrap());
    assert!(!child.has_open(&ids(&copy)).unwrap());
    child.kill();
    child.wait(SOON).unwrap();
    assert_eq!(child.has_open(&ids(&own)).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_child_that_is_stopped_outlives_whoever_started_it() {
    // It leads a session of its own, so the kernel does not take it for a stopped job.
    let child = sleeper();
    let pid = i32::try_from(child.identity().pid).unwrap();
    let pid = rustix::process::Pid::from_raw(pid);
    assert_eq!(rustix::process::getsid(pid).unwrap(), pid.unwrap());
}

#[test]
fn the_time_on_cpus_grows_and_ends_with_the_process() {
    let child = script("while :; do :; done");
    let before = child.cpu_time().unwrap();
    eventually(|| (child.cpu_time().unwrap() > before).then_some(()));
    child.kill();
    child.wait(SOON).unwrap();
    let error = child.cpu_time().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn each_ending_is_told_once_with_its_tag() {
    let (send, told) = mpsc::channel();
    let watch = ExitWatch::start(move |tag, exit| send.send((tag, exit)).unwrap()).unwrap();
    let left_before = script("exit 4");
    left_before.wait(SOON).unwrap();
    watch.watch(1, &left_before).unwrap();
    assert_eq!(told.recv_timeout(SOON).unwrap(), (1, Exit::Code(4)));

    let killed = sleeper();
    let stays = sleeper();
    watch.watch(2, &killed).unwrap();
    watch.watch(3, &stays).unwrap();
    killed.kill();
    assert_eq!(told.recv_timeout(SOON).unwrap(), (2, Exit::Signal(9)));

    assert_eq!(Arc::strong_count(&killed), 1, "it is forgotten");
    drop(watch);
    // The sender is dropped with the thread, so this is all that was ever told.
    assert_eq!(told.iter().count(), 0);
}

#[test]
fn a_child_inherits_what_it_is_given_by_its_number_and_no_more() {
    let (reader, writer) = io::pipe().unwrap();
    let kept = OwnedFd::from(writer);
    let number = kept.as_raw_fd();
    let args = ["-c", &format!("echo $0 >&{number}; ls /proc/self/fd >&2; exit 3")];
    let args: Vec<OsString> = args.iter().map(OsString::from).collect();
    let mut log = tempfile::tempfile().unwrap();
    let launch = Launch {
        name: Some(OsStr::new("a name")),
        inherited: vec![kept],
        stdout: Some(null()),
        ..Launch::new(Path::new("/bin/sh"), &args, log.try_clone().unwrap())
    };
    let child = Child(Process::spawn(launch).unwrap());
    assert_eq!(child.wait(SOON), Some(Exit::Code(3)));
    // Our copy is closed too, so there is an end to what is said.
    assert_eq!(io::read_to_string(reader).unwrap(), "a name\n");
    io::Seek::rewind(&mut log).unwrap();
    let numbers = io::read_to_string(log).unwrap();
    // The last one is the directory itself.
    assert_eq!(numbers.lines().count(), 5, "{numbers}");
    assert!(numbers.lines().any(|line| line == number.to_string()), "{numbers}");
}

#[test]
fn a_child_has_what_it_is_lent_by_its_number_and_we_keep_it() {
    let lent = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
    let path = crate::sys::files::handle_path(&lent);
    let args = ["-c", &format!("echo said > {}", path.display())].map(OsString::from);
    let launch = Launch {
        lent: vec![Arc::clone(&lent)],
        ..Launch::new(Path::new("/bin/sh"), &args, null())
    };
    let child = Child(Process::spawn(launch).unwrap());
    assert_eq!(child.wait(SOON), Some(Exit::Code(0)));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "said\n");
    assert_eq!(Arc::strong_count(&lent), 1);
}

#[test]
fn the_memory_of_files_in_memory_is_told_once_for_each_file() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, 1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 100_000], 1 << 20).unwrap();
    let inherited = vec![file.try_clone().unwrap().into(), file.into()];
    let args = ["-c", "exec sleep 1000"].map(OsString::from);
    let launch = Launch { inherited, ..Launch::new(Path::new("/bin/sh"), &args, null()) };
    let child = Child(Process::spawn(launch).unwrap());
    let bytes = child.memfd_bytes().unwrap();
    // In whole pages, of whatever size.
    assert!((100_000..(4 << 20)).contains(&bytes), "{bytes}");
    child.kill();
    child.wait(SOON).unwrap();
    assert!(child.memfd_bytes().is_err());
}

/// What a shell says that is started in this way, as a process that becomes a program twice.
fn said(script: &str, change: impl FnOnce(&mut Launch<'_>)) -> String {
    let mut log = tempfile::tempfile().unwrap();
    let args = ["-c".into(), format!("exec {script}").into()];
    let mut launch = Launch::new(Path::new("/bin/sh"), &args, log.try_clone().unwrap());
    change(&mut launch);
    let child = Child(Process::spawn(launch).unwrap());
    let exit = child.wait(SOON);
    io::Seek::rewind(&mut log).unwrap();
    let said = io::read_to_string(log).unwrap();
    assert_eq!(exit, Some(Exit::Code(0)), "{said}");
    said
}

/// Finds what a line of `/proc/self/status` says, with one blank between words.
fn line_of(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

const NO_CAPABILITY: &str = "0000000000000000";

#[test]
fn a_child_without_privileges_has_no_capability_and_gets_none() {
    let status =
        |privileges| said("cat /proc/self/status", |launch| launch.privileges = privileges);
    let bare = status(Privileges::None);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line_of(&bare, set), NO_CAPABILITY, "{bare}");
    }
    // CAP_DAC_OVERRIDE is 1, CAP_FOWNER is 3 (capability.h).
    let files = status(Privileges::Files);
    if crate::sys::host::is_root() {
        for set in ["CapPrm:", "CapEff:"] {
            assert_eq!(line_of(&files, set), "000000000000000a", "{files}");
        }
        assert_eq!(line_of(&files, "NoNewPrivs:"), "1");
    }
    assert_eq!(line_of(&bare, "NoNewPrivs:"), "1");
    // Root's are all there otherwise, so they were given up and not just absent.
    let ours = status(Privileges::Ours);
    assert_eq!(line_of(&ours, "CapEff:") == NO_CAPABILITY, !crate::sys::host::is_root());
    let limits = said("cat /proc/self/limits", |launch| launch.privileges = Privileges::None);
    assert_eq!(line_of(&limits, "Max core file size"), "0 0 bytes");
}

#[test]
fn a_child_that_is_another_user_has_its_groups_and_nothing_of_ours() {
    const UID: u32 = 2_147_000_003;
    let user = User { uid: UID, groups: vec![7, 2_147_000_004] };
    let status =
        said("cat /proc/self/status", |launch| launch.privileges = Privileges::NoneAs(user));
    for ids in ["Uid:", "Gid:"] {
        assert_eq!(line_of(&status, ids), [UID.to_string().as_str(); 4].join(" "), "{status}");
    }
    assert_eq!(line_of(&status, "Groups:"), "7 2147000004");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line_of(&status, set), NO_CAPABILITY, "{status}");
    }
    assert_eq!(line_of(&status, "NoNewPrivs:"), "1");

    let args = ["-c", "exec sleep 1000"].map(OsString::from);
    let privileges = Privileges::NoneAs(User { uid: UID, groups: Vec::new() });
    let launch = Launch { privileges, ..Launch::new(Path::new("/bin/sh"), &args, null()) };
    let child = Child(Process::spawn(launch).unwrap());
    assert_eq!(child.user().unwrap(), UID);
    assert!(
        fs::read_to_string(format!("/proc/{}/status", child.identity().pid))
            .is_ok_and(|status| line_of(&status, "Groups:").is_empty())
    );
    child.kill();
    child.wait(SOON).unwrap();
    assert_eq!(child.user().unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn what_is_put_in_a_place_is_found_there_and_nothing_else_of_ours_is() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("file"), b"found\n").unwrap();
    let (first, last) = (FixedFd::new(0).unwrap(), FixedFd::new(31).unwrap());
    assert_eq!(FixedFd::new(32), None);
    // Whichever test is the first: before anything else has those numbers.
    reserve_fixed_fds().unwrap();
    // Many are open, so that some have numbers behind those of the places.
    let crowd: Vec<_> = (0..300).map(|_| null()).collect();
    let dir = File::open(temp.path()).unwrap();
    let found = said(&format!("cat {first}/file {last}"), |launch| {
        let file = File::open(temp.path().join("file")).unwrap();
        launch.placed = vec![(first, dir.into()), (last, file.into())];
    });
    assert_eq!(found, "found\nfound\n");
    let listed = said("ls /proc/self/fd", |launch| {
        launch.placed = vec![(last, null().into())];
    });
    // The one after the standard ones is what `ls` reads.
    assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "231", "3"]);
    drop(crowd);
}

#[test]
fn a_program_that_is_not_there_is_told_also_with_files_in_places() {
    let place = FixedFd::new(1).unwrap();
    let launch = Launch {
        placed: vec![(place, null().into())],
        ..Launch::new(Path::new("/no/such/program"), &[], null())
    };
    assert_eq!(Process::spawn(launch).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_child_has_the_environment_that_it_is_given_and_no_more() {
    let found = said("env", |launch| {
        launch.environment = &[("MALLOC_ARENA_MAX", "1")];
    });
    // The shell adds where it is, and what it runs.
    let given: Vec<_> = found
        .lines()
        .filter(|line| !line.starts_with("PWD="))
        .filter(|line| !line.starts_with("_="))
        .collect();
    assert_eq!(given, ["MALLOC_ARENA_MAX=1"]);
}

#[test]
fn a_device_is_the_childs_own_and_the_hosts_stays_as_it_was() {
    const UID: u32 = 2_147_000_005;
    let host = Path::new("/dev/fuse");
    let other = Path::new("/dev/null");
    let before = fs::metadata(host).unwrap();
    let tree = tempfile::tempdir().unwrap();
    let mounted = tree.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &mounted, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
    let script = format!(
        "sh -c 'stat -c \"%u %g %a %t %T %F\" {} {} && ls -d /sys/kernel && \
         cat /proc/self/mountinfo'",
        host.display(),
        other.display()
    );
    let found = said(&script, |launch| {
        let devices = OwnDevices::prepare(&[host, other], UID, Path::new("/bin/sh"));
        launch.devices = Some(devices.unwrap());
        launch.privileges = Privileges::NoneAs(User { uid: UID, groups: Vec::new() });
    });
    rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH).unwrap();
    let after = fs::metadata(host).unwrap();
    let (first, rest) = found.split_once('\n').unwrap();
    assert_eq!(first, format!("{UID} {UID} 600 a e5 character special file"));
    let (second, rest) = rest.split_once('\n').unwrap();
    assert_eq!(second, format!("{UID} {UID} 600 1 3 character special file"));
    assert!(rest.starts_with("/sys/kernel\n"), "what was covered for a moment is there: {rest}");
    assert!(!rest.contains(mounted.to_str().unwrap()), "no other mount is held on to: {rest}");
    assert_eq!((before.uid(), before.ino()), (after.uid(), after.ino()));
    let prepared = OwnDevices::prepare(&[host, tree.path()], UID, host);
    assert!(prepared.is_err(), "a directory is no device");
}

/// A file that a namespace of another kind than one of networks is pinned to.
struct OtherPin(tempfile::TempPath);

impl OtherPin {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        rustix::mount::mount_bind("/proc/self/ns/uts", &*file).unwrap();
        Self(file)
    }
}

impl Drop for OtherPin {
    fn drop(&mut self) {
        rustix::mount::unmount(&*self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_child_is_in_the_network_that_it_is_given_and_we_stay_where_we_are() {
    const UID: u32 = 2_147_000_006;
    let here = Namespace::current().unwrap().identity();
    let there = netns::in_a_new_one(|_| {
        tun::make("tap7", tun::Device::Tap, 0).unwrap();
        Namespace::current().unwrap()
    });
    let there = there.unwrap();
    let identity = there.identity();
    // It holds the only tap there is of the name, so whoever sees that is inside.
    let found = said("sh -c 'cat /proc/self/net/dev; stat -Lc %i /proc/self/ns/net'", |launch| {
        launch.namespace = Some(there);
        launch.privileges = Privileges::NoneAs(User { uid: UID, groups: Vec::new() });
    });
    assert!(found.contains("tap7:"), "{found}");
    assert_eq!(found.lines().last(), Some(identity.inode.to_string().as_str()), "{found}");
    assert_eq!(Namespace::current().unwrap().identity(), here);
}

#[test]
fn a_network_that_cannot_be_entered_is_an_error_and_leaves_no_process() {
    let pin = OtherPin::new();
    let here = Namespace::current().unwrap().identity();
    let token = format!("dozed-no-network-{}", std::process::id());
    let args = ["-c".into(), format!("exec /bin/sleep 1000 {token}").into()];
    let mut launch = Launch::new(Path::new("/bin/sh"), &args, null());
    launch.name = Some(token.as_ref());
    launch.namespace = Namespace::open(&pin.0).unwrap();
    assert!(launch.namespace.is_some());
    let error = Process::spawn(launch).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    assert!(named(&token).is_empty());
    assert_eq!(Namespace::current().unwrap().identity(), here);
}

#[test]
fn what_a_process_reads_and_writes_is_counted_by_calls_and_by_thread() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let (read, mut write) = io::pipe().unwrap();
    let file = dir.path().join("file");
    let text = "while read line; do echo $line$line; done >$0; exec /bin/sleep 1000";
    let child = spawn(&["-c", text, file.to_str().unwrap()], Some(read.into()));
    let before = child.io().unwrap();
    writeln!(write, "{}", "x".repeat(10_000)).unwrap();
    drop(write);
    let after = eventually(|| {
        let now = child.io().unwrap();
        (now.call_bytes >= before.call_bytes + 30_002).then_some(now)
    });
    assert!(after.block_bytes >= before.block_bytes);
    // It is called `sh`, and then `sleep`.
    let own = child.io_of_threads("s").unwrap();
    assert!(own.call_bytes >= after.call_bytes, "it has one thread, of that name");
    let others = child.io_of_threads("vcpu").unwrap();
    assert_eq!(others, Io { call_bytes: 0, block_bytes: 0 });
}

#[test]
fn what_has_ended_reads_and_writes_nothing_any_more() {
    let child = sleeper();
    child.kill();
    child.wait(SOON).unwrap();
    assert_eq!(child.io().unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(child.io_of_threads("").unwrap_err().kind(), io::ErrorKind::NotFound);
}
