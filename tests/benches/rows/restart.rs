//! The row of a restart with many guests running.

use std::{fs, thread, time::Duration};

use super::{
    Bench,
    daemon::{Daemon, Hardware},
    report::{Line, Samples},
    site::Result,
};

/// What the row asks for.
const GUESTS: u64 = 200;
/// What a guest of 16 MiB takes of the host, generously; QEMU itself is most of it.
const GUEST_BYTES: u64 = 96 << 20;
/// What is left to everything else.
const SPARE_BYTES: u64 = 2 << 30;
/// As many boot at a time.
const BOOTERS: u64 = 4;
const LIMIT: Duration = Duration::from_secs(1);

/// A new daemon's start beside the guests of one that was killed.
pub(crate) fn restart(bench: &Bench) -> Result<Vec<Line>> {
    let wanted = if bench.quick { 50 } else { GUESTS };
    let room = available_bytes()?.saturating_sub(SPARE_BYTES) / GUEST_BYTES;
    let count = wanted.min(room);
    if count == 0 {
        return Err("there is no memory for a single guest".into());
    }
    let mut daemon = Daemon::started(&bench.site, "restart", "[limits]\nwakes = 512\n")?;
    boot_all(&daemon, bench, count)?;
    let mut starts = Samples::default();
    for _ in 0..bench.rounds(7, 3) {
        daemon.kill()?;
        starts.add(daemon.start()?);
        for number in 0..count {
            let state = daemon.read(&id(number), "state")?;
            if state != "running\n" {
                return Err(format!("{} is {} after a restart", id(number), state.trim()).into());
            }
        }
    }
    let less = if count < wanted { ", all that there is memory for" } else { "" };
    let what = format!("restart with {count} running{less}, exec to ready");
    Ok(vec![Line::within("restart", what, &starts, LIMIT)])
}

fn id(number: u64) -> String {
    format!("restart-{number}")
}

fn boot_all(daemon: &Daemon, bench: &Bench, count: u64) -> Result<()> {
    let hardware = Hardware { kernel: &bench.kernel, memory: "16MiB", cmdline: "idle" };
    thread::scope(|scope| {
        let booters: Vec<_> = (0..BOOTERS)
            .map(|booter| {
                scope.spawn(move || -> Result<()> {
                    for number in (0..count).filter(|number| number % BOOTERS == booter) {
                        daemon.make(&id(number), &hardware)?;
                        daemon.boot(&id(number))?;
                    }
                    Ok(())
                })
            })
            .collect();
        for booter in booters {
            booter.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })
}

fn available_bytes() -> Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line.ok_or("no MemAvailable")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
