//! What a kernel and the image of a disk have to be, told by their first bytes.
//!
//! A VMM takes every disk for raw and says nothing of one that is not: the guest then finds no
//! file system on it.

use std::path::Path;

use super::{Error, files::Files};
use crate::{sandbox::Record, snapshot::Home};

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// The `header` of the Linux/x86 boot protocol.
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: usize = 0x202;

/// A format of images that qemu-img reads: its name, and where it has which bytes.
struct Format(&'static str, usize, &'static [u8]);

const IMAGE_FORMATS: [Format; 7] = [
    // Version 1 and the later ones.
    Format("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    Format("qcow2", 0, b"QFI\xfb"),
    Format("VMDK", 0, b"KDMV"),
    Format("VMDK", 0, b"# Disk DescriptorFile"),
    Format("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    Format("VHDX", 0, b"vhdxfile"),
    // A VHD of a fixed size has this at its end only, and is raw before that.
    Format("VHD", 0, b"conectix"),
];

/// A compressed file: its name, its first bytes, and what unpacks it.
struct Compression(&'static str, &'static [u8], &'static str);

const COMPRESSIONS: [Compression; 3] = [
    Compression("gzip", b"\x1f\x8b\x08", "gzip -dc"),
    Compression("xz", b"\xfd7zXZ\0", "xz -dc"),
    Compression("zstd", b"\x28\xb5\x2f\xfd", "zstd -dc"),
];

/// Refuses a kernel that is none, and disks that are to be raw and are not. A kernel that
/// cannot be opened is the VMM's to tell of; a copy that the sandbox has already is its
/// guest's, which may write there what it likes.
pub(super) fn check_formats(record: &Record, home: &Home, files: &Files) -> Result<(), Error> {
    let unbootable = |why| Error::Unbootable { id: record.id.clone(), why };
    if let Some(named) = &record.spec.kernel
        && let Ok(start) = files.start(named)
        && !is_kernel(&start)
    {
        return Err(unbootable(format!(
            "{} is no kernel, neither an ELF file nor a bzImage; name one as `kernel` in \
             `config`",
            named.display()
        )));
    }
    for (number, disk) in record.spec.disks.iter().enumerate() {
        if !disk.readonly && home.disk(number).exists() {
            continue;
        }
        // What cannot be read the copying tells of, or the VMM.
        let start = files.start(&disk.path).unwrap_or_default();
        if let Some(why) = why_not_raw(&disk.path, &start, disk.readonly) {
            return Err(unbootable(why));
        }
    }
    Ok(())
}

fn is_kernel(start: &[u8]) -> bool {
    start.starts_with(ELF_MAGIC)
        || start.get(BZIMAGE_MAGIC_AT..).is_some_and(|rest| rest.starts_with(BZIMAGE_MAGIC))
}

/// Says why an image that begins so is not taken for raw, and how to make a raw one of it. What
/// is compressed may be a `readonly` disk, as a guest may unpack that itself.
fn why_not_raw(path: &Path, start: &[u8], readonly: bool) -> Option<String> {
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let image = IMAGE_FORMATS.iter().find(|Format(_, at, magic)| has(*at, magic));
    let (shown, quoted) = (path.display(), quoted(path));
    if let Some(Format(name, ..)) = image {
        return Some(format!(
            "{shown} is a {name} image, and a disk has to be raw; convert it by `qemu-img convert \
             -O raw {quoted} OUT`, and name OUT in `config`"
        ));
    }
    let compression = COMPRESSIONS.iter().find(|Compression(_, magic, _)| has(0, magic));
    let Compression(name, _, unpack) = compression.filter(|_| !readonly)?;
    Some(format!(
        "{shown} is compressed by {name}, and a disk has to be raw; unpack it by `{unpack} \
         {quoted} > OUT`, and name OUT in `config`"
    ))
}

/// Returns a path as one word of a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "/._-+,:@%".contains(char);
    if text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::files::START_BYTES;

    fn at(at: usize, magic: &[u8]) -> Vec<u8> {
        [vec![0; at], magic.to_vec(), vec![0; START_BYTES]].concat()
    }

    #[test]
    fn an_image_that_is_not_raw_is_told_by_its_magic_with_what_converts_it() {
        for (start, name) in [
            (at(0, b"QFI\xfb\0\0\0\x03"), "qcow2"),
            (at(0, b"QFI\xfb\0\0\0\x01"), "qcow"),
            (at(0, b"KDMV"), "VMDK"),
            (at(0, b"# Disk DescriptorFile\nversion=1"), "VMDK"),
            (at(0x40, &0xbeda_107f_u32.to_le_bytes()), "VDI"),
            (at(0, b"vhdxfile"), "VHDX"),
            (at(0, b"conectix"), "VHD"),
        ] {
            for readonly in [false, true] {
                let why = why_not_raw("/a b'c".as_ref(), &start, readonly).unwrap();
                assert!(why.starts_with(&format!("/a b'c is a {name} image")), "{why}");
                assert!(why.contains(r"`qemu-img convert -O raw '/a b'\''c' OUT`"), "{why}");
            }
        }
        for (magic, unpack) in
            [(&b"\x1f\x8b\x08"[..], "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")]
        {
            let why = why_not_raw("/x.img".as_ref(), &at(0, magic), false).unwrap();
            assert!(why.contains(&format!("`{unpack} -dc /x.img > OUT`")), "{why}");
            assert_eq!(why_not_raw("/x.img".as_ref(), &at(0, magic), true), None);
        }
    }

    #[test]
    fn what_is_raw_or_empty_or_short_is_taken() {
        for start in [vec![], b"QFI".to_vec(), vec![0; START_BYTES], at(1, b"QFI\xfb"), at(0, b"#")]
        {
            assert_eq!(why_not_raw("/x".as_ref(), &start, false), None);
        }
    }

    #[test]
    fn a_kernel_is_an_elf_file_or_a_bzimage() {
        for (start, is) in [
            (at(0, ELF_MAGIC), true),
            (at(BZIMAGE_MAGIC_AT, BZIMAGE_MAGIC), true),
            (ELF_MAGIC.to_vec(), true),
            (at(BZIMAGE_MAGIC_AT + 1, BZIMAGE_MAGIC), false),
            (b"#!/bin/sh".to_vec(), false),
            (vec![], false),
        ] {
            assert_eq!(is_kernel(&start), is, "{start:?}");
        }
    }
}
