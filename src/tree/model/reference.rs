//! The contract as a model: what a few sandboxes have to be after whatever happened.
//!
//! It knows what `docs/SEMANTICS.md` promises and the table of `lifecycle::reconcile`, and
//! nothing of how that is brought about: no lock, no file, no process.

use super::op::{End, NAMES, NONSENSE, Name, Op, Setting, Trouble, Verb};
use crate::{
    lifecycle::CrashPoint,
    sandbox::State,
    tree::Errno,
    vmm::fake::{Call, Fault},
};

/// How many sandboxes there may be, as `lifecycle::testing` has it.
const SANDBOXES_MAX: usize = 3;
/// How many holds a user may have.
const HOLDS_MAX: usize = 3;
/// The memory that all that are awake may have: two small ones, or a large one.
pub(super) const BUDGET_MIB: u64 = 32;
/// For how long the reaper leaves alone what it failed with, at first.
const RETRY_MILLIS: i64 = 30_000;
/// For how long it leaves alone what an earlier daemon held.
const GRACE_MILLIS: i64 = 120_000;

/// What `error` says where a guest's VMM was killed.
const END_BY_SIGNAL: &str = "killed by signal 9";
/// No sandbox is seen so: what one is between that its VMM died under an operation, and that
/// this was noticed.
const DIED_UNDER_IT: State = State::Booting;

/// For how long a sandbox stays awake after a wake, as `[activity]` has it where nobody says,
/// and to what that grows.
const AWAKE_MIN_MILLIS: i64 = 10_000;
const AWAKE_MAX_MILLIS: i64 = 900_000;
/// A sleep of the reaper's that is shorter was in vain.
const SHORT_MILLIS: i64 = 60_000;
/// After so long awake or asleep all that was in vain is forgotten.
const CALM_MILLIS: i64 = 3_600_000;

/// A moment on the steady line, in milliseconds.
type Moment = i64;

/// What there is to know of one sandbox.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// Which of all that were ever made it is.
    pub(super) number: u64,
    pub(super) state: State,
    pub(super) generation: u64,
    pub(super) sleeps: u64,
    pub(super) wakes: u64,
    /// How often its guest was let run since it was booted.
    pub(super) runs: u64,
    pub(super) idle_after: Option<u64>,
    pub(super) delete_after: Option<u64>,
    pub(super) pinned: bool,
    pub(super) vcpus: u32,
    pub(super) mib: u64,
    /// The last activity. A crash of the daemon may take back what came after `kept`.
    pub(super) last: Moment,
    pub(super) kept: Moment,
    slept_at: Moment,
    retry_at: Option<Moment>,
    /// Since when it has been `running`, without a sleep that was taken back.
    awake_since: Moment,
    /// Until when it stays awake, however idle.
    awake_until: Option<Moment>,
    /// Whether the reaper put it to sleep, and how many sleeps were in vain.
    slept_idle: bool,
    in_vain: u8,
    grace: Option<Moment>,
    /// Whether a daemon that starts now finds that it was held.
    noted: bool,
    /// A part of what `error` reads as, and what of it a restart leaves.
    pub(super) error: Option<&'static str>,
    durable_error: Option<&'static str>,
    /// Whether anything counted as activity since the last look at this.
    pub(super) was_active: bool,
}

/// Why something did not come to its end.
enum Stop {
    Refused(Errno, &'static str),
    Crashed,
}

type Done = Result<(), Stop>;

/// How an operation is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Is(Result<(), Errno>),
    /// The daemon is gone.
    Crashed,
}

/// What goes wrong on the way.
struct Course {
    faults: Vec<(Call, Fault)>,
    crash: Option<CrashPoint>,
}

impl Course {
    fn of(trouble: &Trouble) -> Self {
        match trouble {
            Trouble::None => Self { faults: Vec::new(), crash: None },
            Trouble::Faults(faults) => Self { faults: faults.clone(), crash: None },
            Trouble::Crash(point) => Self { faults: Vec::new(), crash: Some(*point) },
        }
    }

    fn meets(&mut self, call: Call) -> Option<Fault> {
        let planned = self.faults.iter().position(|(planned, _)| *planned == call)?;
        Some(self.faults.remove(planned).1)
    }

    fn crashes(&self, points: &[CrashPoint]) -> bool {
        self.crash.is_some_and(|point| points.contains(&point))
    }
}

/// What an operation that met `fault` in the middle is answered with.
fn refused(fault: Fault, doing: &'static str) -> Stop {
    match fault {
        Fault::NoSpace => Stop::Refused(Errno::NoSpc, doing),
        Fault::Panic => Stop::Refused(Errno::Io, "is a bug in dozed"),
        Fault::Unanswered => Stop::Refused(Errno::TimedOut, doing),
        Fault::Refuse | Fault::Die | Fault::Hang => Stop::Refused(Errno::Io, doing),
    }
}

/// All sandboxes, and the open files that hold them.
#[derive(Debug, Default)]
pub(super) struct Reference {
    pub(super) now: Moment,
    pub(super) wall_offset: i64,
    pub(super) known: [Option<Known>; NAMES.len()],
    /// Which sandbox each open file holds, in the order in which they were opened.
    pub(super) holds: Vec<Name>,
    made: u64,
}

impl Known {
    fn new(number: u64, now: Moment) -> Self {
        Self {
            number,
            state: State::Stopped,
            generation: 0,
            sleeps: 0,
            wakes: 0,
            runs: 0,
            idle_after: Some(60),
            delete_after: None,
            pinned: false,
            vcpus: 1,
            mib: 16,
            last: now,
            kept: now,
            slept_at: 0,
            retry_at: None,
            awake_since: 0,
            awake_until: None,
            slept_idle: false,
            in_vain: 0,
            grace: None,
            noted: false,
            error: None,
            durable_error: None,
            was_active: false,
        }
    }

    /// Says whether there is a VMM.
    pub(super) fn has_machine(&self) -> bool {
        matches!(self.state, State::Running | State::Snapshotting)
    }

    fn act(&mut self, now: Moment) {
        self.was_active = true;
        self.last = now;
    }

    fn sleep_due(&self) -> Option<Moment> {
        let after = self.idle_after.filter(|_| self.state == State::Running)?;
        let at = after_seconds(self.last, after);
        Some(self.retry_at.into_iter().chain(self.awake_until).fold(at, Moment::max))
    }

    /// When the reaper is to put it to sleep if nothing else happens.
    pub(super) fn sleeps_at(&self) -> Option<Moment> {
        self.sleep_due().map(|at| self.grace.map_or(at, |grace| at.max(grace)))
    }

    /// When it is to be deleted if nothing else happens.
    pub(super) fn deletes_at(&self) -> Option<Moment> {
        let after = self.delete_after.filter(|_| !self.pinned)?;
        let at = after_seconds(self.slept_at, after);
        let at = self.retry_at.into_iter().chain(self.grace).fold(at, Moment::max);
        (self.state == State::Snapshotted).then_some(at)
    }

    /// The first word of `idle`.
    pub(super) fn verdict(&self, now: Moment, held: bool) -> &'static str {
        let is_ahead = |at: Option<Moment>| at.is_some_and(|at| at > now);
        match (self.state, self.sleeps_at()) {
            (State::Running, _) if held => "held",
            (State::Running, None) => "exempt",
            (State::Running, Some(_)) if is_ahead(self.grace) => "held",
            (State::Running, Some(_)) if is_ahead(self.retry_at) => "put-off",
            (State::Running, at) if is_ahead(at) && self.awake_until == at => "just-woken",
            (State::Running, at) if is_ahead(at) => "active",
            (State::Running, Some(_)) => "idle",
            (state, _) => state.word(),
        }
    }

    fn fails(&mut self, words: &'static str) {
        self.error = Some(words);
        self.durable_error = Some(words);
    }

    fn lost(&mut self, words: &'static str) {
        self.state = State::Stopped;
        self.fails(words);
    }

    fn slept(&mut self, now: Moment, idle: bool) {
        if now - self.awake_since >= CALM_MILLIS {
            self.in_vain = 0;
        }
        (self.state, self.slept_idle) = (State::Snapshotted, idle);
        (self.generation, self.sleeps) = (self.generation + 1, self.sleeps + 1);
        (self.slept_at, self.retry_at) = (now, None);
    }

    fn woken(&mut self, now: Moment) {
        self.state = State::Running;
        (self.generation, self.wakes) = (self.generation + 1, self.wakes + 1);
        self.in_vain = match now - self.slept_at {
            asleep if asleep >= CALM_MILLIS => 0,
            asleep if asleep >= SHORT_MILLIS => self.in_vain.saturating_sub(1),
            _ if self.slept_idle => (self.in_vain + 1).min(16),
            _ => self.in_vain,
        };
        self.awakes(now);
    }

    fn booted(&mut self, now: Moment) {
        (self.state, self.runs) = (State::Running, 1);
        self.awakes(now);
    }

    fn awakes(&mut self, now: Moment) {
        self.retry_at = None;
        let minimum = AWAKE_MIN_MILLIS << self.in_vain.saturating_sub(1);
        (self.awake_since, self.awake_until) = (now, Some(now + minimum.min(AWAKE_MAX_MILLIS)));
        self.act(now);
    }

    /// A sleep has begun, of which nothing comes.
    fn stays(&mut self, now: Moment) {
        if now - self.awake_since >= CALM_MILLIS {
            self.in_vain = 0;
        }
        self.awake_since = now;
    }
}

fn after_seconds(at: Moment, seconds: u64) -> Moment {
    at + 1000 * i64::try_from(seconds).unwrap()
}

impl Reference {
    pub(super) fn at(now: Moment) -> Self {
        Self { now, ..Self::default() }
    }

    pub(super) fn is_held(&self, name: Name) -> bool {
        self.holds.contains(&name)
    }

    fn get(&mut self, name: Name) -> &mut Known {
        self.known[name].as_mut().expect("the caller has looked")
    }

    /// Does what `op` is to do, and returns how it is to be answered.
    pub(super) fn apply(&mut self, op: &Op) -> Reply {
        let there = |name: &Name| self.known[*name].is_some();
        match op {
            Op::Mkdir(name) => Reply::Is(self.mkdir(*name)),
            Op::Rmdir(name, _)
            | Op::Verb { name, .. }
            | Op::Set(name, _)
            | Op::Nonsense(name, _)
            | Op::Touch { name, .. }
            | Op::Hold { name, .. }
                if !there(name) =>
            {
                Reply::Is(Err(Errno::NoEnt))
            }
            Op::Rmdir(name, trouble) => self.rmdir(*name, trouble),
            Op::Verb { name, verb, nonblocking, trouble } => {
                let answer = self.verb(*name, *verb, &mut Course::of(trouble));
                // Who does not wait hears nothing of how it ended.
                if *nonblocking { Reply::Is(Ok(())) } else { answer }
            }
            Op::Set(name, Setting::Config { vcpus, mib }) if self.refuses(*name, *vcpus, *mib) => {
                // Its lines are refused when they are written, before any operation begins.
                self.get(*name).error = Some("cannot change while it is");
                Reply::Is(Err(Errno::Busy))
            }
            Op::Set(name, setting) => {
                let done = self.set(*name, *setting);
                self.answer(*name, done)
            }
            Op::Nonsense(name, which) => match NONSENSE[*which].2 {
                None => Reply::Is(Ok(())),
                Some(words) => {
                    self.get(*name).error = Some(words);
                    Reply::Is(Err(Errno::Inval))
                }
            },
            Op::Touch { name, .. } => {
                let now = self.now;
                self.get(*name).act(now);
                Reply::Is(Ok(()))
            }
            Op::Hold { name, nonblocking, trouble } => self.hold(*name, *nonblocking, trouble),
            Op::LetGo(which) => {
                self.let_go(*which);
                Reply::Is(Ok(()))
            }
            Op::Tick(trouble) => {
                self.tick(&mut Course::of(trouble));
                Reply::Is(Ok(()))
            }
            Op::Pass(by) => {
                self.now += i64::try_from(by.as_millis()).unwrap();
                Reply::Is(Ok(()))
            }
            Op::StepWall(by) => {
                self.wall_offset += by;
                Reply::Is(Ok(()))
            }
            Op::End(name, end) => {
                self.end(*name, *end);
                Reply::Is(Ok(()))
            }
            Op::Restart { ordered, down, dies } => {
                self.now += i64::try_from(down.as_millis()).unwrap();
                self.restart(*ordered, dies);
                Reply::Is(Ok(()))
            }
        }
    }

    fn mkdir(&mut self, name: Name) -> Result<(), Errno> {
        if self.known[name].is_some() {
            return Err(Errno::Exist);
        }
        if self.known.iter().flatten().count() >= SANDBOXES_MAX {
            return Err(Errno::Dquot);
        }
        self.made += 1;
        self.known[name] = Some(Known::new(self.made, self.now));
        Ok(())
    }

    fn rmdir(&mut self, name: Name, trouble: &Trouble) -> Reply {
        let held = self.is_held(name);
        let known = self.get(name);
        if known.pinned {
            known.error = Some("is pinned");
            return Reply::Is(Err(Errno::Perm));
        }
        if held {
            known.error = Some("held awake by");
            return Reply::Is(Err(Errno::Busy));
        }
        self.known[name] = None;
        if matches!(trouble, Trouble::Crash(_)) {
            self.restart(false, &[false; NAMES.len()]);
            return Reply::Crashed;
        }
        Reply::Is(Ok(()))
    }

    /// Puts the result of an operation where `error` finds it.
    fn answer(&mut self, name: Name, done: Done) -> Reply {
        match done {
            Ok(()) => {
                let known = self.get(name);
                (known.error, known.durable_error) = (None, None);
                Reply::Is(Ok(()))
            }
            Err(Stop::Refused(errno, words)) => {
                self.get(name).fails(words);
                Reply::Is(Err(errno))
            }
            Err(Stop::Crashed) => {
                self.restart(false, &[false; NAMES.len()]);
                Reply::Crashed
            }
        }
    }

    fn verb(&mut self, name: Name, verb: Verb, course: &mut Course) -> Reply {
        let done = self.settle(name, course).and_then(|()| match verb {
            Verb::Wake => self.wake(name, course),
            Verb::Sleep | Verb::SleepCounted | Verb::SleepStale => self.sleep(name, verb, course),
        });
        let answer = self.answer(name, done);
        // It was looked at once more when its VMM was seen to be gone.
        if self.get(name).state == DIED_UNDER_IT {
            self.get(name).lost(END_BY_SIGNAL);
        }
        answer
    }

    /// What was left in the middle goes on, if its VMM answers by now.
    fn settle(&mut self, name: Name, course: &mut Course) -> Done {
        let now = self.now;
        let known = self.get(name);
        if known.state != State::Snapshotting {
            return Ok(());
        }
        let fault = course.meets(Call::Resume);
        match fault {
            None | Some(Fault::Panic) => {
                known.state = State::Running;
                known.runs += 1;
                known.stays(now);
            }
            Some(Fault::Die) => known.state = DIED_UNDER_IT,
            // No sequence plans the last one.
            Some(Fault::Refuse | Fault::NoSpace | Fault::Hang | Fault::Unanswered) => {}
        }
        fault.map_or(Ok(()), |fault| Err(refused(fault, "resuming")))
    }

    fn sleep(&mut self, name: Name, verb: Verb, course: &mut Course) -> Done {
        let held = self.is_held(name);
        let now = self.now;
        let known = self.get(name);
        if held && known.state == State::Running {
            return Err(Stop::Refused(Errno::Busy, "held awake by"));
        }
        if verb == Verb::SleepStale {
            return Err(Stop::Refused(Errno::Again, "was active since"));
        }
        match known.state {
            State::Snapshotted => Ok(()),
            State::Running => save(known, now, false, course),
            State::Stopped
            | State::Booting
            | State::Snapshotting
            | State::Restoring
            | State::Deleting => Err(Stop::Refused(Errno::Inval, "cannot be put to sleep")),
        }
    }

    fn wake(&mut self, name: Name, course: &mut Course) -> Done {
        let (now, awake) = (self.now, self.awake_mib());
        let known = self.get(name);
        if known.state == State::Running {
            known.act(now);
            return Ok(());
        }
        if awake + known.mib > BUDGET_MIB {
            return Err(Stop::Refused(Errno::NoMem, "and the budget"));
        }
        match known.state {
            State::Snapshotted => restore(known, now, course),
            State::Stopped => boot(known, now, course),
            State::Running
            | State::Booting
            | State::Snapshotting
            | State::Restoring
            | State::Deleting => unreachable!("nobody leaves it in {}", known.state),
        }
    }

    /// The memory of all that have a VMM.
    pub(super) fn awake_mib(&self) -> u64 {
        self.known.iter().flatten().filter(|known| known.has_machine()).map(|known| known.mib).sum()
    }

    /// Says whether a `config` is for another machine than the one that runs or sleeps.
    fn refuses(&mut self, name: Name, vcpus: u32, mib: u64) -> bool {
        let known = self.get(name);
        let is_other = (vcpus, mib) != (known.vcpus, known.mib);
        is_other && matches!(known.state, State::Running | State::Snapshotted)
    }

    fn set(&mut self, name: Name, setting: Setting) -> Done {
        if matches!(setting, Setting::Config { .. }) {
            self.settle(name, &mut Course::of(&Trouble::None))?;
        }
        let known = self.get(name);
        match setting {
            Setting::IdleAfter(after) => known.idle_after = after,
            Setting::DeleteAfter(after) => known.delete_after = after,
            Setting::Pinned(pinned) => known.pinned = pinned,
            Setting::Config { vcpus, mib } if (vcpus, mib) == (known.vcpus, known.mib) => {}
            Setting::Config { vcpus, mib } if known.state == State::Stopped => {
                (known.vcpus, known.mib) = (vcpus, mib);
            }
            Setting::Config { .. } => {
                return Err(Stop::Refused(Errno::Busy, "cannot change while it is"));
            }
        }
        Ok(())
    }

    fn hold(&mut self, name: Name, nonblocking: bool, trouble: &Trouble) -> Reply {
        let now = self.now;
        if self.holds.len() >= HOLDS_MAX {
            self.get(name).error = Some("files `awake` open");
            return Reply::Is(Err(Errno::Dquot));
        }
        self.holds.push(name);
        let known = self.get(name);
        known.act(now);
        known.noted = true;
        let answer = self.verb(name, Verb::Wake, &mut Course::of(trouble));
        match answer {
            Reply::Is(Err(_)) if nonblocking => Reply::Is(Ok(())),
            Reply::Is(Err(_)) => {
                self.let_go(self.holds.len() - 1);
                answer
            }
            Reply::Is(Ok(())) | Reply::Crashed => answer,
        }
    }

    /// Closes an open file; the sandbox was active until now.
    fn let_go(&mut self, which: usize) {
        if which < self.holds.len() {
            let (name, now) = (self.holds.remove(which), self.now);
            self.get(name).act(now);
        }
    }

    fn tick(&mut self, course: &mut Course) {
        let now = self.now;
        for name in 0..NAMES.len() {
            let held = self.is_held(name);
            let Some(known) = &mut self.known[name] else { continue };
            if held {
                known.act(now);
            }
            known.grace = known.grace.filter(|end| *end > now);
            known.noted = held || (known.noted && known.grace.is_some());
            known.kept = known.last;
        }
        let mut due: Vec<_> = (0..NAMES.len())
            .filter_map(|name| {
                let known = self.known[name].as_ref()?;
                known.sleep_due().filter(|at| *at <= now).map(|at| (at, known.number, name))
            })
            .collect();
        due.sort_unstable();
        let stale = |known: &Known| known.deletes_at().is_some_and(|at| at <= now);
        let stale: Vec<Name> = (0..NAMES.len())
            .filter(|name| self.known[*name].as_ref().is_some_and(stale))
            .filter(|name| !self.is_held(*name))
            .collect();
        let left: Vec<Name> = (0..NAMES.len())
            .filter(|name| {
                let known = self.known[*name].as_ref();
                known.is_some_and(|known| {
                    known.state == State::Snapshotting
                        && known.retry_at.is_none_or(|retry_at| retry_at <= now)
                })
            })
            .collect();
        for (_, _, name) in due {
            if !self.is_held(name) && self.get(name).grace.is_none() {
                self.reap(name, course);
            }
        }
        stale.into_iter().for_each(|name| self.known[name] = None);
        for name in left {
            // Why it was left there stays in `error`.
            drop(self.settle(name, course));
        }
    }

    fn reap(&mut self, name: Name, course: &mut Course) {
        let now = self.now;
        let done = save(self.get(name), now, true, course);
        if let Reply::Is(Err(_)) = self.answer(name, done) {
            self.get(name).retry_at = Some(now + RETRY_MILLIS);
        }
    }

    fn end(&mut self, name: Name, end: End) {
        if let Some(known) = self.known[name].as_mut().filter(|known| known.has_machine()) {
            known.lost(match end {
                End::ShutDown => "the guest shut down",
                End::Crash => END_BY_SIGNAL,
            });
        }
    }

    /// Another daemon finds what the first one left. Those that `dies` says have lost their
    /// VMM meanwhile.
    fn restart(&mut self, ordered: bool, dies: &[bool; NAMES.len()]) {
        let now = self.now;
        self.holds.clear();
        for (known, dies) in self.known.iter_mut().zip(dies) {
            let Some(known) = known else { continue };
            if ordered {
                known.kept = known.last;
            }
            known.error = known.durable_error;
            known.grace = known.noted.then_some(now + GRACE_MILLIS);
            if known.noted {
                known.act(now);
                known.kept = now;
            }
            if *dies && known.has_machine() {
                known.lost("died while dozed was not running");
            }
        }
        for name in 0..NAMES.len() {
            if self.known[name].is_some() {
                drop(self.settle(name, &mut Course::of(&Trouble::None)));
            }
        }
    }
}

/// A sleep that is wanted, by the reaper if `idle`.
fn save(known: &mut Known, now: Moment, idle: bool, course: &mut Course) -> Done {
    if course.crashes(&[CrashPoint::SleepIntended]) {
        known.stays(now);
        return Err(Stop::Crashed);
    }
    if let Some(fault) = course.meets(Call::Pause) {
        known.stays(now);
        if fault == Fault::Die {
            known.lost("");
        }
        // What was not paused runs on, whether or not it hears that it shall.
        course.meets(Call::Resume);
        return Err(refused(fault, "pausing"));
    }
    if course.crashes(&[CrashPoint::SleepPaused, CrashPoint::SleepStaged, CrashPoint::SleepSaved]) {
        known.stays(now);
        known.runs += 1;
        return Err(Stop::Crashed);
    }
    if let Some(fault) = course.meets(Call::Save) {
        known.stays(now);
        if fault == Fault::Die {
            known.lost("");
        } else if course.meets(Call::Resume).is_some() && course.meets(Call::Resume).is_some() {
            known.state = State::Snapshotting;
        } else {
            known.runs += 1;
        }
        return Err(refused(fault, "saving"));
    }
    known.slept(now, idle);
    if course.crashes(&[CrashPoint::SleepCommitted, CrashPoint::SleepKilled]) {
        return Err(Stop::Crashed);
    }
    Ok(())
}

fn restore(known: &mut Known, now: Moment, course: &mut Course) -> Done {
    if course.crashes(&[CrashPoint::WakeIntended, CrashPoint::WakeConnected]) {
        return Err(Stop::Crashed);
    }
    if let Some(fault) = course.meets(Call::Restore) {
        return Err(refused(fault, "restoring"));
    }
    if course.crashes(&[CrashPoint::WakeRestored, CrashPoint::WakeRecorded]) {
        return Err(Stop::Crashed);
    }
    match course.meets(Call::Resume) {
        // It has not run, and its snapshot is taken back.
        Some(fault) if fault != Fault::Panic => return Err(refused(fault, "resuming")),
        // A driver with a bug proves nothing; whoever cleans up lets the guest run.
        Some(fault) => {
            known.runs += 1;
            known.woken(now);
            return Err(refused(fault, "resuming"));
        }
        None => {}
    }
    known.runs += 1;
    known.woken(now);
    if course.crashes(&[CrashPoint::WakeConsumed, CrashPoint::WakeResumed]) {
        known.kept = now; // It is the next daemon that finishes it.
        return Err(Stop::Crashed);
    }
    Ok(())
}

fn boot(known: &mut Known, now: Moment, course: &mut Course) -> Done {
    if course.crashes(&[CrashPoint::BootIntended, CrashPoint::BootConnected]) {
        return Err(Stop::Crashed);
    }
    if let Some(fault) = course.meets(Call::Boot) {
        return Err(refused(fault, "booting"));
    }
    if course.crashes(&[CrashPoint::BootSpawned, CrashPoint::BootRecorded]) {
        return Err(Stop::Crashed);
    }
    if let Some(fault) = course.meets(Call::Resume) {
        return Err(refused(fault, "starting"));
    }
    known.booted(now);
    if course.crashes(&[CrashPoint::BootResumed]) {
        known.kept = now;
        return Err(Stop::Crashed);
    }
    Ok(())
}
