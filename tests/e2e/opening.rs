//! Files that a `config` names, on paths where an open would wait: file systems that do not
//! answer, FIFOs, and the daemon's own tree.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
};

use dozed::sys::files::rename;
use rustix::{fs::CWD, io::Errno};

use crate::support::{
    Host, Setup, Silence, SilentMount, StallingFile, command, counter_kernel, wait_for, wait_until,
};

/// A host with a sandbox `web` whose read-only disk is in a directory of its own.
struct Rig {
    host: Host,
    dir: tempfile::TempDir,
}

impl Rig {
    fn start() -> Self {
        let (host, dir) = (Setup::counter("").start(), tempfile::tempdir().unwrap());
        let rig = Self { host, dir };
        fs::write(rig.disk(), [0; 65536]).unwrap();
        rig.host.mkdir("web").unwrap();
        let document = format!("disks = [{{ path = {:?}, readonly = true }}]\n", rig.disk());
        rig.host.write("web/config", document).unwrap();
        rig.host.boot("other");
        rig
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// The error of `web` says which path did not answer.
    #[track_caller]
    fn says_that_nothing_answers(&self) {
        let says = format!(
            "{}, which the `config` of web names, cannot be opened: its file system did not \
             answer within 10 s",
            self.disk().display()
        );
        assert!(self.host.error("web").contains(&says), "{}", self.host.error("web"));
    }

    fn openers(&self) -> Vec<u32> {
        openers(&self.host)
    }
}

/// Returns the processes that open files for the daemon.
fn openers(host: &Host) -> Vec<u32> {
    let daemon = host.daemon_pid();
    let mut openers = Vec::new();
    for task in fs::read_dir(format!("/proc/{daemon}/task")).unwrap().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
        let is_opener = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name == "dozed-opener\n")
        };
        openers.extend(pids.filter(is_opener));
    }
    openers
}

/// Fails a boot, a wake and a sleep for a disk whose file system does not answer, and goes on
/// with all else meanwhile.
fn a_disk_that_does_not_answer(silence: Silence) {
    let rig = Rig::start();
    let host = &rig.host;
    let fails = |verb: &str, state: &str| {
        let silent = SilentMount::over(rig.dir.path(), silence);
        thread::scope(|scope| {
            let writer = scope.spawn(|| host.write("web/state", verb));
            wait_for("the disk is being opened", || rig.openers().first().copied());
            host.sleep("other");
            host.wake("other");
            host.counts_on("other");
            host.bash_ok("mkdir new && rmdir new; cat */status dozed.list > /dev/null");
            assert_eq!(writer.join().unwrap(), Err(Errno::TIMEDOUT), "{verb}");
        });
        assert_eq!(host.state("web"), state);
        rig.says_that_nothing_answers();
        drop(silent);
        wait_until("no process is left of it", || rig.openers().is_empty());
    };
    fails("wake", "stopped");
    host.wake("web");
    host.counts_on("web");
    fails("sleep", "running");
    let before = host.counts_on("web");
    host.sleep("web");
    fails("wake", "snapshotted");
    host.wake("web");
    assert!(host.counts_on("web").count > before.count);
}

#[test]
fn a_disk_of_which_no_request_is_read_fails_only_what_needs_it() {
    a_disk_that_does_not_answer(Silence::Deaf);
}

#[test]
fn a_disk_of_which_no_request_is_answered_fails_only_what_needs_it() {
    a_disk_that_does_not_answer(Silence::Mute);
}

#[test]
fn a_config_that_names_what_does_not_answer_is_refused() {
    let rig = Rig::start();
    let silent = tempfile::tempdir().unwrap();
    let _silent = SilentMount::over(silent.path(), Silence::Mute);
    for document in [
        format!("kernel = {:?}\n", silent.path().join("kernel")),
        format!("disks = [{{ path = {:?} }}]\n", silent.path().join("disk")),
    ] {
        let before = rig.host.read("web/config");
        assert_eq!(rig.host.write("web/config", &document), Err(Errno::INVAL));
        let says = rig.host.error("web");
        assert!(says.contains("its file system did not answer within 10 s"), "{says}");
        assert_eq!(rig.host.read("web/config"), before);
    }
}

#[test]
fn a_daemon_dies_and_ends_while_a_disk_does_not_answer() {
    for silence in [Silence::Deaf, Silence::Mute] {
        let mut rig = Rig::start();
        rig.host.wake("web");
        let before = rig.host.counts_on("web");
        rig.host.sleep("web");
        let silent = SilentMount::over(rig.dir.path(), silence);
        for is_killed in [true, false] {
            thread::scope(|scope| {
                let path = rig.host.path("web").join("state");
                let writer = scope.spawn(move || fs::write(path, "wake"));
                wait_for("the disk is being opened", || rig.openers().first().copied());
                if is_killed {
                    rig.host.kill_daemon();
                } else {
                    rig.host.terminate();
                }
                writer.join().unwrap().unwrap_err();
            });
            rig.host.restart();
            assert_eq!(rig.host.state("web"), "snapshotted");
            rig.host.sleep("other");
            rig.host.wake("other");
        }
        drop(silent);
        rig.host.wake("web");
        assert!(rig.host.counts_on("web").count > before.count);
    }
}

#[test]
fn a_deletion_does_not_wait_for_a_disk_that_does_not_answer() {
    for silence in [Silence::Deaf, Silence::Mute] {
        let rig = Rig::start();
        let _silent = SilentMount::over(rig.dir.path(), silence);
        thread::scope(|scope| {
            let writer = scope.spawn(|| rig.host.write("web/state", "wake"));
            wait_for("the disk is being opened", || rig.openers().first().copied());
            rig.host.rmdir("web").unwrap();
            // One that had waited for the limit would be told so.
            assert_eq!(writer.join().unwrap(), Err(Errno::NODEV));
        });
        assert_eq!(rig.host.list(), ["other"]);
    }
}

#[test]
fn a_template_that_names_what_does_not_answer_is_refused() {
    let silent = tempfile::tempdir().unwrap();
    let config = tempfile::NamedTempFile::new().unwrap();
    let kernel = silent.path().join("kernel");
    fs::write(config.path(), format!("[template]\nkernel = {kernel:?}\n")).unwrap();
    let _silent = SilentMount::over(silent.path(), Silence::Deaf);
    for subcommand in ["doctor", "run"] {
        let mut dozed = command(env!("CARGO_BIN_EXE_dozed"));
        let output = dozed.args([subcommand, "--config"]).arg(config.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("its file system did not answer within 10 s"), "{said}");
    }
}

#[test]
fn a_kernel_of_the_template_that_does_not_answer_fails_the_boots_that_need_it() {
    for silence in [Silence::Deaf, Silence::Mute] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Setup::counter("").private_kernel(dir.path()).start();
        host.boot("asleep");
        host.sleep("asleep");
        host.mkdir("web").unwrap();
        let silent = SilentMount::over(dir.path(), silence);
        thread::scope(|scope| {
            let writer = scope.spawn(|| host.write("web/state", "wake"));
            wait_for("the kernel is being opened", || openers(&host).first().copied());
            host.wake("asleep");
            host.counts_on("asleep");
            assert_eq!(writer.join().unwrap(), Err(Errno::TIMEDOUT));
        });
        let says = host.error("web");
        assert!(says.contains("its file system did not answer within 10 s"), "{says}");
        assert_eq!(host.state("web"), "stopped");
        thread::scope(|scope| {
            let path = host.path("web").join("state");
            let writer = scope.spawn(move || fs::write(path, "wake"));
            wait_for("the kernel is being opened", || openers(&host).first().copied());
            host.kill_daemon();
            writer.join().unwrap().unwrap_err();
        });
        drop(silent);
        host.restart();
        host.wake("web");
        host.counts_on("web");
    }
}

/// Makes a sandbox that gets a copy of this image.
fn configure(host: &Host, id: &str, image: &Path) {
    host.mkdir(id).unwrap();
    host.write(&format!("{id}/config"), format!("disks = [{{ path = {image:?} }}]\n")).unwrap();
}

#[test]
fn an_image_that_falls_silent_while_it_is_copied_fails_only_that_boot() {
    let image = StallingFile::uncached(8 << 20);
    let mut host = Setup::counter("").config("[limits]\nwakes = 1\n").start();
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(1 << 20).unwrap();
    configure(&host, "web", &image.path());
    configure(&host, "other", other.path());
    let own = host.home("web").join("disk-0.img");
    let is_copying = || own.with_extension("img.tmp").exists();
    {
        let _stall = image.stall_from(4096);
        thread::scope(|scope| {
            let writer = scope.spawn(|| host.write("web/state", "wake"));
            wait_until("the disk is being copied", is_copying);
            // There is one place among those that copy.
            host.wake("other");
            host.counts_on("other");
            assert_eq!(writer.join().unwrap(), Err(Errno::TIMEDOUT));
        });
        let says = host.error("web");
        assert!(says.contains("nothing of it was copied for 30 s"), "{says}");
        assert!(says.contains(image.path().to_str().unwrap()), "{says}");
        assert_eq!(host.state("web"), "stopped");
        assert!(!own.exists() && !is_copying());
    }
    // Else the read that waits would wait on.
    wait_until("who copied is gone", || openers(&host).is_empty());
    {
        let _stall = image.stall_from(4096);
        thread::scope(|scope| {
            let writer = scope.spawn(|| host.write("web/state", "wake"));
            wait_until("the disk is being copied", is_copying);
            host.rmdir("web").unwrap();
            assert_eq!(writer.join().unwrap(), Err(Errno::NODEV));
        });
    }
    wait_until("who copied is gone", || openers(&host).is_empty());
    configure(&host, "web", &image.path());
    let own = host.home("web").join("disk-0.img");
    {
        let _stall = image.stall_from(4096);
        thread::scope(|scope| {
            let path = host.path("web").join("state");
            let writer = scope.spawn(move || fs::write(path, "wake"));
            wait_until("the disk is being copied", || own.with_extension("img.tmp").exists());
            host.kill_daemon();
            writer.join().unwrap().unwrap_err();
        });
        host.restart();
    }
    host.wake("web");
    host.counts_on("web");
}

/// Writes a `config` that names `path`, once for each thing that it can be.
#[track_caller]
fn refused(host: &Host, path: &Path, says: &str) {
    let before = host.read("web/config");
    for document in [
        format!("kernel = {path:?}\n"),
        format!("initramfs = {path:?}\n"),
        format!("disks = [{{ path = {path:?} }}]\n"),
        format!("disks = [{{ path = {path:?}, readonly = true }}]\n"),
    ] {
        assert_eq!(host.write("web/config", &document), Err(Errno::INVAL), "{document}");
        assert!(host.error("web").contains(says), "after {document} {}", host.error("web"));
        assert_eq!(host.read("web/config"), before);
    }
}

#[test]
fn a_file_of_the_tree_is_refused_by_whatever_path_it_is_named() {
    let mut rig = Rig::start();
    let says = "it is in the tree of dozed";
    let in_tree = rig.host.path("other").join("state");
    let link = rig.dir.path().join("link");
    symlink(&in_tree, &link).unwrap();
    for path in [&in_tree, &link, &rig.host.path("web").join("config")] {
        refused(&rig.host, path, says);
    }
    // What was good when it was written may lead there by the time of the boot.
    let (disk, aside) = (rig.disk(), rig.dir.path().join("aside"));
    rename(&disk, &aside).unwrap();
    symlink(&in_tree, &disk).unwrap();
    assert_eq!(rig.host.write("web/state", "wake"), Err(Errno::INVAL));
    assert!(rig.host.error("web").contains(says), "{}", rig.host.error("web"));
    // A daemon that is killed just then is gone, and so is its tree.
    for _ in 0..5 {
        thread::scope(|scope| {
            let path = rig.host.path("web").join("state");
            let writer = scope.spawn(move || fs::write(path, "wake"));
            wait_until("the disk is being opened, or was", || {
                writer.is_finished() || !rig.openers().is_empty()
            });
            rig.host.kill_daemon();
            writer.join().unwrap().unwrap_err();
        });
        rig.host.restart();
    }
    fs::remove_file(&disk).unwrap();
    rename(&aside, &disk).unwrap();
    rig.host.wake("web");
    rig.host.counts_on("web");
}

#[test]
fn a_fifo_is_refused_at_once_whenever_it_is_found() {
    let rig = Rig::start();
    let says = "it is neither a regular file nor a block device";
    let fifo = rig.dir.path().join("fifo");
    let make_fifo = |path: &Path| {
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o666));
        rustix::fs::mknodat(CWD, path, kind, mode, 0).unwrap();
    };
    make_fifo(&fifo);
    refused(&rig.host, &fifo, says);
    let kernel = rig.dir.path().join("kernel");
    fs::copy(counter_kernel(), &kernel).unwrap();
    let document =
        format!("kernel = {kernel:?}\ndisks = [{{ path = {:?}, readonly = true }}]\n", rig.disk());
    rig.host.write("web/config", document).unwrap();
    for path in [kernel, rig.disk()] {
        let aside = rig.dir.path().join("aside");
        rename(&path, &aside).unwrap();
        make_fifo(&path);
        assert_eq!(rig.host.write("web/state", "wake"), Err(Errno::INVAL));
        let told = rig.host.error("web");
        assert!(told.contains(path.to_str().unwrap()) && told.contains(says), "{told}");
        fs::remove_file(&path).unwrap();
        rename(&aside, &path).unwrap();
    }
    rig.host.wake("web");
    rig.host.counts_on("web");
}
