//! The log of events: one bounded ring, and what each reader sees of it.
//!
//! There is one ring for all sandboxes, and nothing for one that sleeps. A *view* is the
//! events of one sandbox, or those that one user may see. To its readers it is a file that
//! is being written: byte 0 is the oldest event that is kept when the first of them opens
//! it, and it never gets shorter while one has it open. What it lost by then, because
//! the ring is full, is one line to a reader who was too slow, which says how many it
//! missed; that line is shorter than any event, so nobody is ever behind the end.

use std::collections::{HashMap, VecDeque};

use super::event::{Event, gap};
use crate::{
    sandbox::{Owner, RowId},
    sync::{Arc, Mutex, lock},
};

/// How many events are kept. A thousand sandboxes that are all put to sleep and woken
/// again are as many; each takes some 300 bytes.
const EVENTS_MAX: usize = 4096;

/// The events that one file is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    /// Those of one sandbox.
    Sandbox(RowId),
    /// Those of all sandboxes that somebody may see.
    Viewer(Viewer),
}

/// Somebody who looks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Viewer {
    /// The user; root sees everything.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The supplementary groups, as far as they are kept, ascending.
    groups: Arc<[u32]>,
}

/// How many groups of a viewer are looked at: far more than people are in, and few enough that
/// an open file costs next to nothing.
const VIEWER_GROUPS_MAX: usize = 1024;

impl Viewer {
    /// Makes a viewer, of whose groups the first 1024 count.
    #[must_use]
    pub fn new(uid: u32, gid: u32, groups: &[u32]) -> Self {
        let mut groups = groups[..groups.len().min(VIEWER_GROUPS_MAX)].to_vec();
        groups.sort_unstable();
        Self { uid, gid, groups: groups.into() }
    }

    /// Says whether this user may see what `owner` has.
    #[must_use]
    pub fn may_see(&self, owner: Owner) -> bool {
        let groups = || self.groups.binary_search(&owner.gid).is_ok();
        self.uid == 0 || self.uid == owner.uid || self.gid == owner.gid || groups()
    }
}

/// The log.
#[derive(Debug, Default)]
pub struct EventLog {
    /// A leaf lock.
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<Kept>,
    /// The number of the oldest that is kept; numbers go up by one.
    first: u64,
    /// The latest event of each sandbox that has one in the ring.
    latest: HashMap<RowId, u64>,
    /// The views that are open, so at most as many as there are open files.
    sandboxes: HashMap<RowId, Tally>,
    viewers: HashMap<Viewer, Tally>,
}

#[derive(Debug)]
struct Kept {
    row: RowId,
    owner: Owner,
    time: jiff::Timestamp,
    line: Arc<str>,
    /// The one before of the same sandbox, if that is still kept.
    before: Option<u64>,
}

/// What a view has had since it was opened, what was there then included.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    readers: usize,
    bytes: u64,
    events: u64,
}

impl EventLog {
    /// Appends an event.
    pub(super) fn append(&self, event: &Event) {
        let line: Arc<str> = event.line().into();
        let mut ring = lock(&self.ring);
        if ring.kept.len() == EVENTS_MAX {
            ring.drop_oldest();
        }
        let number = ring.next();
        let before = ring.latest.insert(event.row, number);
        let bytes = line.len() as u64;
        let tally = |tally: &mut Tally| {
            tally.bytes += bytes;
            tally.events += 1;
        };
        if let Some(its) = ring.sandboxes.get_mut(&event.row) {
            tally(its);
        }
        let seeing = ring.viewers.iter_mut().filter(|(viewer, _)| viewer.may_see(event.owner));
        seeing.for_each(|(_, its)| tally(its));
        let Event { row, owner, time, .. } = *event;
        ring.kept.push_back(Kept { row, owner, time, line, before });
    }

    /// Opens a view for a reader.
    #[must_use]
    pub fn open(self: &Arc<Self>, view: View) -> Reader {
        let mut ring = lock(&self.ring);
        let view = ring.shared(view);
        let there = ring.tally(&view);
        let tally = match &view {
            View::Sandbox(row) => ring.sandboxes.entry(*row).or_insert(there),
            View::Viewer(viewer) => ring.viewers.entry(viewer.clone()).or_insert(there),
        };
        tally.readers += 1;
        drop(ring);
        Reader { log: Arc::clone(self), view, cursor: Mutex::default() }
    }

    /// Returns the size of a view, and when it last grew.
    #[must_use]
    pub fn size(&self, view: &View) -> (u64, Option<jiff::Timestamp>) {
        let ring = lock(&self.ring);
        let newest = ring.seen(view).next();
        (ring.tally(view).bytes, newest.map(|number| ring.event(number).time))
    }

    fn close(&self, view: &View) {
        let mut ring = lock(&self.ring);
        match view {
            View::Sandbox(row) => {
                let Some(tally) = ring.sandboxes.get_mut(row) else { return };
                tally.readers -= 1;
                if tally.readers == 0 {
                    ring.sandboxes.remove(row);
                }
            }
            View::Viewer(viewer) => {
                let Some(tally) = ring.viewers.get_mut(viewer) else { return };
                tally.readers -= 1;
                if tally.readers == 0 {
                    ring.viewers.remove(viewer);
                }
            }
        }
    }
}

impl Ring {
    /// The number of the event to come.
    fn next(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    fn event(&self, number: u64) -> &Kept {
        let place = usize::try_from(number - self.first).expect("the ring is in memory");
        &self.kept[place]
    }

    fn drop_oldest(&mut self) {
        let Some(oldest) = self.kept.pop_front() else { return };
        if self.latest.get(&oldest.row) == Some(&self.first) {
            self.latest.remove(&oldest.row);
        }
        self.first += 1;
    }

    /// Returns the numbers of the events of a view that are kept, the newest first. For
    /// a sandbox that costs as much as it has of them.
    fn seen<'a>(&'a self, view: &'a View) -> Box<dyn Iterator<Item = u64> + 'a> {
        match view {
            View::Sandbox(row) => {
                let before = |number: &u64| {
                    let before = self.event(*number).before;
                    before.filter(|before| *before >= self.first)
                };
                Box::new(std::iter::successors(self.latest.get(row).copied(), before))
            }
            View::Viewer(viewer) => Box::new(
                (self.first..self.next())
                    .rev()
                    .filter(|number| viewer.may_see(self.event(*number).owner)),
            ),
        }
    }

    /// Returns a view that has what one that is open has already in common with it.
    fn shared(&self, view: View) -> View {
        match &view {
            View::Viewer(viewer) => {
                let open = self.viewers.get_key_value(viewer);
                open.map_or(view, |(open, _)| View::Viewer(open.clone()))
            }
            View::Sandbox(_) => view,
        }
    }

    /// Returns what a view has had: since it was opened, or what is kept.
    fn tally(&self, view: &View) -> Tally {
        let open = match view {
            View::Sandbox(row) => self.sandboxes.get(row),
            View::Viewer(viewer) => self.viewers.get(viewer),
        };
        open.copied().unwrap_or_else(|| {
            let lines = self.seen(view).map(|number| self.event(number).line.len() as u64);
            lines.fold(Tally::default(), |tally, bytes| Tally {
                bytes: tally.bytes + bytes,
                events: tally.events + 1,
                ..tally
            })
        })
    }
}

/// A view that is open, and how far it was read.
#[derive(Debug)]
pub struct Reader {
    log: Arc<EventLog>,
    view: View,
    /// Taken before the ring's lock; nothing else is locked inside.
    cursor: Mutex<Cursor>,
}

#[derive(Debug, Default)]
struct Cursor {
    /// The byte that comes next.
    offset: u64,
    /// A line that was begun, and how much of it was read.
    begun: Option<(Arc<str>, usize)>,
    /// The number of the event that comes then, or of a later one.
    number: u64,
    /// How many events of the view were before it.
    passed: u64,
}

impl Reader {
    /// Reads at most `size` bytes from byte `offset`; nothing where there is no more.
    #[must_use]
    pub fn read(&self, offset: u64, size: usize, now: jiff::Timestamp) -> Vec<u8> {
        let mut cursor = lock(&self.cursor);
        let ring = lock(&self.log.ring);
        if cursor.offset != offset || cursor.number == 0 && cursor.passed == 0 {
            *cursor = self.seek(&ring, offset);
        }
        let mut bytes = Vec::new();
        let mut rest = self.rest(&ring, &cursor);
        while bytes.len() < size {
            let (line, read) = match cursor.begun.take() {
                Some(begun) => begun,
                None => match self.next_line(&ring, &mut cursor, &mut rest, now) {
                    Some(line) => (line, 0),
                    None => break,
                },
            };
            let part = &line.as_bytes()[read..];
            let part = &part[..part.len().min(size - bytes.len())];
            bytes.extend_from_slice(part);
            let read = read + part.len();
            if read < line.len() {
                cursor.begun = Some((line, read));
            }
        }
        cursor.offset = offset + bytes.len() as u64;
        bytes
    }

    /// Says whether there is more to read than was.
    #[must_use]
    pub fn has_more(&self) -> bool {
        let cursor = lock(&self.cursor);
        let ring = lock(&self.log.ring);
        cursor.begun.is_some() || ring.tally(&self.view).events > cursor.passed
    }

    /// Returns the kept events of the view from the cursor on, the newest first.
    fn rest(&self, ring: &Ring, cursor: &Cursor) -> Vec<u64> {
        ring.seen(&self.view).take_while(|number| *number >= cursor.number).collect()
    }

    /// Returns the next line: an event, or how many of them are no longer there.
    fn next_line(
        &self,
        ring: &Ring,
        cursor: &mut Cursor,
        rest: &mut Vec<u64>,
        now: jiff::Timestamp,
    ) -> Option<Arc<str>> {
        let left = ring.tally(&self.view).events.saturating_sub(cursor.passed);
        let missed = left.saturating_sub(rest.len() as u64);
        if missed > 0 {
            cursor.passed += missed;
            return Some(gap(now, missed).into());
        }
        let number = rest.pop()?;
        cursor.number = number + 1;
        cursor.passed += 1;
        Some(Arc::clone(&ring.event(number).line))
    }

    /// Returns the place of a byte. What is before the kept events is where they begin.
    fn seek(&self, ring: &Ring, offset: u64) -> Cursor {
        let tally = ring.tally(&self.view);
        let (mut end, mut passed) = (tally.bytes, tally.events);
        let mut place = Cursor { offset, begun: None, number: ring.next(), passed };
        for number in ring.seen(&self.view) {
            if end <= offset {
                break;
            }
            let line = &ring.event(number).line;
            let start = end - line.len() as u64;
            passed -= 1;
            place = Cursor { offset, begun: None, number, passed };
            if start < offset {
                let read = usize::try_from(offset - start).expect("a line is short");
                place.begun = Some((Arc::clone(line), read));
                (place.number, place.passed) = (number + 1, passed + 1);
            }
            end = start;
        }
        place
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.log.close(&self.view);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{events::What, sandbox::Cause};

    fn root() -> Viewer {
        Viewer::new(0, 0, &[])
    }

    fn now() -> jiff::Timestamp {
        jiff::Timestamp::from_millisecond(1_700_000_000_000).unwrap()
    }

    fn event(row: u64, generation: u64) -> Event {
        Event {
            time: now(),
            row: RowId(row),
            id: format!("s{row}").parse().unwrap(),
            owner: Owner { uid: 1000 + u32::try_from(row).unwrap(), gid: 100 },
            generation,
            what: What::Created,
            cause: Cause::Idle,
        }
    }

    fn all(reader: &Reader, from: u64) -> String {
        let mut text = Vec::new();
        loop {
            let part = reader.read(from + text.len() as u64, 100, now());
            if part.is_empty() {
                return String::from_utf8(text).unwrap();
            }
            text.extend(part);
        }
    }

    fn text(events: &[Event]) -> String {
        events.iter().map(Event::line).collect()
    }

    #[test]
    fn a_view_is_a_file_that_grows_and_each_has_its_own() {
        let log = Arc::new(EventLog::default());
        let events: Vec<_> = (0..20).map(|number| event(number % 3, number)).collect();
        let of = |row: u64| -> Vec<Event> {
            events.iter().filter(|event| event.row.0 == row).cloned().collect()
        };
        events[..10].iter().for_each(|event| log.append(event));
        let all_of_root = log.open(View::Viewer(root()));
        let ones = log.open(View::Sandbox(RowId(1)));
        let theirs = log.open(View::Viewer(Viewer::new(1002, 5, &[6])));
        let before = all(&all_of_root, 0);
        assert_eq!(before, text(&events[..10]));
        assert!(!all_of_root.has_more() && ones.has_more());
        events[10..].iter().for_each(|event| log.append(event));
        assert!(all_of_root.has_more());
        assert_eq!(all(&all_of_root, before.len() as u64), text(&events[10..]));
        assert_eq!(all(&ones, 0), text(&of(1)));
        assert_eq!(all(&theirs, 0), text(&of(2)));
        for (view, want) in [
            (View::Viewer(root()), text(&events)),
            (View::Sandbox(RowId(1)), text(&of(1))),
            (View::Sandbox(RowId(9)), String::new()),
            (View::Viewer(Viewer::new(1, 100, &[])), text(&events)),
        ] {
            assert_eq!(log.size(&view).0, want.len() as u64);
            assert_eq!(log.size(&view).1.is_some(), !want.is_empty());
        }
    }

    #[test]
    fn any_byte_can_be_read_from_as_of_a_file() {
        let log = Arc::new(EventLog::default());
        let events: Vec<_> = (0..9).map(|number| event(number % 2, number)).collect();
        events.iter().for_each(|event| log.append(event));
        let whole = text(&events);
        let reader = log.open(View::Viewer(root()));
        for from in (0..=whole.len()).rev().chain([0, 5]) {
            assert_eq!(all(&reader, from as u64), whole[from..], "from {from}");
        }
        assert_eq!(reader.read(whole.len() as u64 + 7, 10, now()), b"");
    }

    #[test]
    fn a_slow_reader_gets_one_line_that_says_how_many_it_missed() {
        let log = Arc::new(EventLog::default());
        (0..10).for_each(|number| log.append(&event(number % 2, number)));
        let view = View::Sandbox(RowId(1));
        let reader = log.open(view.clone());
        // It has read one and a half.
        let first = event(1, 1).line();
        let second = event(1, 3).line();
        let begun = reader.read(0, first.len() + 7, now());
        assert_eq!(begun, format!("{first}{}", &second[..7]).as_bytes());
        let count = 3 * EVENTS_MAX as u64;
        (10..count).for_each(|number| log.append(&event(number % 2, number)));
        let rest = all(&reader, begun.len() as u64);
        let mut lines = rest.lines();
        // A line that was begun is ended, though it is no longer kept.
        assert_eq!(lines.next().unwrap(), second[7..].trim_end());
        let kept = EVENTS_MAX as u64 / 2;
        let missed = count / 2 - 2 - kept;
        assert!(
            lines.next().unwrap().ends_with(&format!("\"event\":\"missed\",\"missed\":{missed}}}"))
        );
        assert_eq!(lines.clone().count() as u64, kept);
        assert_eq!(lines.next_back().unwrap(), event(1, count - 1).line().trim_end());
        // It is not behind the end, and at it, as far as anybody can tell.
        assert!((begun.len() + rest.len()) as u64 <= log.size(&view).0);
        assert!(!reader.has_more());
        log.append(&event(1, 1_000_000));
        let from = (begun.len() + rest.len()) as u64;
        assert_eq!(all(&reader, from), event(1, 1_000_000).line());
    }

    #[test]
    fn a_file_that_is_open_never_gets_shorter_and_one_that_is_opened_anew_has_what_is_kept() {
        let log = Arc::new(EventLog::default());
        let view = View::Viewer(root());
        log.append(&event(1, 0));
        let reader = log.open(view.clone());
        let mut last = 0;
        for number in 0..2 * EVENTS_MAX as u64 {
            log.append(&event(1, number));
            let size = log.size(&view).0;
            assert!(size > last);
            last = size;
        }
        assert!(lock(&log.ring).kept.len() == EVENTS_MAX);
        drop(reader);
        let size = log.size(&view).0;
        assert!(size < last);
        assert_eq!(all(&log.open(view), 0).len() as u64, size);
        let ring = lock(&log.ring);
        assert!(ring.viewers.is_empty() && ring.sandboxes.is_empty());
    }

    #[test]
    fn a_viewer_in_many_groups_costs_once_and_a_bounded_amount() {
        let log = Arc::new(EventLog::default());
        let groups: Vec<u32> = (0..65_536).collect();
        let open = || log.open(View::Viewer(Viewer::new(1, 1, &groups)));
        let readers: Vec<_> = (0..3).map(|_| open()).collect();
        let groups_of = |reader: &Reader| match &reader.view {
            View::Viewer(viewer) => Arc::clone(&viewer.groups),
            View::Sandbox(_) => panic!("it is a viewer's"),
        };
        let first = groups_of(&readers[0]);
        assert_eq!(first.len(), VIEWER_GROUPS_MAX);
        assert!(readers.iter().all(|reader| Arc::ptr_eq(&groups_of(reader), &first)));
    }

    #[test]
    fn what_left_the_ring_leaves_nothing_behind() {
        let log = Arc::new(EventLog::default());
        (0..2 * EVENTS_MAX as u64).for_each(|row| log.append(&event(row, 0)));
        let ring = lock(&log.ring);
        assert_eq!((ring.kept.len(), ring.latest.len()), (EVENTS_MAX, EVENTS_MAX));
    }
}
