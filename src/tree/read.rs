//! Reading.

use std::{fmt::Display, time::SystemTime};

use super::{
    Answer, Caller, DaemonFacts, DaemonFile, Errno, Facts, File, Node, Tree, Work,
    document::DocumentKind,
    glance::Glance,
    seeing::{Seeing, viewer},
    shown, view,
    write::{answer, check_opened},
};
use crate::{
    lifecycle::{Entry, Gauges, Reader, View},
    sandbox::{Record, RowId},
    sync::Arc,
    sys::growth::GrowthWatch,
};

/// What poll(2) is to say of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It is made anew at each read, so it can always be read.
    Always,
    /// It says something else than when it was last read.
    Changed,
    /// It is a log of which there is more to read.
    More,
    /// It is a log that was read to its end.
    AtEnd,
    /// Its sandbox was deleted.
    Gone,
}

impl Tree {
    /// Returns whether an open file has changed since it was last read. `growth` is told of a
    /// console that is to wake its pollers when the guest prints.
    pub fn poll(
        self: &Arc<Self>,
        node: Node,
        handle: u64,
        growth: Option<&Arc<GrowthWatch>>,
    ) -> Answer<Readiness> {
        let Node::File(row, File::Console) = node else {
            return Answer::Now(Ok(self.readiness(node, handle)));
        };
        let (this, growth) = (Arc::clone(self), growth.cloned());
        Answer::job(Work::Read, move || {
            if let Some(growth) = growth {
                this.watch_console(&growth, row);
            }
            Ok(this.readiness(node, handle))
        })
    }

    /// As [`Self::poll`], here and now.
    pub(super) fn readiness(&self, node: Node, handle: u64) -> Readiness {
        let open = self.handles.get(handle, node);
        let entry = match node {
            Node::Root | Node::Daemon(_) => None,
            Node::Dir(row) | Node::NetDir(row) | Node::File(row, _) => {
                match self.lifecycle.by_row(row) {
                    Some(entry) => Some(entry),
                    None => return Readiness::Gone,
                }
            }
        };
        let owner = entry.as_ref().map(|entry| entry.record().owner);
        if open.opened.zip(owner).is_some_and(|(opened, owner)| opened.has_ended(owner)) {
            return Readiness::Gone;
        }
        let log = |more| if more { Readiness::More } else { Readiness::AtEnd };
        match (node, entry) {
            (Node::File(_, File::State), Some(entry)) => {
                let record = entry.record();
                if open.seen == Some((record.state(), record.since)) {
                    Readiness::Always
                } else {
                    Readiness::Changed
                }
            }
            (Node::File(_, File::Console), Some(entry)) => {
                log(open.console.is_none_or(|console| self.console_has_more(&entry, &console)))
            }
            (Node::Daemon(DaemonFile::Events) | Node::File(_, File::Events), _) => {
                log(open.events.is_none_or(|events| events.has_more()))
            }
            (Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) | Node::File(..), _) => {
                Readiness::Always
            }
        }
    }

    /// Reads at most `size` bytes from `offset` of what the file was when it was read
    /// from offset 0.
    ///
    /// # Errors
    /// `NoDev` where the sandbox is gone, `IsDir` for a directory.
    pub fn read(
        self: &Arc<Self>,
        node: Node,
        handle: u64,
        offset: u64,
        size: usize,
        caller: Caller,
    ) -> Answer<Vec<u8>> {
        let open = self.handles.get(handle, node);
        let is_kept = offset > 0 && open.text.is_some();
        let waits = match node {
            Node::File(_, File::Console) => true,
            Node::File(_, file) => Self::is_slow(file) && !is_kept,
            // It is as long as there are sandboxes.
            Node::Daemon(DaemonFile::List) => !is_kept,
            // It was opened for its reader, unless by an earlier daemon.
            Node::Daemon(DaemonFile::Events) => open.events.is_none() && caller.uid != 0,
            Node::Root | Node::Daemon(_) | Node::Dir(_) | Node::NetDir(_) => false,
        };
        if waits {
            let this = Arc::clone(self);
            return Answer::job(Work::Read, move || {
                this.read_here(node, handle, offset, size, caller)
            });
        }
        self.read_here(node, handle, offset, size, caller).into()
    }

    /// As [`Self::read`], here and now.
    pub(super) fn read_here(
        &self,
        node: Node,
        handle: u64,
        offset: u64,
        size: usize,
        caller: Caller,
    ) -> Result<Vec<u8>, Errno> {
        let open = self.handles.get(handle, node);
        if let Node::File(row, _) = node {
            check_opened(&self.lifecycle, &*self.open_entry(row)?, open.opened)?;
        }
        let text = match (node, open.text) {
            (Node::File(row, File::Console), _) => {
                let entry = self.open_entry(row)?;
                let console = open.console.unwrap_or_else(|| Arc::new(self.open_console(row)));
                return self.read_console(&entry, &console, offset, size);
            }
            (Node::Daemon(DaemonFile::Events) | Node::File(_, File::Events), _) => {
                if let Node::File(row, _) = node {
                    self.open_entry(row)?;
                }
                let events = open.events.unwrap_or_else(|| self.open_events(node, caller));
                let clock = self.lifecycle.clock();
                return Ok(events.read(offset, size, clock.wall(clock.now())));
            }
            (_, Some(text)) if offset > 0 => text,
            (Node::File(row, File::State), _) => self.state_text(row, handle)?.into_bytes().into(),
            (Node::File(row, file), _) => self.text_to_read(row, file)?.into_bytes().into(),
            (Node::Daemon(DaemonFile::Status), _) => self.daemon_status().into_bytes().into(),
            (Node::Daemon(DaemonFile::Metrics), _) => self.daemon_metrics().into_bytes().into(),
            (Node::Daemon(DaemonFile::List), _) => self.daemon_list(caller).into_bytes().into(),
            (Node::Daemon(DaemonFile::Error), _) => self.root_error(caller).into_bytes().into(),
            (Node::Root | Node::Dir(_) | Node::NetDir(_), _) => return Err(Errno::IsDir),
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
        let end = from.saturating_add(size).min(text.len());
        let part = text[from..end].to_vec();
        // Also a reader that had it all comes back, to see the end of it.
        self.handles.keep(handle, text);
        Ok(part)
    }

    /// Opens a log of events as `caller` may see it; that of all sandboxes by a job, unless
    /// for root.
    pub(super) fn open_events(&self, node: Node, caller: Caller) -> Arc<Reader> {
        let view = match node {
            Node::File(row, _) | Node::Dir(row) | Node::NetDir(row) => View::Sandbox(row),
            Node::Root | Node::Daemon(_) => View::Viewer(viewer(caller)),
        };
        Arc::new(self.lifecycle.records().feed().log().open(view))
    }

    /// The size of a log of events, and when it last grew; `otherwise` if it never did.
    pub(super) fn events_facts(&self, view: &View, otherwise: SystemTime) -> (u64, SystemTime) {
        let (size, grew) = self.lifecycle.records().feed().log().size(view);
        (size, grew.map_or(otherwise, shown))
    }

    /// Reads a state. A poll of that open file then waits for the next change.
    fn state_text(&self, row: RowId, handle: u64) -> Result<String, Errno> {
        let record = self.open_entry(row)?.record();
        self.handles.saw(handle, (record.state(), record.since));
        Ok(format!("{}\n", record.state()))
    }

    fn text_to_read(&self, row: RowId, file: File) -> Result<String, Errno> {
        let entry = self.open_entry(row)?;
        let now = self.lifecycle.clock().now();
        let told =
            Self::changes_by_itself(file).then(|| self.glances.take(Node::File(row, file), now));
        let glance = match told.flatten() {
            Some(glance) => glance,
            None => self.glance(&entry, file).map_err(|error| {
                answer(&self.lifecycle, &entry, "counting the packets of", &error)
            })?,
        };
        Ok(self.text(&entry, file, &glance))
    }

    /// Returns the text of a file that is no log, from memory.
    pub(super) fn text(&self, entry: &Entry, file: File, glance: &Glance) -> String {
        let record = entry.record();
        let facts = |view: &dyn Fn(&Facts<'_>) -> String| self.facts(entry, &record, glance, view);
        match file {
            File::State => format!("{}\n", record.state()),
            File::Status => facts(&|facts| facts.status()),
            File::Error => facts(&|facts| facts.error()),
            File::Config => DocumentKind::Config.text(&record.spec),
            File::Awake => facts(&|facts| facts.awake()),
            File::Activity => facts(&|facts| facts.activity()),
            File::Idle => facts(&|facts| facts.idle()),
            File::IdleAfter => format!("{}\n", record.idle_after),
            File::DeleteAfter => format!("{}\n", record.delete_after),
            File::Pinned => format!("{}\n", u8::from(record.pinned)),
            File::Address => Self::line(self.lifecycle.networks().address(&record)),
            File::Mac => Self::line(self.lifecycle.networks().mac(&record)),
            File::Namespace => Self::line(glance.facts.namespace().map(|path| path.display())),
            File::Nameservers => DocumentKind::Nameservers.text(&record.spec),
            File::Denied => DocumentKind::Denied.text(&record.spec),
            File::Allowed => DocumentKind::Allowed.text(&record.spec),
            File::Counters => glance.facts.counters(),
            File::Console | File::Events => String::new(), // Read from their logs, not from here.
        }
    }

    /// Returns a file of one value, and an empty one where there is none.
    fn line(value: Option<impl Display>) -> String {
        value.map_or_else(String::new, |value| format!("{value}\n"))
    }

    fn facts<T>(
        &self,
        entry: &Entry,
        record: &Record,
        glance: &Glance,
        view: impl FnOnce(&Facts<'_>) -> T,
    ) -> T {
        let (disk_bytes, cached_bytes) = glance.facts.disks();
        let clock = self.lifecycle.clock();
        view(&Facts {
            record,
            now: glance.at,
            last_activity: entry.last_activity(),
            activity_count: entry.activity_count(),
            signals: self.lifecycle.activity().signals(entry.row()),
            limits: self.lifecycle.activity().limits(record),
            busyness: self.lifecycle.activity().busyness(entry.row()),
            error: self.lifecycle.notes().last_error(entry),
            disk_bytes,
            cached_bytes,
            lacks: self.lifecycle.lacks(record),
            stale: self.lifecycle.stale_at(record),
            grace_until: self.lifecycle.activity().grace_until(record.row),
            unwakeable: self.lifecycle.why_unwakeable(record.row),
            today: self.lifecycle.records().today(),
            holders: self.lifecycle.activity().holders(record.row),
            vsock: self.lifecycle.store().vsock(record),
            wall: &|at| clock.wall(at),
        })
    }

    /// Returns the length of a file of the daemon's that no reader sees as another does.
    pub(super) fn daemon_len(&self, file: DaemonFile) -> u64 {
        let len = match file {
            DaemonFile::Status => self.daemon_status().len(),
            DaemonFile::Metrics => self.daemon_metrics().len(),
            DaemonFile::List | DaemonFile::Events | DaemonFile::Error => 0,
        };
        len as u64
    }

    /// Returns the length of `dozed.list` for a reader.
    pub(super) fn daemon_list_len(&self, caller: Caller) -> u64 {
        let (all, seeing) = (self.lifecycle.entries_after(RowId(0)), Seeing::of(caller));
        let seen = all.filter(|entry| seeing.may_see(entry.record().owner));
        seen.map(|entry| view::list_line_len(&entry.record())).sum()
    }

    fn daemon_status(&self) -> String {
        let clock = self.lifecycle.clock();
        let (memory_bytes, memory_budget_bytes) = self.lifecycle.memory();
        DaemonFacts {
            counts: self.lifecycle.index().count_by_state(),
            memory_bytes,
            memory_budget_bytes,
            reaper_last_tick: self
                .lifecycle
                .records()
                .metrics()
                .last_tick()
                .map(|at| clock.wall(at)),
            started: clock.wall(self.started),
            pid: std::process::id(),
            lacks: &self.lacks,
        }
        .status()
    }

    fn daemon_metrics(&self) -> String {
        let clock = self.lifecycle.clock();
        let (memory_bytes, memory_budget_bytes) = self.lifecycle.memory();
        self.lifecycle.records().metrics().expose(&Gauges {
            counts: self.lifecycle.index().count_by_state(),
            memory_bytes,
            memory_budget_bytes,
            holds: self.lifecycle.activity().hold_count(),
            reaper_last_tick: self
                .lifecycle
                .records()
                .metrics()
                .last_tick()
                .map(|at| clock.wall(at)),
            started: clock.wall(self.started),
        })
    }

    fn daemon_list(&self, caller: Caller) -> String {
        let (all, seeing) = (self.lifecycle.entries_after(RowId(0)), Seeing::of(caller));
        let seen = all.filter(|entry| seeing.may_see(entry.record().owner));
        seen.map(|entry| self.facts_of_line(&entry, &entry.record())).collect()
    }

    /// The line of one sandbox in `dozed.list`, which needs no look at its disks.
    fn facts_of_line(&self, entry: &Entry, record: &Record) -> String {
        let clock = self.lifecycle.clock();
        Facts {
            record,
            now: clock.now(),
            last_activity: entry.last_activity(),
            activity_count: 0,
            signals: crate::activity::Signals::default(),
            limits: self.lifecycle.activity().limits(record),
            busyness: crate::activity::Busyness::default(),
            error: None,
            disk_bytes: 0,
            cached_bytes: None,
            lacks: Vec::new(),
            stale: None,
            grace_until: None,
            unwakeable: None,
            today: 0,
            holders: Vec::new(),
            vsock: None,
            wall: &|at| clock.wall(at),
        }
        .list_line()
    }
}
