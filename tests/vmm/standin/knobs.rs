//! What a test says in `standin.json`: the version, and what goes wrong when.
//!
//! ```json
//! { "version": "53.0",
//!   "userfaultfd": true,
//!   "loading_millis": 0,
//!   "faults": [
//!     { "endpoint": "vm.snapshot", "call": 1,
//!       "act": { "error": { "status": 500, "chain": ["Error from API", "…"] } } },
//!     { "endpoint": "vm.pause", "act": "hang" } ] }
//! ```
//!
//! The faults are read anew at each request, and how long the loading takes while it goes on,
//! so that a test changes them under a program that runs. `call` counts the requests of a
//! process to that endpoint from 1; without it the fault is at each. A file `standin.calls`
//! beside it, where there is one, gets a line for each request: the process, the method, the
//! endpoint and the body.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use std::io::ErrorKind::{NotFound, PermissionDenied};

/// From here on restores can be on demand, and snapshots of shared memory are sparse.
pub(crate) const SPARSE: Version = Version(52, 0);
/// From here on `vm.restore` knows `memory_restore_mode` and `resume`.
pub(crate) const RESTORE_MODES: Version = Version(52, 0);
/// From here on an on-demand restore fills all of the memory in the background.
pub(crate) const PREFAULT: Version = Version(53, 0);
/// From here on `vm.info` without a VM is a 404, and not a 500.
pub(crate) const NOT_FOUND: Version = Version(53, 0);
/// From here on a stale api socket is removed, under a lock.
pub(crate) const SOCKET_LOCK: Version = Version(53, 0);
/// From here on what a serial socket has no reader for is kept.
pub(crate) const SERIAL_BUFFER: Version = Version(53, 0);
/// From here on `--version` has a second line.
pub(crate) const PROTOCOL_VERSIONS: Version = Version(53, 0);
/// From here on an invalid configuration is a 400, and a body may be 4 MiB.
pub(crate) const CONFIG_400: Version = Version(54, 0);
/// From here on memory can be restored copy-on-write.
pub(crate) const COPY_ON_WRITE: Version = Version(54, 0);
/// From here on errors are an array of strings. Before, one text.
pub(crate) const ERROR_ARRAY: Version = Version(47, 0);

/// A version, of which the first two numbers matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u32, u32);

/// What the test wants.
#[derive(Debug, Clone)]
pub(crate) struct Knobs {
    dir: PathBuf,
    text: String,
    version: Version,
    /// Whether the host lets this user have page faults handed to it.
    pub(crate) userfaultfd: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default = "newest_release")]
    version: String,
    #[serde(default = "yes")]
    userfaultfd: bool,
    #[serde(default)]
    loading_millis: u64,
    #[serde(default)]
    faults: Vec<Fault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fault {
    endpoint: String,
    call: Option<u32>,
    act: Act,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Act {
    /// It is refused, and not done.
    Error { status: u16, chain: Vec<String> },
    /// It is not done, and there is never an answer: to this and to every other request.
    Hang,
    /// It is done, and there is never an answer.
    HangAfter,
    /// It is done, and the connection ends in the middle of the answer.
    Half,
    /// These bytes are the answer, and it is not done.
    Say(String),
    /// The process is killed before it is done.
    Die,
    /// The process is killed when it is done.
    DieAfter,
    /// It takes so many milliseconds longer.
    Slow(u64),
    /// It is done, and then something else is put where it wrote, as by a program that a
    /// guest has taken over.
    Leave(Leave),
}

/// What is left in the directory of a snapshot, in place of a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Leave {
    pub(crate) what: Thing,
    pub(crate) name: String,
    /// What a link leads to.
    pub(crate) to: PathBuf,
}

/// What is no plain file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Thing {
    Symlink,
    Fifo,
    /// To a file of its own, as the kernel lets nobody link what is another's.
    HardLink,
}

fn newest_release() -> String {
    "53.0".to_owned()
}

fn yes() -> bool {
    true
}

impl Knobs {
    /// Reads the file, if there is one.
    pub(crate) fn load() -> Result<Self, String> {
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let dir = program.parent().ok_or("the program is in no directory")?.to_owned();
        let file = read(&dir)?;
        let version = Version::parse(&file.version)
            .ok_or_else(|| format!("standin.json: {} is no version", file.version))?;
        Ok(Self { dir, text: file.version, version, userfaultfd: file.userfaultfd })
    }

    /// Says whether this version has what came with `since`.
    pub(crate) fn has(&self, since: Version) -> bool {
        self.version >= since
    }

    /// Returns what the build calls itself: a tag.
    pub(crate) fn build_version(&self) -> String {
        format!("v{}", self.text)
    }

    /// Returns the version as the package has it, with three numbers.
    pub(crate) fn package_version(&self) -> String {
        let numbers = self.text.matches('.').count() + 1;
        self.text.clone() + &".0".repeat(3_usize.saturating_sub(numbers))
    }

    /// Returns what goes wrong at the `call`th request to `endpoint`.
    pub(crate) fn act(&self, endpoint: &str, call: u32) -> Result<Option<Act>, String> {
        let planned = |fault: &Fault| {
            fault.endpoint == endpoint && fault.call.is_none_or(|planned| planned == call)
        };
        Ok(read(&self.dir)?.faults.into_iter().find(planned).map(|fault| fault.act))
    }

    /// Returns how long it takes at the least to load on demand all that nobody demands.
    pub(crate) fn loading(&self) -> Duration {
        Duration::from_millis(read(&self.dir).map_or(0, |file| file.loading_millis))
    }

    /// Notes a request, if the test wants them noted.
    pub(crate) fn note(&self, line: &str) {
        let file = fs::OpenOptions::new().append(true).open(self.dir.join("standin.calls"));
        if let Ok(mut file) = file {
            file.write_all(format!("{} {line}\n", std::process::id()).as_bytes()).ok();
        }
    }
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.').map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??))
    }
}

fn read(dir: &Path) -> Result<File, String> {
    let path = dir.join("standin.json");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // A user who may not enter the directory is not meant to find any.
        Err(error) if [NotFound, PermissionDenied].contains(&error.kind()) => "{}".to_owned(),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}
