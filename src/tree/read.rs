//! Reading.

use std::time::SystemTime;

use super::{Caller, DaemonFacts, DaemonFile, Errno, Facts, File, Node, Tree};
use crate::{
    lifecycle::Entry,
    sandbox::{Record, RowId},
    sync::Arc,
};

/// How many rows are read for `dozed.list` at a time.
const LIST_PAGE: usize = 1024;

impl Tree {
    /// Reads at most `size` bytes from `offset` of what the file was when it was read
    /// from offset 0.
    ///
    /// # Errors
    /// `NoDev` where the sandbox is gone, `IsDir` for a directory.
    pub fn read(
        &self,
        node: Node,
        handle: u64,
        offset: u64,
        size: usize,
        caller: Caller,
    ) -> Result<Vec<u8>, Errno> {
        let open = self.handles.get(handle, node);
        let text = match (node, open.text) {
            (Node::File(row, File::Console), _) => {
                let entry = self.open_entry(row)?;
                let from = open.start.saturating_add(offset);
                return self.lifecycle.read_console(&entry, from, size).map_err(|error| {
                    tracing::warn!(id = %entry.id(), %error, "reading a console");
                    Errno::Io
                });
            }
            (_, Some(text)) if offset > 0 => text,
            (Node::File(row, file), _) => self.file_text(row, file)?.into_bytes().into(),
            (Node::Daemon(DaemonFile::Status), _) => self.daemon_status().into_bytes().into(),
            (Node::Daemon(DaemonFile::List), _) => self.daemon_list(caller).into_bytes().into(),
            (Node::Root | Node::Dir(_), _) => return Err(Errno::IsDir),
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
        let end = from.saturating_add(size).min(text.len());
        let part = text[from..end].to_vec();
        if offset == 0 {
            // Also a reader that had it all comes back, to see the end of it.
            self.handles.keep(handle, text);
        }
        Ok(part)
    }

    fn file_text(&self, row: RowId, file: File) -> Result<String, Errno> {
        let entry = self.open_entry(row)?;
        let record = entry.record();
        Ok(match file {
            File::State => format!("{}\n", record.state),
            File::Status => self.facts(&entry, &record, |facts| facts.status()),
            File::Error => self.facts(&entry, &record, |facts| facts.error()),
            File::Config => record.spec.to_toml(),
            File::Awake => self.facts(&entry, &record, |facts| facts.awake()),
            File::Activity => self.facts(&entry, &record, |facts| facts.activity()),
            File::Idle => self.facts(&entry, &record, |facts| facts.idle()),
            File::IdleAfter => format!("{}\n", record.idle_after),
            File::DeleteAfter => format!("{}\n", record.delete_after),
            File::Pinned => format!("{}\n", u8::from(record.pinned)),
            File::Console => String::new(), // Read from its log, not from here.
        })
    }

    fn facts<T>(&self, entry: &Entry, record: &Record, view: impl FnOnce(&Facts<'_>) -> T) -> T {
        let clock = self.lifecycle.clock();
        view(&Facts {
            record,
            now: clock.now(),
            last_activity: entry.last_activity(),
            activity_count: entry.activity_count(),
            signals: self.lifecycle.signals(entry.row()),
            active_cpu_percent: self.lifecycle.settings().active_cpu_percent,
            error: self.lifecycle.last_error(entry),
            disk_bytes: self.lifecycle.disk_bytes(record),
            cached_bytes: self.lifecycle.cached_bytes(record),
            lacks: self.lifecycle.lacks(record),
            holders: self.lifecycle.holders(record.row),
            vsock: self.lifecycle.vsock(record),
            wall: &|at| clock.wall(at),
        })
    }

    fn daemon_status(&self) -> String {
        let clock = self.lifecycle.clock();
        let (memory_bytes, memory_budget_bytes) = self.lifecycle.memory();
        DaemonFacts {
            counts: self.lifecycle.index().count_by_state(),
            memory_bytes,
            memory_budget_bytes,
            reaper_last_tick: self.lifecycle.last_tick().map(|at| clock.wall(at)),
            started: clock.wall(self.started),
            pid: std::process::id(),
        }
        .status()
    }

    fn daemon_list(&self, caller: Caller) -> String {
        let mut text = String::new();
        let mut last = RowId(0);
        loop {
            let page = self.lifecycle.rows_after(last, LIST_PAGE);
            let Some(end) = page.last() else { return text };
            last = end.row();
            for entry in page.iter().filter(|entry| self.may_see(entry, caller)) {
                let record = entry.record();
                text.push_str(&self.facts_of_line(entry, &record));
            }
        }
    }

    /// The line of one sandbox in `dozed.list`, which needs no look at its disks.
    fn facts_of_line(&self, entry: &Entry, record: &Record) -> String {
        let clock = self.lifecycle.clock();
        Facts {
            record,
            now: clock.now(),
            last_activity: entry.last_activity(),
            activity_count: 0,
            signals: crate::lifecycle::Signals::default(),
            active_cpu_percent: 0,
            error: None,
            disk_bytes: 0,
            cached_bytes: None,
            lacks: Vec::new(),
            holders: Vec::new(),
            vsock: None,
            wall: &|at| clock.wall(at),
        }
        .list_line()
    }

    /// The size of the console's log, without what was cut off from its front, and when
    /// it last grew.
    pub(super) fn console_facts(&self, record: &Arc<Record>) -> (u64, SystemTime) {
        let log = self.lifecycle.console(record);
        (log.len - log.start, log.mtime.unwrap_or_else(|| self.system_time(record.since)))
    }
}
