//! Rows of reads: `cat state`, and a `wake` that has nothing to do.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::Path,
    time::Duration,
};

use dozed::sys::clock::Stopwatch;

use super::{
    Bench,
    daemon::{Daemon, Hardware},
    empty::Empty,
    report::{Bound, Line, Samples},
    site::Result,
};

/// So many turns are not counted: names, memory and threads become warm.
const WARM_UP: usize = 10;
/// So many of one kind are a turn. The first after a change of turn finds the CPUs' caches
/// and the scheduler's mind on something else, which is neither's doing.
const TURN: usize = 20;

/// Opens, reads and closes, as a shell's `read x < state` does.
fn read(path: &Path) -> Result<Duration> {
    let mut text = [0; 64];
    let watch = Stopwatch::start();
    let count = File::open(path)?.read(&mut text)?;
    let took = watch.elapsed();
    if count == 0 {
        return Err(format!("{} is empty", path.display()).into());
    }
    Ok(took)
}

/// Opens, writes and closes.
fn write(path: &Path, verb: &str) -> Result<Duration> {
    let watch = Stopwatch::start();
    OpenOptions::new().write(true).open(path)?.write_all(verb.as_bytes())?;
    Ok(watch.elapsed())
}

/// What is measured, and where the samples go.
type Side<'a> = (&'a mut Samples, &'a mut dyn FnMut() -> Result<Duration>);

fn take_turns<'a>(turns: usize, mut one: Side<'a>, mut other: Side<'a>) -> Result<()> {
    for turn in 0..WARM_UP + turns {
        for (samples, act) in [&mut one, &mut other] {
            for _ in 0..TURN {
                let sample = act()?;
                if turn >= WARM_UP {
                    samples.add(sample);
                }
            }
        }
    }
    Ok(())
}

/// `cat state` against the same of an empty file system.
pub(crate) fn cat_state(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "cat-state", "")?;
    std::fs::create_dir(daemon.mount().join("x"))?;
    let empty = Empty::mount(&bench.site)?;
    let (our_file, their_file) = (daemon.file("x", "state"), empty.file());
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    take_turns(
        bench.rounds(1000, 150),
        (&mut ours, &mut || read(&our_file)),
        (&mut theirs, &mut || read(&their_file)),
    )?;
    let against = ("empty file system", &theirs);
    Ok(vec![Line::held_against(
        "cat-state",
        "open, read, close of `state`",
        &ours,
        against,
        Bound::Times(1.15),
    )])
}

/// `wake` of a running sandbox against `cat state` of the same one.
pub(crate) fn no_op(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "no-op", "")?;
    let hardware = Hardware { kernel: &bench.kernel, memory: "16MiB", cmdline: "idle" };
    daemon.make("x", &hardware)?;
    daemon.boot("x")?;
    let file = daemon.file("x", "state");
    let (mut wakes, mut reads) = (Samples::default(), Samples::default());
    take_turns(
        bench.rounds(500, 100),
        (&mut wakes, &mut || write(&file, "wake\n")),
        (&mut reads, &mut || read(&file)),
    )?;
    let against = ("`cat state`", &reads);
    Ok(vec![Line::held_against(
        "no-op",
        "`wake` of a running one",
        &wakes,
        against,
        Bound::Times(2.0),
    )])
}
