//! Holding the index against the store and the processes, before either is changed.
//!
//! An index that was lost, emptied or set back to an earlier time says less than the
//! directories and the VMMs show. Whoever believed it would kill guests as leftovers, boot
//! over memory, or give the number of a directory away. So a start looks for what an index
//! cannot have forgotten, and ends with a sentence where it finds any; and nothing that is
//! not proven is killed or removed later.
//!
//! A crash or a power cut leaves none of this: each step is in the index before its files or
//! its VMM are changed, see `recover`.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
};

use super::{Entry, Error, Lifecycle, error::snapshot_failed};
use crate::{
    sandbox::{ProcessIdentity, Record, RowId, State},
    snapshot::Survey,
    sync::Arc,
    sys::{
        host::own_ids,
        process::{Process, Search},
    },
};

/// What the names of VMMs' programs have in them, also where none is installed any more.
const PROGRAM_NAMES: [&str; 2] = ["qemu-system", "cloud-hypervisor"];
/// How many contradictions an error names.
const NAMED_MAX: usize = 5;

/// The store or the processes show what the index does not know.
#[derive(Debug, thiserror::Error)]
pub enum Contradicted {
    /// They do.
    #[error(
        "the index {} was lost or is older than the store: {found}; nothing was changed; restore \
         the index.db and index.db-wal that were last in use, or kill these VMMs and move these \
         directories away to start without them",
        .index.display()
    )]
    Behind {
        /// The index.
        index: PathBuf,
        /// What it does not know.
        found: String,
    },
    /// It could not be seen whether they do.
    #[error("comparing the index with {}", .dir.display())]
    Look {
        /// The directory of all sandboxes.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A process that has the token of this store.
pub(super) struct Tokened {
    pub(super) process: Arc<Process>,
    /// The row that its token names; `None` where that is none.
    pub(super) row: Option<RowId>,
}

/// Refuses to begin a new index where there are files of sandboxes. SQLite would take what is
/// left of an earlier log for the new one's, and whoever put the old one back would then have
/// the new log beside it.
///
/// # Errors
/// As [`Lifecycle::check_index`].
pub fn check_index_file(store: &Path, index: &Path) -> Result<(), Contradicted> {
    let dir = store.join("sandboxes");
    let looking = |source| Contradicted::Look { dir: dir.clone(), source };
    let is_there = match std::fs::metadata(index) {
        Ok(file) => file.len() > 0,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(looking(error)),
    };
    if is_there {
        return Ok(());
    }
    let found = match rows_in(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(looking)?,
    };
    behind(index, found.iter().map(|row| without_row(&dir, *row)).collect())
}

impl Lifecycle {
    /// Makes sure that the index is not behind the store and the processes. Nothing is changed.
    ///
    /// # Errors
    /// `Behind`, with what contradicts it.
    pub fn check_index(&self) -> Result<(), Contradicted> {
        let sandboxes = self.settings.store.join("sandboxes");
        let looking = |source| Contradicted::Look { dir: sandboxes.clone(), source };
        let left_out: HashSet<RowId> =
            self.index.malformed().iter().map(|malformed| malformed.row).collect();
        let is_known = |row: RowId| self.index.by_row(row).is_some() || left_out.contains(&row);
        let mut found = Vec::new();
        for row in rows_in(&sandboxes).map_err(looking)? {
            if !is_known(row) {
                found.push(without_row(&sandboxes, row));
            }
        }
        let mut vmms: HashMap<RowId, Vec<Arc<Process>>> = HashMap::new();
        for Tokened { process, row } in tokened(self) {
            match row.filter(|row| is_known(*row)) {
                Some(row) => vmms.entry(row).or_default().push(process),
                None => {
                    let pid = process.identity().pid;
                    found.push(format!("it has no row for the VMM of process {pid}"));
                }
            }
        }
        for entry in self.index.entries_after(RowId(0)) {
            let vmms = vmms.remove(&entry.row()).unwrap_or_default();
            if vmms.is_empty() && is_at_rest(entry.record().state()) {
                continue; // Looked at when somebody wants it, however many there are.
            }
            // Two snapshots, say: `recover` tells, and changes nothing.
            let Ok(survey) = self.store.home(&entry.record()).survey() else { continue };
            found.extend(contradiction(&entry.record(), &survey, &vmms));
        }
        behind(self.index.path(), found)
    }
}

/// Returns the VMMs that have the token of this store and files of it open.
pub(super) fn tokened(lifecycle: &Lifecycle) -> Vec<Tokened> {
    let prefix = lifecycle.store.token_prefix();
    let found = vmms_named(lifecycle, &prefix).unwrap_or_else(|error| {
        tracing::warn!(%error, "looking for VMMs");
        Vec::new()
    });
    let with_row = |(process, name): (Arc<Process>, String)| {
        let rest = name.strip_prefix(&prefix)?;
        let row = rest.strip_suffix(':').and_then(row_of);
        // One that has ended meanwhile is no VMM any more.
        lifecycle.store.uses_files_of(row?, &process).ok()?.then_some(Tokened { process, row })
    };
    found.into_iter().filter_map(with_row).collect()
}

/// Returns the processes that run a VMM, as we would start it, by a name that begins so.
fn vmms_named(lifecycle: &Lifecycle, prefix: &str) -> io::Result<Vec<(Arc<Process>, String)>> {
    let mut programs = PROGRAM_NAMES.map(str::to_owned).to_vec();
    for vmm in lifecycle.vmms.all() {
        // By its own name and by that of what a link leads to.
        let paths = [vmm.program().canonicalize().ok(), Some(vmm.program().to_owned())];
        let names = paths.iter().flatten().filter_map(|path| path.file_name());
        programs.extend(names.map(|name| name.to_string_lossy().into_owned()));
    }
    let ours = own_ids().0;
    let is_user =
        |uid| uid == ours || lifecycle.settings.users.is_some_and(|users| users.contains(uid));
    Process::find(&Search { programs: &programs, is_user: &is_user, prefix })
}

/// Says whether a VMM is of no use to a sandbox whose lock is held: a crash left it before
/// its guest ran, or its guest's memory is in the committed snapshot.
pub(super) fn is_leftover(lifecycle: &Lifecycle, entry: &Entry) -> bool {
    let record = entry.record();
    let Ok(survey) = lifecycle.store.home(&record).survey() else { return false };
    match record.state() {
        State::Stopped => survey.live.is_none() && survey.committed.is_none(),
        State::Snapshotted => is_snapshot_of(&record, &survey),
        State::Booting
        | State::Running
        | State::Snapshotting
        | State::Restoring
        | State::Deleting => false,
    }
}

/// Refuses to boot a sandbox that has a snapshot, of which its record knows nothing.
pub(super) fn check_nothing_sleeps(lifecycle: &Lifecycle, entry: &Entry) -> Result<(), Error> {
    let home = lifecycle.store.home(&entry.record());
    let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
    match survey.committed {
        None => Ok(()),
        Some(generation) => {
            let dir = home.snapshot_dir(generation);
            let why = format!("it is stopped, but has a snapshot in {}", dir.display());
            Err(Error::Unrecorded { id: entry.id().clone(), why })
        }
    }
}

/// Refuses to delete a sleeper for its age whose files are newer than its record.
pub(super) fn check_sleeps_as_recorded(lifecycle: &Lifecycle, entry: &Entry) -> Result<(), Error> {
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let survey = home.survey().map_err(snapshot_failed(entry, "surveying the files of"))?;
    let is_newer = match (survey.committed, survey.live) {
        (Some(_), _) => !is_snapshot_of(&record, &survey),
        (None, live) => live.is_some_and(|live| live >= record.generation),
    };
    if !is_newer {
        return Ok(());
    }
    let why = format!("{} is newer than its record", home.dir().display());
    Err(Error::Unrecorded { id: entry.id().clone(), why })
}

/// Returns the VMM's process of a sandbox, if it lives: the one that we know, the
/// recorded one, or - where a crash came before the record - the one that has its
/// token.
pub(super) fn process_of(
    lifecycle: &Lifecycle,
    entry: &Entry,
) -> Result<Option<Arc<Process>>, Error> {
    let record = entry.record();
    let failed =
        |source| Error::Host { doing: "looking for the VMM of", id: record.id.clone(), source };
    if let Some(live) = lifecycle.machines.get(record.row) {
        return Ok(live.process.exited().is_none().then(|| Arc::clone(&live.process)));
    }
    let token = lifecycle.store.token(record.row);
    if let Some(identity) = record.process() {
        let adopted = Process::adopt(identity, &token).map_err(failed)?;
        return first_of_ours(lifecycle, &record, adopted).map_err(failed);
    }
    match record.state() {
        State::Booting | State::Restoring | State::Deleting => {
            let found = vmms_named(lifecycle, &token).map_err(failed)?;
            let found = found.into_iter().map(|(process, _)| process);
            first_of_ours(lifecycle, &record, found).map_err(failed)
        }
        State::Stopped | State::Running | State::Snapshotting | State::Snapshotted => Ok(None),
    }
}

/// Returns the first that uses the files of this sandbox. The record and the token may be
/// in a copy of the store too, whose VMMs are not ours.
fn first_of_ours(
    lifecycle: &Lifecycle,
    record: &Record,
    found: impl IntoIterator<Item = Arc<Process>>,
) -> io::Result<Option<Arc<Process>>> {
    for process in found {
        match lifecycle.store.uses_files_of(record.row, &process) {
            Ok(true) => return Ok(Some(process)),
            Ok(false) => {
                let pid = process.identity().pid;
                tracing::warn!(
                    id = %record.id, pid,
                    "a VMM of this name uses none of the files of this store and is left alone"
                );
            }
            Err(_) if process.exited().is_some() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn behind(index: &Path, mut found: Vec<String>) -> Result<(), Contradicted> {
    if found.is_empty() {
        return Ok(());
    }
    let more = found.len().saturating_sub(NAMED_MAX);
    found.truncate(NAMED_MAX);
    if more > 0 {
        found.push(format!("and {more} more"));
    }
    Err(Contradicted::Behind { index: index.to_owned(), found: found.join("; ") })
}

/// Returns the rows that have a directory.
fn rows_in(sandboxes: &Path) -> io::Result<Vec<RowId>> {
    let mut rows = Vec::new();
    for entry in std::fs::read_dir(sandboxes)? {
        rows.extend(entry?.file_name().to_str().and_then(row_of));
    }
    rows.sort_unstable();
    Ok(rows)
}

fn without_row(sandboxes: &Path, row: RowId) -> String {
    format!("it has no row for the directory {}", sandboxes.join(row.to_string()).display())
}

fn is_at_rest(state: State) -> bool {
    match state {
        State::Stopped | State::Snapshotted => true,
        State::Booting
        | State::Running
        | State::Snapshotting
        | State::Restoring
        | State::Deleting => false,
    }
}

fn is_snapshot_of(record: &Record, survey: &Survey) -> bool {
    let recorded = record.snapshot().map(|facts| facts.generation);
    survey.committed.is_some() && survey.committed == recorded
}

/// Says what the files and the VMMs of a sandbox show that its record cannot be older than.
fn contradiction(record: &Record, survey: &Survey, vmms: &[Arc<Process>]) -> Option<String> {
    let (id, state) = (&record.id, record.state());
    if let Some(committed) = survey.committed {
        let is_expected = match state {
            State::Snapshotted | State::Restoring => is_snapshot_of(record, survey),
            State::Snapshotting => committed == record.generation + 1,
            State::Deleting => true,
            State::Stopped | State::Booting | State::Running => false,
        };
        if !is_expected {
            return Some(format!(
                "{id} (row {}) is {state} in it, and has the snapshot {committed}",
                record.row
            ));
        }
    }
    let is_recorded = |vmm: &ProcessIdentity| {
        let recorded = record.process();
        recorded.is_some_and(|known| {
            (known.pid, known.start_ticks, &known.boot_id)
                == (vmm.pid, vmm.start_ticks, &vmm.boot_id)
        })
    };
    let is_expected = |vmm: &ProcessIdentity| match state {
        State::Running | State::Snapshotting => is_recorded(vmm),
        // It is recorded just after it was started.
        State::Booting | State::Restoring => {
            let is_earlier = survey.live.is_none_or(|live| live <= record.generation);
            is_recorded(vmm) || record.process().is_none() && is_earlier
        }
        State::Snapshotted => is_snapshot_of(record, survey),
        State::Stopped => survey.live.is_none(),
        State::Deleting => true,
    };
    let unknown = vmms.iter().map(|vmm| vmm.identity()).find(|vmm| !is_expected(vmm))?;
    Some(format!(
        "{id} (row {}) is {state} in it, and process {} is a VMM of it",
        record.row, unknown.pid
    ))
}

/// Reads the number of a row, in the form that we write.
fn row_of(text: &str) -> Option<RowId> {
    let row = text.parse::<u64>().ok().filter(|row| row.to_string() == text)?;
    Some(RowId(row))
}
