//! Programs and libraries that watch files, as users have them.
//!
//! Each says which file had which event. What the test then notes is what `state` reads
//! when the event has arrived: an event that comes before its change is of no use.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use rustix::process::Signal;

use super::{
    process::{command, signal},
    wait::{wait_for, wait_until},
};

/// Prints `KIND PATH` at each event below its first argument.
const WATCHDOG: &str = "
import sys
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

class Print(FileSystemEventHandler):
    def on_any_event(self, event):
        if event.event_type in ('created', 'deleted', 'modified'):
            print(event.event_type, event.src_path, flush=True)

observer = Observer()
observer.schedule(Print(), sys.argv[1], recursive=True)
observer.start()
print('ready', flush=True)
observer.join()
";
/// Does the same, of a directory and of those in it by name.
const NODE: &str = "
const fs = require('fs');
const root = process.argv[1];
fs.watch(root, (type, name) => {
    const kind = type !== 'rename' ? 'modified' :
        fs.existsSync(`${root}/${name}`) ? 'created' : 'deleted';
    console.log(`${kind} ${root}/${name}`);
});
for (const id of process.argv.slice(2)) {
    fs.watch(`${root}/${id}`, (type, name) => {
        if (type === 'change') console.log(`modified ${root}/${id}/${name}`);
    });
}
console.log('ready');
";

/// What a sandbox was seen to be at each event of it.
type Seen = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

/// Something that watches a tree.
#[derive(Debug)]
pub(crate) struct Watcher {
    /// Its name.
    pub(crate) name: &'static str,
    seen: Seen,
    running: Running,
}

#[derive(Debug)]
enum Running {
    Program { child: Child, listening: Option<JoinHandle<()>> },
    Library { _watcher: RecommendedWatcher },
}

impl Watcher {
    /// Starts every kind of watcher on a tree with these sandboxes.
    pub(crate) fn every(mount: &Path, ids: &[String]) -> Vec<Self> {
        vec![
            Self::inotifywait(mount, ids),
            Self::watchdog(mount),
            Self::node(mount, ids),
            Self::rust_notify(mount),
        ]
    }

    /// Starts inotifywait.
    pub(crate) fn inotifywait(mount: &Path, ids: &[String]) -> Self {
        let mut program = command("inotifywait");
        program.args(["-m", "-e", "modify,create,delete", "--format", "%e %w%f"]);
        program.arg(mount).args(ids.iter().map(|id| mount.join(id)));
        Self::program("inotifywait", mount, program)
    }

    fn watchdog(mount: &Path) -> Self {
        let mut program = command("/usr/bin/python3");
        program.args(["-c", WATCHDOG]).arg(mount);
        Self::program("Python's watchdog", mount, program)
    }

    fn node(mount: &Path, ids: &[String]) -> Self {
        let mut program = command("node");
        program.args(["-e", NODE]).arg(mount).args(ids);
        Self::program("Node's fs.watch", mount, program)
    }

    fn rust_notify(mount: &Path) -> Self {
        let seen = Seen::default();
        let (noting, root) = (Arc::clone(&seen), mount.to_owned());
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                let event = event.unwrap();
                let kind = match event.kind {
                    EventKind::Create(_) => "created",
                    EventKind::Remove(_) => "deleted",
                    EventKind::Modify(_) => "modified",
                    EventKind::Any | EventKind::Access(_) | EventKind::Other => return,
                };
                event.paths.iter().for_each(|path| note(&noting, &root, kind, path));
            })
            .unwrap();
        watcher.watch(mount, RecursiveMode::Recursive).unwrap();
        Self { name: "Rust's notify", seen, running: Running::Library { _watcher: watcher } }
    }

    fn program(name: &'static str, mount: &Path, mut program: std::process::Command) -> Self {
        let seen = Seen::default();
        program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn().unwrap_or_else(|error| panic!("starting {name}: {error}"));
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let ready = Arc::new(Mutex::new(false));
        // inotifywait says on standard error that it is ready.
        let listener = |lines: Box<dyn BufRead + Send>| {
            let (ready, noting, root) = (Arc::clone(&ready), Arc::clone(&seen), mount.to_owned());
            let thread = thread::Builder::new().name(format!("hears {name}"));
            let hearing = thread.spawn(move || {
                for line in lines.lines().map_while(Result::ok) {
                    if line == "ready" || line == "Watches established." {
                        *ready.lock().unwrap() = true;
                    } else if let Some((kind, path)) = line.split_once(' ') {
                        note(&noting, &root, kind, Path::new(path));
                    }
                }
            });
            hearing.unwrap()
        };
        listener(Box::new(BufReader::new(err)));
        let listening = Some(listener(Box::new(BufReader::new(out))));
        wait_until(&format!("{name} watches"), || *ready.lock().unwrap());
        Self { name, seen, running: Running::Program { child, listening } }
    }

    /// Returns what a sandbox was seen to be, at each event of it so far.
    pub(crate) fn seen(&self, id: &str) -> Vec<String> {
        self.seen.lock().unwrap().get(id).cloned().unwrap_or_default()
    }

    /// Waits until a sandbox was seen to be `what` after the first `count` events of it.
    #[track_caller]
    pub(crate) fn wait_to_see(&self, id: &str, count: usize, what: &str) {
        wait_until(&format!("{} sees that {id} is {what}", self.name), || {
            self.seen(id)[count..].iter().any(|seen| seen == what)
        });
    }

    /// Sends a signal to a program.
    pub(crate) fn signal(&self, which: Signal) {
        match &self.running {
            Running::Program { child, .. } => signal(child, which),
            Running::Library { .. } => panic!("{} is no program", self.name),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Running::Program { child, listening } = &mut self.running {
            child.kill().unwrap();
            // Whatever the daemon did meanwhile, a watcher that is killed ends.
            wait_for("a watcher ends", || child.try_wait().unwrap());
            listening.take().map(JoinHandle::join);
        }
    }
}

/// Notes an event: of a `state` what it reads now, of a sandbox whether it came or went.
fn note(seen: &Seen, mount: &Path, kind: &str, path: &Path) {
    let Ok(below) = path.strip_prefix(mount) else { return };
    let below: PathBuf = below.components().collect();
    let names: Vec<_> = below.iter().map(|name| name.to_string_lossy()).collect();
    let kind = kind.to_lowercase();
    let what = match names.as_slice() {
        [_, file] if file == "state" && kind.starts_with("modif") => {
            let state = fs::read_to_string(path).unwrap_or_default();
            state.trim_end().to_owned()
        }
        [_] if kind.starts_with("create") => "created".to_owned(),
        [_] if kind.starts_with("delete") => "deleted".to_owned(),
        _ => return,
    };
    seen.lock().unwrap().entry(names[0].clone().into_owned()).or_default().push(what);
}
