//! What a kernel, an initial RAM file system and the image of a disk have to be, told by their
//! first bytes and their sizes.
//!
//! A VMM takes every disk for raw and says nothing of one that is not: the guest then finds no
//! file system on it. What it does refuse it refuses in words of its own.

use std::path::Path;

use super::kernel;
use crate::{sandbox::FileRole, sys::files::Opened};

/// Disks are read and written by so many bytes.
const SECTOR_BYTES: u64 = 512;

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

/// Says what is wrong with a file that is to have such a role, and how to mend it, in a clause
/// that follows its name.
pub(super) fn why_unfit(path: &Path, role: FileRole, file: &Opened) -> Option<String> {
    if file.size.bytes == 0 {
        return Some("is empty; name another file in `config`".to_owned());
    }
    if file.is_device && !matches!(role, FileRole::Disk { .. }) {
        return Some(
            "is a block device, from which no kernel or initramfs is loaded; copy it to a file"
                .to_owned(),
        );
    }
    match role {
        FileRole::Kernel if kernel::is_kernel(&file.start) => None,
        FileRole::Kernel => {
            Some("is not a kernel (an ELF file or a bzImage); set `kernel` in `config`".to_owned())
        }
        FileRole::Initramfs => None,
        FileRole::Disk { readonly } => why_not_raw(path, &file.start, readonly)
            .or_else(|| why_no_sectors(path, file.size.bytes)),
    }
}

/// Says why kernel and initial RAM file system, in so far as they are known, are not loaded into
/// so much memory.
pub(super) fn why_too_large(
    memory_bytes: u64,
    kernel: Option<&Opened>,
    initramfs: Option<&Opened>,
) -> Option<String> {
    let kernel_end = kernel.map_or(0, kernel::end_in_memory);
    let initramfs_bytes = initramfs.map_or(0, |file| file.size.bytes);
    if kernel_end.saturating_add(initramfs_bytes) <= memory_bytes {
        return None;
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Some(format!(
        "`memory` is {} MiB, of which the kernel takes {} MiB and the initramfs {} MiB; write a \
         larger `memory` in `config`, or name smaller files",
        mib(memory_bytes),
        mib(kernel_end),
        mib(initramfs_bytes)
    ))
}

/// Says why an image that begins so is not taken for raw, and how to make a raw one of it. What
/// is compressed may be a `readonly` disk, as a guest may unpack that itself.
fn why_not_raw(path: &Path, start: &[u8], readonly: bool) -> Option<String> {
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let image = IMAGE_FORMATS.iter().find(|Format(_, at, magic)| has(*at, magic));
    let quoted = quoted(path);
    if let Some(Format(name, ..)) = image {
        return Some(format!(
            "is a {name} image, and a disk has to be raw; convert it by `qemu-img convert -O raw \
             {quoted} OUT`, and name OUT in `config`"
        ));
    }
    let compression = COMPRESSIONS.iter().find(|Compression(_, magic, _)| has(0, magic));
    let Compression(name, _, unpack) = compression.filter(|_| !readonly)?;
    Some(format!(
        "is compressed by {name}, and a disk has to be raw; unpack it by `{unpack} {quoted} > \
         OUT`, and name OUT in `config`"
    ))
}

/// Says why so many bytes are no disk. One VMM adds what the last sector lacks, and another
/// leaves that sector out.
fn why_no_sectors(path: &Path, bytes: u64) -> Option<String> {
    (!bytes.is_multiple_of(SECTOR_BYTES)).then(|| {
        format!(
            "has {bytes} bytes, and a disk is of whole sectors of {SECTOR_BYTES} bytes; lengthen \
             it by `truncate -s %{SECTOR_BYTES} {}`",
            quoted(path)
        )
    })
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
    use crate::{
        sync::Arc,
        sys::files::{ImageSize, START_BYTES},
    };

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
                assert!(why.starts_with(&format!("is a {name} image")), "{why}");
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

    fn opened(bytes: u64, start: &[u8]) -> Opened {
        Opened {
            file: Arc::new(tempfile::tempfile().unwrap().into()),
            is_device: false,
            size: ImageSize { device: 0, bytes, allocated_bytes: 0 },
            start: start.to_vec(),
        }
    }

    #[test]
    fn a_disk_is_of_whole_sectors_and_no_file_is_empty() {
        let disk = FileRole::Disk { readonly: true };
        let unfit = |role, bytes| why_unfit("/x y".as_ref(), role, &opened(bytes, b"\x7fELF"));
        for role in [FileRole::Kernel, FileRole::Initramfs, disk] {
            assert!(unfit(role, 0).unwrap().starts_with("is empty"), "{role:?}");
            assert_eq!(unfit(role, 512), None, "{role:?}");
        }
        let why = unfit(disk, 513).unwrap();
        assert!(why.contains("513 bytes") && why.contains("`truncate -s %512 '/x y'`"), "{why}");
        assert_eq!(unfit(FileRole::Kernel, 513), None);
    }

    #[test]
    fn what_is_loaded_fits_into_memory() {
        const MIB: u64 = 1 << 20;
        let bzimage = opened(8 * MIB, b"MZ");
        let initramfs = |mib| opened(mib * MIB, b"");
        let large = |memory, mib| {
            why_too_large(memory * MIB, Some(&bzimage), Some(&initramfs(mib))).is_some()
        };
        assert!(!large(16, 8) && large(16, 9) && large(15, 8));
        assert!(why_too_large(7 * MIB, Some(&bzimage), None).is_some());
        let why = why_too_large(16 * MIB, None, Some(&initramfs(17))).unwrap();
        assert!(why.contains("`memory` is 16 MiB") && why.contains("initramfs 17 MiB"), "{why}");
        // What is not loaded of an ELF file does not count.
        assert_eq!(why_too_large(16 * MIB, Some(&opened(99 * MIB, b"\x7fELF")), None), None);
    }
}
