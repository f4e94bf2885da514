//! Rows of sleeps and wakes, one at a time and many at once.

use std::{sync::Barrier, thread, time::Duration};

use dozed::sys::clock::{Stopwatch, pause_for};

use super::{
    Bench,
    bare::Bare,
    daemon::{Daemon, Hardware},
    report::{Bound, Line, Samples},
    site::Result,
};

/// How long a guest runs between its wake and its sleep: a line or two of the counter's.
const RUN_TIME: Duration = Duration::from_millis(120);
/// The first sleep of all writes what the boot touched; so it does not count.
const WARM_UP: usize = 2;
const MORE: Duration = Duration::from_millis(3);
/// How many wake at once.
const CROWD: usize = 16;
/// What tells a daemon that its one guest may be as many.
const NO_CONFIG: &str = "";

/// Sleeps and wakes of one, and how long each took.
#[derive(Debug, Default)]
struct Naps {
    wakes: Samples,
    sleeps: Samples,
}

impl Naps {
    fn add(&mut self, wake: Duration, sleep: Duration) {
        self.wakes.add(wake);
        self.sleeps.add(sleep);
    }
}

/// Wakes a sandbox, lets it run and puts it to sleep.
fn nap(daemon: &Daemon, id: &str) -> Result<(Duration, Duration)> {
    let wake = daemon.timed(id, "wake")?;
    pause_for(RUN_TIME);
    Ok((wake, daemon.timed(id, "sleep")?))
}

fn bare_nap(bare: &mut Bare) -> Result<(Duration, Duration)> {
    let wake = bare.wake()?;
    pause_for(RUN_TIME);
    Ok((wake, bare.sleep()?))
}

/// Makes a sandbox that sleeps and has been woken once.
fn sleeper(daemon: &Daemon, id: &str, hardware: &Hardware<'_>) -> Result<()> {
    daemon.make(id, hardware)?;
    daemon.boot(id)?;
    daemon.write(id, "state", "sleep")
}

/// Sleep and wake against the same of the bare VMM.
pub(crate) fn one(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "one", NO_CONFIG)?;
    let mut lines = Vec::new();
    for (id, cmdline, touched) in [("one-small", "", "little"), ("one-64", "touch=64", "64 MiB")] {
        let hardware = Hardware { kernel: &bench.kernel, memory: "256MiB", cmdline };
        sleeper(&daemon, id, &hardware)?;
        daemon.write(id, "state", "wake")?;
        let mut bare = Bare::copy(&bench.site, &daemon, id)?;
        let (mut ours, mut theirs) = (Naps::default(), Naps::default());
        for round in 0..WARM_UP + bench.rounds(60, 10) {
            // The other one sleeps, so neither disturbs the other.
            let (wake, sleep) = nap(&daemon, id)?;
            let (bare_wake, bare_sleep) = bare_nap(&mut bare)?;
            if round >= WARM_UP {
                ours.add(wake, sleep);
                theirs.add(bare_wake, bare_sleep);
            }
        }
        let bound = Bound::TimesPlus(1.1, MORE);
        for (row, what, ours, theirs) in [
            ("wake", "wake", &ours.wakes, &theirs.wakes),
            ("sleep", "sleep", &ours.sleeps, &theirs.sleeps),
        ] {
            let what = format!("{what} of 256 MiB of which the guest touched {touched}");
            lines.push(Line::held_against(row, what, ours, ("bare VMM", theirs), bound));
        }
    }
    Ok(lines)
}

/// Sleep and wake of large guests against those of a small one that touched as much.
pub(crate) fn large(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "large", NO_CONFIG)?;
    let sizes = ["256MiB", "2GiB", "4GiB"];
    let mut naps: Vec<(String, Naps)> = Vec::new();
    for memory in sizes {
        let id = format!("large-{}", memory.to_lowercase());
        sleeper(&daemon, &id, &Hardware { kernel: &bench.kernel, memory, cmdline: "touch=64" })?;
        naps.push((id, Naps::default()));
    }
    for round in 0..WARM_UP + bench.rounds(40, 8) {
        for (id, naps) in &mut naps {
            let (wake, sleep) = nap(&daemon, id)?;
            if round >= WARM_UP {
                naps.add(wake, sleep);
            }
        }
    }
    let Some(((_, small), larger)) = naps.split_first() else { return Ok(Vec::new()) };
    let mut lines = Vec::new();
    for ((_, naps), size) in larger.iter().zip(sizes.iter().skip(1)) {
        for (what, ours, limit) in
            [("wake", &naps.wakes, &small.wakes), ("sleep", &naps.sleeps, &small.sleeps)]
        {
            let what = format!("{what} of {size} of which the guest touched 64 MiB");
            let against = ("of 256MiB", limit);
            lines.push(Line::held_against("large", what, ours, against, Bound::Times(1.3)));
        }
    }
    Ok(lines)
}

/// Many wakes at once against as many bare restores at once.
pub(crate) fn crowd(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "crowd", NO_CONFIG)?;
    let hardware = Hardware { kernel: &bench.kernel, memory: "256MiB", cmdline: "touch=16" };
    let ids: Vec<String> = (0..CROWD).map(|number| format!("crowd-{number}")).collect();
    let mut bares = Vec::new();
    for id in &ids {
        sleeper(&daemon, id, &hardware)?;
        daemon.write(id, "state", "wake")?;
        bares.push(Bare::copy(&bench.site, &daemon, id)?);
    }
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for round in 0..1 + bench.rounds(12, 3) {
        let our_time = at_once(&mut ids.clone(), |id| daemon.write(id, "state", "wake"))?;
        at_once(&mut ids.clone(), |id| daemon.write(id, "state", "sleep"))?;
        let their_time = at_once(&mut bares, |bare| bare.wake().map(drop))?;
        at_once(&mut bares, |bare| bare.sleep().map(drop))?;
        if round > 0 {
            ours.add(our_time);
            theirs.add(their_time);
        }
    }
    let what = format!("{CROWD} wakes at once, to the end of the last");
    let against = ("bare VMMs", &theirs);
    Ok(vec![Line::held_against("crowd", what, &ours, against, Bound::Times(1.15))])
}

/// Does the same to all at once, and returns how long it took until the last was done.
fn at_once<T: Send>(all: &mut [T], act: impl Fn(&mut T) -> Result<()> + Sync) -> Result<Duration> {
    let start = Barrier::new(all.len() + 1);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for one in all.iter_mut() {
            let (start, act) = (&start, &act);
            threads.push(scope.spawn(move || {
                start.wait();
                act(one)
            }));
        }
        start.wait();
        let watch = Stopwatch::start();
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(watch.elapsed())
    })
}
