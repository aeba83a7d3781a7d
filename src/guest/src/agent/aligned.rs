//! Block-aligned memory, for reads and writes that bypass the page cache (`O_DIRECT`).

use std::fs::File;
use std::io;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Alignment of direct reads and writes, in bytes: offsets, lengths and memory addresses are multiples of it. No
/// device has larger blocks.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Size of one direct read or write, in bytes. Each of them waits for the device.
pub(super) const ALIGNED_BYTES: usize = 512 << 10;

/// A buffer for direct reads and writes. Its first byte is aligned to a block.
#[derive(Debug)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn new() -> Self {
        // The memory is not touched here: new memory costs only as much as is used of it.
        let memory = vec![0; ALIGNED_BYTES + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start, length: 0 }
    }

    /// Appends as much of `data` as there is room for. Returns the number of bytes appended.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(ALIGNED_BYTES - self.length);
        let at = self.start + self.length;
        self.memory[at..at + count].copy_from_slice(&data[..count]);
        self.length += count;
        count
    }

    /// Replaces the contents with what `read` writes into the buffer.
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

/// Sets or clears `O_DIRECT` on a file: whether reads and writes bypass the page cache.
pub(super) fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, is_direct);
    Ok(fcntl_setfl(file, flags)?)
}
