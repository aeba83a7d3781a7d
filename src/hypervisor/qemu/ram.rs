//! The RAM of a VM as a file: made, found again, and copied without its zeros.
//!
//! While a VM lives its RAM is an anonymous file (memfd) shared with the VMM: as fast as memory of its
//! own, where a file on a disk costs a boot a tenth, and open to a save through `/proc`. That of a fork
//! is instead the file of a snapshot, mapped privately: forks share its pages until they write.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crc32fast::Hasher;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, memfd_create, seek};
use stead_schemas::quantity::Bytes;

/// Of guest RAM, for what is zero and what is not: a page.
const BLOCK: usize = 4096;
/// Of one read: it stays in a core's cache until it is looked at.
const CHUNK: usize = 64 * BLOCK;
/// Of what a thread takes at a time: what is in use of a guest's RAM lies together, so that halves of it
/// are not half the work.
const PART: u64 = 8 << 20;
/// Threads of one copy: as many as a copy is worth, on a host that has them.
const THREADS_MAX: usize = 4;
/// Of the anonymous file; found again as `/memfd:stead-ram` among the VMM's descriptors.
const ANONYMOUS: &str = "stead-ram";

/// RAM of this size that nothing was written to yet.
pub(super) fn fresh_ram(size: Bytes) -> io::Result<File> {
    let ram = anonymous()?;
    ram.set_len(size.0)?;
    Ok(ram)
}

pub(super) fn anonymous() -> io::Result<File> {
    Ok(File::from(memfd_create(ANONYMOUS, MemfdFlags::CLOEXEC)?))
}

/// RAM that outlives its VMM a little: to free it takes longer than all else of a process's end, and
/// nobody has to wait for that.
#[derive(Debug, Default)]
pub(super) struct HeldRam(Mutex<Option<File>>);

impl HeldRam {
    pub(super) fn hold(&self, ram: File) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ram);
    }
}

impl Drop for HeldRam {
    fn drop(&mut self) {
        let ram = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // Where no thread can be had it is freed here.
        drop(ram.map(|ram| std::thread::Builder::new().spawn(move || drop(ram))));
    }
}

/// The RAM of a VMM that lives.
pub(super) fn ram_of(pid: u32) -> io::Result<File> {
    let mark = format!("/memfd:{ANONYMOUS}");
    let is_ram =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with(&mark));
    let mut descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|entry| entry.path());
    let ram =
        descriptors.find(is_ram).ok_or_else(|| io::Error::other("its RAM is not a file that we made"))?;
    File::open(ram)
}

/// Copies what is not zero into an empty file. Its length, and a sum of where those blocks are and
/// what is in them: the same for holes and for zeros.
pub(super) fn copy_ram(from: &File, to: &File) -> io::Result<(u64, u32)> {
    to.set_len(from.metadata()?.len())?;
    in_parts(from, |[buffer, _], start, end| {
        each_run_between(from, buffer, start, end, |at, run| to.write_all_at(run, at))
    })
}

/// Makes an older copy the same, by writing only what differs: most of a guest's RAM stays as it was.
pub(super) fn update_ram(from: &File, to: &File) -> io::Result<(u64, u32)> {
    to.set_len(from.metadata()?.len())?;
    in_parts(from, |buffers, start, end| update_between(from, to, buffers, start, end))
}

/// The length and the sum that a copy would have.
pub(super) fn sum_ram(from: &File) -> io::Result<(u64, u32)> {
    in_parts(from, |[buffer, _], start, end| each_run_between(from, buffer, start, end, |_, _| Ok(())))
}

/// Of one thread: for what is read, and for what it is compared with.
type Buffers = [Vec<u8>; 2];

/// Goes over the parts of a file side by side: a VM is held meanwhile, or waited for. Its length, and
/// the sum of its parts' sums.
fn in_parts(
    from: &File,
    part_sum: impl Fn(&mut Buffers, u64, u64) -> io::Result<Hasher> + Sync,
) -> io::Result<(u64, u32)> {
    let length = from.metadata()?.len();
    let (next, sums) = (AtomicU64::new(0), Mutex::new(BTreeMap::new()));
    let take_parts = || -> io::Result<()> {
        let mut buffers = [(); 2].map(|()| vec![0; CHUNK]);
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            let start = part.saturating_mul(PART);
            if start >= length {
                return Ok(());
            }
            let sum = part_sum(&mut buffers, start, start.saturating_add(PART).min(length))?;
            sums.lock().unwrap_or_else(PoisonError::into_inner).insert(part, sum);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take_parts)).collect();
        let mine = take_parts();
        others.into_iter().fold(mine, |done, other| {
            let panicked = |_| Err(io::Error::other("a copying thread panicked"));
            done.and(other.join().unwrap_or_else(panicked))
        })
    })?;
    let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut sum = Hasher::new();
    sums.values().for_each(|part| sum.combine(part));
    Ok((length, sum.finalize()))
}

/// Goes over all runs of blocks that are not zero, none longer than a read, in order.
pub(super) fn each_block_run(from: &File, take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    each_run_between(from, &mut vec![0; CHUNK], 0, from.metadata()?.len(), take).map(drop)
}

fn each_run_between(
    from: &File,
    buffer: &mut [u8],
    start: u64,
    end: u64,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Hasher> {
    let mut sum = Hasher::new();
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
            take_blocks(&buffer[..wanted], at, &mut sum, &mut take)?;
            at += wanted as u64;
        }
    }
    Ok(sum)
}

fn update_between(
    from: &File,
    to: &File,
    [new, old]: &mut Buffers,
    start: u64,
    end: u64,
) -> io::Result<Hasher> {
    let mut sum = Hasher::new();
    let mut at = start;
    while at < end {
        // Where neither has data both are zero.
        at = match (data_from(from, at)?, data_from(to, at)?) {
            (Some(one), Some(other)) => one.min(other),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => break,
        };
        let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(CHUNK);
        let (new, old) = (&mut new[..wanted], &mut old[..wanted]);
        from.read_exact_at(new, at)?;
        to.read_exact_at(old, at)?;
        take_blocks(new, at, &mut sum, &mut |_, _| Ok(()))?;
        write_changed(new, old, to, at)?;
        at += wanted as u64;
    }
    Ok(sum)
}

/// Blocks in a row that differ are written together; zeros become holes.
fn write_changed(new: &[u8], old: &[u8], to: &File, start: u64) -> io::Result<()> {
    enum Change {
        Not,
        Bytes,
        Zeros,
    }
    let change = |new: &[u8], old: &[u8]| match new == old {
        true => Change::Not,
        false if is_zero(new) => Change::Zeros,
        false => Change::Bytes,
    };
    let changes: Vec<_> =
        new.chunks(BLOCK).zip(old.chunks(BLOCK)).map(|(new, old)| change(new, old)).collect();
    let mut offset = 0;
    for run in changes.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
        let length = (run.len() * BLOCK).min(new.len() - offset);
        let (bytes, at) = (&new[offset..offset + length], start + offset as u64);
        match run[0] {
            Change::Not => {}
            Change::Bytes => to.write_all_at(bytes, at)?,
            Change::Zeros => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A file system without holes has zeros.
                fallocate(to, punch, at, length as u64).or_else(|_| to.write_all_at(bytes, at))?;
            }
        }
        offset += length;
    }
    Ok(())
}

/// Where there is data next, if there is. The offset is shared with other threads; what a seek
/// answers is not.
fn data_from(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// By comparison: a search would look at one byte after the other.
fn is_zero(block: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    block == &ZEROS[..block.len()]
}

/// Blocks in a row that are not zero are taken together.
fn take_blocks(
    bytes: &[u8],
    at: u64,
    sum: &mut Hasher,
    take: &mut impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut offset = 0;
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK).collect();
    for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(run[0]) {
            let (from, run) = (at + offset as u64, &bytes[offset..offset + length]);
            take(from, run)?;
            for (index, block) in run.chunks(BLOCK).enumerate() {
                sum.update(&(from + (index * BLOCK) as u64).to_le_bytes());
                sum.update(block);
            }
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
        // Written and yet zero.
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
        for (at, bytes) in [(0, vec![0; BLOCK]), (BLOCK as u64 * 2, vec![7; 9]), (PART + 1, vec![8; BLOCK])] {
            from.write_all_at(&bytes, at).expect("in memory");
        }
        assert_eq!(update_ram(&from, &to).expect("in memory"), sum_ram(&from).expect("in memory"));
        assert_eq!(sum_ram(&to).expect("in memory"), sum_ram(&from).expect("in memory"));
        assert!(all(&to) == all(&from), "updated");
        assert!(to.metadata().expect("in memory").blocks() * 512 < CHUNK as u64, "zeros are holes");
        to.write_all_at(&[9], CHUNK as u64 * 7).expect("in memory");
        assert_ne!(
            copy_ram(&to, &anonymous().expect("in memory")).expect("in memory"),
            sum_ram(&from).expect("in memory"),
            "a changed byte shows"
        );
    }
}
