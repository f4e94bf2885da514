//! Rows of sleeps and wakes, one at a time and many at once.

use std::{sync::Barrier, thread, time::Duration};

use dozed::sys::clock::{Stopwatch, pause_for};

use super::{
    Bench,
    bare::{Bare, Script},
    cloud::{self, BareCloud},
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
/// How much memory the guests have of which sizes are not compared.
const MEMORY: &str = "256MiB";
/// The sizes that are, with QEMU. The last one is a number of the design's table.
const SIZES: [&str; 3] = [MEMORY, "2GiB", "4GiB"];
/// With Cloud Hypervisor they are fewer, as nothing tells one more that is larger.
const CLOUD_SIZES: [&str; 2] = [MEMORY, "2GiB"];

/// Which VMM a row is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qemu,
    Cloud,
}

impl Kind {
    /// Returns the command line of a guest that does as `words` say.
    fn cmdline(self, words: &str) -> String {
        match self {
            Self::Qemu => words.to_owned(),
            // Not every KVM that runs a guest which computes has timers for it. All of
            // the memory is saved and loaded anyway, whatever the guest did meanwhile.
            Self::Cloud => format!("idle {words}").trim_end().to_owned(),
        }
    }
}

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
pub(super) fn nap(daemon: &Daemon, id: &str) -> Result<(Duration, Duration)> {
    let wake = daemon.timed(id, "wake")?;
    pause_for(RUN_TIME);
    Ok((wake, daemon.timed(id, "sleep")?))
}

fn bare_nap(bare: &mut dyn Script) -> Result<(Duration, Duration)> {
    let wake = bare.wake()?;
    pause_for(RUN_TIME);
    Ok((wake, bare.sleep()?))
}

/// Makes a sandbox that sleeps and has been woken once.
pub(super) fn sleeper(daemon: &Daemon, id: &str, hardware: &Hardware<'_>) -> Result<()> {
    daemon.make(id, hardware)?;
    daemon.boot(id)?;
    daemon.write(id, "state", "sleep")
}

/// Sleep and wake against the same of the bare QEMU.
pub(crate) fn one(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "one", "")?;
    against_bare(bench, &daemon, Kind::Qemu, ("wake", "sleep"))
}

/// Sleeps and wakes with QEMU of large guests against those of a small one.
pub(crate) fn large(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "large", "")?;
    of_sizes(bench, &daemon, Kind::Qemu, "large", &SIZES)
}

/// As [`one`] and [`large`], with Cloud Hypervisor, where there is one.
pub(crate) fn cloud(bench: &Bench) -> Result<Vec<Line>> {
    const ROWS: [&str; 3] = ["cloud-wake", "cloud-sleep", "cloud-large"];
    let program = match cloud::find(bench.cloud_hypervisor.clone()) {
        Ok(program) => program.canonicalize()?,
        Err(why) => return Ok(ROWS.map(|row| Line::not_here(row, &why)).into()),
    };
    let config =
        format!("[vmm]\ncloud_hypervisor = {program:?}\n[template]\nvmm = \"cloud-hypervisor\"\n");
    let daemon = Daemon::started(&bench.site, "cloud", &config)?;
    let mut lines = Vec::new();
    if bench.is_chosen(ROWS[0]) || bench.is_chosen(ROWS[1]) {
        lines.extend(against_bare(bench, &daemon, Kind::Cloud, (ROWS[0], ROWS[1]))?);
    }
    if bench.is_chosen(ROWS[2]) {
        lines.extend(of_sizes(bench, &daemon, Kind::Cloud, ROWS[2], &CLOUD_SIZES)?);
    }
    Ok(lines)
}

/// Makes a sandbox that was woken and sleeps again, and the bare copy of it.
fn pair(bench: &Bench, daemon: &Daemon, kind: Kind, id: &str) -> Result<Box<dyn Script>> {
    daemon.write(id, "state", "wake")?;
    Ok(match kind {
        Kind::Qemu => Box::new(Bare::copy(&bench.site, daemon, id)?),
        Kind::Cloud => Box::new(BareCloud::copy(&bench.site, daemon, id)?),
    })
}

fn against_bare(
    bench: &Bench,
    daemon: &Daemon,
    kind: Kind,
    (wake_row, sleep_row): (&'static str, &'static str),
) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (id, touch, touched) in [("one-small", "", "little"), ("one-64", "touch=64", "64 MiB")] {
        let cmdline = &kind.cmdline(touch);
        sleeper(daemon, id, &Hardware { kernel: &bench.kernel, memory: MEMORY, cmdline })?;
        let mut bare = pair(bench, daemon, kind, id)?;
        let (mut ours, mut theirs) = (Naps::default(), Naps::default());
        for round in 0..WARM_UP + bench.rounds(60, 10) {
            // The other one sleeps, so neither disturbs the other.
            let (wake, sleep) = nap(daemon, id)?;
            let (bare_wake, bare_sleep) = bare_nap(bare.as_mut())?;
            if round >= WARM_UP {
                ours.add(wake, sleep);
                theirs.add(bare_wake, bare_sleep);
            }
        }
        let bound = Bound::TimesPlus(1.1, MORE);
        for (row, what, ours, theirs) in [
            (wake_row, "wake", &ours.wakes, &theirs.wakes),
            (sleep_row, "sleep", &ours.sleeps, &theirs.sleeps),
        ] {
            let what = format!("{what} of 256 MiB of which the guest touched {touched}");
            lines.push(Line::held_against(row, what, ours, ("bare VMM", theirs), bound));
        }
    }
    Ok(lines)
}

/// Sleep and wake of large guests against those of the first, which touched as much.
fn of_sizes(
    bench: &Bench,
    daemon: &Daemon,
    kind: Kind,
    row: &'static str,
    sizes: &[&str],
) -> Result<Vec<Line>> {
    let mut naps: Vec<(String, Naps)> = Vec::new();
    for memory in sizes {
        let id = format!("large-{}", memory.to_lowercase());
        let cmdline = &kind.cmdline("touch=64");
        sleeper(daemon, &id, &Hardware { kernel: &bench.kernel, memory, cmdline })?;
        naps.push((id, Naps::default()));
    }
    for round in 0..WARM_UP + bench.rounds(40, 8) {
        for (id, naps) in &mut naps {
            let (wake, sleep) = nap(daemon, id)?;
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
            lines.push(Line::held_against(row, what, ours, against, Bound::Times(1.3)));
        }
    }
    Ok(lines)
}

/// Many wakes at once against as many bare restores at once.
pub(crate) fn crowd(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "crowd", "")?;
    let hardware = Hardware { kernel: &bench.kernel, memory: MEMORY, cmdline: "touch=16" };
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
