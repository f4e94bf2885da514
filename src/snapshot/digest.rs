//! Digests of the files of a snapshot.

use std::{
    fs::File,
    io::{self, Read as _},
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::sys::{
    cancel::CalledOff,
    files::{PieceError, data_extents},
};

/// What the digest of a memory file begins with.
const BLOCKS: &str = "crc64-nvme-blocks:";
/// What the digest of every other file begins with.
const BLAKE3: &str = "blake3:";

/// The unit of the digest of a memory file, fixed by the format. It is read in one call,
/// stays in the processor's cache, and is small beside what a guest touches.
const BLOCK_BYTES: u64 = 64 << 10;
const BLOCK_LEN: usize = 64 << 10;
static ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];

/// Returns the digest of a small file, all of it.
pub(super) fn of_small(file: &mut File) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BLOCK_LEN];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(format!("{BLAKE3}{}", hasher.finalize().to_hex()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// How much of a memory file a thread takes at a time: enough that the taking is
/// nothing, and little enough that threads end at about the same time.
const SPAN_PARTS: usize = 64;

/// The number of a block, and its checksum.
type Block = (u64, u64);

/// Returns the digest of a memory file: a CRC-64/NVME over number and CRC-64/NVME of each
/// 64 KiB block that is not all zeros. `threads` share the work, this one among them, for
/// as long as it `goes_on`.
///
/// It costs what the file has of data, and does not tell a hole from zeros. The file is
/// read and not mapped, since a mapped file that someone truncates is a SIGBUS.
pub(super) fn of_blocks(
    file: &File,
    goes_on: &(dyn Fn() -> Result<(), CalledOff> + Sync),
    threads: usize,
) -> Result<String, PieceError> {
    let len = file.metadata()?.len();
    let spans = spans(file, len)?;
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(span) = spans.get(next.fetch_add(1, Ordering::Relaxed)) {
            goes_on()?;
            done.extend(blocks_of(file, len, span)?);
        }
        Ok::<Vec<Block>, PieceError>(done)
    };
    let others = threads.min(spans.len()).saturating_sub(1);
    let mut blocks = thread::scope(|scope| {
        // With fewer threads it takes longer.
        let begin =
            |_| thread::Builder::new().name("memory-digest".to_owned()).spawn_scoped(scope, work);
        let others: Vec<_> = (0..others).map_while(|number| begin(number).ok()).collect();
        let mut blocks = work()?;
        for other in others {
            blocks.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<Vec<Block>, PieceError>(blocks)
    })?;
    blocks.sort_unstable();
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    for (index, checksum) in blocks {
        digest.update(&index.to_le_bytes());
        digest.update(&checksum.to_le_bytes());
    }
    Ok(format!("{BLOCKS}{:016x}", digest.finalize()))
}

/// Says whether `digest` is one that [`of_blocks`] could have made.
pub(super) fn is_of_blocks(digest: &str) -> bool {
    digest.starts_with(BLOCKS)
}

/// Data of a file that one thread reads at a time: parts of extents, each within a block,
/// and all parts of a block together.
type Span = Vec<Range<u64>>;

/// Cuts the data of a file into spans.
fn spans(file: &File, len: u64) -> Result<Vec<Span>, PieceError> {
    let mut spans: Vec<Span> = Vec::new();
    for extent in data_extents(file) {
        let extent = extent?;
        let mut at = extent.start;
        while at < extent.end.min(len) {
            let end = extent.end.min(len).min((at / BLOCK_BYTES + 1) * BLOCK_BYTES);
            let last = spans.last_mut().filter(|span| {
                let part = span.last().expect("a span begins with a part");
                span.len() < SPAN_PARTS || part.start / BLOCK_BYTES == at / BLOCK_BYTES
            });
            match last {
                Some(span) => span.push(at..end),
                None => {
                    let mut span = Span::with_capacity(SPAN_PARTS);
                    span.push(at..end);
                    spans.push(span);
                }
            }
            at = end;
        }
    }
    Ok(spans)
}

/// Returns the blocks of a span that are not all zeros. What lies between two parts of a
/// block is not read, but left as the zeros that it is.
fn blocks_of(file: &File, len: u64, span: &[Range<u64>]) -> io::Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut buffer = ZEROS.to_vec();
    for parts in span.chunk_by(|one, next| one.start / BLOCK_BYTES == next.start / BLOCK_BYTES) {
        let index = parts[0].start / BLOCK_BYTES;
        let within = |at: u64| {
            usize::try_from(at - index * BLOCK_BYTES).expect("a block is smaller than memory")
        };
        // Most blocks are whole, and then all of the buffer is read into.
        let is_whole = parts.len() == 1 && parts[0].end - parts[0].start == BLOCK_BYTES;
        if !is_whole {
            buffer.copy_from_slice(&ZEROS);
        }
        for part in parts {
            file.read_exact_at(&mut buffer[within(part.start)..within(part.end)], part.start)?;
        }
        let block = &buffer[..within(len.min((index + 1) * BLOCK_BYTES))];
        if *block != ZEROS[..block.len()] {
            blocks.push((index, crc_fast::crc64_nvme(block)));
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{cancel::Cancel, clock::Stopwatch, files::punch};

    fn file_of(len: u64, parts: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        for (at, bytes) in parts {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    fn digest(file: &File) -> String {
        let alone = of_blocks(file, &|| Ok(()), 1).unwrap();
        assert_eq!(of_blocks(file, &|| Ok(()), 4).unwrap(), alone);
        alone
    }

    #[test]
    fn the_digest_is_the_one_that_the_format_describes() {
        let file = file_of(1 << 20, &[(3 << 16, b"123456789")]);
        let mut block = ZEROS.to_vec();
        block[..9].copy_from_slice(b"123456789");
        let mut record = 3_u64.to_le_bytes().to_vec();
        record.extend(crc_fast::crc64_nvme(&block).to_le_bytes());
        let want = format!("crc64-nvme-blocks:{:016x}", crc_fast::crc64_nvme(&record));
        assert_eq!(digest(&file), want);
        assert_eq!(digest(&file_of(1 << 20, &[])), "crc64-nvme-blocks:0000000000000000");
    }

    #[test]
    fn holes_and_zeros_are_the_same() {
        let dense = file_of(1 << 20, &[(0, &[0; 1 << 20]), (300_000, b"x"), (1_000_000, b"y")]);
        let sparse = file_of(1 << 20, &[(300_000, b"x"), (1_000_000, b"y")]);
        assert_eq!(digest(&dense), digest(&sparse));
        punch(&dense, 0, 200_000).unwrap();
        assert_eq!(digest(&dense), digest(&sparse));
    }

    #[test]
    fn a_block_of_several_extents_is_one_block() {
        // 4 KiB of data, 4 KiB of hole, and so on: holes within each block.
        let file = file_of(1 << 20, &[]);
        let mut same = vec![0; 1 << 20];
        for at in (0..1 << 20).step_by(8192) {
            file.write_all_at(&[9; 100], u64::try_from(at).unwrap()).unwrap();
            same[at..at + 100].fill(9);
        }
        assert_eq!(digest(&file), digest(&file_of(1 << 20, &[(0, &same)])));
    }

    #[test]
    fn every_change_shows() {
        let before = digest(&file_of(200_000, &[(0, b"a"), (199_999, b"b")]));
        for (len, parts) in [
            (200_000, [(0, b"a"), (199_998, b"b")]),
            (200_000, [(0, b"b"), (199_999, b"a")]),
            (200_000, [(65_536, b"a"), (199_999, b"b")]),
            (200_001, [(0, b"a"), (199_999, b"b")]),
            (200_000, [(0, b"c"), (199_999, b"b")]),
        ] {
            let parts = parts.map(|(at, bytes)| (at, &bytes[..]));
            assert_ne!(digest(&file_of(len, &parts)), before, "{len} {parts:?}");
        }
    }

    #[test]
    fn a_digest_can_be_called_off() {
        let cancel = Cancel::default();
        cancel.call_off();
        let error = of_blocks(&file_of(1 << 20, &[(0, b"a")]), &|| cancel.check(), 2).unwrap_err();
        assert!(matches!(error, PieceError::CalledOff(_)), "{error}");
    }

    #[test]
    fn a_digest_costs_what_there_is_and_not_what_could_be() {
        // A TiB would take ten minutes, where nothing else is to be done.
        let watch = Stopwatch::start();
        digest(&file_of(1 << 40, &[(1 << 39, b"a")]));
        assert!(watch.elapsed().as_secs() < 120, "{:?}", watch.elapsed());
    }
}
