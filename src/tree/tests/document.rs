//! Documents commit when they are closed, whole or not at all.

use super::*;

/// A process that is there, other than this one.
const OTHER: Caller = Caller { uid: 0, gid: 0, tid: 1 };

fn us() -> Caller {
    let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    Caller { tid, ..ROOT }
}

/// A sandbox, and one of its documents that is open for writing.
struct Open {
    _host: Host,
    tree: Arc<Tree>,
    file: File,
    node: Node,
    handle: u64,
}

impl Open {
    fn new(file: File, access: Access, caller: Caller) -> Self {
        let host = Host::new();
        host.create("a");
        let tree = tree(&host);
        let node = node(&tree, "a", file);
        let handle = tree.open(node, access, caller).wait().unwrap().handle;
        Self { _host: host, tree, file, node, handle }
    }

    fn write(&self, data: &str) -> Result<usize, Errno> {
        self.write_at(0, data)
    }

    fn write_at(&self, offset: u64, data: &str) -> Result<usize, Errno> {
        write_to(&self.tree, self.node, self.handle, offset, data)
    }

    /// Writes where the last write ended, as a file's position does.
    fn write_all(&self, pieces: &[&str]) {
        let mut at = 0;
        for piece in pieces {
            assert_eq!(self.write_at(at, piece), Ok(piece.len()), "{piece:?} at {at}");
            at += piece.len() as u64;
        }
    }

    fn flush(&self) -> Result<(), Errno> {
        flush(&self.tree, self.node, self.handle)
    }

    fn text(&self) -> String {
        let handle = open(&self.tree, self.node, Access::Read).unwrap();
        let text = self.tree.read_here(self.node, handle, 0, 1 << 20, ROOT).unwrap();
        assert!(self.tree.close(handle).is_none());
        String::from_utf8(text).unwrap()
    }

    fn error(&self) -> String {
        read(&self.tree, "a", File::Error)
    }
}

#[test]
fn a_document_may_come_in_any_number_of_writes_and_holds_from_its_close_on() {
    let open = Open::new(File::Config, Access::Write, ROOT);
    let before = open.text();
    open.write_all(&["vcp", "us = 2\nmem", "ory = \"64MiB\"\n", "# the end"]);
    assert_eq!(open.text(), before, "nothing holds before it is closed");
    assert_eq!(open.flush(), Ok(()));
    assert!(open.text().contains("vcpus = 2\nmemory = \"64MiB\"\n"), "{}", open.text());
    assert!(open.tree.close(open.handle).is_none());
}

#[test]
fn only_what_was_written_is_the_document_unless_it_was_opened_to_append() {
    for (access, whole) in
        [(Access::Write, "10.1.0.0/16\n"), (Access::Append, "10.0.0.0/16\n10.1.0.0/16\n")]
    {
        let open = Open::new(File::Denied, access, ROOT);
        let list = open_for(&open, Access::Write);
        write_to(&open.tree, open.node, list, 0, "10.0.0.0/16\n").unwrap();
        close(&open.tree, open.node, list).unwrap();
        // The kernel's offset of what is appended is the old size, and means nothing.
        let at = if access == Access::Append { 12 } else { 0 };
        assert_eq!(open.write_at(at, "10.1.0.0/16\n"), Ok(12));
        assert_eq!(open.flush(), Ok(()));
        assert_eq!(open.text(), whole, "{access:?}");
    }
}

#[test]
fn what_two_append_at_a_time_is_there_of_both() {
    let open = Open::new(File::Denied, Access::Append, ROOT);
    let other = open_for(&open, Access::Append);
    open.write_all(&["10.1.0.0/16\n"]);
    write_to(&open.tree, open.node, other, 0, "10.2.0.0/16\n").unwrap();
    assert_eq!(open.flush(), Ok(()));
    close(&open.tree, open.node, other).unwrap();
    assert_eq!(open.text(), "10.1.0.0/16\n10.2.0.0/16\n");
    open.write_all(&["10.3.0.0/16\n"]);
    assert_eq!(open.flush(), Ok(()));
    assert_eq!(open.text(), "10.1.0.0/16\n10.2.0.0/16\n10.3.0.0/16\n");
}

fn open_for(other: &Open, access: Access) -> u64 {
    open(&other.tree, other.node, access).unwrap()
}

#[test]
fn a_line_that_can_never_be_right_fails_its_write_and_the_whole_document() {
    for (file, good, bad, says) in [
        (File::Denied, "10.0.0.0/8\n", "10.0.0.0/33\n", "line 2"),
        (File::Nameservers, "9.9.9.9\n", "nine\n", "line 2"),
        (File::Config, "vcpus = 1\n", "vcpsu = 2\n", "line 2: unknown key `vcpsu`"),
        (File::Config, "vcpus = 1\n", "vcpus = 2\n", "line 2: `vcpus`: duplicate key"),
        (File::Config, "vcpus = 1\n", "kernel = \"/no\"\n", "line 2: `kernel`: /no"),
        (File::Config, "vcpus = 1\n", "denied = [\"x\"]\n", "line 2: `denied`: `x`"),
    ] {
        let open = Open::new(file, Access::Write, ROOT);
        let before = open.text();
        open.write_all(&[good]);
        assert_eq!(open.write_at(good.len() as u64, bad), Err(Errno::Inval), "{bad}");
        assert!(open.error().contains(says), "{}", open.error());
        assert_eq!(open.write_at(good.len() as u64, good), Err(Errno::Inval), "{bad}");
        assert_eq!(open.flush(), Err(Errno::Inval), "{bad}");
        assert!(open.tree.close(open.handle).is_none());
        assert_eq!(open.text(), before, "{file:?}");
    }
}

#[test]
fn what_may_still_become_right_fails_only_at_the_close() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(512).unwrap();
    let named = format!("path = {:?}\nreadonly = true\n", disk.path());
    for (beginning, rest) in [
        ("[[disks]]\n", named.as_str()),
        ("denied = [\n", "\"10.0.0.0/8\"\n]\n"),
        ("cmdline = \"\"\"\n", "quiet\"\"\"\n"),
        ("memory = \"64MiB", "\"\n"),
    ] {
        let open = Open::new(File::Config, Access::Write, ROOT);
        let before = open.text();
        open.write_all(&[beginning]);
        assert_eq!(open.flush(), Err(Errno::Inval), "{beginning}");
        assert_ne!(open.error(), "ok\n");
        assert_eq!(open.flush(), Err(Errno::Inval), "nothing has changed since");
        assert_eq!(open.text(), before);
        // The writer has it open still, and goes on.
        let whole = open.write_at(beginning.len() as u64, rest);
        assert_eq!(whole, Ok(rest.len()), "{beginning}{rest}: {}", open.error());
        assert_eq!(open.flush(), Ok(()), "{beginning}{rest}: {}", open.error());
        assert_ne!(open.text(), before);
    }
}

#[test]
fn a_child_that_closes_the_file_commits_nothing_and_the_last_close_does_what_is_left() {
    let open = Open::new(File::Denied, Access::Write, us());
    open.write_all(&["10.0.0.0/8\n"]);
    assert_eq!(open.tree.flush(open.node, open.handle, OTHER).wait(), Ok(()));
    assert_eq!(open.text(), "");
    open.write_at(11, "10.1.0.0/16\n").unwrap();
    assert_eq!(open.tree.flush(open.node, open.handle, us()).wait(), Ok(()));
    assert_eq!(open.text(), "10.0.0.0/8\n10.1.0.0/16\n");
    // A child that has outlived the opener goes on writing.
    open.write_at(23, "10.2.0.0/16\n").unwrap();
    assert_eq!(open.tree.flush(open.node, open.handle, OTHER).wait(), Ok(()));
    let left = open.tree.close(open.handle).expect("there is something left to commit");
    assert_eq!(left(), Ok(()));
    assert_eq!(open.text(), "10.0.0.0/8\n10.1.0.0/16\n10.2.0.0/16\n");
    assert_eq!(open.file, File::Denied);
}

#[test]
fn fsync_commits_and_the_close_after_it_has_nothing_left_to_do() {
    let open = Open::new(File::Denied, Access::Write, ROOT);
    open.write_all(&["10.0.0.0/8"]);
    assert_eq!(open.tree.sync(open.node, open.handle).wait(), Ok(()));
    assert_eq!(open.text(), "10.0.0.0/8\n");
    assert!(matches!(open.tree.flush(open.node, open.handle, ROOT), Answer::Now(Ok(()))));
}

#[test]
fn to_truncate_changes_nothing_by_itself_and_takes_back_what_was_written() {
    let open = Open::new(File::Denied, Access::Append, ROOT);
    let list = open_for(&open, Access::Write);
    write_to(&open.tree, open.node, list, 0, "10.0.0.0/16\n").unwrap();
    close(&open.tree, open.node, list).unwrap();
    open.tree.truncate(open.node, open.handle, 0);
    assert_eq!(open.flush(), Ok(()));
    assert_eq!(open.text(), "10.0.0.0/16\n");
    open.write_at(12, "10.1.0.0/16\nx").unwrap();
    open.tree.truncate(open.node, open.handle, 12);
    assert_eq!(open.flush(), Ok(()));
    assert_eq!(open.text(), "10.1.0.0/16\n");
    assert_eq!(open.write("bad\n"), Err(Errno::Inval));
    open.tree.truncate(open.node, open.handle, 0);
    assert_eq!(open.write("10.2.0.0/16\n"), Ok(12));
    assert_eq!(open.flush(), Ok(()));
    assert_eq!(open.text(), "10.2.0.0/16\n");
}

#[test]
fn a_document_has_no_holes_and_an_end() {
    let open = Open::new(File::Config, Access::Write, ROOT);
    let before = open.text();
    open.write_all(&["vcpus = 1\n"]);
    assert_eq!(open.write_at(11, "# further on\n"), Err(Errno::Inval));
    assert!(open.error().contains("at byte 11, after 10 bytes"), "{}", open.error());
    assert_eq!(open.flush(), Err(Errno::Inval));
    let other = open_for(&open, Access::Write);
    let half = "#".repeat(32 << 10);
    assert_eq!(write_to(&open.tree, open.node, other, 0, &half), Ok(half.len()));
    assert_eq!(write_to(&open.tree, open.node, other, 32 << 10, &half), Ok(half.len()));
    assert_eq!(write_to(&open.tree, open.node, other, 64 << 10, "#"), Err(Errno::TooBig));
    assert_eq!(flush(&open.tree, open.node, other), Err(Errno::TooBig));
    assert_eq!(open.text(), before);
}

#[test]
fn a_user_has_a_bounded_number_of_bytes_in_documents_that_are_not_closed() {
    let open = Open::new(File::Config, Access::Write, ROOT);
    let long = "#".repeat(64 << 10);
    let mut handles: Vec<u64> = (0..16).map(|_| open_for(&open, Access::Write)).collect();
    for handle in &handles {
        assert_eq!(write_to(&open.tree, open.node, *handle, 0, &long), Ok(long.len()));
    }
    assert_eq!(open.write("#"), Err(Errno::Dquot));
    assert!(open.error().contains("close some"), "{}", open.error());
    // Another user is not concerned, and what is closed makes room.
    let theirs = Caller { uid: 7, gid: 7, tid: 0 };
    let other = open.tree.open(open.node, Access::Write, theirs).wait().unwrap().handle;
    assert_eq!(write_to(&open.tree, open.node, other, 0, "#"), Ok(1));
    drop(open.tree.close(handles.pop().unwrap()));
    let again = open_for(&open, Access::Write);
    assert_eq!(write_to(&open.tree, open.node, again, 0, "#"), Ok(1));
}

#[test]
fn a_list_that_could_not_be_put_in_force_fails_the_close_and_can_be_tried_again() {
    let open = Open::new(File::Config, Access::WriteNonblocking, ROOT);
    let (host, before) = (&open._host, open.text());
    let lock = || {
        let entry = host.entry("a");
        let cause = crate::sandbox::Cause::Reconcile;
        host.daemon.lock(&entry, crate::lifecycle::Wait::ForIt, cause).unwrap()
    };
    open.write_all(&["vcpus = 2\n"]);
    let held = lock();
    assert_eq!(open.flush(), Err(Errno::Again));
    drop(held);
    assert_eq!(open.text(), before);
    open.write("vcpus = 3\n").unwrap();
    assert_eq!(open.flush(), Ok(()));
    assert!(open.text().contains("vcpus = 3\n"));
}
