//! The manifest: what a snapshot is of, what it takes to wake it, and what it consists of.
//!
//! JSON for whoever reads it at night, with its own digest as the last line.

use std::{collections::HashSet, io, path::PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{MANIFEST, MEMORY, digest};
use crate::{sandbox::SandboxId, sys::host};

/// What every manifest begins with.
const MAGIC: &str = "dozed-snapshot";
/// The format that we write, and the latest that we read.
pub(super) const FORMAT: u32 = 1;
/// The longest manifest that is read. Ours have some KiB.
pub(super) const MANIFEST_MAX_BYTES: u64 = 1 << 20;

/// What a snapshot is of, what it takes to wake it, and what it consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The sandbox's name.
    #[serde(serialize_with = "id_as_text", deserialize_with = "id_from_text")]
    pub id: SandboxId,
    /// The number of the sandbox's row.
    pub row: u64,
    /// The number of the snapshot.
    pub generation: u64,
    /// When it was committed, by RFC 3339.
    pub created_at: String,
    /// The VMM that wrote it.
    pub vmm: VmmFacts,
    /// The machine.
    pub hardware: HardwareFacts,
    /// The host that it was written on.
    pub host: HostFacts,
    /// The files, but for the manifest.
    pub files: Vec<FileFacts>,
}

/// What the caller of a commit knows, and the manifest is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFacts {
    /// The sandbox's name.
    pub id: SandboxId,
    /// Now, by RFC 3339.
    pub created_at: String,
    /// The VMM that wrote the snapshot.
    pub vmm: VmmFacts,
    /// The machine.
    pub hardware: HardwareFacts,
    /// This host.
    pub host: HostFacts,
}

/// A VMM, in so far as its snapshots depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmFacts {
    /// Such as `qemu`.
    pub name: String,
    /// Such as `7.2.22`.
    pub version: String,
    /// `blake3:` and the digest of the program's file, in hexadecimal.
    pub digest: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The machine type, such as `microvm`.
    pub machine: String,
    /// The CPU model that the guest sees.
    pub cpu: String,
}

/// A machine, in so far as its snapshots depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareFacts {
    /// The count of its vCPUs.
    pub vcpus: u8,
    /// The size of its memory.
    pub memory_bytes: u64,
    /// Its disks, in the guest's order.
    pub disks: Vec<DiskFacts>,
}

/// A disk of a machine. Its contents are not in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Its size.
    pub bytes: u64,
}

/// A host, for whoever wonders why a guest is odd after its wake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The kernel's release, such as `6.1.0-18-amd64`.
    pub kernel: String,
    /// The model name of the first processor.
    pub cpu: String,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Its name in the snapshot's directory.
    pub name: String,
    /// Its size, holes included.
    pub bytes: u64,
    /// What it took on the disk.
    pub stored_bytes: u64,
    /// Its digest, beginning with the name of the algorithm.
    pub digest: String,
}

/// Why some bytes are no manifest that we can use.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// They are not what was written.
    Damaged(String),
    /// They never were a manifest.
    Foreign(String),
    /// They are of this later format.
    Newer(u32),
}

/// What stands at the head of every format, now and later.
#[derive(Serialize, Deserialize)]
struct Head {
    magic: String,
    format: u32,
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    head: Head,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

impl HostFacts {
    /// Returns what this host is.
    ///
    /// # Errors
    /// Where `/proc` cannot be read.
    pub fn of_this_host() -> io::Result<Self> {
        Ok(Self { kernel: host::kernel_release(), cpu: host::cpu_model()?.to_owned() })
    }
}

impl Manifest {
    /// Returns the bytes that read back as this manifest.
    pub(super) fn encode(&self) -> Vec<u8> {
        let head = Head { magic: MAGIC.to_owned(), format: FORMAT };
        let document = Document { head, manifest: self };
        let mut text = serde_json::to_string_pretty(&document)
            .expect("a manifest has nothing that JSON cannot say");
        text.push('\n');
        let digest = blake3::hash(text.as_bytes());
        text.push_str(&format!("blake3 {}\n", digest.to_hex()));
        text.into_bytes()
    }

    /// Reads what [`Manifest::encode`] wrote.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let damaged = |why: String| Unreadable::Damaged(format!("its manifest {why}"));
        if bytes.is_empty() {
            return Err(damaged("is empty".to_owned()));
        }
        let text = checked_text(bytes).map_err(|why| damaged(why.to_owned()))?;
        let head: Head = serde_json::from_str(text).map_err(|error| {
            Unreadable::Foreign(format!("its manifest is not one of dozed: {error}"))
        })?;
        if head.magic != MAGIC {
            let why = format!("its manifest says `{}`, not `{MAGIC}`", head.magic);
            return Err(Unreadable::Foreign(why));
        }
        if head.format > FORMAT {
            return Err(Unreadable::Newer(head.format));
        }
        if head.format == 0 {
            return Err(damaged("has format 0, which does not exist".to_owned()));
        }
        let manifest: Self = serde_json::from_str(text)
            .map_err(|error| damaged(format!("cannot be decoded: {error}")))?;
        manifest.check_files().map_err(damaged)?;
        Ok(manifest)
    }

    /// Returns what is known of the memory file.
    pub(super) fn memory(&self) -> Option<&FileFacts> {
        self.files.iter().find(|file| file.name == MEMORY)
    }

    fn check_files(&self) -> Result<(), String> {
        let mut seen = HashSet::new();
        for file in &self.files {
            let name = file.name.as_str();
            if name.is_empty() || name == MANIFEST || name.starts_with('.') || name.contains('/') {
                return Err(format!("lists a file `{name}`, which no snapshot has"));
            }
            if !seen.insert(name) {
                return Err(format!("lists `{name}` twice"));
            }
        }
        match self.memory() {
            None => Err("lists no memory".to_owned()),
            Some(memory) if !digest::is_of_blocks(&memory.digest) => {
                Err(format!("has a digest of the memory of an unknown kind, `{}`", memory.digest))
            }
            Some(_) => Ok(()),
        }
    }
}

/// Returns the text before the last line, if that is its digest.
fn checked_text(bytes: &[u8]) -> Result<&str, &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is no text")?;
    let whole = text.strip_suffix('\n').ok_or("is cut off")?;
    let start = whole.rfind('\n').ok_or("is cut off")? + 1;
    let said = whole[start..].strip_prefix("blake3 ").ok_or("has no digest as its last line")?;
    if blake3::hash(&bytes[..start]).to_hex().as_str() == said {
        Ok(&text[..start])
    } else {
        Err("does not match its own digest")
    }
}

fn id_as_text<S: Serializer>(id: &SandboxId, output: S) -> Result<S::Ok, S::Error> {
    output.serialize_str(id.as_str())
}

fn id_from_text<'de, D: Deserializer<'de>>(input: D) -> Result<SandboxId, D::Error> {
    String::deserialize(input)?.parse().map_err(|error| D::Error::custom(format!("`id`: {error}")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Some facts, of the sandbox `id`, with `memory_bytes` of memory.
    pub(crate) fn facts(id: &str, memory_bytes: u64) -> ManifestFacts {
        ManifestFacts {
            id: id.parse().unwrap(),
            created_at: "2026-11-24T20:32:00Z".to_owned(),
            vmm: VmmFacts {
                name: "qemu".to_owned(),
                version: "7.2.22".to_owned(),
                digest: "blake3:00".to_owned(),
                accelerator: "tcg".to_owned(),
                machine: "microvm".to_owned(),
                cpu: "max".to_owned(),
            },
            hardware: HardwareFacts {
                vcpus: 1,
                memory_bytes,
                disks: vec![DiskFacts {
                    path: "/images/root.img".into(),
                    readonly: true,
                    bytes: 1 << 30,
                }],
            },
            host: HostFacts::of_this_host().unwrap(),
        }
    }

    fn manifest() -> Manifest {
        let facts = facts("web-1", 1 << 20);
        let file = |name: &str, digest: &str| FileFacts {
            name: name.to_owned(),
            bytes: 1 << 20,
            stored_bytes: 4096,
            digest: digest.to_owned(),
        };
        Manifest {
            id: facts.id,
            row: 7,
            generation: 3,
            created_at: facts.created_at,
            vmm: facts.vmm,
            hardware: facts.hardware,
            host: facts.host,
            files: vec![file("memory", "crc64-nvme-blocks:00"), file("vmstate", "blake3:00")],
        }
    }

    /// Puts a right last line under `text`, which has been tampered with.
    pub(crate) fn sealed(text: &str) -> Vec<u8> {
        format!("{text}blake3 {}\n", blake3::hash(text.as_bytes()).to_hex()).into_bytes()
    }

    /// Returns the manifest's text without its last line.
    pub(crate) fn unsealed(bytes: &[u8]) -> String {
        let text = std::str::from_utf8(bytes).unwrap();
        let end = text.trim_end().rfind('\n').unwrap() + 1;
        text[..end].to_owned()
    }

    #[test]
    fn a_manifest_reads_back() {
        let manifest = manifest();
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
    }

    #[test]
    fn keys_that_a_later_version_adds_are_passed_over() {
        let manifest = manifest();
        let text = unsealed(&manifest.encode()).replacen('{', "{\n  \"mood\": \"sleepy\",", 1);
        assert_eq!(Manifest::decode(&sealed(&text)), Ok(manifest));
    }

    #[test]
    fn a_change_of_any_byte_shows() {
        let bytes = manifest().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(matches!(Manifest::decode(&changed), Err(Unreadable::Damaged(_))), "byte {at}");
            assert!(Manifest::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_whole_but_not_ours_is_told_apart() {
        let text = unsealed(&manifest().encode());
        let refused = |from: &str, to: &str| {
            assert!(text.contains(from), "{text}");
            Manifest::decode(&sealed(&text.replace(from, to))).unwrap_err()
        };
        assert_eq!(refused("\"format\": 1", "\"format\": 2"), Unreadable::Newer(2));
        for (from, to, says) in [
            ("dozed-snapshot", "tarball", "says `tarball`, not `dozed-snapshot`"),
            ("\"magic\"", "\"tragic\"", "not one of dozed: missing field `magic`"),
            ("\"format\": 1", "\"format\": 0", "format 0, which does not exist"),
            ("\"row\": 7", "\"row\": -7", "cannot be decoded"),
            ("\"web-1\"", "\"Web 1\"", "`id`: an id consists of lower-case"),
            ("\"vmstate\"", "\"../vmstate\"", "lists a file `../vmstate`"),
            ("\"vmstate\"", "\"manifest\"", "lists a file `manifest`"),
            ("\"vmstate\"", "\"memory\"", "lists `memory` twice"),
            ("\"memory\"", "\"memories\"", "lists no memory"),
            ("crc64-nvme-blocks:", "md5:", "of an unknown kind, `md5:00`"),
        ] {
            let error = format!("{:?}", refused(from, to));
            assert!(error.contains(says), "{to}: {error}");
        }
        let error = Manifest::decode(b"").unwrap_err();
        assert_eq!(error, Unreadable::Damaged("its manifest is empty".to_owned()));
    }
}
