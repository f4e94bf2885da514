//! The row of crawlers: how much longer a `sleep` takes while ten of them are at the tree.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dozed::sys::process::{Exit, Launch, Process};

use super::{
    Bench,
    daemon::{Daemon, Hardware},
    report::{Bound, Line, Samples},
    roads::{nap, sleeper},
    site::Result,
};

/// What crawlers do to a tree, each again and again: a search, a look at everything, a backup,
/// and what updatedb does.
const CRAWLS: [&str; 4] = [
    "grep -r nothing .",
    "find . -exec stat {} +",
    "tar cf - . | cat",
    "find . -printf '%p %s %T@ %C@\\n'",
];
/// How many crawl at a time.
const CRAWLERS: usize = 10;
/// So many sandboxes are there to be looked at besides the one that sleeps.
const CROWD: usize = 100;
/// So many sleeps are measured before crawlers start or end. Twelve turns of them, each with
/// its wakes, are a minute.
const TURN: usize = 16;
/// How much longer a sleep may take beside them.
const MORE: Duration = Duration::from_millis(10);
/// How long a crawler may take to end: one round of it.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Crawlers at work, until they are told to end.
struct Crawlers {
    processes: Vec<Arc<Process>>,
    /// While this is there they go on.
    go: PathBuf,
}

impl Crawlers {
    fn start(bench: &Bench, dir: &Path, (tree, nice): (&Path, u8)) -> Result<Self> {
        let go = dir.join("go");
        File::create(&go)?;
        let mut processes = Vec::new();
        for number in 0..CRAWLERS {
            let crawl = CRAWLS[number % CRAWLS.len()];
            // One that nobody can tell to end any more ends when the site is cleared.
            let script = format!(
                "cd {tree:?} || exit 1; renice -n {nice} $$; \
                 while test -e {go:?}; do {crawl}; done; exit 0"
            );
            let log = OpenOptions::new().write(true).open("/dev/null")?;
            let args = ["-c", &script].map(OsString::from);
            processes.push(bench.site.spawn(Launch::new(Path::new("/bin/sh"), &args, log))?);
        }
        Ok(Self { processes, go })
    }

    fn end(self) -> Result<()> {
        fs::remove_file(&self.go)?;
        for process in self.processes {
            if process.wait(END_LIMIT) != Some(Exit::Code(0)) {
                return Err("a crawler does not end as it should".into());
            }
        }
        Ok(())
    }
}

/// `sleep` beside ten crawlers against the same without, and beside as many that are at a tree
/// of nobody's, which take as much of the CPUs.
pub(crate) fn crawlers(bench: &Bench) -> Result<Vec<Line>> {
    let daemon = Daemon::started(&bench.site, "crawlers", "")?;
    for number in 0..CROWD {
        fs::create_dir(daemon.mount().join(format!("crowd-{number}")))?;
    }
    let hardware = Hardware { kernel: &bench.kernel, memory: "256MiB", cmdline: "" };
    sleeper(&daemon, "x", &hardware)?;
    let (dir, _) = bench.site.place("crawled")?;
    let other = dir.join("tree");
    copy_of_tree(&daemon.mount(), &other)?;
    let mount = daemon.mount();
    let kinds: [Option<(&Path, u8)>; 4] =
        [None, Some((&mount, 19)), Some((&mount, 0)), Some((&other, 0))];
    let mut samples = [(); 4].map(|()| Samples::default());
    for _ in 0..bench.rounds(12, 3) {
        for (samples, kind) in samples.iter_mut().zip(kinds) {
            let crawlers = kind.map(|kind| Crawlers::start(bench, &dir, kind)).transpose()?;
            for _ in 0..TURN {
                samples.add(nap(&daemon, "x")?.1);
            }
            crawlers.map_or(Ok(()), Crawlers::end)?;
        }
    }
    let [alone, nice, beside, elsewhere] = samples;
    let line = |what, ours, against| {
        Line::held_against("crawlers", what, ours, against, Bound::TimesPlus(1.0, MORE))
    };
    Ok(vec![
        line("sleep beside ten crawlers at nice 19", &nice, ("without any", &alone)),
        line("sleep beside ten crawlers", &beside, ("without any", &alone)),
        line("the same", &beside, ("crawlers of a tree on the disk", &elsewhere)),
    ])
}

/// Makes files of the same names, with what a reader gets of them.
fn copy_of_tree(tree: &Path, copy: &Path) -> Result<()> {
    fs::create_dir(copy)?;
    for entry in fs::read_dir(tree)? {
        let entry = entry?;
        let (from, to) = (entry.path(), copy.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_of_tree(&from, &to)?;
        } else {
            fs::write(to, fs::read(from)?)?;
        }
    }
    Ok(())
}
