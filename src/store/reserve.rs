//! Room on the disk that is given up when nothing else is left: for deletions, which make room, and
//! for statuses, which tell of it.
//!
//! A file of blocks and no content beside the database. New objects are refused before it is
//! touched, and until it is whole again.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Thousands of deletions: each commit appends some kilobytes, and old segments are used again.
pub(super) const RESERVE_BYTES: u64 = 16 << 20;
/// What must be free besides for new objects to be taken.
const HEADROOM_BYTES: u64 = 8 << 20;

/// Shared by the store's thread, which spends it, and by whoever asks whether there is room.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    file: Arc<File>,
    is_whole: Arc<AtomicBool>,
}

impl Reserve {
    /// Opens the file; it is filled as soon as there is room for it.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join("reserve");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let reserve = Self { file: Arc::new(file), is_whole: Arc::new(AtomicBool::new(false)) };
        reserve.refill()?;
        Ok(reserve)
    }

    /// Whether new objects may be stored now.
    pub(super) fn allows_growth(&self) -> bool {
        let need = if self.is_whole.load(Ordering::Relaxed) {
            HEADROOM_BYTES
        } else {
            HEADROOM_BYTES + RESERVE_BYTES
        };
        // A file system that does not tell is not known to be full.
        free_bytes(&self.file).is_ok_and(|free| free >= need)
    }

    /// Frees the blocks; whether there were any.
    pub(super) fn give_up(&self) -> bool {
        self.is_whole.swap(false, Ordering::Relaxed) && self.file.set_len(0).is_ok()
    }

    /// Takes the blocks again when the disk has them to spare.
    pub(super) fn refill(&self) -> io::Result<()> {
        if self.is_whole.load(Ordering::Relaxed) {
            return Ok(());
        }
        let has_room = self.file.metadata()?.len() == RESERVE_BYTES
            || free_bytes(&self.file)? >= HEADROOM_BYTES + RESERVE_BYTES;
        if !has_room {
            return Ok(());
        }
        match fallocate(&*self.file, FallocateFlags::empty(), 0, RESERVE_BYTES) {
            // Without reservations on this file system there is none to keep, nor to wait for.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.is_whole.store(true, Ordering::Relaxed),
            Err(Errno::NOSPC | Errno::DQUOT) => self.file.set_len(0)?,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

pub(super) fn free_bytes(file: &File) -> io::Result<u64> {
    let space = rustix::fs::fstatvfs(file)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}
