//! The RAM of a VM as a file: creating it, finding it again, and copying it without its zeros.
//!
//! The RAM of a VM that boots is an anonymous file (memfd) shared with the VMM. It is as fast as anonymous
//! memory (a file on a disk makes a boot a tenth longer), and a save reads it through `/proc`. The RAM of a
//! VM that is restored is the saved file, mapped privately: a page is read when it is first used, VMs
//! restored from the same file share its pages until they write to them, and the kernel reports which pages
//! were written (`dirty_pages`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crc32fast::Hasher;
use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SeekFrom, fallocate, memfd_create, seek};
use stead_schemas::quantity::Bytes;

use crate::host::process::of_process;

/// Size of one block of guest RAM in bytes: a page. Whether RAM is zero is decided per block.
pub(crate) const BLOCK: usize = 4096;
/// Size of one read in bytes: it stays in the cache of a processor core while it is examined.
pub(crate) const CHUNK: usize = 64 * BLOCK;
/// Number of bytes that a thread takes at a time. The used RAM of a guest lies together, so two halves of the RAM
/// would not be two halves of the work.
const PART: u64 = 8 << 20;
/// Limit on the threads of one copy. More of them make it no faster.
const THREADS_MAX: usize = 4;
/// Name of the anonymous file, which is found as `/memfd:stead-ram` among the descriptors of the VMM.
const ANONYMOUS: &str = "stead-ram";

/// Creates zeroed RAM of this size.
pub(crate) fn fresh_ram(size: Bytes) -> io::Result<File> {
    let ram = anonymous()?;
    ram.set_len(size.0)?;
    Ok(ram)
}

pub(crate) fn anonymous() -> io::Result<File> {
    Ok(File::from(memfd_create(ANONYMOUS, MemfdFlags::CLOEXEC)?))
}

/// RAM that is kept a little longer than its VMM. To free it takes longer than everything else at the end
/// of a process, and nothing has to wait for that.
#[derive(Debug, Default)]
pub(crate) struct HeldRam(Mutex<Option<File>>);

impl HeldRam {
    pub(crate) fn hold(&self, ram: File) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ram);
    }
}

impl Drop for HeldRam {
    fn drop(&mut self) {
        let ram = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // Where no thread can be started, the RAM is freed here.
        drop(ram.map(|ram| std::thread::Builder::new().spawn(move || drop(ram))));
    }
}

/// Frees the pages in these ranges of the anonymous RAM of a living VMM. Whoever reads them reads zeros.
pub(crate) fn free_ram(pid: u32, ranges: &[Range<u64>]) -> io::Result<()> {
    free(&open_ram(pid, File::options().read(true).write(true))?, ranges)
}

fn free(ram: &File, ranges: &[Range<u64>]) -> io::Result<()> {
    for range in ranges {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(ram, flags, range.start, range.end.saturating_sub(range.start))?;
    }
    Ok(())
}

/// Opens the RAM of a living VMM for reading.
pub(crate) fn ram_of(pid: u32) -> io::Result<File> {
    open_ram(pid, File::options().read(true))
}

fn open_ram(pid: u32, options: &mut OpenOptions) -> io::Result<File> {
    let mark = format!("/memfd:{ANONYMOUS}");
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = descriptor?.path();
        // A descriptor that was closed meanwhile has no target.
        let target = of_process(fs::read_link(&path))?.unwrap_or_default();
        if target.to_string_lossy().starts_with(&mark) {
            // A VMM may put a pipe in its place in between, whose opening would last for ever.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
            let ram = options.custom_flags(flags).open(path)?;
            if ram.metadata()?.is_file() {
                return Ok(ram);
            }
        }
    }
    Err(io::Error::other("its RAM is not a file that we made"))
}

/// Copies everything but zeros into an empty file. Returns the length in bytes and the sum of all blocks.
pub(crate) fn copy_ram(from: &File, to: &File) -> io::Result<(u64, u64)> {
    to.set_len(from.metadata()?.len())?;
    in_parts(from, |buffer, start, end| {
        each_run_between(from, buffer, start, end, |at, run| to.write_all_at(run, at))
    })
}

/// Returns the length in bytes and the sum of all blocks.
pub(crate) fn sum_ram(from: &File) -> io::Result<(u64, u64)> {
    in_parts(from, |buffer, start, end| each_run_between(from, buffer, start, end, |_, _| Ok(())))
}

/// Returns the share of adjacent blocks in the sum of a RAM, made of the offset and the content of each.
/// Blocks of zeros add nothing, so holes and zeros have the same sum. When a block changes, the sum changes
/// by the difference of the old and the new share.
pub(crate) fn share_of(at: u64, blocks: &[u8]) -> u64 {
    let share = |(index, block): (usize, &[u8])| {
        if is_zero(block) {
            return 0;
        }
        let mut sum = Hasher::new();
        sum.update(&(at + (index * BLOCK) as u64).to_le_bytes());
        sum.update(block);
        u64::from(sum.finalize())
    };
    blocks.chunks(BLOCK).enumerate().map(share).fold(0, u64::wrapping_add)
}

fn in_parts(
    from: &File,
    part_sum: impl Fn(&mut [u8], u64, u64) -> io::Result<u64> + Sync,
) -> io::Result<(u64, u64)> {
    let length = from.metadata()?.len();
    let parts = usize::try_from(length.div_ceil(PART)).unwrap_or(usize::MAX);
    let sum = side_by_side(parts, |buffer, part| {
        let start = part as u64 * PART;
        part_sum(buffer, start, start.saturating_add(PART).min(length))
    })?;
    Ok((length, sum))
}

/// Splits a piece of work among threads, each with a buffer of its own, because a VM is paused or awaited
/// meanwhile. Returns the sum of the results.
pub(crate) fn side_by_side(
    pieces: usize,
    work: impl Fn(&mut [u8], usize) -> io::Result<u64> + Sync,
) -> io::Result<u64> {
    let next = AtomicUsize::new(0);
    let take_pieces = || -> io::Result<u64> {
        let (mut buffer, mut sum) = (vec![0; CHUNK], 0u64);
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return Ok(sum);
            }
            sum = sum.wrapping_add(work(&mut buffer, piece)?);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(pieces);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take_pieces)).collect();
        let mine = take_pieces();
        others.into_iter().fold(mine, |sum, other| {
            let panicked = |_| Err(io::Error::other("a copying thread panicked"));
            let its = other.join().unwrap_or_else(panicked);
            Ok(sum?.wrapping_add(its?))
        })
    })
}

/// Visits all runs of blocks that are not zero in order, none of them longer than one read.
pub(crate) fn each_block_run(from: &File, take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    each_run_between(from, &mut vec![0; CHUNK], 0, from.metadata()?.len(), take).map(drop)
}

fn each_run_between(
    from: &File,
    buffer: &mut [u8],
    start: u64,
    end: u64,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let mut sum = 0u64;
    let mut at = start;
    while at < end {
        at = match data_from(from, at)? {
            Some(data) => data,
            None => break,
        };
        let hole = seek(from, SeekFrom::Hole(at))?.min(end);
        while at < hole {
            let wanted = usize::try_from(hole - at).unwrap_or(usize::MAX).min(CHUNK);
            from.read_exact_at(&mut buffer[..wanted], at)?;
            take_runs(&buffer[..wanted], at, &mut take)?;
            sum = sum.wrapping_add(share_of(at, &buffer[..wanted]));
            at += wanted as u64;
        }
    }
    Ok(sum)
}

/// Returns the offset of the next data, if any. The file offset is shared with other threads; the result of
/// a seek is not.
fn data_from(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Compares whole blocks: a search would examine one byte after the other.
fn is_zero(block: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    block == &ZEROS[..block.len()]
}

/// Passes on adjacent blocks that are not zero as one run.
fn take_runs(bytes: &[u8], at: u64, take: &mut impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut offset = 0;
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK).collect();
    for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(run[0]) {
            take(at + offset as u64, &bytes[offset..offset + length])?;
        }
        offset += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_sum_of_its_source_and_no_blocks_of_zeros() {
        let (from, to, back) = (
            anonymous().expect("in memory"),
            tempfile::tempfile().expect("in memory"),
            anonymous().expect("in memory"),
        );
        let length = 2 * usize::try_from(PART).expect("small") + 9 * CHUNK;
        from.set_len(length as u64).expect("in memory");
        let written = [
            (0, vec![1; 10]),
            (5000, vec![2; BLOCK * 3]),
            (CHUNK as u64 * 3 - 7, vec![3; 14]),
            (PART * 2 - 7, vec![4; 14]),
        ];
        for (at, bytes) in written {
            from.write_all_at(&bytes, at).expect("in memory");
        }
        // Zeros that were written.
        from.write_all_at(&vec![0; CHUNK], CHUNK as u64 * 5).expect("in memory");
        let sum = copy_ram(&from, &to).expect("in memory");
        assert_eq!(copy_ram(&to, &back).expect("in memory"), sum);
        assert_eq!(sum_ram(&back).expect("in memory"), sum);
        let all = |file: &File| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, 0).expect("in memory");
            bytes
        };
        assert!(all(&to) == all(&from) && all(&back) == all(&from));
        assert!(to.metadata().expect("in memory").blocks() * 512 < CHUNK as u64, "zeros are holes");
        to.write_all_at(&[9], CHUNK as u64 * 7).expect("in memory");
        assert_ne!(
            copy_ram(&to, &anonymous().expect("in memory")).expect("in memory"),
            sum_ram(&from).expect("in memory"),
            "a changed byte shows"
        );
    }

    #[test]
    fn memory_that_is_freed_reads_as_zeros_and_takes_no_room() {
        let ram = fresh_ram(Bytes(4 * PART)).expect("in memory");
        ram.write_all_at(&vec![7; CHUNK], 0).expect("written");
        ram.write_all_at(&vec![7; CHUNK], PART).expect("written");
        let kept = ram.metadata().expect("there").blocks();
        free(&ram, std::slice::from_ref(&(PART..2 * PART))).expect("freed");
        assert_eq!(ram.metadata().expect("there").blocks() * 2, kept);
        let mut read = vec![1; CHUNK];
        ram.read_exact_at(&mut read, PART).expect("read");
        assert!(read.iter().all(|byte| *byte == 0));
        ram.read_exact_at(&mut read, 0).expect("read");
        assert!(read.iter().all(|byte| *byte == 7));
    }
}
