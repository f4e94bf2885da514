//! The tree without a kernel, and once with one, on a host with a fake VMM.

use std::{fs, io::Write, path::Path, time::Duration};

use super::*;
use crate::{
    fuse::Mounted,
    lifecycle::testing::{Host, wait_for},
    sandbox::State,
    sys::pool::Pool,
    vmm::fake::{Call, Fault},
};

mod document;
mod idle;

const ROOT: Caller = Caller { uid: 0, gid: 0, tid: 0 };

fn tree(host: &Host) -> Arc<Tree> {
    Arc::new(Tree::new(Arc::clone(&host.daemon)).unwrap())
}

fn node(tree: &Tree, id: &str, file: File) -> Node {
    let mut node = Node::Root;
    for name in format!("{id}/{}", file.path()).split('/') {
        node = tree.lookup(node, name.as_bytes()).unwrap().node;
    }
    node
}

/// Opens a file, and does the job at once if there is one.
fn open(tree: &Arc<Tree>, node: Node, access: Access) -> Result<u64, Errno> {
    tree.open(node, access, ROOT).wait().map(|opened| opened.handle)
}

fn read(tree: &Arc<Tree>, id: &str, file: File) -> String {
    let node = node(tree, id, file);
    let handle = open(tree, node, Access::Read).unwrap();
    let text = tree.read_here(node, handle, 0, 1 << 20, ROOT).unwrap();
    assert!(tree.close(handle).is_none());
    String::from_utf8(text).unwrap()
}

/// Writes as a command does, by one write into a file that is opened for it.
fn write(tree: &Arc<Tree>, id: &str, file: File, data: &str) -> Result<usize, Errno> {
    let node = node(tree, id, file);
    let handle = open(tree, node, Access::Write)?;
    let written = write_to(tree, node, handle, 0, data);
    let closed = close(tree, node, handle);
    written.and_then(|len| closed.map(|()| len))
}

/// Writes to an open file, and does the job at once if there is one.
fn write_to(tree: &Tree, node: Node, handle: u64, offset: u64, data: &str) -> Result<usize, Errno> {
    tree.write(node, handle, offset, data.as_bytes(), false, ROOT).wait()
}

/// Closes a file as its only process does: flush, and then release.
fn close(tree: &Tree, node: Node, handle: u64) -> Result<(), Errno> {
    let flushed = flush(tree, node, handle);
    assert!(tree.close(handle).is_none(), "a close has committed everything");
    flushed
}

fn flush(tree: &Tree, node: Node, handle: u64) -> Result<(), Errno> {
    tree.flush(node, handle, ROOT).wait()
}

#[test]
fn a_verb_does_what_it_says_and_state_tells() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    assert_eq!(read(&tree, "a", File::State), "stopped\n");
    assert_eq!(write(&tree, "a", File::State, "wake\n"), Ok(5));
    assert_eq!(read(&tree, "a", File::State), "running\n");
    assert_eq!(write(&tree, "a", File::State, " sleep "), Ok(7));
    assert_eq!(read(&tree, "a", File::State), "snapshotted\n");
    assert_eq!(read(&tree, "a", File::Error), "ok\n");
}

#[test]
fn status_tells_what_the_vmm_of_a_sandbox_lacks_and_nothing_of_one_that_is_stopped() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let lacks = || {
        let status = read(&tree, "a", File::Status);
        status.lines().find(|line| line.starts_with("lacks ")).unwrap().to_owned()
    };
    assert_eq!(lacks(), "lacks none");
    for verb in ["wake", "sleep"] {
        write(&tree, "a", File::State, verb).unwrap();
        assert_eq!(lacks(), "lacks it is a fake; it is an old one", "{verb}");
    }
}

#[test]
fn what_is_wrong_has_an_errno_and_a_sentence_and_changes_nothing() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    for (file, data, errno, says) in [
        (File::State, "hibernate", Errno::Inval, "write `sleep` or `wake`"),
        (File::State, "sleep\nwake\n", Errno::Inval, "one write is one command"),
        (File::State, "sleep", Errno::Inval, "a sandbox that is stopped cannot be put to sleep"),
        (File::State, &"x".repeat(4097), Errno::TooBig, "at most 4096 bytes"),
        (File::IdleAfter, "5 minutes", Errno::Inval, "`90s`, `5m`, `2h`, `7d` or `never`"),
        (File::Pinned, "2", Errno::Inval, "neither `0` nor `1`"),
        (File::Config, "vcpus = 0", Errno::Inval, "line 1: `vcpus` is from 1 to 64"),
        (File::Config, "balloon = 0", Errno::Inval, "line 1: `balloon` is true or false, not 0"),
        (
            File::Config,
            "balloon = false\ninflate_before_sleep = true",
            Errno::Inval,
            "line 2: `inflate_before_sleep = true` needs `balloon = true`",
        ),
        (
            File::Config,
            "vsock = true\nvmm = \"qemu\"",
            Errno::Inval,
            "line 1: `vsock = true` needs Cloud Hypervisor",
        ),
        (File::Config, "\nkernel = \"/no\"", Errno::Inval, "line 2: `kernel`: /no: "),
        (File::Config, &"#".repeat(65_537), Errno::TooBig, "at most 65536 bytes"),
        (File::Console, "x", Errno::Inval, "a is stopped; wake it first"),
    ] {
        let before = host.entry("a").record();
        assert_eq!(write(&tree, "a", file, data), Err(errno), "{file:?} {says}");
        let error = read(&tree, "a", File::Error);
        assert!(error.contains(says), "{error}");
        assert_eq!(error.matches('\n').count(), 1, "{error:?}");
        let after = host.entry("a").record();
        assert_eq!((&before.state(), &before.spec), (&after.state(), &after.spec));
        assert_eq!(before.idle_after, after.idle_after);
    }
    for file in [File::Status, File::Error, File::Idle] {
        assert_eq!(write(&tree, "a", file, "x"), Err(Errno::Acces));
        assert_eq!(open(&tree, node(&tree, "a", file), Access::Write), Err(Errno::Acces));
    }
}

#[test]
fn a_blank_write_does_nothing_and_a_success_clears_the_error() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    for file in [File::State, File::IdleAfter, File::DeleteAfter, File::Pinned, File::Config] {
        assert_eq!(write(&tree, "a", file, " \n"), Ok(2), "{file:?}");
        assert_eq!(write(&tree, "a", file, ""), Ok(0), "{file:?}");
    }
    assert_eq!(read(&tree, "a", File::State), "stopped\n");
    write(&tree, "a", File::State, "bogus").unwrap_err();
    write(&tree, "a", File::IdleAfter, "90s").unwrap();
    assert_eq!(read(&tree, "a", File::Error), "ok\n");
    assert_eq!(read(&tree, "a", File::IdleAfter), "90s\n");
}

#[test]
fn config_reads_back_and_takes_a_whole_document() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    write(&tree, "a", File::Config, "vcpus = 2\nmemory = \"64MiB\"\n").unwrap();
    let document = read(&tree, "a", File::Config);
    assert!(document.contains("vcpus = 2\nmemory = \"64MiB\"\n"), "{document}");
    host.wake("a").unwrap();
    assert_eq!(write(&tree, "a", File::Config, "vcpus = 1"), Err(Errno::Busy));
    assert_eq!(read(&tree, "a", File::Config), document);
}

#[test]
fn a_writer_that_does_not_wait_gets_eagain_while_the_lock_is_taken() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let state = node(&tree, "a", File::State);
    let held = host
        .daemon
        .lock(&host.entry("a"), crate::lifecycle::Wait::ForIt, crate::sandbox::Cause::Reconcile)
        .unwrap();
    assert!(matches!(tree.write(state, 0, 0, b"wake", true, ROOT), Answer::Now(Err(Errno::Again))));
    drop(held);
    match tree.write(state, 0, 0, b"wake", true, ROOT) {
        Answer::Started(4, job) => assert_eq!(job(), Ok(())),
        other @ (Answer::Now(_) | Answer::Job(..) | Answer::Started(..)) => panic!("{other:?}"),
    }
    assert_eq!(host.state("a"), State::Running);
}

#[test]
fn a_reader_sees_one_text_from_its_first_byte_to_its_last() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let state = node(&tree, "a", File::State);
    let handle = open(&tree, state, Access::Read).unwrap();
    assert_eq!(tree.read_here(state, handle, 0, 3, ROOT).unwrap(), b"sto");
    host.wake("a").unwrap();
    assert_eq!(tree.read_here(state, handle, 3, 100, ROOT).unwrap(), b"pped\n");
    assert_eq!(tree.read_here(state, handle, 8, 100, ROOT).unwrap(), b"");
    assert_eq!(tree.read_here(state, handle, 0, 100, ROOT).unwrap(), b"running\n");
    drop(tree.close(handle));
    // A handle that an earlier daemon gave out still reads.
    assert_eq!(tree.read_here(state, handle, 0, 100, ROOT).unwrap(), b"running\n");
}

#[test]
fn an_open_file_of_a_deleted_sandbox_answers_enodev_and_its_inode_is_not_used_again() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let state = node(&tree, "a", File::State);
    let handle = open(&tree, state, Access::Read).unwrap();
    let removal = tree.remove_dir(Node::Root, b"a", ROOT).unwrap();
    assert!(tree.lookup(Node::Root, b"a").is_ok(), "nothing has happened yet");
    assert_eq!(removal.wait(), Ok(()));
    assert_eq!(tree.lookup(Node::Root, b"a"), Err(Errno::NoEnt));
    assert_eq!(tree.read_here(state, handle, 0, 9, ROOT), Err(Errno::NoDev));
    assert!(matches!(
        tree.write(state, 0, 0, b"wake", false, ROOT),
        Answer::Now(Err(Errno::NoDev))
    ));
    let made = tree.make_dir(Node::Root, b"a", ROOT).wait();
    assert_ne!(made.unwrap().node, Node::Dir(crate::sandbox::RowId(1)));
    assert_ne!(node(&tree, "a", File::State), state);
}

#[test]
fn names_are_ids_and_directories_are_only_made_in_the_root() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let make = |parent, name: &[u8]| tree.make_dir(parent, name, ROOT).wait().map(drop);
    for bad in [&b"A"[..], b"a.b", b"\xff", b"-a", b"dozed.list", b""] {
        assert_eq!(make(Node::Root, bad), Err(Errno::Inval), "{bad:?}");
    }
    assert_eq!(make(Node::Root, &[b'a'; 64]), Err(Errno::NameTooLong));
    assert_eq!(make(Node::Dir(crate::sandbox::RowId(1)), b"b"), Err(Errno::Perm));
    assert_eq!(make(Node::Root, b"a"), Err(Errno::Exist));
}

#[test]
fn a_listing_goes_on_where_it_stopped_whatever_came_and_went() {
    let host = Host::new();
    for id in ["a", "b", "c"] {
        host.create(id);
    }
    let tree = tree(&host);
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let mut next = None;
        tree.list(Node::Root, offset, &mut |entry| {
            if next.is_some() {
                return false;
            }
            next = Some((entry.name, entry.next));
            true
        })
        .unwrap();
        let Some((name, at)) = next else { break };
        if name == "a" {
            host.destroy("b").unwrap();
        }
        names.push(name);
        offset = at;
    }
    assert_eq!(
        names,
        [
            ".",
            "..",
            "dozed.status",
            "dozed.list",
            "dozed.events",
            "dozed.metrics",
            "dozed.error",
            "a",
            "c"
        ]
    );
}

#[test]
fn strangers_see_neither_the_line_nor_the_files_of_a_sandbox() {
    let host = Host::new();
    host.create("a"); // It is owned by user 1 and group 2.
    let tree = tree(&host);
    let list = tree.lookup(Node::Root, b"dozed.list").unwrap().node;
    let seen = |uid, gid| {
        let handle = open(&tree, list, Access::Read).unwrap();
        let caller = Caller { uid, gid, tid: 0 };
        String::from_utf8(tree.read_here(list, handle, 0, 4096, caller).unwrap()).unwrap()
    };
    for (uid, gid) in [(0, 0), (1, 9), (9, 2)] {
        assert!(seen(uid, gid).starts_with("a stopped 1:2 "), "{}", seen(uid, gid));
    }
    assert_eq!(seen(9, 9), "");
    let dir = tree.lookup(Node::Root, b"a").unwrap();
    assert_eq!((dir.mode, dir.uid, dir.gid), (0o750, 1, 2));
}

#[test]
fn looking_changes_nothing() {
    let host = Host::new();
    host.create("a");
    host.wake("a").unwrap();
    host.sleep("a").unwrap();
    let tree = tree(&host);
    let entry = host.entry("a");
    let before = (entry.activity_count(), entry.last_activity(), entry.record());
    host.clock.advance(Duration::from_secs(9));
    for file in File::ALL {
        read(&tree, "a", file);
    }
    tree.set_attr(
        node(&tree, "a", File::State),
        AttrChange { mtime: true, ..Default::default() },
        ROOT,
    )
    .wait()
    .unwrap();
    assert_eq!((entry.activity_count(), entry.last_activity(), entry.record()), before);
    let touch = AttrChange { mtime: true, ..Default::default() };
    tree.set_attr(node(&tree, "a", File::Activity), touch, ROOT).wait().unwrap();
    assert_eq!(entry.activity_count(), before.0 + 1);
}

#[test]
fn chmod_and_chown_do_what_they_say_and_last() {
    let mut host = Host::new();
    host.create("a");
    let (dir, state) = {
        let tree = tree(&host);
        (tree.lookup(Node::Root, b"a").unwrap().node, node(&tree, "a", File::State))
    };
    let change = |host: &Host, node, change| tree(host).set_attr(node, change, ROOT).wait();
    let mode = AttrChange { mode: Some(0o600), ..Default::default() };
    assert_eq!(change(&host, state, mode).unwrap().mode, 0o600);
    let wide = AttrChange { mode: Some(0o1777), ..Default::default() };
    assert_eq!(change(&host, Node::Root, wide).unwrap().mode, 0o1777);
    let owner = AttrChange { uid: Some(7), gid: Some(8), ..Default::default() };
    assert_eq!(change(&host, state, owner), Err(Errno::Perm));
    let owned = change(&host, dir, owner).unwrap();
    assert_eq!((owned.uid, owned.gid, owned.mode), (7, 8, 0o750));
    // The same again, as `chown -R` does, is no change.
    assert!(matches!(tree(&host).set_attr(state, owner, ROOT), Answer::Now(Ok(_))));

    host.restart();
    let state = tree(&host).attr(state).unwrap();
    assert_eq!((state.uid, state.gid, state.mode), (7, 8, 0o600));
    assert_eq!(tree(&host).attr(Node::Root).unwrap().mode, 0o1777);
    assert_eq!(host.state("a"), State::Stopped);
}

#[test]
fn a_panic_in_one_operation_is_an_eio_and_never_hangs_the_mount() {
    let host = Host::new();
    host.create("a");
    host.create("b");
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::new());
    let mounted = Mounted::mount(tree(&host), dir.path(), pool, None).unwrap();
    let write = |path: &str, text: &str| {
        let mut file = fs::File::options().write(true).open(dir.path().join(path)).unwrap();
        file.write_all(text.as_bytes()).map_err(|error| error.raw_os_error())
    };
    for _ in 0..5 {
        host.vmm.fail_next(Call::Boot, Fault::Panic);
        assert_eq!(write("a/state", "wake"), Err(Some(libc::EIO)));
    }
    let says = fs::read_to_string(dir.path().join("a/error")).unwrap();
    assert!(says.contains("panicked, which is a bug in dozed"), "{says}");
    for id in ["a", "b"] {
        write(&format!("{id}/state"), "wake").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(id).join("state")).unwrap(), "running\n");
    }
    fs::remove_dir(dir.path().join("a")).unwrap();
    assert!(!Path::exists(&dir.path().join("a")));
    wait_for("locks to be free", || host.daemon.locks_in_use() == 0);
    mounted.unmount().unwrap();
}

#[test]
fn questions_that_hang_hold_up_nobody() {
    let host = Host::new();
    let tree = tree(&host);
    for id in ["a", "b"] {
        host.create(id);
        write(&tree, id, File::Config, "net = \"internet\"\n").unwrap();
        host.wake(id).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mounted::mount(tree, dir.path(), Arc::new(Pool::new()), None).unwrap();
    let counters = dir.path().join("a/net/counters");
    // More than there are threads that serve requests.
    let readers = 4;
    std::thread::scope(|scope| {
        let held = host.network.hold_counters();
        for _ in 0..readers {
            scope.spawn(|| assert!(fs::read_to_string(&counters).unwrap().ends_with('\n')));
        }
        wait_for("all of them to hang", || host.network.asked() >= readers);
        for _ in 0..20 {
            assert_eq!(fs::read_to_string(dir.path().join("b/state")).unwrap(), "running\n");
            assert!(fs::metadata(dir.path().join("a/config")).unwrap().len() > 0);
            assert!(fs::read_dir(dir.path()).unwrap().count() > 2);
        }
        drop(held);
    });
    mounted.unmount().unwrap();
}

#[test]
fn an_open_awake_wakes_and_holds_until_it_is_closed() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let awake = node(&tree, "a", File::Awake);
    assert_eq!(read(&tree, "a", File::Awake), "");
    assert_eq!(read(&tree, "a", File::State), "stopped\n", "looking wakes nobody");

    let first = open(&tree, awake, Access::Write).unwrap();
    let second = open(&tree, awake, Access::WriteNonblocking).unwrap();
    assert_eq!(read(&tree, "a", File::State), "running\n");
    assert_eq!(read(&tree, "a", File::Awake).lines().count(), 2);
    assert!(read(&tree, "a", File::Idle).starts_with("verdict held\nbecause held awake by "));
    assert!(read(&tree, "a", File::Idle).contains("\nsleeps_at none\n"));

    assert_eq!(write(&tree, "a", File::State, "sleep"), Err(Errno::Busy));
    assert!(read(&tree, "a", File::Error).starts_with("a is held awake by ? (pid 0, uid 0), "));
    assert_eq!(tree.remove_dir(Node::Root, b"a", ROOT).unwrap().wait(), Err(Errno::Busy));
    drop(tree.close(first));
    assert_eq!(write(&tree, "a", File::State, "sleep"), Err(Errno::Busy));
    drop(tree.close(second));
    assert_eq!(write(&tree, "a", File::State, "sleep"), Ok(5));
    assert_eq!(tree.remove_dir(Node::Root, b"a", ROOT).unwrap().wait(), Ok(()));
}

#[test]
fn a_hold_that_cannot_wake_is_none_and_each_user_has_a_bounded_number() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let awake = node(&tree, "a", File::Awake);
    host.vmm.fail_next(Call::Boot, Fault::Refuse);
    assert_eq!(open(&tree, awake, Access::Write), Err(Errno::Io));
    assert_eq!(read(&tree, "a", File::Awake), "");
    assert!(read(&tree, "a", File::Error).contains("as planned"));

    let held: Vec<u64> = (0..3).map(|_| open(&tree, awake, Access::Write).unwrap()).collect();
    assert_eq!(open(&tree, awake, Access::Write), Err(Errno::Dquot));
    assert!(read(&tree, "a", File::Error).contains("[limits] holds"));
    held.into_iter().for_each(|handle| drop(tree.close(handle)));
    open(&tree, awake, Access::Write).unwrap();
}

#[test]
fn metrics_count_what_was_done_by_cause_and_what_failed_by_errno() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let read = || {
        let node = tree.lookup(Node::Root, b"dozed.metrics").unwrap().node;
        let handle = open(&tree, node, Access::Read).unwrap();
        let text = tree.read_here(node, handle, 0, 1 << 20, ROOT).unwrap();
        drop(tree.close(handle));
        String::from_utf8(text).unwrap()
    };
    for verb in ["wake", "sleep", "wake"] {
        write(&tree, "a", File::State, verb).unwrap();
    }
    assert_eq!(write(&tree, "a", File::State, "hibernate"), Err(Errno::Inval));
    assert_eq!(write(&tree, "a", File::Config, "vcpus = 0"), Err(Errno::Inval));
    host.vmm.fail_next(Call::Save, Fault::Refuse);
    assert_eq!(write(&tree, "a", File::State, "sleep"), Err(Errno::Io));
    let handle = open(&tree, node(&tree, "a", File::Awake), Access::Write).unwrap();
    let text = read();
    for line in [
        "dozed_sandboxes{state=\"running\"} 1",
        "dozed_boots_total{cause=\"write\"} 1",
        "dozed_sleeps_total{cause=\"write\"} 1",
        "dozed_wakes_total{cause=\"write\"} 1",
        "dozed_sleep_duration_seconds_count 1",
        "dozed_wake_duration_seconds_count 1",
        "dozed_failures_total{errno=\"EINVAL\"} 2",
        "dozed_failures_total{errno=\"EIO\"} 1",
        "dozed_holds 1",
        "dozed_memory_bytes 16777216",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    assert!(!text.contains("dozed_losses_total"), "{text}");
    drop(tree.close(handle));
    assert!(read().contains("\ndozed_holds 0\n"));
}

#[test]
fn the_size_of_every_file_but_state_is_the_length_of_its_text() {
    let host = Host::new();
    for (id, verb) in [("a", "wake"), ("b", "sleep"), ("c", "wake")] {
        host.create(id);
        host.wake(id).unwrap();
        let tree = tree(&host);
        write(&tree, id, File::State, verb).unwrap();
        write(&tree, id, File::Denied, "10.0.0.0/8\n").unwrap();
        write(&tree, id, File::IdleAfter, "bogus").unwrap_err();
    }
    let tree = tree(&host);
    let mut nodes: Vec<Node> = DaemonFile::ALL.map(Node::Daemon).to_vec();
    for id in ["a", "b", "c"] {
        let Node::Dir(row) = tree.lookup(Node::Root, id.as_bytes()).unwrap().node else { panic!() };
        nodes.extend(File::every().map(|file| Node::File(row, file)));
    }
    for (node, seconds) in nodes.into_iter().zip((0..10).cycle()) {
        if matches!(node, Node::File(_, File::State)) {
            continue;
        }
        // An age has another digit after ten seconds, a read comes a little after the size.
        host.clock.advance(Duration::from_millis(1000 * seconds + 900));
        let size = tree.attr_for(node, ROOT).wait().unwrap().size;
        let handle = open(&tree, node, Access::Read).unwrap();
        host.clock.advance(Duration::from_millis(200));
        let text = tree.read(node, handle, 0, 1 << 20, ROOT).wait().unwrap();
        assert_eq!(text.len() as u64, size, "{node:?}: {}", String::from_utf8_lossy(&text));
        drop(tree.close(handle));
        assert!(tree.attr(node).is_ok());
    }
}

#[test]
fn what_waits_for_a_disk_or_the_kernel_is_a_job() {
    let host = Host::new();
    host.create("a");
    let tree = tree(&host);
    let row = host.entry("a").row();
    for (node, reads, sizes) in [
        (Node::File(row, File::Console), true, true),
        (Node::File(row, File::Status), true, true),
        (Node::File(row, File::Counters), true, true),
        (Node::File(row, File::Namespace), true, true),
        (Node::Daemon(DaemonFile::List), true, true),
        (Node::File(row, File::State), false, false),
        (Node::File(row, File::Config), false, false),
        (Node::File(row, File::Idle), false, false),
        (Node::File(row, File::Events), false, false),
        (Node::Daemon(DaemonFile::Status), false, false),
        (Node::Daemon(DaemonFile::Metrics), false, false),
        (Node::Dir(row), false, false),
    ] {
        let is_job = matches!(tree.attr_for(node, ROOT), Answer::Job(Work::Read, _));
        assert_eq!(is_job, sizes, "the attributes of {node:?}");
        if !node.is_dir() {
            let is_job = matches!(tree.read(node, 0, 0, 10, ROOT), Answer::Job(Work::Read, _));
            assert_eq!(is_job, reads, "{node:?}");
        }
    }
    let console = Node::File(row, File::Console);
    assert!(matches!(tree.open(console, Access::Read, ROOT), Answer::Job(Work::Read, _)));
    assert!(matches!(tree.poll(console, 0, None), Answer::Job(Work::Read, _)));
    assert!(matches!(tree.poll(Node::File(row, File::State), 0, None), Answer::Now(_)));
}

#[test]
fn why_a_mkdir_or_an_rmdir_failed_is_told_to_its_user_until_one_succeeds() {
    let host = Host::new();
    let tree = tree(&host);
    let node = Node::Daemon(DaemonFile::Error);
    let user = Caller { uid: 7, gid: 7, tid: 0 };
    let error = |caller| {
        let text = tree.read(node, 0, 0, 4096, caller).wait().unwrap();
        String::from_utf8(text).unwrap()
    };
    let make = |name: &[u8]| tree.make_dir(Node::Root, name, user).wait();
    assert_eq!(error(user), "ok\n");
    assert_eq!(make(b"Web_1").unwrap_err(), Errno::Inval);
    let says = "`Web_1`: an id consists of lower-case letters, digits and inner hyphens, such as \
                `web-1`\n";
    assert_eq!((error(user).as_str(), error(ROOT).as_str()), (says, "ok\n"));
    make(b"web-1").unwrap();
    assert_eq!(error(user), "ok\n");
    assert_eq!(make(&[b'a'; 64]).unwrap_err(), Errno::NameTooLong);
    assert!(error(user).contains("at most 63 characters"), "{}", error(user));
    write(&tree, "web-1", File::Pinned, "1").unwrap();
    let remove = || tree.remove_dir(Node::Root, b"web-1", user).unwrap().wait();
    assert_eq!(remove(), Err(Errno::Perm));
    assert!(error(user).contains("pinned"), "{}", error(user));
    write(&tree, "web-1", File::Pinned, "0").unwrap();
    assert_eq!(remove(), Ok(()));
    assert_eq!(error(user), "ok\n");
}

#[test]
fn changed_modes_go_with_their_sandbox_from_memory_and_index() {
    let host = Host::new();
    for id in ["a", "ab"] {
        host.create(id);
    }
    let tree = tree(&host);
    let mode = AttrChange { mode: Some(0o600), ..Default::default() };
    let change = |node: Node| tree.set_attr(node, mode, ROOT).wait().unwrap();
    let row = |id: &str| host.entry(id).row();
    let nodes = [Node::Dir(row("a")), Node::File(row("a"), File::State), Node::Dir(row("ab"))];
    for node in nodes.into_iter().chain([Node::Root]) {
        change(node);
    }
    let left = || host.daemon.index().metas("row:").unwrap().len();
    assert_eq!(left(), 4);
    tree.remove_dir(Node::Root, b"a", ROOT).unwrap().wait().unwrap();
    assert_eq!(left(), 2);
    assert_eq!(nodes.map(|node| tree.modes.get(node).is_some()), [false, false, true]);
    // Of one that was deleted while nobody had a tree nothing is read.
    host.destroy("ab").unwrap();
    assert_eq!((left(), self::tree(&host).modes.get(Node::Root)), (1, Some(0o600)));
}
