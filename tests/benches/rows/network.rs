//! Rows of networks: what it takes to make one and to remove one, by how many there are.
//!
//! They are made in a network namespace that stands for the host, so that nothing of the
//! real one is touched, and all of it goes with that namespace.

use std::time::Duration;

use dozed::{
    net::{LinuxNetwork, Network, Wanted},
    sandbox::network::{AddressPlan, Destinations, Nameservers, NetworkPolicy, Reach},
    sys::{clock::Stopwatch, command, netns},
};

use super::{
    Bench,
    report::{Bound, Line, Samples},
    site::Result,
};

/// No answer of a program takes as long.
const PROGRAM_LIMIT: Duration = Duration::from_secs(10);
/// As the issue of it has it.
const EACH_AT_MOST: Duration = Duration::from_millis(8);
const FEW: u32 = 10;

/// How long it takes to make a network, and to remove it.
#[derive(Debug, Default)]
struct Taken {
    made: Samples,
    removed: Samples,
}

pub(crate) fn network(bench: &Bench) -> Result<Vec<Line>> {
    let many = if bench.quick { 100 } else { 1000 };
    let rounds = u32::try_from(bench.rounds(100, 30))?;
    let (dir, _) = bench.site.place("network")?;
    let measured = netns::in_a_new_one(move |_| measure(&dir, many, rounds))?;
    let (few, many_taken) = measured?;
    let lines = [
        ("make the network of one more sandbox", &few.made, &many_taken.made),
        ("remove the network of a sandbox", &few.removed, &many_taken.removed),
    ];
    Ok(lines
        .into_iter()
        .flat_map(|(what, at_few, at_many)| {
            [
                Line::within("network", format!("{what}, at {FEW}"), at_few, EACH_AT_MOST),
                Line::held_against(
                    "network",
                    format!("{what}, at {many}"),
                    at_many,
                    (&format!("at {FEW}"), at_few),
                    Bound::Times(2.0),
                ),
            ]
        })
        .collect())
}

fn measure(dir: &std::path::Path, many: u32, rounds: u32) -> Result<(Taken, Taken)> {
    let ip = command::find("ip").ok_or("there is no ip; scripts/install-deps --tests has it")?;
    command::output(&ip, &["link", "set", "lo", "up"], PROGRAM_LIMIT)?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    let network = LinuxNetwork::new(AddressPlan::default(), dir);
    let done = at_both(&network, many, rounds);
    network.dismantle()?;
    done
}

fn at_both(network: &LinuxNetwork, many: u32, rounds: u32) -> Result<(Taken, Taken)> {
    let mut slots = 0_u32..;
    let mut next = move || wanted(slots.next().unwrap_or(u32::MAX));
    let mut taken = Vec::new();
    let mut there = 0;
    for count in [FEW, many] {
        while there < count {
            network.ensure(&next()?)?;
            there += 1;
        }
        taken.push(one_more(network, &mut next, rounds)?);
    }
    let many = taken.pop().ok_or("nothing was measured")?;
    let few = taken.pop().ok_or("nothing was measured")?;
    Ok((few, many))
}

fn one_more(
    network: &LinuxNetwork,
    next: &mut impl FnMut() -> Result<Wanted>,
    rounds: u32,
) -> Result<Taken> {
    let mut taken = Taken::default();
    for _ in 0..rounds {
        let wanted = next()?;
        let watch = Stopwatch::start();
        network.ensure(&wanted)?;
        taken.made.add(watch.elapsed());
        let watch = Stopwatch::start();
        network.remove(&wanted.id, wanted.address)?;
        taken.removed.add(watch.elapsed());
    }
    Ok(taken)
}

fn wanted(slot: u32) -> Result<Wanted> {
    Ok(Wanted {
        id: format!("s{slot}").parse()?,
        address: AddressPlan::default().address(slot).ok_or("the range is full")?,
        tap_owner: 0,
        policy: NetworkPolicy {
            reach: Reach::Internet,
            nameservers: "9.9.9.9".parse::<Nameservers>()?,
            denied: Destinations::default(),
            allowed: Destinations::default(),
        },
    })
}
