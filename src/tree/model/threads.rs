//! Many threads at once, on one sandbox and on several. In what order they come is not known,
//! so there is no model to compare with; but some things hold in whatever order:
//!
//! - there are never two machines of one sandbox, and `generation` never falls;
//! - what is held is `running` for as long as the hold lasts;
//! - a `sleep` with a count of before a touch is refused, whatever else happens;
//! - everybody has an answer that the contract knows, and afterwards all can be used.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::JoinHandle,
    time::Duration,
};

use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    CASES, SeededCases,
    op::NAMES,
    rig::{NO_TICK, ROOT, hold, node, tree_of, try_read, value, write},
};
use crate::{
    lifecycle::{
        Lifecycle,
        testing::{Host, wait_for},
    },
    reaper::Reaper,
    sandbox::State,
    sync::Arc,
    sys::clock::{Deadline, ManualClock, pause_for},
    tree::{Errno, File, Node, Tree},
};

/// How many threads do something at a time.
const THREADS: usize = 6;
/// How much each of them does.
const STEPS: usize = 12;
/// How long all of it may take on a machine that has other things to do.
const ALL_DONE: Duration = Duration::from_secs(600);

/// What a thread does to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Wake,
    Sleep,
    /// Holds it, and looks whether it runs.
    Hold,
    /// Touches it between the look at its count and the sleep.
    TouchAndSleep,
    /// Takes the time at which the reaper would put it to sleep, and has it look.
    Idle,
    Remake,
}

fn acts(names: usize, remake: bool) -> impl Strategy<Value = Vec<Vec<(usize, Act)>>> {
    let act = prop_oneof![
        4 => Just(Act::Wake),
        3 => Just(Act::Sleep),
        3 => Just(Act::Hold),
        3 => Just(Act::TouchAndSleep),
        2 => Just(Act::Idle),
        1 => Just(if remake { Act::Remake } else { Act::Wake }),
    ];
    let step = (select((0..names).collect::<Vec<_>>()), act);
    vec(vec(step, STEPS), THREADS)
}

/// What all threads share.
struct Shared {
    tree: Arc<Tree>,
    daemon: Arc<Lifecycle>,
    clock: Arc<ManualClock>,
    /// How many are at work still.
    left: AtomicUsize,
    is_over: AtomicBool,
}

/// Counts one less also where a thread panicked.
struct Leaves(Arc<Shared>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.left.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn read(&self, id: &str, file: File) -> Result<String, Errno> {
        try_read(&self.tree, node(&self.tree, id, file)?)
    }

    /// Does it, and refuses an answer that it cannot have.
    fn act(&self, id: &str, act: Act) {
        let (result, known): (_, &[Errno]) = match act {
            Act::Wake => (write(&self.tree, id, "state", "wake", false), &[]),
            Act::Sleep => {
                (write(&self.tree, id, "state", "sleep", false), &[Errno::Busy, Errno::Inval])
            }
            Act::Hold => (self.hold(id), &[Errno::Dquot]),
            Act::TouchAndSleep => (self.touch_and_sleep(id), &[Errno::Busy]),
            Act::Idle => {
                self.clock.advance(Duration::from_secs(60));
                self.daemon.records().reaper_wakeup().notify();
                (Ok(()), &[])
            }
            Act::Remake => (self.remake(id), &[Errno::Busy, Errno::Exist]),
        };
        if let Err(errno) = result {
            let gone = [Errno::NoEnt, Errno::NoDev];
            assert!(known.contains(&errno) || gone.contains(&errno), "{act:?} of {id}: {errno:?}");
        }
    }

    fn hold(&self, id: &str) -> Result<(), Errno> {
        let held = hold(&self.tree, id, false)?;
        for _ in 0..4 {
            let state = self.read(id, File::State);
            assert_eq!(state, Ok("running\n".to_owned()), "{id} is held");
            assert_eq!(self.remove(id), Err(Errno::Busy), "{id} is held");
        }
        drop(self.tree.close(held));
        Ok(())
    }

    fn touch_and_sleep(&self, id: &str) -> Result<(), Errno> {
        let count = value(&self.read(id, File::Activity)?, "count");
        write(&self.tree, id, "activity", "x", false)?;
        match write(&self.tree, id, "state", &format!("sleep {count}"), false) {
            Err(Errno::Again) => Ok(()),
            Ok(()) => panic!("{id} was touched after its count was {count}, and put to sleep"),
            refused => refused,
        }
    }

    fn remove(&self, id: &str) -> Result<(), Errno> {
        self.tree.remove_dir(Node::Root, id.as_bytes(), ROOT)?.wait()
    }

    fn remake(&self, id: &str) -> Result<(), Errno> {
        self.remove(id)?;
        self.tree.make_dir(Node::Root, id.as_bytes(), ROOT).wait().map(drop)
    }

    /// Looks at all of them until the others are done.
    fn look(&self) {
        let mut generations: HashMap<Node, u64> = HashMap::new();
        while !self.is_over.load(Ordering::SeqCst) {
            for id in NAMES {
                let Ok(node) = node(&self.tree, id, File::Status) else { continue };
                let Ok(status) = try_read(&self.tree, node) else { continue };
                let generation = value(&status, "generation").parse().unwrap();
                let before = generations.insert(node, generation).unwrap_or(0);
                assert!(generation >= before, "{id} was at {before}: {status}");
            }
            pause_for(Duration::from_millis(1));
        }
    }
}

fn spawn(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) -> JoinHandle<()> {
    let leaves = Leaves(Arc::clone(shared));
    let thread = std::thread::Builder::new().name("model".to_owned());
    thread.spawn(move || work(&leaves.0)).unwrap()
}

/// Has each list of acts done by a thread of its own, and looks at what is left.
fn run(names: usize, lists: Vec<Vec<(usize, Act)>>) {
    let host = Host::new();
    NAMES[..names].iter().for_each(|id| drop(host.create(id)));
    let shared = Arc::new(Shared {
        tree: tree_of(&host),
        daemon: Arc::clone(&host.daemon),
        clock: Arc::clone(&host.clock),
        left: AtomicUsize::new(lists.len()),
        is_over: AtomicBool::new(false),
    });
    let reaper = Reaper::start(Arc::clone(&host.daemon), NO_TICK, 2).unwrap();
    let threads: Vec<_> = lists
        .into_iter()
        .map(|list| {
            spawn(&shared, move |shared| {
                list.into_iter().for_each(|(name, act)| shared.act(NAMES[name], act));
            })
        })
        .collect();
    let looking = Arc::clone(&shared);
    let looking = std::thread::Builder::new().spawn(move || looking.look()).unwrap();
    let deadline = Deadline::after(ALL_DONE);
    while shared.left.load(Ordering::SeqCst) > 0 {
        assert!(!deadline.passed(), "somebody waits for ever");
        pause_for(Duration::from_millis(1));
    }
    shared.is_over.store(true, Ordering::SeqCst);
    for thread in threads.into_iter().chain([looking]) {
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
    reaper.stop(NO_TICK);
    check(&host);
}

/// Everything is as it says, and can be used.
fn check(host: &Host) {
    wait_for("locks to be free", || host.daemon.locks_in_use() == 0);
    assert_eq!(host.vmm.doubles(), [""; 0]);
    let there = || NAMES.iter().filter(|id| host.daemon.by_id(&id.parse().unwrap()).is_some());
    let running = there().filter(|id| host.state(id) == State::Running).count();
    wait_for("other VMMs to be gone", || host.vmm.living().len() == running);
    for id in there() {
        let record = host.entry(id).record();
        assert_eq!(record.generation, record.sleeps + record.wakes, "{id}");
        assert_eq!(host.daemon.activity().holders(record.row), [], "{id}");
        host.check(id);
    }
}

#[test]
fn many_at_once_on_one_sandbox_lose_nothing_and_are_told_no_lies() {
    SeededCases::new(CASES / 8).run(&acts(1, false), |lists| run(1, lists));
}

#[test]
fn many_at_once_on_several_that_come_and_go_lose_nothing_and_are_told_no_lies() {
    SeededCases::new(CASES / 8).run(&acts(3, true), |lists| run(3, lists));
}
