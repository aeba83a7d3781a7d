//! Compressed RAM: several threads, a bounded amount at a time, and no holes stored.
//!
//! ```text
//! magic, algorithm, length of the RAM; then chunks, until a chunk without content
//! chunk   plain length (u32), compressed length (u32), CRC-32 of the plain bytes (u32), compressed bytes
//! plain   records: offset in the RAM (u64), length (u32), bytes
//! ```
//! Numbers are little-endian. Chunks are in no particular order: each record has its offset.
//! Guarantees: an intact file decompresses to the same RAM; a damaged one is detected.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use lz4::block::CompressionMode;
use stead_schemas::compression::{Algorithm, Compression};

use super::ram::each_block_run;

const MAGIC: &[u8; 8] = b"STEADRAM";
/// Size of the plain bytes of one chunk: enough to compress well, few enough to hold some chunks at once.
const CHUNK_BYTES: usize = 4 << 20;
/// Limit on the plain bytes of one chunk. The last run of blocks may end a little beyond `CHUNK_BYTES`.
const CHUNK_BYTES_MAX: usize = CHUNK_BYTES + (2 << 20);
const RECORD_BYTES: usize = 12;
/// Limit on the threads. More of them would only wait for the disk.
const THREADS_MAX: usize = 4;

/// Compresses everything but zeros of `ram`, until `stop` is set. Returns the bytes written.
pub(crate) fn compress(ram: &File, to: &File, how: Compression, stop: &AtomicBool) -> io::Result<u64> {
    let mut out = BufWriter::new(to);
    out.write_all(MAGIC)?;
    out.write_all(&[algorithm_byte(how.algorithm)])?;
    out.write_all(&ram.metadata()?.len().to_le_bytes())?;
    let (chunks, to_compress) = sync_channel::<Vec<u8>>(THREADS_MAX);
    let (compressed, to_write) = sync_channel::<io::Result<Vec<u8>>>(THREADS_MAX);
    let to_compress = Mutex::new(to_compress);
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            let (compressed, to_compress) = (compressed.clone(), &to_compress);
            scope.spawn(move || {
                while let Some(chunk) = take(to_compress) {
                    if compressed.send(compress_chunk(&chunk, how)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(compressed);
        let reader = scope.spawn(move || read_chunks(ram, &chunks, stop));
        let written = write_chunks(to_write, &mut out);
        let read = reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader panicked")));
        written.and(read)
    })?;
    out.write_all(&[0; RECORD_BYTES])?;
    out.flush()?;
    drop(out);
    to.sync_all()?;
    Ok(to.metadata()?.len())
}

/// Decompresses RAM into an empty file of its length.
pub(crate) fn decompress(from: &File, ram: &File) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut head = [0u8; MAGIC.len() + 1 + 8];
    from.read_exact(&mut head)?;
    let (magic, rest) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(damaged("it is no compressed RAM"));
    }
    let algorithm = algorithm_of(rest[0])?;
    let length = u64::from_le_bytes(fixed(&rest[1..])?);
    if length != ram.metadata()?.len() {
        return Err(damaged("its length is another"));
    }
    let (chunks, to_decompress) = sync_channel::<Chunk>(THREADS_MAX);
    let to_decompress = Mutex::new(to_decompress);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads())
            .map(|_| {
                let to_decompress = &to_decompress;
                scope.spawn(move || {
                    let mut done = Ok(());
                    // After an error the rest is still received, or the reader would wait for ever.
                    while let Some(chunk) = take(to_decompress) {
                        done = done.and_then(|()| chunk.decompress_into(ram, length, algorithm));
                    }
                    done
                })
            })
            .collect();
        let read = read_compressed(&mut from, &chunks);
        drop(chunks);
        let ends = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked"))));
        ends.fold(read, |all, one| all.and(one))
    })
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

fn take<T>(queue: &Mutex<Receiver<T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn read_chunks(ram: &File, chunks: &SyncSender<Vec<u8>>, stop: &AtomicBool) -> io::Result<()> {
    let ended = || io::Error::new(io::ErrorKind::Interrupted, "the compression was ended");
    let mut chunk = Vec::with_capacity(CHUNK_BYTES_MAX);
    each_block_run(ram, |at, run| {
        chunk.extend(at.to_le_bytes());
        chunk.extend(length_u32(run.len())?.to_le_bytes());
        chunk.extend(run);
        if chunk.len() >= CHUNK_BYTES {
            if stop.load(Ordering::Relaxed) {
                return Err(ended());
            }
            let full = std::mem::replace(&mut chunk, Vec::with_capacity(CHUNK_BYTES_MAX));
            return chunks.send(full).map_err(|_| ended());
        }
        Ok(())
    })?;
    if chunk.is_empty() { Ok(()) } else { chunks.send(chunk).map_err(|_| ended()) }
}

fn compress_chunk(chunk: &[u8], how: Compression) -> io::Result<Vec<u8>> {
    let level = i32::try_from(how.level).unwrap_or(0);
    let compressed = match (how.algorithm, level) {
        (Algorithm::Zstd, level) => zstd::bulk::compress(chunk, level)?,
        (Algorithm::Lz4, 0) => lz4::block::compress(chunk, Some(CompressionMode::DEFAULT), false)?,
        (Algorithm::Lz4, level) => {
            lz4::block::compress(chunk, Some(CompressionMode::HIGHCOMPRESSION(level)), false)?
        }
    };
    let mut out = Vec::with_capacity(compressed.len() + RECORD_BYTES);
    out.extend(length_u32(chunk.len())?.to_le_bytes());
    out.extend(length_u32(compressed.len())?.to_le_bytes());
    out.extend(crc32fast::hash(chunk).to_le_bytes());
    out.extend(compressed);
    Ok(out)
}

/// Writes compressed chunks. After an error the rest is still received, or the workers would wait for ever.
fn write_chunks(compressed: Receiver<io::Result<Vec<u8>>>, out: &mut impl Write) -> io::Result<()> {
    let mut done = Ok(());
    for chunk in compressed {
        done = done.and_then(|()| out.write_all(&chunk?));
    }
    done
}

struct Chunk {
    plain: usize,
    crc32: u32,
    compressed: Vec<u8>,
}

fn read_compressed(from: &mut impl Read, chunks: &SyncSender<Chunk>) -> io::Result<()> {
    loop {
        let mut head = [0u8; RECORD_BYTES];
        from.read_exact(&mut head)?;
        let number = |at: usize| Ok::<_, io::Error>(u32::from_le_bytes(fixed(&head[at..at + 4])?));
        let (plain, compressed, crc32) = (number(0)? as usize, number(4)? as usize, number(8)?);
        if plain == 0 {
            return Ok(());
        }
        // Content that does not compress becomes a little longer.
        if plain > CHUNK_BYTES_MAX || compressed > CHUNK_BYTES_MAX * 2 {
            return Err(damaged("a chunk is too long"));
        }
        let mut bytes = vec![0; compressed];
        from.read_exact(&mut bytes)?;
        if chunks.send(Chunk { plain, crc32, compressed: bytes }).is_err() {
            return Err(io::Error::other("the workers ended"));
        }
    }
}

impl Chunk {
    fn decompress_into(&self, ram: &File, length: u64, algorithm: Algorithm) -> io::Result<()> {
        let bytes = match algorithm {
            Algorithm::Zstd => zstd::bulk::decompress(&self.compressed, self.plain)?,
            Algorithm::Lz4 => {
                let size = i32::try_from(self.plain).map_err(io::Error::other)?;
                lz4::block::decompress(&self.compressed, Some(size))?
            }
        };
        if bytes.len() != self.plain || crc32fast::hash(&bytes) != self.crc32 {
            return Err(damaged("a chunk is not what was compressed"));
        }
        let mut rest = bytes.as_slice();
        while let Some((head, after)) = rest.split_at_checked(RECORD_BYTES) {
            let at = u64::from_le_bytes(fixed(&head[..8])?);
            let count = u32::from_le_bytes(fixed(&head[8..])?) as usize;
            let (run, after) = after.split_at_checked(count).ok_or_else(|| damaged("a record is cut"))?;
            if at.checked_add(count as u64).is_none_or(|end| end > length) {
                return Err(damaged("a record is beyond the RAM"));
            }
            ram.write_all_at(run, at)?;
            rest = after;
        }
        Ok(())
    }
}

fn algorithm_byte(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::Zstd => 1,
        Algorithm::Lz4 => 2,
    }
}

fn algorithm_of(byte: u8) -> io::Result<Algorithm> {
    match byte {
        1 => Ok(Algorithm::Zstd),
        2 => Ok(Algorithm::Lz4),
        _ => Err(damaged("its algorithm is not known")),
    }
}

fn fixed<const LENGTH: usize>(bytes: &[u8]) -> io::Result<[u8; LENGTH]> {
    bytes.try_into().map_err(|_| damaged("it is cut"))
}

fn length_u32(length: usize) -> io::Result<u32> {
    u32::try_from(length).map_err(io::Error::other)
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;
    use stead_schemas::quantity::Bytes;

    use super::super::ram::{fresh_ram, sum_ram};
    use super::*;

    const LENGTH: u64 = 64 << 20;

    fn ram(pieces: &[(u64, Vec<u8>)]) -> File {
        let ram = fresh_ram(Bytes(LENGTH)).expect("in memory");
        pieces.iter().for_each(|(at, bytes)| ram.write_all_at(bytes, *at).expect("in memory"));
        ram
    }

    fn zstd(level: u32) -> Compression {
        Compression { algorithm: Algorithm::Zstd, level }
    }

    #[test]
    fn every_algorithm_restores_what_it_compressed_and_zeros_stay_holes() {
        let noise: Vec<u8> =
            (0..20_000_000u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
        let source = ram(&[(4096, vec![7; 100_000]), (9 << 20, noise), (LENGTH - 3, vec![1; 3])]);
        let expected = sum_ram(&source).expect("read");
        let lz4 = |level| Compression { algorithm: Algorithm::Lz4, level };
        for how in [zstd(1), zstd(19), lz4(0), lz4(9)] {
            let (compressed, back) = (tempfile::tempfile().expect("made"), ram(&[]));
            let count = compress(&source, &compressed, how, &AtomicBool::new(false)).expect("compressed");
            assert_eq!(count, compressed.metadata().expect("there").len());
            io::Seek::rewind(&mut &compressed).expect("rewound");
            decompress(&compressed, &back).expect("plain");
            assert_eq!(sum_ram(&back).expect("read"), expected, "{how:?}");
            let blocks = |file: &File| file.metadata().expect("there").blocks();
            assert!(blocks(&back) <= blocks(&source) + 64, "{how:?}");
        }
    }

    #[test]
    fn a_stopped_compression_ends_with_an_error() {
        let source = ram(&[(0, (0..16 << 20).map(|at: u32| at.to_le_bytes()[0]).collect())]);
        let stopped =
            compress(&source, &tempfile::tempfile().expect("made"), zstd(1), &AtomicBool::new(true));
        assert_eq!(stopped.expect_err("stopped").kind(), io::ErrorKind::Interrupted);
    }

    proptest! {
        /// Changes or cuts off any byte: the result is an error, or the very same content.
        #[test]
        fn damage_is_found(at in 0..2000usize, flip in 1..=255u8, cut in any::<bool>()) {
            let source = ram(&[(4096, (0..4096 * 3).map(|at: u32| (at * 7).to_le_bytes()[0]).collect())]);
            let compressed = tempfile::tempfile().expect("made");
            compress(&source, &compressed, zstd(1), &AtomicBool::new(false)).expect("compressed");
            let length = usize::try_from(compressed.metadata().expect("there").len()).expect("small");
            let at = at % length;
            if cut {
                compressed.set_len(at as u64).expect("cut");
            } else {
                let mut byte = [0];
                compressed.read_exact_at(&mut byte, at as u64).expect("read");
                compressed.write_all_at(&[byte[0] ^ flip], at as u64).expect("written");
            }
            io::Seek::rewind(&mut &compressed).expect("rewound");
            let back = ram(&[]);
            if decompress(&compressed, &back).is_ok() {
                prop_assert_eq!(sum_ram(&back).expect("read"), sum_ram(&source).expect("read"));
            }
        }
    }
}
