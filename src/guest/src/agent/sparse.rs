//! A file that is written from start to end, with holes instead of zeros.
//!
//! A large file bypasses the page cache where its file system allows it: a guest has little memory to cache data that
//! was not asked for, and a page in the cache costs more than the write itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::aligned::{Aligned, BLOCK_BYTES, set_direct};

/// Size from which a file is written past the page cache, in bytes.
const DIRECT_FROM: u64 = 256 << 10;
#[derive(Debug)]
pub(super) struct SparseFile {
    file: File,
    /// Number of bytes that were taken.
    taken: u64,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Cached {
        may_change: bool,
    },
    /// Writes past the page cache; the buffer holds the bytes that are not written yet.
    Direct(Aligned),
}

impl SparseFile {
    /// Creates a writer for an empty file.
    pub(super) fn new(file: File) -> Self {
        Self { file, taken: 0, way: Way::Cached { may_change: true } }
    }

    /// Takes the next bytes of the file.
    pub(super) fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        if self.taken >= DIRECT_FROM && matches!(self.way, Way::Cached { may_change: true }) {
            let to_block = usize::try_from(self.taken.next_multiple_of(BLOCK_BYTES as u64) - self.taken);
            let (head, rest) = data.split_at(to_block.unwrap_or(0).min(data.len()));
            self.write_cached(head)?;
            data = rest;
            if self.taken.is_multiple_of(BLOCK_BYTES as u64) {
                let is_direct = set_direct(&self.file, true).is_ok();
                self.way =
                    if is_direct { Way::Direct(Aligned::new()) } else { Way::Cached { may_change: false } };
            }
        }
        while let Way::Direct(staged) = &mut self.way {
            let count = staged.push(data);
            self.taken += count as u64;
            data = &data[count..];
            if data.is_empty() {
                return Ok(());
            }
            self.write_staged()?;
        }
        self.write_cached(data)
    }

    /// Returns the file, which has the length of all bytes taken, and this length.
    pub(super) fn finish(mut self) -> io::Result<(File, u64)> {
        if matches!(self.way, Way::Direct(_)) {
            self.write_staged()?;
        }
        // A hole at the end exists only through the file's length.
        self.file.set_len(self.taken)?;
        Ok((self.file, self.taken))
    }

    /// Writes the staged bytes. The last staged block is whole, or is the last of the file.
    fn write_staged(&mut self) -> io::Result<()> {
        let Way::Direct(staged) = &mut self.way else { return Ok(()) };
        let length = staged.bytes().len();
        let (blocks, tail) = staged.bytes().split_at(length / BLOCK_BYTES * BLOCK_BYTES);
        let at = self.taken - length as u64;
        let is_refused = match write_runs(&self.file, blocks, at) {
            // A file system that accepts the flag may still require other block sizes.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => true,
            done => done.map(|()| false)?,
        };
        if is_refused || !tail.is_empty() {
            set_direct(&self.file, false)?;
            let from = if is_refused { 0 } else { blocks.len() };
            write_runs(&self.file, &staged.bytes()[from..], at + from as u64)?;
            self.way = Way::Cached { may_change: false };
        } else {
            staged.clear();
        }
        Ok(())
    }

    fn write_cached(&mut self, data: &[u8]) -> io::Result<()> {
        write_runs(&self.file, data, self.taken)?;
        self.taken += data.len() as u64;
        Ok(())
    }
}

/// Writes the runs of blocks that are not zero. The other blocks become holes.
fn write_runs(file: &File, data: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.len() == BLOCK_BYTES && block.iter().all(|&byte| byte == 0);
    let mut offset = 0;
    // Every block is examined once.
    let blocks: Vec<(bool, usize)> =
        data.chunks(BLOCK_BYTES).map(|block| (is_zero(block), block.len())).collect();
    for run in blocks.chunk_by(|one, other| one.0 == other.0) {
        let length: usize = run.iter().map(|(_, length)| length).sum();
        if !run[0].0 {
            file.write_all_at(&data[offset..offset + length], at + offset as u64)?;
        }
        offset += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::super::aligned::ALIGNED_BYTES;
    use super::*;

    /// Writes `data` in parts and checks the file's contents. Returns the space that the file takes.
    fn written(directory: &Path, data: &[u8], part: usize) -> u64 {
        let path = directory.join(format!("stead-sparse-{}-{part}", std::process::id()));
        let mut file = SparseFile::new(File::create_new(&path).expect("made"));
        data.chunks(part).for_each(|part| file.write(part).expect("written"));
        let (file, length) = file.finish().expect("written");
        assert_eq!(length, data.len() as u64);
        let back = std::fs::read(&path).expect("read");
        let allocated = file.metadata().expect("there").blocks() * 512;
        std::fs::remove_file(path).expect("removed");
        assert!(back == data, "the contents differ in {} with {part}", directory.display());
        allocated
    }

    #[test]
    fn zeros_are_stored_as_holes_and_every_byte_is_unchanged_on_either_path() {
        let mut data = vec![7u8; 5000];
        data.extend(vec![0u8; 1 << 20]);
        data.extend((0..900_000u32).map(|at| (at % 251) as u8));
        data.extend(vec![0u8; 3 << 20]);
        data.extend(vec![9u8; 3]);
        data.extend(vec![0u8; 10_000]);
        // The first file system has no way past its cache, the second may have it.
        for directory in [Path::new("/dev/shm"), &std::env::current_dir().expect("there")] {
            for part in [64 << 10, 128 << 10, 100_001, 4 << 20] {
                let allocated = written(directory, &data, part);
                assert!(allocated < 2 << 20, "{allocated} bytes are allocated");
            }
        }
    }

    #[test]
    fn a_file_may_end_anywhere() {
        let directory = std::env::current_dir().expect("there");
        let direct_from = usize::try_from(DIRECT_FROM).expect("small");
        for length in [0, 1, direct_from, direct_from + 1, direct_from + ALIGNED_BYTES, direct_from + 4095] {
            written(&directory, &vec![5; length], 128 << 10);
        }
    }
}
