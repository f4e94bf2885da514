//! What is known of one sandbox.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    Period, Phase, ProcessIdentity, SandboxId, SnapshotFacts, Spec, State, Timestamp, Waking,
};

/// The number of a sandbox's row. It is never used again, so it also names the
/// sandbox's directory in the store and, as a part of it, its inode numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u64);

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose a sandbox is: the user and group of the process that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group, which is the organisation.
    pub gid: u32,
}

/// Who wrote the `config` of a sandbox: the files that it names are opened with their rights.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Writer {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The groups that they were in besides, as far as they are kept.
    groups: Vec<u32>,
}

/// How many groups of a writer are kept. Whoever is in more has no rights by the others.
const WRITER_GROUPS_MAX: usize = 32;

impl Writer {
    /// Makes a writer, of whose groups the first are kept.
    #[must_use]
    pub fn new(uid: u32, gid: u32, mut groups: Vec<u32>) -> Self {
        groups.truncate(WRITER_GROUPS_MAX);
        groups.shrink_to_fit();
        Self { uid, gid, groups }
    }

    /// Returns the groups that they were in besides.
    #[must_use]
    pub fn groups(&self) -> &[u32] {
        &self.groups
    }
}

impl From<Owner> for Writer {
    fn from(Owner { uid, gid }: Owner) -> Self {
        Self::new(uid, gid, Vec::new())
    }
}

/// `1000:100`, and then the other groups, `1000:100:4:24`.
impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)?;
        self.groups.iter().try_for_each(|group| write!(f, ":{group}"))
    }
}

impl std::str::FromStr for Writer {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Vec<u32> = text.split(':').map(str::parse).collect::<Result<_, _>>()?;
        match *numbers {
            [uid, gid, ref groups @ ..] => Ok(Self::new(uid, gid, groups.to_vec())),
            // One that has no group is as one that is no number.
            _ => Err("".parse::<u32>().expect_err("nothing is no number")),
        }
    }
}

/// What is known of one sandbox, but for its activity, which changes too often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its row.
    pub row: RowId,
    /// Its name.
    pub id: SandboxId,
    /// Whose it is.
    pub owner: Owner,
    /// Where it is in its lifecycle, and what exists only there.
    pub phase: Phase,
    /// When it came into that state.
    pub since: Timestamp,
    /// When it was made.
    pub created_at: Timestamp,
    /// The count of completed sleeps and wakes.
    pub generation: u64,
    /// Its hardware and guest.
    pub spec: Arc<Spec>,
    /// Who wrote that; nobody where it is the template's.
    pub config_by: Option<Arc<Writer>>,
    /// How long without activity before the reaper puts it to sleep.
    pub idle_after: Period,
    /// How long asleep before the reaper deletes it.
    pub delete_after: Period,
    /// Whether neither `rmdir` nor the reaper may delete it.
    pub pinned: bool,
    /// The VMM that runs it or that it sleeps by, such as `qemu 7.2.22`.
    pub vmm: Option<Box<str>>,
    /// The user id that its VMM runs as, if it is one of its own; no other sandbox has it.
    pub user: Option<u32>,
    /// The number of its address in the range, if it has one; no other sandbox has it.
    pub slot: Option<u32>,
    /// The count of completed sleeps.
    pub sleeps: u64,
    /// The count of completed wakes from a snapshot.
    pub wakes: u64,
    /// How long its last sleep took.
    pub last_sleep: Option<Duration>,
    /// How long its last wake took.
    pub last_wake: Option<Duration>,
    /// Why the last operation failed, or why it ended by itself: one line.
    pub error: Option<Box<str>>,
    /// Before this moment the reaper leaves it alone, as its last try failed.
    pub retry_at: Option<Timestamp>,
    /// How it came to be awake, and how long it stays so.
    pub waking: Waking,
}

impl Record {
    /// Returns its state.
    #[must_use]
    pub fn state(&self) -> State {
        self.phase.state()
    }

    /// Returns the VMM's process, from just before its first instruction to its end.
    #[must_use]
    pub fn process(&self) -> Option<&ProcessIdentity> {
        self.phase.process()
    }

    /// Returns the snapshot that it sleeps on or is being woken from.
    #[must_use]
    pub fn snapshot(&self) -> Option<SnapshotFacts> {
        self.phase.snapshot()
    }

    /// Returns when the reaper is to put it to sleep if nothing more happens, given its
    /// last activity; `None` where it is not.
    #[must_use]
    pub fn sleep_at(&self, last_activity: Timestamp) -> Option<Timestamp> {
        match self.state() {
            State::Running => {
                let at = last_activity.after(self.idle_after.duration()?);
                let at = self.waking.awake_until.map_or(at, |until| at.max(until));
                Some(self.not_before_retry(at))
            }
            State::Stopped
            | State::Booting
            | State::Snapshotting
            | State::Snapshotted
            | State::Restoring
            | State::Deleting => None,
        }
    }

    /// Returns when the reaper is to delete it if nothing more happens; `None` where it
    /// is not.
    #[must_use]
    pub fn delete_at(&self) -> Option<Timestamp> {
        self.delete_at_without(Duration::ZERO)
    }

    /// Returns when it has been asleep since, if it sleeps.
    #[must_use]
    pub fn asleep_since(&self) -> Timestamp {
        self.snapshot().map_or(self.since, |snapshot| snapshot.at)
    }

    /// As `delete_at`, where `excess` of the time that it seems to have slept did not pass.
    #[must_use]
    pub fn delete_at_without(&self, excess: Duration) -> Option<Timestamp> {
        match self.state() {
            State::Snapshotted if !self.pinned => {
                let at = self.asleep_since().after(self.delete_after.duration()?);
                Some(self.not_before_retry(at.after(excess)))
            }
            State::Snapshotted
            | State::Stopped
            | State::Booting
            | State::Running
            | State::Snapshotting
            | State::Restoring
            | State::Deleting => None,
        }
    }

    fn not_before_retry(&self, at: Timestamp) -> Timestamp {
        self.retry_at.map_or(at, |retry_at| at.max(retry_at))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    fn record(state: State) -> Record {
        let process =
            ProcessIdentity { pid: 1, boot_id: "b".into(), pidfs_inode: None, start_ticks: 1 };
        let snapshot = SnapshotFacts { generation: 1, bytes: 0, at: at(100) };
        let phase = match state {
            State::Stopped => Phase::Stopped,
            State::Booting => Phase::Booting { process: Some(process) },
            State::Running => Phase::Running { process },
            State::Snapshotting => Phase::Snapshotting { process },
            State::Snapshotted => Phase::Snapshotted { snapshot },
            State::Restoring => Phase::Restoring { snapshot, process: Some(process) },
            State::Deleting => Phase::Deleting { process: Some(process), snapshot: Some(snapshot) },
        };
        Record {
            row: RowId(1),
            id: "web-1".parse().unwrap(),
            owner: Owner { uid: 0, gid: 0 },
            phase,
            since: at(0),
            created_at: at(0),
            generation: 0,
            spec: Arc::new(Spec::default()),
            config_by: None,
            idle_after: Period::After(Duration::from_secs(60)),
            delete_after: Period::After(Duration::from_secs(600)),
            pinned: false,
            vmm: None,
            user: None,
            slot: None,
            sleeps: 0,
            wakes: 0,
            last_sleep: None,
            last_wake: None,
            error: None,
            retry_at: None,
            waking: Waking::default(),
        }
    }

    #[test]
    fn a_writer_reads_back_and_has_a_bounded_count_of_groups() {
        for text in ["1000:100", "1000:100:4:24"] {
            assert_eq!(text.parse::<Writer>().unwrap().to_string(), text);
        }
        for text in ["", "1000", "1000:", "a:b", "1000:100:"] {
            text.parse::<Writer>().unwrap_err();
        }
        let writer = Writer::new(1, 2, (0..65_536).collect());
        assert_eq!(writer.groups().len(), WRITER_GROUPS_MAX);
    }

    #[test]
    fn only_what_runs_is_due_to_sleep_and_only_what_sleeps_to_be_deleted() {
        for state in State::ALL {
            let record = record(state);
            let sleeps = (state == State::Running).then(|| at(70));
            let deletes = (state == State::Snapshotted).then(|| at(700));
            assert_eq!(record.sleep_at(at(10)), sleeps, "{state}");
            assert_eq!(record.delete_at(), deletes, "{state}");
        }
    }

    #[test]
    fn never_and_pinned_mean_never() {
        let never = Record { idle_after: Period::Never, ..record(State::Running) };
        assert_eq!(never.sleep_at(at(10)), None);
        let never = Record { delete_after: Period::Never, ..record(State::Snapshotted) };
        assert_eq!(never.delete_at(), None);
        let pinned = Record { pinned: true, ..record(State::Snapshotted) };
        assert_eq!(pinned.delete_at(), None);
    }

    #[test]
    fn it_stays_awake_for_the_minimum_also_where_its_idle_time_is_over() {
        let waking = Waking { awake_until: Some(at(90)), ..Waking::default() };
        let woken = Record { waking, ..record(State::Running) };
        assert_eq!(woken.sleep_at(at(10)), Some(at(90)));
        assert_eq!(woken.sleep_at(at(80)), Some(at(140)));
        let exempt = Record { idle_after: Period::Never, ..woken };
        assert_eq!(exempt.sleep_at(at(10)), None);
    }

    #[test]
    fn a_failed_try_puts_the_next_one_off_but_never_forward() {
        let later = Record { retry_at: Some(at(90)), ..record(State::Running) };
        assert_eq!(later.sleep_at(at(10)), Some(at(90)));
        assert_eq!(later.sleep_at(at(80)), Some(at(140)));
    }
}
