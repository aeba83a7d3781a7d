//! Room on the disk that is used when nothing else is left: for deletions, which make room, and for
//! statuses, which tell of it.
//!
//! Most of it are blocks of the database's own file beyond its end, which the store holds: whoever else
//! fills the disk cannot take them, but for the moment after sled cut that file. The rest is a file of blocks and no content, given up for what sled
//! writes to files of its own. New objects are refused when either is touched, until both are whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Within the database's file. Thousands of deletions: each commit appends some kilobytes, and old
/// segments are used again.
pub(super) const WITHIN_BYTES: u64 = 16 << 20;
/// Beside it: sled's notes of where its objects are, written when it opens, and the rare large value.
const BESIDE_BYTES: u64 = 4 << 20;
/// What must be free besides for new objects to be taken.
const HEADROOM_BYTES: u64 = 8 << 20;

/// Shared by the store's thread, which spends it, and by whoever asks whether there is room.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    beside: Arc<File>,
    /// Of what the database's file should hold.
    missing_within: Arc<AtomicU64>,
}

impl Reserve {
    /// Opens the file; it is filled as soon as there is room for it.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join("reserve");
        let beside = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        // An older release kept all of it here.
        if beside.metadata()?.len() > BESIDE_BYTES {
            beside.set_len(BESIDE_BYTES)?;
        }
        Ok(Self { beside: Arc::new(beside), missing_within: Arc::new(AtomicU64::new(WITHIN_BYTES)) })
    }

    /// Whether new objects may be stored now: there is room for them and for all of the reserve.
    pub(super) fn allows_growth(&self) -> bool {
        let missing = self.missing_within.load(Ordering::Relaxed);
        let has_room = || {
            let missing_beside = BESIDE_BYTES.saturating_sub(self.beside.metadata()?.len());
            Ok::<_, io::Error>(free_bytes(&self.beside)? >= HEADROOM_BYTES + missing + missing_beside)
        };
        has_room().unwrap_or_else(|error| {
            tracing::warn!(%error, "it is not known how full the disk is: no new objects are taken");
            false
        })
    }

    /// How much the database's file holds of it.
    pub(super) fn held_within(&self, bytes: u64) {
        self.missing_within.store(WITHIN_BYTES.saturating_sub(bytes), Ordering::Relaxed);
    }

    /// Frees what is beside, unless so much is free as it is.
    pub(super) fn make_free(&self, bytes: u64) -> io::Result<()> {
        if free_bytes(&self.beside)? >= bytes { Ok(()) } else { self.beside.set_len(0) }
    }

    /// Takes the blocks beside again when the disk has them to spare.
    pub(super) fn refill(&self) -> io::Result<()> {
        let is_filled = self.beside.metadata()?.len() == BESIDE_BYTES;
        if is_filled || free_bytes(&self.beside)? < HEADROOM_BYTES + BESIDE_BYTES {
            return Ok(());
        }
        match fallocate(&*self.beside, FallocateFlags::empty(), 0, BESIDE_BYTES) {
            // A file system without reservations keeps none.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(Errno::NOSPC | Errno::DQUOT) => self.beside.set_len(0),
            Err(error) => Err(error.into()),
        }
    }
}

pub(super) fn free_bytes(file: &File) -> io::Result<u64> {
    let space = rustix::fs::fstatvfs(file)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}
