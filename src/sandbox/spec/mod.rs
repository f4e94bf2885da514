//! The hardware and guest of a sandbox, as the keys of `[template]` and of `config`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use toml::Spanned;

use super::{
    ActivityKeys,
    network::{Destinations, Nameservers, NetworkPolicy, PolicyError, Reach, WakeOn, WakePorts},
};

#[cfg(test)]
mod tests;
mod toml_error;

const MIB: u64 = 1 << 20;
/// Less memory than this boots no guest that we know of.
const MEMORY_MIN_BYTES: u64 = 8 * MIB;
/// More than any host we have heard of, and far from every overflow.
const MEMORY_MAX_BYTES: u64 = 16 << 40;
/// Where QEMU's microvm ends; sandboxes are small.
const VCPUS_MAX: u8 = 64;
/// A microvm has eight virtio-mmio transports; balloon and entropy take two.
const DISKS_MAX: usize = 6;
/// And a network interface takes another.
const DISKS_MAX_WITH_NET: usize = 5;
/// Two that answer everybody, of two operators.
const NAMESERVERS: [&str; 2] = ["1.1.1.1", "9.9.9.9"];
/// The x86 boot protocol's limit for a command line (`COMMAND_LINE_SIZE`).
const CMDLINE_MAX_BYTES: usize = 2048;

/// Which VMM runs a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// The best that works on this host.
    #[default]
    Auto,
    /// QEMU, with or without hardware virtualisation.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

/// Which network a sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetMode {
    /// No interface at all.
    #[default]
    None,
    /// An interface that reaches nothing but what is allowed by name.
    Isolated,
    /// An interface that reaches the public internet, but for what is denied.
    Internet,
}

/// Where the memory of a sandbox's guest is while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// What its VMM does best.
    #[default]
    Auto,
    /// In the process of the VMM; a sleep writes it and a wake reads it.
    Shared,
    /// In a file of the store, which is the snapshot's while it sleeps.
    File,
}

/// How memory that is in no file comes back at a wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreMode {
    /// What the version of the VMM does best.
    #[default]
    Auto,
    /// All of it, before the guest runs.
    Copy,
    /// Each page when the guest wants it, and the others behind its back.
    OnDemand,
    /// Each page when the guest wants it, for as long as it lives.
    CopyOnWrite,
}

/// A disk of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Disk {
    /// The raw image. A writable disk is copied from it at the first wake.
    pub path: PathBuf,
    /// Whether sandboxes share the image and cannot write to it.
    pub readonly: bool,
}

/// What a file that a spec names is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRole {
    /// The kernel.
    Kernel,
    /// The initial RAM file system.
    Initramfs,
    /// The image of a disk.
    Disk {
        /// As in [`Disk`].
        readonly: bool,
    },
}

/// Says what is wrong with a file that is to have such a role, if anything.
pub type FileCheck<'a> = dyn Fn(&Path, FileRole) -> Option<String> + 'a;

/// What a sandbox's machine is made of, which is fixed while it is not `stopped`; and what
/// else `config` says of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Spec {
    /// Which VMM runs it.
    pub vmm: VmmChoice,
    /// The count of its vCPUs, from 1 to 64.
    pub vcpus: u8,
    /// The size of its memory, whole MiB.
    #[serde(rename = "memory", serialize_with = "memory_as_text")]
    pub memory_bytes: u64,
    /// Where its memory is while it runs.
    pub memory_mode: MemoryMode,
    /// How its memory comes back at a wake.
    pub restore_mode: RestoreMode,
    /// The kernel: an ELF with a PVH note, or a bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its network.
    pub net: NetMode,
    /// Who answers its questions for names.
    pub nameservers: Nameservers,
    /// What it never reaches.
    pub denied: Destinations,
    /// What it reaches although it is not of the public internet, or is isolated.
    pub allowed: Destinations,
    /// Whether packets wake it.
    pub wake_on: WakeOn,
    /// To which ports they do.
    pub wake_ports: WakePorts,
    /// Whether it has a balloon, by which its guest gives back memory that it has freed.
    pub balloon: bool,
    /// Whether its guest is asked for all memory that it can spare before it is put to sleep.
    pub inflate_before_sleep: bool,
    /// Whether it has a vsock, by which the host reaches its guest without a network.
    pub vsock: bool,
    /// What counts as activity of it.
    #[serde(skip_serializing_if = "ActivityKeys::is_empty")]
    pub activity: ActivityKeys,
    /// Its disks, in the order in which the guest sees them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
}

/// Why a document is no spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError {
    /// The line of the document, from 1, where it is known.
    pub line: Option<usize>,
    /// What is wrong with which key, and what is accepted.
    pub message: String,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for SpecError {}

impl Default for Spec {
    fn default() -> Self {
        Self {
            vmm: VmmChoice::Auto,
            vcpus: 1,
            memory_bytes: 256 * MIB,
            memory_mode: MemoryMode::Auto,
            restore_mode: RestoreMode::Auto,
            kernel: None,
            initramfs: None,
            cmdline: "console=ttyS0".to_owned(),
            net: NetMode::None,
            nameservers: Nameservers::read(NAMESERVERS.into_iter()).expect("they are public"),
            denied: Destinations::default(),
            allowed: Destinations::default(),
            wake_on: WakeOn::None,
            wake_ports: WakePorts::default(),
            balloon: true,
            inflate_before_sleep: false,
            vsock: false,
            activity: ActivityKeys::default(),
            disks: Vec::new(),
        }
    }
}

/// The document that a spec is read from, with the place of each path in it.
///
/// `config` has these keys at its top level, and the daemon's configuration has
/// them under `[template]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecDocument {
    vmm: Option<Spanned<VmmChoice>>,
    #[serde(default, deserialize_with = "vcpus_from_number")]
    vcpus: Option<u8>,
    #[serde(default, deserialize_with = "memory_from_text")]
    memory: Option<u64>,
    memory_mode: Option<Spanned<MemoryMode>>,
    restore_mode: Option<Spanned<RestoreMode>>,
    kernel: Option<Spanned<AbsolutePath>>,
    initramfs: Option<Spanned<AbsolutePath>>,
    #[serde(default, deserialize_with = "cmdline_from_text")]
    cmdline: Option<String>,
    net: Option<Spanned<NetMode>>,
    nameservers: Option<Entries>,
    denied: Option<Entries>,
    allowed: Option<Entries>,
    wake_on: Option<Spanned<WakeOn>>,
    wake_ports: Option<WakePorts>,
    balloon: Option<Switch>,
    inflate_before_sleep: Option<Switch>,
    vsock: Option<Switch>,
    #[serde(default)]
    activity: ActivityKeys,
    disks: Option<Vec<DiskDocument>>,
}

/// What is to be true or false.
type Switch = Spanned<toml::Value>;

/// A list of which each entry is of its own.
type Entries = Spanned<Vec<String>>;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskDocument {
    /// Required, but a document that is still being written may not have it yet.
    path: Option<Spanned<AbsolutePath>>,
    #[serde(default)]
    readonly: bool,
}

#[derive(Debug, Clone)]
struct AbsolutePath(PathBuf);

impl<'de> Deserialize<'de> for AbsolutePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        // QEMU's option syntax is not meant for them, and no honest path has any.
        if path.to_string_lossy().chars().any(char::is_control) {
            return Err(D::Error::custom("a path has no control characters"));
        }
        if path.is_absolute() {
            Ok(Self(path))
        } else {
            Err(D::Error::custom(format!(
                "`{}` is a relative path; write an absolute one",
                path.display()
            )))
        }
    }
}

impl SpecDocument {
    /// Returns the spec that this document describes; what it leaves out is as in `base`.
    ///
    /// `check` looks at each file that the document names; `text` is the whole text that the
    /// document was read from.
    ///
    /// # Errors
    /// A sentence with line and key for the first thing that cannot be.
    pub fn into_spec(
        self,
        base: &Spec,
        text: &str,
        check: &FileCheck<'_>,
    ) -> Result<Spec, SpecError> {
        let lines = self.lines(text);
        let spec = self.resolve(base, text, check)?;
        spec.check(&lines)?;
        Ok(spec)
    }

    /// As [`Self::into_spec`], without looking at which values go together.
    fn resolve(self, base: &Spec, text: &str, check: &FileCheck<'_>) -> Result<Spec, SpecError> {
        let found = |key: &str, role: FileRole, path: Spanned<AbsolutePath>| {
            let line = line_of(text, path.span().start);
            let path = path.into_inner().0;
            match check(&path, role) {
                None => Ok(path),
                Some(why) => Err(SpecError {
                    line: Some(line),
                    message: format!("`{key}`: {}: {why}", path.display()),
                }),
            }
        };
        let kernel = self.kernel.map(|path| found("kernel", FileRole::Kernel, path));
        let kernel = kernel.transpose()?;
        let initramfs = self.initramfs.map(|path| found("initramfs", FileRole::Initramfs, path));
        let initramfs = initramfs.transpose()?;
        let disks = match self.disks {
            None => base.disks.clone(),
            Some(disks) => disks
                .into_iter()
                .zip(1..)
                .map(|(disk, number)| {
                    let readonly = disk.readonly;
                    let path = disk.path.ok_or_else(|| SpecError::disk_without_path(number))?;
                    let role = FileRole::Disk { readonly };
                    found("disks.path", role, path).map(|path| Disk { path, readonly })
                })
                .collect::<Result<Vec<_>, _>>()?,
        };
        let nameservers =
            list("nameservers", self.nameservers, &base.nameservers, text, |lines| {
                Nameservers::read(lines)
            })?;
        let denied =
            list("denied", self.denied, &base.denied, text, |lines| Destinations::denied(lines))?;
        let allowed = list("allowed", self.allowed, &base.allowed, text, |lines| {
            Destinations::allowed(lines)
        })?;
        let switch = |key: &str, given: Option<Switch>, base: bool| match given {
            None => Ok(base),
            Some(given) => given.get_ref().as_bool().ok_or_else(|| SpecError {
                line: Some(line_of(text, given.span().start)),
                message: format!("`{key}` is true or false, not {}", given.get_ref()),
            }),
        };
        Ok(Spec {
            vmm: self.vmm.map_or(base.vmm, Spanned::into_inner),
            vcpus: self.vcpus.unwrap_or(base.vcpus),
            memory_bytes: self.memory.unwrap_or(base.memory_bytes),
            memory_mode: self.memory_mode.map_or(base.memory_mode, Spanned::into_inner),
            restore_mode: self.restore_mode.map_or(base.restore_mode, Spanned::into_inner),
            kernel: kernel.or_else(|| base.kernel.clone()),
            initramfs: initramfs.or_else(|| base.initramfs.clone()),
            cmdline: self.cmdline.unwrap_or_else(|| base.cmdline.clone()),
            net: self.net.map_or(base.net, Spanned::into_inner),
            nameservers,
            denied,
            allowed,
            wake_on: self.wake_on.map_or(base.wake_on, Spanned::into_inner),
            wake_ports: self.wake_ports.unwrap_or_else(|| base.wake_ports.clone()),
            balloon: switch("balloon", self.balloon, base.balloon)?,
            inflate_before_sleep: switch(
                "inflate_before_sleep",
                self.inflate_before_sleep,
                base.inflate_before_sleep,
            )?,
            vsock: switch("vsock", self.vsock, base.vsock)?,
            activity: self.activity.or(base.activity),
            disks,
        })
    }

    fn lines(&self, text: &str) -> Lines {
        let line = |start: usize| line_of(text, start);
        let of_switch = |key: &Option<Switch>| key.as_ref().map(|key| line(key.span().start));
        Lines {
            vmm: self.vmm.as_ref().map(|key| line(key.span().start)),
            memory_mode: self.memory_mode.as_ref().map(|key| line(key.span().start)),
            restore_mode: self.restore_mode.as_ref().map(|key| line(key.span().start)),
            net: self.net.as_ref().map(|key| line(key.span().start)),
            wake_on: self.wake_on.as_ref().map(|key| line(key.span().start)),
            balloon: of_switch(&self.balloon),
            inflate: of_switch(&self.inflate_before_sleep),
            vsock: of_switch(&self.vsock),
        }
    }
}

/// Where a document has keys of which one goes with another or does not, if it has them.
struct Lines {
    vmm: Option<usize>,
    memory_mode: Option<usize>,
    restore_mode: Option<usize>,
    net: Option<usize>,
    wake_on: Option<usize>,
    balloon: Option<usize>,
    inflate: Option<usize>,
    vsock: Option<usize>,
}

impl Spec {
    /// Reads a whole `config` document; what it leaves out is as in `base`.
    ///
    /// # Errors
    /// As [`SpecDocument::into_spec`], and for text that is no such document.
    pub fn parse(text: &str, base: &Self, check: &FileCheck<'_>) -> Result<Self, SpecError> {
        let document: SpecDocument =
            toml::from_str(text).map_err(|error| SpecError::from_toml(&error, text))?;
        document.into_spec(base, text, check)
    }

    /// Checks the first lines of a `config` document that is still being written; values
    /// that they leave out are those of `base`.
    ///
    /// Returns the spec so far, or `None` where a value is open at the end.
    ///
    /// # Errors
    /// As [`Self::parse`], but only if no further lines can make the document valid.
    pub fn parse_beginning(
        text: &str,
        base: &Self,
        check: &FileCheck<'_>,
    ) -> Result<Option<Self>, SpecError> {
        let mut document: SpecDocument = match toml::from_str(text) {
            Ok(document) => document,
            Err(error) if may_go_on(error.message()) => return Ok(None),
            Err(error) => return Err(SpecError::from_toml(&error, text)),
        };
        // The path of the last disk may be on the next line.
        if let Some(disks) = &mut document.disks
            && disks.last().is_some_and(|disk| disk.path.is_none())
        {
            disks.pop();
        }
        document.resolve(base, text, check).map(Some)
    }

    /// Returns the files of the host that it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let disks = self.disks.iter().map(|disk| &disk.path);
        self.kernel.iter().chain(&self.initramfs).chain(disks).map(PathBuf::as_path)
    }

    /// Refuses what cannot be had together.
    fn check(&self, lines: &Lines) -> Result<(), SpecError> {
        self.check_memory_mode().map_err(|why| SpecError {
            line: lines.memory_mode,
            message: format!("`memory_mode`: {why}"),
        })?;
        self.check_restore_mode().map_err(|why| SpecError {
            line: lines.restore_mode.or(lines.memory_mode),
            message: format!("`restore_mode`: {why}"),
        })?;
        self.check_devices(lines)
    }

    /// Refuses devices that cannot be had together. What a key contradicts may be in the
    /// base, and then it is its own line that is to be mended.
    fn check_devices(&self, lines: &Lines) -> Result<(), SpecError> {
        if self.inflate_before_sleep && !self.balloon {
            let message = "`inflate_before_sleep = true` needs `balloon = true`".to_owned();
            return Err(SpecError { line: lines.inflate.or(lines.balloon), message });
        }
        if self.vsock && self.vmm == VmmChoice::Qemu {
            let message = "`vsock = true` needs Cloud Hypervisor; write \
                           `vmm = \"cloud-hypervisor\"`, or `vsock = false`";
            let line = lines.vsock.or(lines.vmm);
            return Err(SpecError { line, message: message.to_owned() });
        }
        if self.wake_on == WakeOn::Packet && self.net == NetMode::None {
            let message = "`wake_on = \"packet\"` needs a network; write `net = \"isolated\"` or \
                           `\"internet\"`, or `wake_on = \"none\"`";
            let line = lines.wake_on.or(lines.net);
            return Err(SpecError { line, message: message.to_owned() });
        }
        self.check_disks(lines)
    }

    /// Refuses more disks than the machine takes.
    fn check_disks(&self, lines: &Lines) -> Result<(), SpecError> {
        let (max, with) = match self.net {
            NetMode::None => (DISKS_MAX, ""),
            NetMode::Isolated | NetMode::Internet => (DISKS_MAX_WITH_NET, " with a network"),
        };
        if self.disks.len() <= max {
            return Ok(());
        }
        let message = format!("`disks`: a sandbox{with} has at most {max} disks");
        Err(SpecError { line: lines.net.filter(|_| !with.is_empty()), message })
    }

    /// Refuses memory that the VMM, if it is said which, does not have.
    fn check_memory_mode(&self) -> Result<(), &'static str> {
        match (self.vmm, self.memory_mode) {
            (VmmChoice::Qemu, MemoryMode::Shared) => {
                Err("qemu keeps guest memory in a file; write \"auto\" or \"file\", or vmm = \
                     \"cloud-hypervisor\"")
            }
            (VmmChoice::Qemu, MemoryMode::Auto | MemoryMode::File)
            | (VmmChoice::Auto | VmmChoice::CloudHypervisor, _) => Ok(()),
        }
    }

    /// Refuses a way to restore that there is not, or not of memory such as this.
    fn check_restore_mode(&self) -> Result<(), &'static str> {
        let in_file = self.vmm == VmmChoice::Qemu || self.memory_mode == MemoryMode::File;
        match self.restore_mode {
            RestoreMode::Auto | RestoreMode::Copy => Ok(()),
            RestoreMode::OnDemand | RestoreMode::CopyOnWrite if in_file => {
                Err("memory that is in a file is not read at a wake; write \"auto\" or \"copy\", \
                     or memory_mode = \"shared\" with vmm = \"cloud-hypervisor\"")
            }
            RestoreMode::OnDemand => Ok(()),
            RestoreMode::CopyOnWrite => {
                Err("\"copy-on-write\" takes a Cloud Hypervisor later than v53.0, and no release \
                     is; write \"auto\", \"copy\" or \"on-demand\"")
            }
        }
    }

    /// Says whether a machine of `other` is one of this, so that it may become the other
    /// while it runs or sleeps.
    #[must_use]
    pub fn is_same_machine(&self, other: &Self) -> bool {
        let mut like = other.clone();
        like.keep_policy(self);
        like.wake_on = self.wake_on;
        like.wake_ports = self.wake_ports.clone();
        let has_net = |spec: &Self| spec.net != NetMode::None;
        if has_net(&like) == has_net(self) {
            like.net = self.net;
        }
        like.is_equal_but_for_activity(self)
    }

    /// Says whether `other` differs at most in what counts as activity.
    #[must_use]
    pub fn is_equal_but_for_activity(&self, other: &Self) -> bool {
        let mut like = other.clone();
        like.activity = self.activity;
        like == *self
    }

    /// Takes over what is not of the machine and has files of its own beside `config`.
    pub fn keep_policy(&mut self, from: &Self) {
        self.nameservers = from.nameservers.clone();
        self.denied = from.denied.clone();
        self.allowed = from.allowed.clone();
    }

    /// Returns what its guest may reach; `None` where it has no network.
    #[must_use]
    pub fn network_policy(&self) -> Option<NetworkPolicy> {
        let reach = match self.net {
            NetMode::None => return None,
            NetMode::Isolated => Reach::Isolated,
            NetMode::Internet => Reach::Internet,
        };
        Some(NetworkPolicy {
            reach,
            nameservers: self.nameservers.clone(),
            denied: self.denied.clone(),
            allowed: self.allowed.clone(),
        })
    }

    /// Returns the document that reads back as this spec.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a spec has nothing that TOML cannot say")
    }
}

impl SpecError {
    fn disk_without_path(number: usize) -> Self {
        let message =
            format!("`disks`: number {number} has no `path`; write the absolute path of an image");
        Self { line: None, message }
    }
}

/// Says whether what the TOML reader objects to is only that the text ends within a value.
/// The texts of its errors are all that tells; a test holds them.
fn may_go_on(message: &str) -> bool {
    ["unclosed array,", "unclosed inline table,", "invalid multi-line "]
        .iter()
        .any(|unfinished| message.starts_with(unfinished))
}

/// Reads a list of the document; what it leaves out is as in `base`.
fn list<T: Clone>(
    key: &str,
    given: Option<Entries>,
    base: &T,
    text: &str,
    read: impl Fn(&mut dyn Iterator<Item = &str>) -> Result<T, PolicyError>,
) -> Result<T, SpecError> {
    let Some(given) = given else { return Ok(base.clone()) };
    read(&mut given.get_ref().iter().map(String::as_str)).map_err(|error| SpecError {
        line: Some(line_of(text, given.span().start)),
        message: match error {
            PolicyError::Line { text, why, .. } => format!("`{key}`: `{text}` {why}"),
            PolicyError::TooMany { .. } => format!("`{key}`: {error}"),
        },
    })
}

/// Returns the line, from 1, that byte `offset` of `text` is in.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn vcpus_from_number<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u8>, D::Error> {
    let count = i64::deserialize(input)?;
    u8::try_from(count)
        .ok()
        .filter(|count| (1..=VCPUS_MAX).contains(count))
        .map(Some)
        .ok_or_else(|| D::Error::custom(format!("`vcpus` is from 1 to {VCPUS_MAX}, not {count}")))
}

/// Reads a size such as `256MiB` or `256M`, of a sandbox or of many together.
pub(crate) fn memory_from_text<'de, D: Deserializer<'de>>(
    input: D,
) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(input)?;
    let accepted = "write it with a unit: \"256MiB\", \"256M\" or \"4GiB\"";
    // As QEMU, Docker and systemd have it, K, M, G and T alone are binary.
    let is_short = text.ends_with(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't']);
    let whole = if is_short { format!("{text}iB") } else { text.clone() };
    // A bare number would be bytes to the library and MiB to most people.
    if !whole.ends_with(['B', 'b']) {
        return Err(D::Error::custom(format!("`memory` = \"{text}\" has no unit; {accepted}")));
    }
    let bytes = parse_size::parse_size(&whole).map_err(|_| {
        D::Error::custom(format!("`memory` = \"{text}\" is not a size; {accepted}"))
    })?;
    if !bytes.is_multiple_of(MIB) {
        return Err(D::Error::custom(format!(
            "`memory` = \"{text}\" is not a whole number of MiB; {accepted}"
        )));
    }
    if !(MEMORY_MIN_BYTES..=MEMORY_MAX_BYTES).contains(&bytes) {
        return Err(D::Error::custom(format!(
            "`memory` is from {}MiB to {}TiB, not \"{text}\"",
            MEMORY_MIN_BYTES / MIB,
            MEMORY_MAX_BYTES >> 40
        )));
    }
    Ok(Some(bytes))
}

fn cmdline_from_text<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(input)?;
    if text.len() > CMDLINE_MAX_BYTES || text.chars().any(char::is_control) {
        return Err(D::Error::custom(format!(
            "`cmdline` is one line of at most {CMDLINE_MAX_BYTES} bytes"
        )));
    }
    Ok(Some(text))
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn memory_as_text<S: Serializer>(bytes: &u64, output: S) -> Result<S::Ok, S::Error> {
    let mib = bytes / MIB;
    if mib.is_multiple_of(1024) {
        output.collect_str(&format_args!("{}GiB", mib / 1024))
    } else {
        output.collect_str(&format_args!("{mib}MiB"))
    }
}
