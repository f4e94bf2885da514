//! What a kernel is, told by its first bytes, and how much memory it takes.

use crate::sys::files::Opened;

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// The `header` of the Linux/x86 boot protocol.
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: usize = 0x202;

/// The type of a program header of what is loaded (`elf(5)`).
const PT_LOAD: u64 = 1;

/// A number in a file: where it begins, and how many bytes it has.
type Field = (usize, usize);

/// Where an ELF file has what is read of it.
struct Layout {
    headers_at: Field,
    header_size: Field,
    header_count: Field,
    address: Field,
    size: Field,
}

const ELF_32: Layout = Layout {
    headers_at: (0x1c, 4),
    header_size: (0x2a, 2),
    header_count: (0x2c, 2),
    address: (0x0c, 4),
    size: (0x14, 4),
};
const ELF_64: Layout = Layout {
    headers_at: (0x20, 8),
    header_size: (0x36, 2),
    header_count: (0x38, 2),
    address: (0x18, 8),
    size: (0x28, 8),
};

/// Says whether a file that begins so is an ELF file or a bzImage.
pub(super) fn is_kernel(start: &[u8]) -> bool {
    start.starts_with(ELF_MAGIC)
        || start.get(BZIMAGE_MAGIC_AT..).is_some_and(|rest| rest.starts_with(BZIMAGE_MAGIC))
}

/// Returns where a kernel ends in the guest's memory, at the least. An ELF file may have much
/// that is not loaded.
pub(super) fn end_in_memory(kernel: &Opened) -> u64 {
    if kernel.start.starts_with(ELF_MAGIC) {
        loaded_end(&kernel.start).unwrap_or(0)
    } else {
        kernel.size.bytes
    }
}

/// Returns the end of what is loaded of an ELF file, by the headers that are in its first bytes.
fn loaded_end(start: &[u8]) -> Option<u64> {
    let layout = match start.get(4)? {
        1 => ELF_32,
        2 => ELF_64,
        _ => return None,
    };
    let at = usize::try_from(number(start, layout.headers_at)?).ok()?;
    let size = usize::try_from(number(start, layout.header_size)?).ok()?;
    let count = usize::try_from(number(start, layout.header_count)?).ok()?;
    let headers = (0..count).map_while(|header| start.get(at.checked_add(header * size)?..));
    let loaded = headers.filter(|header| number(header, (0, 4)) == Some(PT_LOAD));
    let ends = loaded.filter_map(|header| {
        number(header, layout.address)?.checked_add(number(header, layout.size)?)
    });
    ends.max()
}

/// Reads a little-endian number.
fn number(bytes: &[u8], (at, length): Field) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::files::START_BYTES;

    fn at(at: usize, magic: &[u8]) -> Vec<u8> {
        [vec![0; at], magic.to_vec(), vec![0; START_BYTES]].concat()
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

    /// An ELF file with these headers: type, address and size.
    fn elf(class: u8, headers: &[(u32, u32, u32)]) -> Vec<u8> {
        let layout = if class == 1 { ELF_32 } else { ELF_64 };
        let (table, header_size) = (128, 56);
        let mut bytes = at(0, ELF_MAGIC);
        bytes[4] = class;
        let mut put = |(at, _): Field, base: usize, value: u32| {
            bytes[base + at..base + at + 2].copy_from_slice(&value.to_le_bytes()[..2]);
            if value > 0xffff {
                bytes[base + at + 2..base + at + 4].copy_from_slice(&value.to_le_bytes()[2..]);
            }
        };
        put(layout.headers_at, 0, table);
        put(layout.header_size, 0, header_size);
        put(layout.header_count, 0, u32::try_from(headers.len()).unwrap());
        for (number, (kind, address, size)) in (0..).zip(headers) {
            let base = usize::try_from(table + number * header_size).unwrap();
            put((0, 4), base, *kind);
            put(layout.address, base, *address);
            put(layout.size, base, *size);
        }
        bytes
    }

    #[test]
    fn an_elf_file_takes_what_is_loaded_of_it() {
        for class in [1, 2] {
            let headers = [(1, 0x10_0000, 0x5000), (4, 0x4000_0000, 0x1000), (1, 0x8_0000, 0x10)];
            assert_eq!(loaded_end(&elf(class, &headers)), Some(0x10_5000), "class {class}");
            assert_eq!(loaded_end(&elf(class, &[])), None);
            // What is not among the first bytes is not known.
            assert_eq!(loaded_end(&elf(class, &headers)[..100]), None);
        }
        assert_eq!(loaded_end(ELF_MAGIC), None);
        assert_eq!(loaded_end(&[0xff; 256]), None);
    }
}
