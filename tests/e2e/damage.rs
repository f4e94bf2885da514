//! Snapshots that are not what they were.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::support::{Host, Setup};

/// Returns the directory of a sleeper's snapshot.
fn snapshot(host: &Host, id: &str) -> PathBuf {
    let generation = host.number(&format!("{id}/status"), "generation");
    host.home(id).join(generation.to_string())
}

/// Flips a bit of the byte of `file` at `at`.
fn flip(file: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).unwrap();
}

/// Returns where in a file its last byte is that is not nought.
fn last_data(file: &Path) -> u64 {
    let bytes = fs::read(file).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).unwrap() as u64
}

/// The wake is refused, says why, and leaves everything as it was.
#[track_caller]
fn wake_is_refused(host: &Host, id: &str, says: &str) {
    let dir = snapshot(host, id);
    let files = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let mut files: Vec<_> =
            entries.map(|entry| (entry.file_name(), entry.metadata().unwrap().len())).collect();
        files.sort_unstable();
        files
    };
    let before = files(&dir);
    assert_eq!(host.write(&format!("{id}/state"), "wake"), Err(Errno::IO));
    assert_eq!(host.state(id), "snapshotted");
    assert!(host.error(id).contains(says), "{}", host.error(id));
    assert_eq!(files(&dir), before);
    assert_eq!(host.value(&format!("{id}/status"), "pid"), "none");
}

#[test]
fn a_flipped_bit_anywhere_in_a_snapshot_is_found_before_the_guest_runs() {
    let host = Setup::counter("touch=4").start();
    host.boot("web-1");
    host.counts_on("web-1");
    host.sleep("web-1");
    let dir = snapshot(&host, "web-1");
    for name in ["vmstate", "memory", "manifest"] {
        let file = dir.join(name);
        let (len, last) = (fs::metadata(&file).unwrap().len(), last_data(&file));
        for at in [0, len / 2, last, len - 1] {
            flip(&file, at);
            wake_is_refused(&host, "web-1", "is damaged and was left as it is");
            flip(&file, at);
        }
    }
    host.wake("web-1");
    assert_eq!(host.counts_on("web-1").boots, 1);
}

#[test]
fn a_snapshot_that_lacks_a_file_or_a_part_is_not_woken() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    host.sleep("web-1");
    let dir = snapshot(&host, "web-1");
    for name in ["vmstate", "memory", "manifest"] {
        let (file, aside) = (dir.join(name), host.store().join("aside"));
        fs::copy(&file, &aside).unwrap();
        let short = OpenOptions::new().write(true).open(&file).unwrap();
        short.set_len(fs::metadata(&file).unwrap().len() - 1).unwrap();
        wake_is_refused(&host, "web-1", "damaged");
        fs::remove_file(&file).unwrap();
        wake_is_refused(&host, "web-1", "damaged");
        fs::copy(&aside, &file).unwrap();
        fs::remove_file(&aside).unwrap();
    }
    host.wake("web-1");
    host.counts_on("web-1");
}

#[test]
fn a_snapshot_of_another_sandbox_is_refused_as_foreign() {
    let host = Setup::counter("").start();
    for id in ["mine", "other"] {
        host.boot(id);
        host.counts_on(id);
        host.sleep(id);
    }
    let (mine, other) = (snapshot(&host, "mine"), snapshot(&host, "other"));
    let copy = |from: &Path, to: &Path| {
        let script = format!("rm -rf {1} && cp -a {0} {1}", from.display(), to.display());
        host.bash_ok(&script);
    };
    let aside = host.store().join("aside");
    copy(&mine, &aside);
    copy(&other, &mine);
    wake_is_refused(&host, "mine", "belongs to another sandbox");
    copy(&aside, &mine);
    fs::remove_dir_all(&aside).unwrap();
    host.wake("mine");
    host.wake("other");
    host.counts_on("mine");
    host.counts_on("other");
}

#[test]
fn a_damaged_sleeper_can_be_deleted() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    host.sleep("web-1");
    fs::remove_dir_all(snapshot(&host, "web-1")).unwrap();
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::IO));
    assert!(host.error("web-1").contains("there is no snapshot"), "{}", host.error("web-1"));
    host.rmdir("web-1").unwrap();
}
