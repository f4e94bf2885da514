//! The round trip, each kind of damage, and each place to crash in.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    manifest::tests::{facts, sealed, unsealed},
    *,
};
use crate::{
    sandbox::RowId,
    sys::{
        cancel::Cancel,
        files::{self, punch},
    },
};

const MEMORY_BYTES: u64 = 8 << 20;

/// A sandbox's directory, with a store around it.
struct Store {
    _temp: tempfile::TempDir,
    path: PathBuf,
    home: Home,
}

impl Store {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().to_owned();
        let home = Home::new(&path, RowId(7));
        home.create().unwrap();
        Self { _temp: temp, path, home }
    }

    /// One whose machine lives since `generation`, and has written to its memory.
    fn alive(generation: u64) -> Self {
        let store = Self::new();
        store.home.begin_run(generation, Memory::Mapped, MEMORY_BYTES).unwrap();
        let memory = write_open(&store.home.live_memory(generation));
        memory.write_all_at(b"a guest", 3 << 20).unwrap();
        store
    }

    /// One that sleeps on the snapshot 4.
    fn asleep() -> Self {
        let store = Self::alive(3);
        let staged = store.staged(3, 4);
        staged.commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap();
        store.home.end_run().unwrap();
        store
    }

    /// Does what comes before a commit, the VMM's part included.
    fn staged(&self, live: u64, generation: u64) -> Staged {
        let mut staged = self.home.stage(generation, Memory::Mapped).unwrap();
        staged.take_memory(live).unwrap();
        fs::write(staged.dir().join("vmstate"), "registers").unwrap();
        staged
    }

    fn open(&self) -> Result<Snapshot, Error> {
        self.home.open(&"web-1".parse().unwrap(), 4)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.home.snapshot_dir(4).join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.home.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn survey(&self) -> (Option<u64>, Vec<u64>, Option<u64>) {
        let survey = self.home.survey().unwrap();
        (survey.live, survey.partials, survey.committed)
    }
}

fn write_open(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

fn has_the_guest(memory: &Path) -> bool {
    let mut bytes = [0; 7];
    let file = File::open(memory).unwrap();
    file.read_exact_at(&mut bytes, 3 << 20).unwrap();
    bytes == *b"a guest"
}

#[test]
fn a_guest_falls_asleep_and_is_woken_with_its_memory() {
    let store = Store::alive(3);
    let committed =
        store.staged(3, 4).commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap();
    assert_eq!(committed.generation, 4);
    assert!((8192..1 << 20).contains(&committed.bytes), "{committed:?}");
    store.home.end_run().unwrap();
    assert_eq!(store.names(), ["4"]);

    let snapshot = store.open().unwrap();
    snapshot.check_memory(&Cancel::default()).unwrap();
    assert_eq!(snapshot.manifest().vmm.version, "7.2.22");
    assert_eq!(snapshot.manifest().hardware.memory_bytes, MEMORY_BYTES);
    assert_eq!(snapshot.memory(), store.file("memory"));

    let live = snapshot.consume().unwrap();
    assert_eq!(live, store.home.live_dir(4));
    assert_eq!(store.names(), ["4.live"]);
    assert!(has_the_guest(&store.home.live_memory(4)));
    assert!(matches!(store.open(), Err(Error::Absent { .. })));

    // And once more, from what the wake left.
    let again = store.staged(4, 5);
    again.commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap();
    store.home.end_run().unwrap();
    assert_eq!(store.names(), ["5"]);
}

#[test]
fn a_consumed_snapshot_is_checked_where_the_life_has_it_and_then_named_one_again() {
    let store = Store::asleep();
    store.open().unwrap().consume().unwrap();
    let memory = write_open(&store.home.live_memory(4));
    memory.write_all_at(b"it ran!", 3 << 20).unwrap();
    let dir = File::open(store.home.dir()).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    dir.set_times(fs::FileTimes::new().set_modified(long_ago)).unwrap();
    let take_back = || store.home.unconsume(&"web-1".parse().unwrap(), 4, &Cancel::default());
    assert!(matches!(take_back(), Err(Error::Damaged { .. })));
    let renamed = dir.metadata().unwrap().modified().unwrap() != long_ago;
    assert!(!renamed, "a crash would have left a snapshot whose guest has run");
    assert_eq!(store.names(), ["4.live"]);
    memory.write_all_at(b"a guest", 3 << 20).unwrap();
    take_back().unwrap();
    assert_eq!(store.names(), ["4"]);
}

#[test]
fn a_mapping_survives_the_move_of_its_memory() {
    let store = Store::alive(3);
    let held = write_open(&store.home.live_memory(3));
    let staged = store.staged(3, 4);
    held.write_all_at(b"late", 0).unwrap();
    let memory = fs::read(staged.dir().join("memory")).unwrap();
    assert_eq!(&memory[..4], b"late");
}

#[test]
fn what_is_asleep_is_its_owners_alone() {
    let store = Store::asleep();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(store.home.dir()), 0o700);
    assert_eq!(mode(&store.home.snapshot_dir(4)), 0o700);
    assert_eq!(mode(&store.file("memory")), 0o600);
    assert_eq!(mode(&store.file("manifest")), 0o600);
}

#[test]
fn a_sleep_that_is_discarded_leaves_the_life_as_it_was() {
    let store = Store::alive(3);
    store.staged(3, 4).discard().unwrap();
    assert_eq!(store.names(), ["3.live"]);
    assert!(has_the_guest(&store.home.live_memory(3)));
}

#[test]
fn a_commit_that_is_called_off_can_be_discarded_or_done_again() {
    let store = Store::alive(3);
    let cancel = Cancel::default();
    cancel.call_off();
    let facts = facts("web-1", MEMORY_BYTES);
    let error = store.staged(3, 4).commit(facts.clone(), &cancel).unwrap_err();
    assert!(matches!(error.source, Error::CalledOff(_)), "{error:?}");
    assert_eq!(store.names(), ["3.live", "4.partial", "unsynced"]);
    error.staged.discard().unwrap();
    assert_eq!(store.names(), ["3.live", "unsynced"]);
    assert!(has_the_guest(&store.home.live_memory(3)));

    let error = store.staged(3, 4).commit(facts.clone(), &cancel).unwrap_err();
    error.staged.commit(facts, &Cancel::default()).unwrap();
    store.open().unwrap();
}

#[test]
fn after_a_commit_that_failed_the_next_one_writes_all_anew() {
    let store = Store::alive(3);
    let cancel = Cancel::default();
    cancel.call_off();
    let facts = facts("web-1", MEMORY_BYTES);
    let staged = store.staged(3, 4);
    assert!(!staged.follows_failed_sync());
    staged.commit(facts.clone(), &cancel).unwrap_err().staged.discard().unwrap();
    let memory = write_open(&store.home.live_memory(3));
    let before = std::time::SystemTime::UNIX_EPOCH;
    memory.set_modified(before).unwrap();
    // Whoever does it: a daemon may have come and gone.
    let staged = store.staged(3, 4);
    assert!(staged.follows_failed_sync());
    staged.commit(facts.clone(), &Cancel::default()).unwrap();
    assert_ne!(memory.metadata().unwrap().modified().unwrap(), before);
    assert!(has_the_guest(&store.file("memory")));
    store.home.end_run().unwrap();
    assert_eq!(store.names(), ["4"]);
    // With the run the note is gone.
    store.open().unwrap().consume().unwrap();
    memory.set_modified(before).unwrap();
    let staged = store.staged(4, 5);
    assert!(!staged.follows_failed_sync());
    staged.commit(facts, &Cancel::default()).unwrap();
    assert_eq!(memory.metadata().unwrap().modified().unwrap(), before);
}

#[test]
fn what_cannot_be_noted_is_not_synced() {
    let store = Store::alive(3);
    let staged = store.staged(3, 4);
    fs::create_dir(store.home.dir().join("unsynced")).unwrap();
    let error = staged.commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap_err();
    assert!(error.source.to_string().starts_with("making "), "{}", error.source);
    error.staged.discard().unwrap();
    assert!(has_the_guest(&store.home.live_memory(3)));
}

#[test]
fn what_is_no_whole_snapshot_is_not_committed() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 6] = [
        ("no memory", |dir| {
            fs::remove_file(dir.join("memory")).unwrap();
        }),
        ("its memory has 5 bytes", |dir| {
            write_open(&dir.join("memory")).set_len(5).unwrap();
        }),
        ("the VMM saved nothing", |dir| {
            fs::remove_file(dir.join("vmstate")).unwrap();
        }),
        ("`odd` is not a file", |dir| {
            fs::create_dir(dir.join("odd")).unwrap();
        }),
        ("`odd` is not a file", |dir| {
            std::os::unix::fs::symlink("memory", dir.join("odd")).unwrap();
        }),
        ("more than the limit of", |dir| {
            write_open(&dir.join("vmstate")).set_len(SMALL_FILE_MAX_BYTES + 1).unwrap();
        }),
    ];
    for (says, spoil) in cases {
        let store = Store::alive(3);
        let staged = store.staged(3, 4);
        spoil(&staged.dir());
        let error = staged.commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap_err();
        assert!(error.source.to_string().contains(says), "{}", error.source);
        assert_eq!(store.survey(), (Some(3), vec![4], None));
    }
}

#[test]
fn a_second_snapshot_is_not_staged_beside_the_first() {
    let store = Store::asleep();
    let error = store.home.stage(5, Memory::Mapped).unwrap_err();
    assert!(matches!(error, Error::Ambiguous { .. }), "{error}");
    assert_eq!(store.names(), ["4"]);
}

#[test]
fn every_damage_is_told_and_nothing_is_removed() {
    let flip = |path: PathBuf| {
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    type Spoil<'a> = &'a dyn Fn(&Store);
    let cases: [(&str, Spoil<'_>); 13] = [
        ("`vmstate` does not match its digest", &|store| {
            flip(store.file("vmstate"));
        }),
        ("does not match its own digest", &|store| {
            flip(store.file("manifest"));
        }),
        ("`vmstate` has 2 bytes, and had 9", &|store| {
            write_open(&store.file("vmstate")).set_len(2).unwrap();
        }),
        ("`memory` has 100 bytes, and had 8388608", &|store| {
            write_open(&store.file("memory")).set_len(100).unwrap();
        }),
        ("manifest is cut off", &|store| {
            write_open(&store.file("manifest")).set_len(100).unwrap();
        }),
        ("manifest is empty", &|store| {
            fs::write(store.file("manifest"), "").unwrap();
        }),
        ("more than 1048576 bytes", &|store| {
            write_open(&store.file("manifest")).set_len(1 << 21).unwrap();
        }),
        ("it has no manifest", &|store| {
            fs::remove_file(store.file("manifest")).unwrap();
        }),
        ("`vmstate` is missing", &|store| {
            fs::remove_file(store.file("vmstate")).unwrap();
        }),
        ("`memory` is missing", &|store| {
            fs::remove_file(store.file("memory")).unwrap();
        }),
        ("a file `extra` that is not its own", &|store| {
            fs::write(store.file("extra"), "").unwrap();
        }),
        ("it is a directory, not a regular file", &|store| {
            fs::remove_file(store.file("vmstate")).unwrap();
            fs::create_dir(store.file("vmstate")).unwrap();
        }),
        ("`memory` cannot be used: it is a FIFO, not a regular file", &|store| {
            fs::remove_file(store.file("memory")).unwrap();
            files::regular::tests::make_fifo(&store.file("memory"));
        }),
    ];
    for (says, spoil) in cases {
        let store = Store::asleep();
        spoil(&store);
        let before = fs::read_dir(store.home.snapshot_dir(4)).unwrap().count();
        let error = store.open().unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        let after = fs::read_dir(store.home.snapshot_dir(4)).unwrap().count();
        assert_eq!(before, after, "{says}");
    }
}

#[test]
fn a_changed_memory_is_told() {
    let store = Store::asleep();
    write_open(&store.file("memory")).write_all_at(b"b", 3 << 20).unwrap();
    let snapshot = store.open().unwrap();
    let error = snapshot.check_memory(&Cancel::default()).unwrap_err();
    assert!(error.to_string().contains("its memory has the digest crc64-nvme-blocks:"), "{error}");
}

#[test]
fn a_memory_that_shrinks_under_the_check_is_an_error() {
    let store = Store::asleep();
    let snapshot = store.open().unwrap();
    write_open(&store.file("memory")).set_len(3 << 20).unwrap();
    snapshot.check_memory(&Cancel::default()).unwrap_err();
}

#[test]
fn holes_that_a_copy_filled_or_made_do_no_harm() {
    let store = Store::asleep();
    let snapshot = store.open().unwrap();
    let memory = fs::read(store.file("memory")).unwrap();
    fs::write(store.file("memory"), &memory).unwrap();
    assert!(files::allocated_bytes(&store.file("memory")).unwrap() >= MEMORY_BYTES);
    snapshot.check_memory(&Cancel::default()).unwrap();
    punch(&write_open(&store.file("memory")), 0, 3 << 20).unwrap();
    snapshot.check_memory(&Cancel::default()).unwrap();
}

#[test]
fn a_snapshot_of_something_else_is_refused() {
    let store = Store::asleep();
    let foreign = |result: Result<Snapshot, Error>, says: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    let id = "web-1".parse().unwrap();
    foreign(
        store.home.open(&"web-2".parse().unwrap(), 4),
        "of web-1 (row 7, generation 4), not of web-2",
    );

    fs::create_dir(store.path.join("sandboxes/8")).unwrap();
    let other = Home::new(&store.path, RowId(8));
    files::rename(&store.home.snapshot_dir(4), &other.snapshot_dir(4)).unwrap();
    foreign(other.open(&id, 4), "not of web-1 (row 8, generation 4)");

    files::rename(&other.snapshot_dir(4), &store.home.snapshot_dir(6)).unwrap();
    foreign(store.home.open(&id, 6), "not of web-1 (row 7, generation 6)");
}

#[test]
fn a_snapshot_of_a_later_format_is_refused() {
    let store = Store::asleep();
    let text = unsealed(&fs::read(store.file("manifest")).unwrap());
    let text = text.replace("\"format\": 1", "\"format\": 2");
    fs::write(store.file("manifest"), sealed(&text)).unwrap();
    let error = store.open().unwrap_err();
    assert!(error.to_string().contains("has format 2, and this dozed reads up to 1"), "{error}");
}

#[test]
fn a_crash_between_any_two_steps_of_a_sleep_is_told_by_the_names() {
    let store = Store::alive(3);
    assert_eq!(store.survey(), (Some(3), vec![], None));
    let mut staged = store.home.stage(4, Memory::Mapped).unwrap();
    assert_eq!(store.survey(), (Some(3), vec![4], None));
    staged.take_memory(3).unwrap();
    assert_eq!(store.survey(), (Some(3), vec![4], None));
    fs::write(staged.dir().join("vmstate"), "registers").unwrap();
    fs::write(staged.dir().join("manifest.tmp"), "half a mani").unwrap();
    assert_eq!(store.survey(), (Some(3), vec![4], None));

    // Up to here the VMM lives and is the truth.
    store.home.recover_partials(Memory::Mapped).unwrap();
    assert_eq!(store.survey(), (Some(3), vec![], None));
    assert!(has_the_guest(&store.home.live_memory(3)));

    // From the commit point on the snapshot is, even if the old run is still in the way.
    store.staged(3, 4).commit(facts("web-1", MEMORY_BYTES), &Cancel::default()).unwrap();
    assert_eq!(store.names(), ["3.live", "4", "unsynced"]);
    assert_eq!(store.survey(), (Some(3), vec![], Some(4)));
    let snapshot = store.open().unwrap();
    snapshot.consume().unwrap();
    assert_eq!(store.survey(), (Some(4), vec![], None));
}

#[test]
fn a_new_sleep_takes_back_one_that_was_cut() {
    for cut in [4, 5] {
        let store = Store::alive(3);
        drop(store.staged(3, cut));
        let mut staged = store.home.stage(5, Memory::Mapped).unwrap();
        assert_eq!(store.survey(), (Some(3), vec![5], None));
        assert_eq!(fs::read_dir(staged.dir()).unwrap().count(), 0);
        staged.take_memory(3).unwrap();
        assert!(has_the_guest(&staged.dir().join("memory")));
    }
}

#[test]
fn a_memory_that_has_no_life_to_go_back_to_is_kept() {
    let store = Store::alive(3);
    drop(store.staged(3, 4));
    fs::remove_dir(store.home.live_dir(3)).unwrap();
    let error = store.home.recover_partials(Memory::Mapped).unwrap_err();
    assert!(error.to_string().contains("a run that has no directory"), "{error}");
    assert!(has_the_guest(&store.home.dir().join("4.partial/memory")));
}

#[test]
fn two_truths_are_no_truth() {
    let store = Store::asleep();
    fs::create_dir(store.home.snapshot_dir(5)).unwrap();
    let error = store.home.survey().unwrap_err().to_string();
    assert!(error.contains("has 4 and 5, of which only one can be valid"), "{error}");
    fs::remove_dir(store.home.snapshot_dir(5)).unwrap();
    fs::create_dir(store.home.live_dir(2)).unwrap();
    fs::create_dir(store.home.live_dir(3)).unwrap();
    let error = store.home.survey().unwrap_err().to_string();
    assert!(error.contains("has 2.live and 3.live"), "{error}");
}

#[test]
fn names_that_are_not_ours_are_passed_over() {
    let store = Store::new();
    for name in ["disk-0.img", "console.log", "07", "+7", "7.live.old", "x.live", ".live", ""] {
        fs::create_dir_all(store.home.dir().join(name)).unwrap();
    }
    assert_eq!(store.survey(), (None, vec![], None));
    let nowhere = Home::new(&store.path, RowId(99));
    assert_eq!(nowhere.survey().unwrap(), Survey::default());
}

#[test]
fn a_new_life_ends_the_one_before() {
    let store = Store::alive(3);
    store.home.begin_run(3, Memory::Mapped, MEMORY_BYTES).unwrap();
    assert!(!has_the_guest(&store.home.live_memory(3)));
    store.home.begin_run(5, Memory::Mapped, MEMORY_BYTES).unwrap();
    assert_eq!(store.names(), ["5.live"]);
}

#[test]
fn the_end_of_a_life_leaves_the_snapshot_and_the_disks() {
    let store = Store::asleep();
    fs::create_dir(store.home.live_dir(3)).unwrap();
    fs::create_dir(store.home.dir().join("5.partial")).unwrap();
    fs::write(store.home.disk(0), "a disk").unwrap();
    store.home.end_run().unwrap();
    assert_eq!(store.names(), ["4", "disk-0.img"]);
}

#[test]
fn a_disk_that_is_too_full_is_told_beforehand() {
    let store = Store::new();
    store.home.check_space(1).unwrap();
    let error = store.home.check_space(u64::MAX).unwrap_err();
    assert!(matches!(error, Error::NoSpace { needed: u64::MAX, .. }), "{error}");
}
