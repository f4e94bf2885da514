//! Measures the rows of the design's table of figures, each next to its limit, measured
//! in the same run: one of ours, one of theirs, in turns.
//!
//!     scripts/bench [--quick] [--cloud-hypervisor PATH] [ROW ...]
//!
//! It prints a line for each, and `MISSED` where the limit was not kept. The exit code
//! says only whether everything worked. `docs/performance.md` tells how to read it.

mod bare;
mod calling;
mod cloud;
mod crawling;
mod daemon;
mod empty;
mod filled;
mod looking;
mod network;
mod qmp;
mod report;
mod restart;
mod roads;
mod site;
mod watching;

use std::{
    env,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use report::{HEAD, Line};
use site::{Result, Site, complain};

/// What a row is measured by; some come in pairs.
type Measure = fn(&Bench) -> Result<Vec<Line>>;

/// All rows. The tick comes last: its million rows leave this process large, and a large
/// process is slow to fork, which would be held against the bare VMM.
const ROWS: [(&[&str], Measure); 13] = [
    (&["cat-state"], looking::cat_state),
    (&["wake", "sleep"], roads::one),
    (&["large"], roads::large),
    (&["cloud-wake", "cloud-sleep", "cloud-large"], roads::cloud),
    (&["no-op"], looking::no_op),
    (&["watch"], watching::watch),
    (&["crawlers"], crawling::crawlers),
    (&["memory"], filled::memory),
    (&["crowd"], roads::crowd),
    (&["restart"], restart::restart),
    (&["network"], network::network),
    (&["call"], calling::call),
    (&["tick"], filled::tick),
];

const HELP: &str = "\
usage: scripts/bench [--quick] [--cloud-hypervisor PATH] [ROW ...]

Measures the figures of docs/performance.md; without a ROW, all of them.
Rows: cat-state wake sleep large cloud-wake cloud-sleep cloud-large no-op watch crawlers
      memory crowd restart network call tick

  --quick                   fewer rounds, smaller numbers
  --cloud-hypervisor PATH   the program for the rows cloud-*, which otherwise are of the
                            system's, or \"not here\"
";

/// Exit code of a program that was ended by SIGINT, as shells have it.
const INTERRUPTED: i32 = 130;

/// What every row needs to know.
#[derive(Debug)]
pub(crate) struct Bench {
    site: Arc<Site>,
    /// The counter guest.
    kernel: PathBuf,
    /// The directory of the Linux guest.
    linux: PathBuf,
    /// The Cloud Hypervisor that was named.
    cloud_hypervisor: Option<PathBuf>,
    quick: bool,
    /// The names of the rows to measure; all of them if there is none.
    chosen: Vec<String>,
}

impl Bench {
    fn rounds(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    fn is_chosen(&self, row: &str) -> bool {
        self.chosen.is_empty() || self.chosen.iter().any(|chosen| chosen == row)
    }
}

/// What the command line asks for.
enum Task {
    Run {
        quick: bool,
        kernel: PathBuf,
        linux: PathBuf,
        cloud_hypervisor: Option<PathBuf>,
        chosen: Vec<String>,
    },
    ServeEmpty(PathBuf),
    Help,
}

fn task() -> Result<Task> {
    let (mut quick, mut chosen) = (false, Vec::new());
    let (mut kernel, mut linux, mut cloud_hypervisor) = (None, None, None);
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            empty::SERVE => {
                return Ok(Task::ServeEmpty(args.next().ok_or("where to mount it?")?.into()));
            }
            "--kernel" => kernel = args.next().map(PathBuf::from), // By the script, as the next.
            "--linux" => linux = args.next().map(PathBuf::from),
            "--cloud-hypervisor" => {
                let path = PathBuf::from(args.next().ok_or("which Cloud Hypervisor?")?);
                cloud_hypervisor = Some(
                    path.canonicalize()
                        .map_err(|error| format!("there is no {}: {error}", path.display()))?,
                );
            }
            "--quick" => quick = true,
            "--bench" => {} // Cargo's way of saying `cargo bench`.
            "--help" | "-h" => return Ok(Task::Help),
            row if ROWS.iter().any(|(names, _)| names.contains(&row)) => chosen.push(arg),
            other => return Err(format!("there is no row `{other}`; see --help").into()),
        }
    }
    // As `cargo test --benches` runs it: there is nothing to measure then.
    let Some((kernel, linux)) = kernel.zip(linux) else { return Ok(Task::Help) };
    let (kernel, linux) = (kernel.canonicalize()?, linux.canonicalize()?);
    Ok(Task::Run { quick, kernel, linux, cloud_hypervisor, chosen })
}

fn main() -> ExitCode {
    let done = task().and_then(|task| match task {
        Task::Run { quick, kernel, linux, cloud_hypervisor, chosen } => {
            let site = Site::new()?;
            run(Bench { site, kernel, linux, cloud_hypervisor, quick, chosen })
        }
        Task::ServeEmpty(mount) => empty::serve(Path::new(&mount)),
        Task::Help => Ok(io::stdout().write_all(HELP.as_bytes())?),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Clears the site at the end, however that comes.
struct Clearing(Arc<Site>);

impl Drop for Clearing {
    fn drop(&mut self) {
        self.0.clear();
    }
}

fn run(bench: Bench) -> Result<()> {
    let _clearing = Clearing(Arc::clone(&bench.site));
    let to_clear = Arc::clone(&bench.site);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if signals.forever().next().is_some() {
            to_clear.clear();
            #[allow(
                clippy::exit,
                reason = "whoever is waiting below has nothing left to wait for"
            )]
            std::process::exit(INTERRUPTED);
        }
    })?;

    writeln!(io::stdout(), "{HEAD}")?;
    for (names, measure) in ROWS {
        if names.iter().any(|name| bench.is_chosen(name)) {
            for line in measure(&bench).map_err(|error| format!("{}: {error}", names[0]))? {
                if bench.is_chosen(line.row) {
                    writeln!(io::stdout(), "{line}")?;
                }
            }
        }
    }
    Ok(())
}
