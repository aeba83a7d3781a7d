//! Buffers of large frames, kept for reuse.
//!
//! New memory costs a program in a guest more than the data read into it: a fault and a cleared page for every 4 KiB.
//! Guarantees: only a few buffers are kept, all of one size.

use std::sync::{Mutex, MutexGuard, PoisonError};

use stead_schemas::guest::DATA_BYTES_MAX;

/// Number of buffers that one busy stream uses: its window, one that is read and one that is written.
const KEPT_MAX: usize = 10;

#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    pub(crate) fn take(&self) -> Option<Vec<u8>> {
        self.lock().pop()
    }

    /// Keeps a buffer that is no longer used, if it is a large one.
    pub(crate) fn put(&self, buffer: Vec<u8>) {
        let mut kept = self.lock();
        // The capacity must match exactly: a read into the buffer must not get more than a frame holds.
        if buffer.capacity() == DATA_BYTES_MAX && kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_buffers_of_one_size_are_kept() {
        let spares = Spares::default();
        spares.put(vec![0; DATA_BYTES_MAX - 1]);
        spares.put(vec![0; DATA_BYTES_MAX + 1]);
        assert!(spares.take().is_none());
        (0..2 * KEPT_MAX).for_each(|_| spares.put(vec![0; DATA_BYTES_MAX]));
        assert_eq!(std::iter::from_fn(|| spares.take()).count(), KEPT_MAX);
    }
}
