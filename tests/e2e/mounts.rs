//! The mount itself: who else has it when the daemon ends, and what is below it when the
//! next one starts.

use std::{
    fs,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount},
};

use crate::support::{Host, Setup, command, wait_for, wait_until};

/// Another place that has the tree, for as long as this lives.
struct BindMount(tempfile::TempDir);

impl BindMount {
    fn of(tree: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount_bind(tree, dir.path()).unwrap();
        // As in a container: what is done to the tree is not done here.
        mount_change(dir.path(), MountPropagationFlags::PRIVATE).unwrap();
        Self(dir)
    }
}

impl Drop for BindMount {
    fn drop(&mut self) {
        unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// A process with a mount namespace of its own, for as long as this lives.
struct MountNamespace(Child);

impl MountNamespace {
    fn start() -> Self {
        let mut program = command("unshare");
        program.args(["--mount", "--propagation", "private", "sh", "-c", "echo there; exec cat"]);
        let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        assert_eq!(&said, b"there\n");
        Self(child)
    }
}

impl Drop for MountNamespace {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Watches what a path leads to.
struct Watch {
    inotify: OwnedFd,
    seen: Vec<ReadFlags>,
}

impl Watch {
    fn of(path: &Path) -> Self {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&inotify, path, WatchFlags::ALL_EVENTS).unwrap();
        Self { inotify, seen: Vec::new() }
    }

    fn has_seen(&mut self, event: ReadFlags) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(next) = reader.next() {
            self.seen.push(next.events());
        }
        self.seen.iter().any(|seen| seen.contains(event))
    }
}

fn watches(host: &Host) -> [Watch; 3] {
    ["", "web-1", "web-1/state"].map(|name| Watch::of(&host.path(name)))
}

fn all_are_ended(watches: &mut [Watch]) {
    for watch in watches {
        for event in [ReadFlags::UNMOUNT, ReadFlags::IGNORED] {
            wait_until("a watcher hears that its tree is gone", || watch.has_seen(event));
        }
    }
}

#[test]
fn an_end_does_not_wait_for_who_else_has_the_tree() {
    let mut host = Setup::counter("").start();
    host.boot("web-1");
    let (bound, _namespace) = (BindMount::of(host.mount()), MountNamespace::start());
    let open = fs::File::open(host.path("web-1/state")).unwrap();
    host.terminate();
    let error = fs::read_dir(bound.0.path()).map(drop).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTCONN.raw_os_error()));
    drop(open);
    host.restart();
    assert_eq!(host.counts_on("web-1").boots, 1);
    // Nor does it matter to a start after a crash.
    host.kill_daemon();
    host.restart();
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn a_tree_that_only_another_namespace_still_has_is_not_served() {
    let mut host = Setup::bare().start();
    let bound = BindMount::of(host.mount());
    dozed::sys::mount::detach(host.mount()).unwrap();
    assert_eq!(host.ended().code(), Some(1));
    assert!(host.log().contains("was unmounted by somebody else; guests keep running"));
    drop(bound);
    host.restart();
}

#[test]
fn directories_made_while_no_daemon_ran_do_not_keep_one_from_starting() {
    let mut host = Setup::bare().start();
    host.terminate();
    let stray = host.path("web-1");
    fs::create_dir(&stray).unwrap();
    host.restart();
    assert_eq!(host.list(), [""; 0]);
    assert!(host.log().contains("empty directories"), "{}", host.log());
    host.mkdir("web-1").unwrap();
    host.terminate();
    // A file is not hidden.
    fs::write(stray.join("file"), "mine").unwrap();
    let output = host.second_start();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("has files in it, which the tree would hide"), "{said}");
    assert_eq!(fs::read(stray.join("file")).unwrap(), b"mine");
    fs::remove_dir_all(&stray).unwrap();
    host.restart();
    assert_eq!(host.list(), ["web-1"]);
}

#[test]
fn a_directory_of_the_configuration_that_is_a_file_is_named_with_its_key() {
    let mut host = Setup::bare().start();
    host.terminate();
    let mount = host.mount().to_owned();
    fs::remove_dir(&mount).unwrap();
    fs::write(&mount, "").unwrap();
    let output = host.second_start();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.ends_with("is not a directory; choose another `mount`\n"), "{said}");
    fs::remove_file(&mount).unwrap();
    host.restart();
}

#[test]
fn a_daemon_with_a_directory_in_a_tree_is_refused_and_makes_no_sandbox() {
    let mut host = Setup::bare().start();
    let beside = tempfile::tempdir().unwrap();
    let dirs = ["mount", "store", "runtime"].map(|key| beside.path().join(key));
    std::os::unix::fs::symlink(host.mount(), beside.path().join("link")).unwrap();
    let inside = [host.path("web-1"), host.path("web-1/a"), beside.path().join("link/web-1")];
    let refused = |host: &Host, tree: &Path| {
        for (place, key) in ["mount", "store", "runtime"].into_iter().enumerate() {
            for dir in inside.iter().map(std::path::PathBuf::as_path).chain([tree]) {
                if key == "mount" && dir == tree {
                    continue; // That it is in use is another sentence.
                }
                let mut dirs = dirs.clone();
                dir.clone_into(&mut dirs[place]);
                let [mount, store, runtime] = &dirs;
                let output = host.start_another(&Setup::bare(), mount, store, runtime);
                let said = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), Some(1), "{said}");
                let want = format!(
                    "dozed: `{key}` = \"{}\" is in the tree of sandboxes {}; ",
                    dir.display(),
                    host.mount().display()
                );
                assert!(said.starts_with(&want), "{said}");
            }
        }
        assert!(dirs.iter().all(|dir| !dir.exists()), "nothing was made");
    };
    refused(&host, host.mount());
    assert_eq!(host.list(), [""; 0]);
    // What a killed daemon has left does not answer.
    host.kill_daemon();
    refused(&host, host.mount());
    host.restart();
    assert_eq!(host.list(), [""; 0]);
}

#[test]
fn nobody_gets_below_the_mount_while_a_killed_daemon_is_replaced() {
    let mut host = Setup::bare().start();
    let done = AtomicBool::new(false);
    let path = host.path("stray");
    for _ in 0..5 {
        thread::scope(|scope| {
            let maker = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    fs::create_dir(&path).ok();
                    fs::remove_dir(&path).ok();
                }
            });
            host.kill_daemon();
            host.restart();
            done.store(true, Ordering::Relaxed);
            maker.join().unwrap();
            done.store(false, Ordering::Relaxed);
        });
        host.rmdir("stray").ok();
    }
    host.terminate();
    let left: Vec<_> = fs::read_dir(host.mount()).unwrap().map(|entry| entry.unwrap()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn watchers_hear_that_their_tree_is_gone() {
    let mut host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    let mut before = watches(&host);
    host.terminate();
    all_are_ended(&mut before);
    host.restart();
    let mut before = watches(&host);
    host.kill_daemon();
    host.restart();
    all_are_ended(&mut before);
    // A watcher that watches anew hears of what happens now.
    let mut watch = Watch::of(host.mount());
    host.mkdir("web-2").unwrap();
    wait_for("a watcher hears of a new one", || watch.has_seen(ReadFlags::CREATE).then_some(()));
}
