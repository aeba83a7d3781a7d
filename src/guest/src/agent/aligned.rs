//! Memory as devices want it, for reads and writes past the page cache.

use std::fs::File;
use std::io;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What is read and written past the cache begins and ends at such blocks, in memory as well: no
/// device has larger ones.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Of one read or write past the cache: each waits for the device.
pub(super) const ALIGNED_BYTES: usize = 512 << 10;

/// Bytes on their way; the first is at the beginning of a block.
#[derive(Debug)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn new() -> Self {
        // Not touched here: memory that is new costs only what is used of it.
        let memory = vec![0; ALIGNED_BYTES + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start, length: 0 }
    }

    /// Takes as much as there is room for; how much.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(ALIGNED_BYTES - self.length);
        let at = self.start + self.length;
        self.memory[at..at + count].copy_from_slice(&data[..count]);
        self.length += count;
        count
    }

    /// Holds what this reads instead of what it held.
    pub(super) fn fill<E>(&mut self, read: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        self.length = 0;
        self.length = read(&mut self.memory[self.start..self.start + ALIGNED_BYTES])?.min(ALIGNED_BYTES);
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

/// Has reads and writes of the file pass by the page cache, or not.
pub(super) fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, is_direct);
    Ok(fcntl_setfl(file, flags)?)
}
