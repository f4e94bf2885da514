//! An index whose log is cut, spoilt or gone. SQLite takes such a log for one that ends there,
//! and so believes an earlier time. No guest is killed for it, and no memory removed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    index::{copy_index, names_and_sizes},
    support::{Host, Setup, is_alive},
};

/// Places in the log that are cut at and spoilt at, besides the middle.
const PLACES: u64 = 6;

/// What is done to a log.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Gone,
    CutAt(u64),
    /// A byte has other bits.
    SpoiltAt(u64),
}

impl Damage {
    /// Returns all that are tried with a log of so many bytes.
    fn all(len: u64) -> Vec<Self> {
        let mut numbers = Numbers(len);
        let mut places = || (0..PLACES).map(|_| numbers.next() % len).collect::<Vec<_>>();
        let mut all = vec![Self::Gone, Self::CutAt(len / 2), Self::CutAt(0), Self::SpoiltAt(0)];
        all.extend(places().into_iter().map(Self::CutAt));
        all.extend(places().into_iter().map(Self::SpoiltAt));
        // The last changes are in the last pages.
        all.extend([Self::CutAt(len - 1), Self::SpoiltAt(len - 1)]);
        all
    }

    fn inflict(self, log: &Path) {
        match self {
            Self::Gone => fs::remove_file(log).unwrap(),
            Self::CutAt(len) => {
                fs::File::options().write(true).open(log).unwrap().set_len(len).unwrap();
            }
            Self::SpoiltAt(place) => {
                let mut bytes = fs::read(log).unwrap();
                bytes[usize::try_from(place).unwrap()] ^= 0x55;
                fs::write(log, bytes).unwrap();
            }
        }
    }
}

/// Numbers that look random and are the same for the same seed: xorshift.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The sandboxes of a daemon that was killed, and what they were.
struct Before {
    vmm: u32,
    generation: u64,
    files: Vec<(PathBuf, u64)>,
}

impl Before {
    /// What a daemon that believes its index may have done: nothing that cannot be taken back.
    #[track_caller]
    fn is_kept(&self, host: &Host) {
        assert!(is_alive(self.vmm), "the guest that ran was killed");
        assert_eq!(names_and_sizes(host.store()), self.files);
    }

    /// It serves what it believes, and that is right or harmless.
    #[track_caller]
    fn is_served(&self, host: &Host) {
        assert_eq!((host.state("running").as_str(), host.vmm("running")), ("running", self.vmm));
        host.counts_on("running");
        let generation = host.number("asleep/status", "generation");
        if host.state("asleep") != "snapshotted" || generation != self.generation {
            host.write("asleep/state", "wake").unwrap_err();
            assert_ne!(host.error("asleep"), "ok");
        }
    }
}

#[test]
fn a_log_that_is_cut_or_spoilt_or_gone_kills_no_guest_and_loses_no_memory() {
    let mut host = Setup::counter("").start();
    host.boot("asleep");
    host.boot("running");
    for _ in 0..2 {
        for id in ["running", "asleep"] {
            host.sleep(id);
            host.wake(id);
            host.counts_on(id);
        }
    }
    host.sleep("asleep");
    host.mkdir("last").unwrap();
    let (store, late) = (host.store().to_owned(), host.store().join("late"));
    let (vmm, generation) = (host.vmm("running"), host.number("asleep/status", "generation"));
    host.kill_daemon();
    copy_index(&store, &late);
    let before = Before { vmm, generation, files: names_and_sizes(&store) };
    let len = fs::metadata(late.join("index.db-wal")).unwrap().len();
    assert!(len > 32 * 4096, "a log of {len} bytes says little");

    let mut refused = 0;
    for damage in Damage::all(len) {
        println!("{damage:?} of {len}");
        copy_index(&late, &store);
        damage.inflict(&store.join("index.db-wal"));
        match host.try_restart() {
            Ok(()) => {
                before.is_served(&host);
                host.kill_daemon();
            }
            Err(said) => {
                refused += 1;
                assert!(said.contains("the index"), "{said}");
                assert!(said.contains("nothing was changed"), "{said}");
            }
        }
        before.is_kept(&host);
    }
    assert!(refused > 0, "no damage showed");

    copy_index(&late, &store);
    fs::remove_dir_all(late).unwrap();
    host.restart();
    assert_eq!(host.vmm("running"), vmm);
    host.wake("asleep");
    for id in ["running", "asleep"] {
        assert_eq!(host.counts_on(id).boots, 1, "{id}");
    }
}
