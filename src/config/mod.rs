//! The daemon's settings: one TOML file, checked before anything is done.
//!
//! Every key is optional and an unknown key is refused, so that a misspelt one is never
//! taken for a default. What is wrong is told in one sentence with file and line, and
//! says what is accepted. Nothing in here is changed after the start.

use std::{
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Spanned;

use crate::{
    sandbox::{
        Activity, ActivityKeys, FileCheck, Period, Spec, SpecDocument, SpecError, Users, line_of,
        memory_from_text,
        network::{AddressPlan, Destinations, Ignored, Span},
    },
    sys::{command::is_program, files::why_unusable},
};

#[cfg(test)]
mod tests;

/// Where the settings are, unless the command line says otherwise.
pub const CONFIG_FILE: &str = "/etc/dozed.toml";
/// Nobody writes as many settings by hand; a longer file is some other file.
const CONFIG_MAX_BYTES: u64 = 1 << 20;
/// The path of a Unix socket has at most 107 bytes (`unix(7)`). The longest below `runtime`
/// is `/ROW/vsock/vsock.sock`, where a row has at most 19 digits.
const RUNTIME_MAX_BYTES: usize = 64;

/// All settings of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the tree of sandboxes is mounted.
    pub mount: PathBuf,
    /// Where snapshots, disks and the index are kept.
    pub store: PathBuf,
    /// Where sockets are; may be empty after a reboot.
    pub runtime: PathBuf,
    /// When and how the reaper works.
    pub reaper: Reaper,
    /// The policy of a sandbox that nobody gave another.
    pub defaults: Defaults,
    /// What counts as activity of a sandbox whose `config` does not say it.
    pub activity: Activity,
    /// How much of everything there may be.
    pub limits: Limits,
    /// How snapshots are treated.
    pub snapshot: Snapshot,
    /// Which programs run sandboxes.
    pub vmm: Vmm,
    /// The network of all sandboxes.
    pub network: Network,
    /// The machine of a sandbox that nobody gave another.
    pub template: Spec,
}

/// `[reaper]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reaper {
    /// How long it rests between two looks, at most.
    #[serde(deserialize_with = "tick")]
    pub tick: Duration,
    /// How many sandboxes it puts to sleep or deletes at a time.
    #[serde(deserialize_with = "number::<_, _, 1, 64>")]
    pub concurrency: usize,
}

/// `[defaults]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// How long without activity before the reaper puts a sandbox to sleep.
    #[serde(deserialize_with = "period")]
    pub idle_after: Period,
    /// How long asleep before the reaper deletes a sandbox.
    #[serde(deserialize_with = "period")]
    pub delete_after: Period,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// How many sandboxes may exist.
    #[serde(deserialize_with = "number::<_, _, 1, 10_000_000>")]
    pub sandboxes: u64,
    /// How many may boot or wake at a time.
    #[serde(deserialize_with = "number::<_, _, 1, 1024>")]
    pub wakes: usize,
    /// How many may be put to sleep at a time.
    #[serde(deserialize_with = "number::<_, _, 1, 1024>")]
    pub sleeps: usize,
    /// How many holds a user may have at a time: files `awake` that are open for writing.
    #[serde(deserialize_with = "number::<_, _, 1, 1_000_000>")]
    pub holds: usize,
    /// How much memory all sandboxes that are awake may have together.
    #[serde(rename = "memory", deserialize_with = "memory_from_text")]
    pub memory_bytes: Option<u64>,
}

/// `[snapshot]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshot {
    /// What of a snapshot is held against its digest at each wake.
    #[serde(deserialize_with = "verify")]
    pub verify: Verify,
}

/// `[vmm]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmm {
    /// Cloud Hypervisor, if it is not to be looked for.
    pub cloud_hypervisor: Option<PathBuf>,
    /// QEMU, if it is not to be looked for.
    pub qemu: Option<PathBuf>,
    /// The user ids that VMMs run as, one for each sandbox; ours if there are none.
    pub users: Option<Users>,
}

/// `[network]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// The addresses of the sandboxes of this host, which nothing else may have.
    pub range: AddressPlan,
    /// How long the network of a sandbox stays when that falls asleep.
    #[serde(deserialize_with = "period")]
    pub linger: Period,
    /// What passes and is no activity.
    pub ignore: Ignored,
}

/// What of a snapshot is held against its digest at each wake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verify {
    /// All of it. Takes as long as reading the memory that the guest touched.
    #[default]
    Full,
    /// All but the memory.
    State,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file does not exist.
    #[error(
        "{}: there is no such file; name an existing one with --config, or leave out --config to \
         use {CONFIG_FILE}, or the defaults if that does not exist",
        .file.display()
    )]
    Missing {
        /// The file.
        file: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("{}: reading the configuration", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file says something that is not accepted.
    #[error("{}: {message}", place(.file, *.line))]
    Refused {
        /// The file.
        file: PathBuf,
        /// The line, from 1, where it is known.
        line: Option<usize>,
        /// What is wrong with which key, and what is accepted.
        message: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mount: "/run/sandboxes".into(),
            store: "/var/lib/dozed".into(),
            runtime: "/run/dozed".into(),
            reaper: Reaper::default(),
            defaults: Defaults::default(),
            activity: Activity::default(),
            limits: Limits::default(),
            snapshot: Snapshot::default(),
            vmm: Vmm::default(),
            network: Network::default(),
            template: Spec::default(),
        }
    }
}

impl Default for Reaper {
    fn default() -> Self {
        Self { tick: Duration::from_secs(30), concurrency: 2 }
    }
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            idle_after: Period::After(Duration::from_secs(15 * 60)),
            delete_after: Period::Never,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { sandboxes: 10_000, wakes: 16, sleeps: 8, holds: 1024, memory_bytes: None }
    }
}

impl Default for Network {
    fn default() -> Self {
        let linger = Period::After(Duration::from_secs(10 * 60));
        Self { range: AddressPlan::default(), linger, ignore: Ignored::default() }
    }
}

impl Default for Vmm {
    fn default() -> Self {
        Self { cloud_hypervisor: None, qemu: None, users: Some(Users::default()) }
    }
}

impl Config {
    /// Reads the settings from `file`. The files that they name have to be there.
    ///
    /// # Errors
    /// `Missing` or `Read` where it cannot be read, `Refused` for the first thing in it that
    /// is not accepted.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = read_bounded(file).map_err(|source| {
            let file = file.to_owned();
            if source.kind() == io::ErrorKind::NotFound {
                ConfigError::Missing { file }
            } else {
                ConfigError::Read { file, source }
            }
        })?;
        Self::parse(&text, &|path, _| why_unusable(path)).map_err(|SpecError { line, message }| {
            ConfigError::Refused { file: file.to_owned(), line, message }
        })
    }

    /// Reads the settings from [`CONFIG_FILE`], or takes the defaults where there is none.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_default() -> Result<Self, ConfigError> {
        match Self::load(Path::new(CONFIG_FILE)) {
            Err(ConfigError::Missing { .. }) => Ok(Self::default()),
            result => result,
        }
    }

    /// Reads the settings from `text`; `check` looks at each file that they name.
    fn parse(text: &str, check: &FileCheck<'_>) -> Result<Self, SpecError> {
        let document: Document =
            toml::from_str(text).map_err(|error| SpecError::from_toml(&error, text))?;
        let default = Self::default();
        let directories = [
            ("mount", document.mount, default.mount),
            ("store", document.store, default.store),
            ("runtime", document.runtime, default.runtime),
        ]
        .map(|(key, given, default)| Placed::new(key, given, default, text));
        refuse_nested(&directories)?;
        let [mount, store, runtime] = directories;
        if runtime.path.as_os_str().len() > RUNTIME_MAX_BYTES {
            return Err(runtime.refused(&format!(
                "is too long for the sockets below it; write at most {RUNTIME_MAX_BYTES} bytes"
            )));
        }
        let template = document.template.into_spec(&Spec::default(), text, check)?;
        refuse_own_range(&template, &document.network.range)?;
        Ok(Self {
            mount: mount.path,
            store: store.path,
            runtime: runtime.path,
            reaper: document.reaper,
            defaults: document.defaults,
            activity: document.activity.over(Activity::default()),
            limits: document.limits,
            snapshot: document.snapshot,
            vmm: document.vmm.into_vmm(text)?,
            network: document.network,
            template,
        })
    }
}

/// Refuses a template that allows what no sandbox reaches.
fn refuse_own_range(template: &Spec, range: &AddressPlan) -> Result<(), SpecError> {
    let own = Span::from(range.range());
    let Some(network) = template.allowed.in_vain(&Destinations::default(), &[own]) else {
        return Ok(());
    };
    let message = format!(
        "`allowed` of [template] has `{network}`, which cannot be allowed: it is in the range of \
         sandboxes, {range}"
    );
    Err(SpecError { line: None, message })
}

fn place(file: &Path, line: Option<usize>) -> String {
    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
    format!("{}{line}", file.display())
}

/// The file as it is written.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Document {
    mount: Option<Spanned<Directory>>,
    store: Option<Spanned<Directory>>,
    runtime: Option<Spanned<Directory>>,
    reaper: Reaper,
    defaults: Defaults,
    activity: ActivityKeys,
    limits: Limits,
    snapshot: Snapshot,
    vmm: VmmDocument,
    network: Network,
    template: SpecDocument,
}

/// `[vmm]` as it is written.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct VmmDocument {
    cloud_hypervisor: Option<Spanned<Directory>>,
    qemu: Option<Spanned<Directory>>,
    #[serde(deserialize_with = "users")]
    users: Option<Users>,
}

impl Default for VmmDocument {
    fn default() -> Self {
        Self { cloud_hypervisor: None, qemu: None, users: Vmm::default().users }
    }
}

impl VmmDocument {
    fn into_vmm(self, text: &str) -> Result<Vmm, SpecError> {
        let program = |key: &str, given: Option<Spanned<Directory>>| {
            let Some(given) = given else {
                return Ok(None);
            };
            let line = Some(line_of(text, given.span().start));
            let path = given.into_inner().0;
            if is_program(&path) {
                return Ok(Some(path));
            }
            let path = path.display();
            let message = format!("`{key}`: {path} is not a program; write the path of a program");
            Err(SpecError { line, message })
        };
        Ok(Vmm {
            cloud_hypervisor: program("cloud_hypervisor", self.cloud_hypervisor)?,
            qemu: program("qemu", self.qemu)?,
            users: self.users,
        })
    }
}

/// An absolute path without `.` or `..`, so that what is inside what can be seen.
struct Directory(PathBuf);

impl<'de> Deserialize<'de> for Directory {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let path = PathBuf::from(text_of(input, "an absolute path, as \"/srv/sandboxes\"")?);
        let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        let control = path.to_string_lossy().chars().any(char::is_control);
        if path.is_absolute() && path.components().all(plain) && !control {
            // Collecting drops double and trailing slashes.
            Ok(Self(path.components().collect()))
        } else {
            Err(D::Error::custom(format!(
                "`{}` is not accepted; write an absolute path without `..`",
                path.to_string_lossy().escape_debug()
            )))
        }
    }
}

/// A directory, and where the file names it.
struct Placed {
    key: &'static str,
    line: Option<usize>,
    path: PathBuf,
}

impl Placed {
    fn new(
        key: &'static str,
        given: Option<Spanned<Directory>>,
        default: PathBuf,
        text: &str,
    ) -> Self {
        Self {
            key,
            line: given.as_ref().map(|given| line_of(text, given.span().start)),
            path: given.map_or(default, |given| given.into_inner().0),
        }
    }

    fn refused(&self, why: &str) -> SpecError {
        SpecError {
            line: self.line,
            message: format!("`{}` = \"{}\" {why}", self.key, self.path.display()),
        }
    }
}

/// Refuses directories of which one is inside another: the mount would hide the store,
/// and whoever clears the one would clear the other.
fn refuse_nested(directories: &[Placed]) -> Result<(), SpecError> {
    for inner in directories {
        for outer in directories {
            if inner.key != outer.key && inner.path.starts_with(&outer.path) {
                // Where one is a default, the line of the other is the one to mend.
                let mut error = inner.refused(&format!(
                    "is inside `{}` = \"{}\"; write one that is not",
                    outer.key,
                    outer.path.display()
                ));
                error.line = inner.line.or(outer.line);
                return Err(error);
            }
        }
    }
    Ok(())
}

fn read_bounded(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let count = File::open(file)?.take(CONFIG_MAX_BYTES + 1).read_to_string(&mut text)?;
    if count as u64 > CONFIG_MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 MiB"));
    }
    Ok(text)
}

fn text_of<'de, D: Deserializer<'de>>(input: D, accepted: &str) -> Result<String, D::Error> {
    let value = toml::Value::deserialize(input)?;
    let refused = || D::Error::custom(format!("`{value}` is not accepted; write {accepted}"));
    value.as_str().map(str::to_owned).ok_or_else(refused)
}

fn period<'de, D: Deserializer<'de>>(input: D) -> Result<Period, D::Error> {
    text_of(input, "\"90s\", \"5m\", \"2h\", \"7d\" or \"never\"")?
        .parse()
        .map_err(D::Error::custom)
}

fn tick<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let accepted = "\"30s\" or \"5m\"";
    let text = text_of(input, accepted)?;
    text.parse::<Period>().ok().and_then(Period::duration).ok_or_else(|| {
        D::Error::custom(format!("\"{text}\" is not accepted; write it as {accepted}"))
    })
}

fn number<'de, D, T, const MIN: u64, const MAX: u64>(input: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let value = toml::Value::deserialize(input)?;
    value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok())
        .filter(|number| (MIN..=MAX).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| {
            D::Error::custom(format!(
                "`{value}` is not accepted; write a whole number from {MIN} to {MAX}"
            ))
        })
}

fn users<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Users>, D::Error> {
    let accepted = "a range, as \"2010000000-2109999999\", or \"off\"";
    let text = text_of(input, accepted)?;
    if text == "off" {
        return Ok(None);
    }
    let refused = |why| D::Error::custom(format!("\"{text}\" is not accepted: {why}"));
    text.parse().map(Some).map_err(refused)
}

fn verify<'de, D: Deserializer<'de>>(input: D) -> Result<Verify, D::Error> {
    let accepted = "\"full\" or \"state\"";
    match text_of(input, accepted)?.as_str() {
        "full" => Ok(Verify::Full),
        "state" => Ok(Verify::State),
        other => Err(D::Error::custom(format!("\"{other}\" is not accepted; write {accepted}"))),
    }
}
