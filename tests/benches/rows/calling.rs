//! The row of calls: how long a caller waits for a guest that sleeps.
//!
//! It is all in a network namespace that stands for the host: the daemon, the guest and who
//! calls it. What the call to a sleeper takes is held against who wakes it by a write first,
//! and then calls: the guest that answers is in both cases one that has just been woken.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dozed::sys::{clock::Stopwatch, command, netns};

use super::{
    Bench,
    daemon::{Daemon, Hardware},
    report::{Bound, Line, Samples},
    site::{Result, Site, wait_for},
};

/// No answer of a program takes as long.
const PROGRAM_LIMIT: Duration = Duration::from_secs(10);
/// A caller gives up after this.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// As the issue of it has it.
const MORE: Duration = Duration::from_millis(10);
/// Where the guest says what it hears.
const PORT: u16 = 7;
/// What it is told: the address that every guest has, and to do that.
const WORDS: &str = "console=ttyS0 reboot=t panic=-1 quiet \
                     dozed.net=169.254.0.21/30,169.254.0.22 dozed.serve=7";

/// A call to a sleeper against a write and a call.
pub(crate) fn call(bench: &Bench) -> Result<Vec<Line>> {
    let (site, linux) = (Arc::clone(&bench.site), bench.linux.clone());
    let rounds = bench.rounds(30, 5);
    let measured = netns::in_a_new_one(move |_| measure(&site, &linux, rounds))?;
    let [called, written] = measured?;
    let bound = Bound::TimesPlus(1.0, MORE);
    let what = "first byte of a call to a sleeper";
    Ok(vec![Line::held_against(
        "call",
        what,
        &called,
        ("a wake by a write, and a call", &written),
        bound,
    )])
}

fn measure(site: &Arc<Site>, linux: &Path, rounds: usize) -> Result<[Samples; 2]> {
    let ip = command::find("ip").ok_or("there is no ip; scripts/install-deps --tests has it")?;
    command::output(&ip, &["link", "set", "lo", "up"], PROGRAM_LIMIT)?;
    let initramfs = linux.join("initramfs");
    let more = format!(
        "[template]\ninitramfs = {initramfs:?}\nnet = \"isolated\"\nwake_on = \"packet\"\n"
    );
    let daemon = Daemon::started(site, "call", &more)?;
    let kernel: PathBuf = linux.join("vmlinuz");
    daemon.make("x", &Hardware { kernel: &kernel, memory: "256MiB", cmdline: WORDS })?;
    daemon.write("x", "state", "wake")?;
    let address: Ipv4Addr = daemon.read("x", "net/address")?.trim().parse()?;
    wait_for("the guest to answer", || Ok(answered(address).is_ok().then_some(())))?;
    let mut samples = [(); 2].map(|()| Samples::default());
    for _ in 0..rounds {
        for (samples, writes) in samples.iter_mut().zip([false, true]) {
            daemon.write("x", "state", "sleep")?;
            let watch = Stopwatch::start();
            if writes {
                daemon.write("x", "state", "wake")?;
            }
            answered(address)?;
            samples.add(watch.elapsed());
        }
    }
    Ok(samples)
}

/// Calls the guest, says something, and waits until it has said the first byte of it.
fn answered(address: Ipv4Addr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, PORT)), CALL_LIMIT)?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    stream.write_all(b"hello\n")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}
