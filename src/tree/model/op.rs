//! What may happen to a few sandboxes, and how it is drawn.

use std::time::Duration;

use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
};

use crate::{
    lifecycle::CrashPoint,
    vmm::fake::{Call, Fault},
};

/// The names of sandboxes. There may be one fewer at a time.
pub(super) const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Which of the names.
pub(super) type Name = usize;

/// A verb as a person writes it to `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Wake,
    Sleep,
    /// With the count that `activity` has at this moment.
    SleepCounted,
    /// With the count that it had before somebody touched it.
    SleepStale,
}

/// What goes wrong meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    None,
    /// The VMM fails these calls.
    Faults(Vec<(Call, Fault)>),
    /// The daemon crashes there, if it comes there, and is started again.
    Crash(CrashPoint),
}

/// A value that is set by a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    IdleAfter(Option<u64>),
    DeleteAfter(Option<u64>),
    Pinned(bool),
    Config { vcpus: u32, mib: u64 },
}

/// How a guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    ShutDown,
    Crash,
}

/// Something that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Op {
    Mkdir(Name),
    Rmdir(Name, Trouble),
    Verb {
        name: Name,
        verb: Verb,
        nonblocking: bool,
        trouble: Trouble,
    },
    Set(Name, Setting),
    /// A write that is no command; the number says which.
    Nonsense(Name, usize),
    /// By `utimensat`, or by a write.
    Touch {
        name: Name,
        write: bool,
    },
    Hold {
        name: Name,
        nonblocking: bool,
        trouble: Trouble,
    },
    /// Which of the open files is closed.
    LetGo(usize),
    /// The reaper looks.
    Tick(Trouble),
    /// Time passes.
    Pass(Duration),
    /// Somebody sets the wall clock.
    StepWall(i64),
    End(Name, End),
    Restart {
        ordered: bool,
        down: Duration,
        dies: [bool; NAMES.len()],
    },
}

/// A day, in milliseconds.
const DAY_MILLIS: i64 = 86_400_000;

/// Draws what happens, up to so many things.
pub(super) fn ops(steps_max: usize) -> impl Strategy<Value = Vec<Op>> {
    vec(op(), 1..=steps_max)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => name().prop_map(Op::Mkdir),
        2 => (name(), crash(DELETE)).prop_map(|(name, trouble)| Op::Rmdir(name, trouble)),
        30 => (name(), verb(), any::<bool>(), trouble()).prop_map(
            |(name, verb, nonblocking, trouble)| {
                // Who does not wait has its answer before anything goes wrong.
                let nonblocking = nonblocking && !matches!(trouble, Trouble::Crash(_));
                Op::Verb { name, verb, nonblocking, trouble }
            }
        ),
        10 => (name(), setting()).prop_map(|(name, setting)| Op::Set(name, setting)),
        2 => (name(), 0..NONSENSE.len()).prop_map(|(name, which)| Op::Nonsense(name, which)),
        4 => (name(), any::<bool>()).prop_map(|(name, write)| Op::Touch { name, write }),
        8 => (name(), any::<bool>(), trouble())
            .prop_map(|(name, nonblocking, trouble)| Op::Hold { name, nonblocking, trouble }),
        4 => (0..4_usize).prop_map(Op::LetGo),
        14 => faults(TICK).prop_map(Op::Tick),
        12 => select(vec![1, 9, 30, 60, 120, 3_600, 86_400])
            .prop_map(|seconds| Op::Pass(Duration::from_secs(seconds))),
        2 => select(vec![-DAY_MILLIS, DAY_MILLIS]).prop_map(Op::StepWall),
        4 => (name(), select(vec![End::ShutDown, End::Crash]))
            .prop_map(|(name, end)| Op::End(name, end)),
        5 => (any::<bool>(), select(vec![0, 1, 200, 86_400]), any::<[bool; NAMES.len()]>())
            .prop_map(|(ordered, down, dies)| {
                Op::Restart { ordered, down: Duration::from_secs(down), dies }
            }),
    ]
}

fn name() -> impl Strategy<Value = Name> {
    // Mostly the same few, so that things happen to one and the same.
    prop_oneof![4 => Just(0), 2 => Just(1), 2 => Just(2), 1 => Just(3)]
}

fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        6 => Just(Verb::Wake),
        3 => Just(Verb::Sleep),
        1 => Just(Verb::SleepCounted),
        1 => Just(Verb::SleepStale),
    ]
}

fn setting() -> impl Strategy<Value = Setting> {
    prop_oneof![
        3 => option::weighted(0.8, select(vec![1, 10, 60, 300])).prop_map(Setting::IdleAfter),
        2 => option::weighted(0.8, select(vec![1, 60, 86_400])).prop_map(Setting::DeleteAfter),
        1 => any::<bool>().prop_map(Setting::Pinned),
        2 => (select(vec![1, 2]), select(vec![16, 32]))
            .prop_map(|(vcpus, mib)| Setting::Config { vcpus, mib }),
    ]
}

/// What can go wrong with a verb.
fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        6 => Just(Trouble::None),
        2 => faults(VERB),
        2 => crash(ROADS),
    ]
}

/// What of it a VMM does. One that dies or a driver with a bug comes alone, as a second
/// fault has nobody left to meet it.
fn faults(plans: &'static [&'static [(Call, Fault)]]) -> impl Strategy<Value = Trouble> {
    let plan = any::<Index>().prop_map(|which| Trouble::Faults(which.get(plans).to_vec()));
    prop_oneof![3 => Just(Trouble::None), 1 => plan]
}

fn crash(points: &'static [CrashPoint]) -> impl Strategy<Value = Trouble> {
    let at = any::<Index>().prop_map(|which| Trouble::Crash(*which.get(points)));
    prop_oneof![1 => Just(Trouble::None), 1 => at]
}

const VERB: &[&[(Call, Fault)]] = &[
    &[(Call::Boot, Fault::Refuse)],
    &[(Call::Boot, Fault::Die)],
    &[(Call::Boot, Fault::Panic)],
    &[(Call::Restore, Fault::Refuse)],
    &[(Call::Restore, Fault::NoSpace)],
    &[(Call::Restore, Fault::Die)],
    &[(Call::Restore, Fault::Panic)],
    &[(Call::Resume, Fault::Refuse)],
    &[(Call::Resume, Fault::Die)],
    &[(Call::Resume, Fault::Panic)],
    &[(Call::Pause, Fault::Refuse)],
    &[(Call::Pause, Fault::Die)],
    &[(Call::Pause, Fault::Panic)],
    &[(Call::Save, Fault::Refuse)],
    &[(Call::Save, Fault::NoSpace)],
    &[(Call::Save, Fault::Die)],
    &[(Call::Save, Fault::Panic)],
    // It cannot be resumed by the undo, and by the recovery after that it can.
    &[(Call::Save, Fault::Refuse), (Call::Resume, Fault::Refuse)],
    // Nor by the recovery: it stays in the middle.
    &[(Call::Save, Fault::Refuse), (Call::Resume, Fault::Refuse), (Call::Resume, Fault::Refuse)],
];

/// The faults of the reaper's sleeps. It does not leave any in the middle, since whether the
/// same look settles that is a race.
const TICK: &[&[(Call, Fault)]] = &[
    &[(Call::Pause, Fault::Refuse)],
    &[(Call::Pause, Fault::Die)],
    &[(Call::Save, Fault::Refuse)],
    &[(Call::Save, Fault::NoSpace)],
    &[(Call::Save, Fault::Die)],
];

const ROADS: &[CrashPoint] = &[
    CrashPoint::SleepIntended,
    CrashPoint::SleepPaused,
    CrashPoint::SleepStaged,
    CrashPoint::SleepSaved,
    CrashPoint::SleepCommitted,
    CrashPoint::SleepKilled,
    CrashPoint::WakeIntended,
    CrashPoint::WakeConnected,
    CrashPoint::WakeRestored,
    CrashPoint::WakeRecorded,
    CrashPoint::WakeConsumed,
    CrashPoint::WakeResumed,
    CrashPoint::BootIntended,
    CrashPoint::BootConnected,
    CrashPoint::BootSpawned,
    CrashPoint::BootRecorded,
    CrashPoint::BootResumed,
];

const DELETE: &[CrashPoint] =
    &[CrashPoint::DeleteIntended, CrashPoint::DeleteKilled, CrashPoint::DeleteTrashed];

/// Writes that are no command: the file, what is written, and a part of what `error` says
/// then, or nothing where the write is none and so succeeds.
pub(super) const NONSENSE: [(&str, &str, Option<&str>); 7] = [
    ("state", "hibernate", Some("is not a verb")),
    ("state", "sleep\nwake\n", Some("one write is one command")),
    ("state", " \n", None),
    ("idle_after", "5 minutes", Some("`never`")),
    ("pinned", "2", Some("neither `0` nor `1`")),
    ("config", "vcpus = 0", Some("is from 1 to")),
    ("config", "\n", None),
];
