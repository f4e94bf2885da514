//! The real thing beside the model: each op is done to both, and what can be read of either
//! has to be the same.

use std::time::Duration;

use super::{
    op::{End, NAMES, NONSENSE, Name, Op, Setting, Trouble, Verb},
    reference::{BUDGET_MIB, Known, Reference, Reply},
};
use crate::{
    lifecycle::testing::{Host, wait_for},
    reaper::Reaper,
    sandbox::{Period, State},
    sync::Arc,
    sys::clock::Clock,
    tree::{Access, Answer, AttrChange, Caller, DaemonFile, Errno, File, Node, Tree},
};

pub(super) const ROOT: Caller = Caller { uid: 0, gid: 0, tid: 0 };
/// The reaper looks when we start it, and never again.
pub(super) const NO_TICK: Duration = Duration::from_secs(3600);

/// A host and its model.
pub(super) struct Rig {
    pub(super) host: Host,
    tree: Arc<Tree>,
    reference: Reference,
    /// The open files that hold, as `reference` has them.
    handles: Vec<u64>,
    /// The count of activity that each sandbox had at the last look, and which it was.
    counts: [Option<(u64, u64)>; NAMES.len()],
    /// Whether another daemon has come since.
    is_new_daemon: bool,
}

/// A sandbox as both tell of it, a line for each thing.
type Facts = Vec<(&'static str, String)>;

impl Rig {
    pub(super) fn new() -> Self {
        let host = Host::with_budget(Some(BUDGET_MIB << 20));
        let tree = tree_of(&host);
        let reference = Reference::at(host.clock.now().as_millis());
        Self {
            host,
            tree,
            reference,
            handles: Vec::new(),
            counts: [None; NAMES.len()],
            is_new_daemon: false,
        }
    }

    /// Does an op to both, and compares them.
    pub(super) fn step(&mut self, op: &Op) {
        // A VMM that was ended on purpose is looked after under its sandbox's lock too, a moment
        // later. Whoever does not wait, the reaper too, would find the lock taken.
        wait_for("locks to be free", || self.host.daemon.locks_in_use() == 0);
        let want = self.reference.apply(op);
        let got = self.act(op);
        assert_eq!(got, want, "the answer to {op:?}");
        self.compare(op);
    }

    fn act(&mut self, op: &Op) -> Reply {
        let planned = |trouble: &Trouble| match trouble {
            Trouble::Faults(faults) => faults.clone(),
            Trouble::None | Trouble::Crash(_) => Vec::new(),
        };
        match op {
            Op::Rmdir(_, trouble)
            | Op::Verb { trouble, .. }
            | Op::Hold { trouble, .. }
            | Op::Tick(trouble) => {
                planned(trouble).into_iter().for_each(|(call, fault)| {
                    self.host.vmm.fail_next(call, fault);
                });
                let answer = self.act_in_trouble(op, trouble);
                self.host.vmm.forget_faults();
                answer
            }
            Op::Restart { ordered, down, dies } => {
                self.restart(*ordered, *down, dies);
                Reply::Is(Ok(()))
            }
            Op::Mkdir(_)
            | Op::Set(..)
            | Op::Nonsense(..)
            | Op::Touch { .. }
            | Op::LetGo(_)
            | Op::Pass(_)
            | Op::StepWall(_)
            | Op::End(..) => Reply::Is(self.act_plainly(op)),
        }
    }

    fn act_in_trouble(&mut self, op: &Op, trouble: &Trouble) -> Reply {
        let Trouble::Crash(point) = trouble else {
            return Reply::Is(self.act_plainly(op));
        };
        // What is open does not outlive a crash, so it need not be known.
        let mut done = Ok(());
        let (tree, handles) = (Arc::clone(&self.tree), &mut self.handles);
        let crashed = self.host.crashes_at(*point, || done = plainly(&tree, handles, op));
        if !crashed {
            return Reply::Is(done);
        }
        drop(tree);
        self.restart(false, Duration::ZERO, &[false; NAMES.len()]);
        Reply::Crashed
    }

    fn act_plainly(&mut self, op: &Op) -> Result<(), Errno> {
        match op {
            Op::Tick(_) => {
                // With its wakeup closed it looks once, does all that is due, and ends.
                self.host.daemon.records().reaper_wakeup().close();
                Reaper::start(Arc::clone(&self.host.daemon), NO_TICK, 1).unwrap().run_once();
                Ok(())
            }
            Op::Pass(by) => {
                self.host.clock.advance(*by);
                Ok(())
            }
            Op::StepWall(by) => {
                self.host.clock.step_wall(*by);
                Ok(())
            }
            Op::End(name, end) => {
                let entry = self.host.daemon.by_id(&NAMES[*name].parse().unwrap());
                let process = entry.and_then(|entry| entry.record().process().cloned());
                match (process, end) {
                    (Some(process), End::ShutDown) => self.host.vmm.shut_down(process.pid),
                    (Some(process), End::Crash) => self.host.vmm.crash(process.pid),
                    (None, _) => {}
                }
                Ok(())
            }
            Op::Mkdir(_)
            | Op::Rmdir(..)
            | Op::Verb { .. }
            | Op::Set(..)
            | Op::Nonsense(..)
            | Op::Touch { .. }
            | Op::Hold { .. }
            | Op::LetGo(_)
            | Op::Restart { .. } => plainly(&self.tree, &mut self.handles, op),
        }
    }

    fn restart(&mut self, ordered: bool, down: Duration, dies: &[bool; NAMES.len()]) {
        let dead: Vec<u32> = NAMES
            .iter()
            .zip(dies)
            .filter(|(_, dies)| **dies)
            .filter_map(|(name, _)| self.host.daemon.by_id(&name.parse().unwrap()))
            .filter_map(|entry| Some(entry.record().process()?.pid))
            .collect();
        self.host.restart_after(ordered, |host| {
            host.clock.advance(down);
            dead.iter().for_each(|pid| host.vmm.crash(*pid));
        });
        self.tree = tree_of(&self.host);
        self.handles.clear();
        self.is_new_daemon = true;
        // What was not yet written of activity is lost with a daemon that crashed.
        for (known, name) in self.reference.known.iter_mut().zip(NAMES) {
            let Some(known) = known else { continue };
            let last = self.host.entry(name).last_activity().as_millis();
            assert!((known.kept..=known.last).contains(&last), "{name}: {last} of {known:?}");
            (known.last, known.kept) = (last, last);
        }
    }

    fn compare(&mut self, op: &Op) {
        let calls = self.host.vmm.calls().len();
        for (name, id) in NAMES.into_iter().enumerate() {
            let got = self.tree.lookup(Node::Root, id.as_bytes()).is_ok();
            assert_eq!(got, self.reference.known[name].is_some(), "{id} is there after {op:?}");
            let Some(known) = self.reference.known[name].clone() else {
                continue;
            };
            if known.state == State::Stopped {
                // The end of a guest is noticed a moment later.
                wait_for("its end to be seen", || self.host.state(id) == State::Stopped);
                wait_for("its end to be told", || self.host.daemon.locks_in_use() == 0);
            }
            let (got, want) = (self.seen(id), self.wanted(name, &known));
            let differs = got.iter().zip(&want).filter(|(got, want)| got != want);
            let differs: Vec<_> = differs.map(|(got, want)| (got, &want.1)).collect();
            assert!(differs.is_empty(), "{id} after {op:?} is {differs:?}");
            self.compare_count(name, id, op);
            if known.has_machine() || known.state == State::Snapshotted {
                assert_eq!(self.host.runs(id), known.runs, "runs of {id} after {op:?}");
            }
            let error = self.read(id, File::Error);
            let fits = known.error.map_or(error == "ok\n", |words| error.contains(words));
            assert!(fits, "{id} says {error:?} and not {:?} after {op:?}", known.error);
        }
        self.is_new_daemon = false;
        self.compare_daemon(op);
        assert_eq!(self.host.vmm.calls().len(), calls, "no look asks a VMM");
    }

    /// The count grows exactly by what counts as activity.
    fn compare_count(&mut self, name: Name, id: &str, op: &Op) {
        let known = self.reference.known[name].as_mut().expect("it was looked for");
        let count = self.host.entry(id).activity_count();
        let grew = std::mem::take(&mut known.was_active);
        match self.counts[name] {
            None => {}
            // The counts of a new sandbox, and of a new daemon, are above all earlier ones.
            Some((number, before)) if grew || self.is_new_daemon || number != known.number => {
                assert!(count > before, "{id} was active by {op:?}, or is new");
            }
            Some((_, before)) => assert_eq!(count, before, "{id} was not active by {op:?}"),
        }
        self.counts[name] = Some((known.number, count));
    }

    fn compare_daemon(&self, op: &Op) {
        let known = || self.reference.known.iter().flatten();
        let status = self.daemon_file(DaemonFile::Status);
        for state in State::ALL {
            let count = known().filter(|known| known.state == state).count();
            assert_eq!(value(&status, state.word()), count.to_string(), "{state} after {op:?}");
        }
        let memory = (self.reference.awake_mib() << 20).to_string();
        assert_eq!(value(&status, "memory_bytes"), memory, "after {op:?}");
        let list = self.daemon_file(DaemonFile::List);
        assert_eq!(list.lines().count(), known().count(), "{list}");
        assert_eq!(self.host.vmm.doubles(), [""; 0], "after {op:?}");
        let machines = known().filter(|known| known.has_machine()).count();
        // Leftovers that start-up found are killed and not waited for.
        wait_for("all other VMMs to be gone", || self.host.vmm.living().len() == machines);
    }

    fn seen(&self, id: &str) -> Facts {
        let [status, activity, idle] =
            [File::Status, File::Activity, File::Idle].map(|file| self.read(id, file));
        let mut facts = vec![("state", self.read(id, File::State))];
        for key in ["state", "generation", "sleeps", "wakes", "vcpus", "memory_bytes"] {
            facts.push((key, value(&status, key)));
        }
        facts.push(("last", value(&activity, "last")));
        facts.push(("holds", value(&activity, "holds")));
        for key in ["verdict", "sleeps_at", "deletes_at"] {
            facts.push((key, value(&idle, key)));
        }
        facts.push(("idle_after", self.read(id, File::IdleAfter)));
        facts.push(("delete_after", self.read(id, File::DeleteAfter)));
        facts.push(("pinned", self.read(id, File::Pinned)));
        facts.push(("holders", self.read(id, File::Awake).lines().count().to_string()));
        facts
    }

    fn wanted(&self, name: Name, known: &Known) -> Facts {
        let Reference { now, wall_offset, .. } = self.reference;
        let held = self.reference.is_held(name);
        let holds = self.reference.holds.iter().filter(|held| **held == name).count().to_string();
        let time = |at: i64| {
            format!("{:.3}", jiff::Timestamp::from_millisecond(at + wall_offset).unwrap())
        };
        let due = |at: Option<i64>, period: Option<u64>| match (at, period) {
            (Some(at), _) => time(at),
            (None, None) => "never".to_owned(),
            (None, Some(_)) => "none".to_owned(),
        };
        let sleeps_at = known.sleeps_at().filter(|_| !held);
        let deletes_at = known.deletes_at().filter(|_| !held);
        let period = |seconds| format!("{}\n", period(seconds));
        vec![
            ("state", format!("{}\n", known.state)),
            ("state", known.state.to_string()),
            ("generation", known.generation.to_string()),
            ("sleeps", known.sleeps.to_string()),
            ("wakes", known.wakes.to_string()),
            ("vcpus", known.vcpus.to_string()),
            ("memory_bytes", (known.mib << 20).to_string()),
            ("last", time(known.last)),
            ("holds", holds.clone()),
            ("verdict", known.verdict(now, held).to_owned()),
            ("sleeps_at", due(sleeps_at, known.idle_after)),
            ("deletes_at", due(deletes_at, known.delete_after)),
            ("idle_after", period(known.idle_after)),
            ("delete_after", period(known.delete_after)),
            ("pinned", format!("{}\n", u8::from(known.pinned))),
            ("holders", holds),
        ]
    }

    fn read(&self, id: &str, file: File) -> String {
        read(&self.tree, node(&self.tree, id, file).unwrap())
    }

    fn daemon_file(&self, file: DaemonFile) -> String {
        read(&self.tree, Node::Daemon(file))
    }
}

pub(super) fn tree_of(host: &Host) -> Arc<Tree> {
    Arc::new(Tree::new(Arc::clone(&host.daemon)).unwrap())
}

fn period(seconds: Option<u64>) -> Period {
    seconds.map_or(Period::Never, |seconds| Period::After(Duration::from_secs(seconds)))
}

/// Returns a value of a flat-keyed table.
pub(super) fn value(table: &str, key: &str) -> String {
    let found = table.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("there is no {key} in {table}")).to_owned()
}

pub(super) fn node(tree: &Tree, id: &str, file: File) -> Result<Node, Errno> {
    let dir = tree.lookup(Node::Root, id.as_bytes())?.node;
    Ok(tree.lookup(dir, file.name().as_bytes())?.node)
}

/// Reads a file from its start to its end, as `cat` does.
pub(super) fn try_read(tree: &Arc<Tree>, node: Node) -> Result<String, Errno> {
    let Answer::Now(opened) = tree.open(node, Access::Read, ROOT) else {
        panic!("to open a file for reading is no job");
    };
    let handle = opened?.handle;
    let text = tree.read_here(node, handle, 0, 1 << 20, ROOT);
    drop(tree.close(handle));
    Ok(String::from_utf8(text?).unwrap())
}

fn read(tree: &Arc<Tree>, node: Node) -> String {
    try_read(tree, node).unwrap()
}

/// Writes as a command of a shell does: by one write, into a file that was opened for it.
pub(super) fn write(
    tree: &Arc<Tree>,
    id: &str,
    file: &str,
    text: &str,
    nonblocking: bool,
) -> Result<(), Errno> {
    let file = File::ALL.into_iter().find(|known| known.name() == file).unwrap();
    let node = node(tree, id, file)?;
    let Answer::Now(opened) = tree.open(node, Access::Write, ROOT) else {
        panic!("to open {file:?} is no job");
    };
    let handle = opened?.handle;
    let written = done(tree.write(node, handle, 0, text.as_bytes(), nonblocking, ROOT)).map(drop);
    let closed = tree.flush(node, handle, ROOT).wait();
    drop(tree.close(handle));
    written.and(closed)
}

/// Opens `awake` for writing.
pub(super) fn hold(tree: &Arc<Tree>, id: &str, nonblocking: bool) -> Result<u64, Errno> {
    let access = if nonblocking { Access::WriteNonblocking } else { Access::Write };
    done(tree.open(node(tree, id, File::Awake)?, access, ROOT)).map(|opened| opened.handle)
}

/// Returns an answer. Whoever does not wait has had theirs; the job is done all the same.
fn done<T>(answer: Answer<T>) -> Result<T, Errno> {
    match answer {
        Answer::Started(value, job) => {
            job().ok();
            Ok(value)
        }
        answer @ (Answer::Now(_) | Answer::Job(..)) => answer.wait(),
    }
}

/// Does what somebody does by a file.
fn plainly(tree: &Arc<Tree>, handles: &mut Vec<u64>, op: &Op) -> Result<(), Errno> {
    match op {
        Op::Mkdir(name) => {
            tree.make_dir(Node::Root, NAMES[*name].as_bytes(), ROOT).wait().map(drop)
        }
        Op::Rmdir(name, _) => tree.remove_dir(Node::Root, NAMES[*name].as_bytes(), ROOT)?.wait(),
        Op::Verb { name, verb, nonblocking, .. } => {
            let id = NAMES[*name];
            let count = || {
                let activity = try_read(tree, node(tree, id, File::Activity)?)?;
                Ok(value(&activity, "count").parse::<u64>().unwrap())
            };
            let text = match verb {
                Verb::Wake => "wake\n".to_owned(),
                Verb::Sleep => "sleep\n".to_owned(),
                Verb::SleepCounted => format!("sleep {}\n", count()?),
                Verb::SleepStale => format!("sleep {}\n", count()?.wrapping_sub(1)),
            };
            write(tree, id, "state", &text, *nonblocking)
        }
        Op::Set(name, setting) => {
            let (file, text) = match setting {
                Setting::IdleAfter(after) => ("idle_after", period(*after).to_string()),
                Setting::DeleteAfter(after) => ("delete_after", period(*after).to_string()),
                Setting::Pinned(pinned) => ("pinned", u8::from(*pinned).to_string()),
                Setting::Config { vcpus, mib } => {
                    ("config", format!("vcpus = {vcpus}\nmemory = \"{mib}MiB\"\n"))
                }
            };
            write(tree, NAMES[*name], file, &text, false)
        }
        Op::Nonsense(name, which) => {
            let (file, text, _) = NONSENSE[*which];
            write(tree, NAMES[*name], file, text, false)
        }
        Op::Touch { name, write: true } => write(tree, NAMES[*name], "activity", "x", false),
        Op::Touch { name, write: false } => {
            let node = node(tree, NAMES[*name], File::Activity)?;
            let touched = AttrChange { mtime: true, ..AttrChange::default() };
            done(tree.set_attr(node, touched, ROOT)).map(drop)
        }
        Op::Hold { name, nonblocking, .. } => {
            handles.push(hold(tree, NAMES[*name], *nonblocking)?);
            Ok(())
        }
        Op::LetGo(which) => {
            if *which < handles.len() {
                drop(tree.close(handles.remove(*which)));
            }
            Ok(())
        }
        Op::Tick(_) | Op::Pass(_) | Op::StepWall(_) | Op::End(..) | Op::Restart { .. } => {
            panic!("{op:?} is nothing that is done by a file")
        }
    }
}
