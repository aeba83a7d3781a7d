//! Space on the disk that is used when no other space is left: for deletions, which free space, and for
//! statuses, which report the full disk.
//!
//! Most of it are blocks of the database's own file beyond its end, which the store holds: other programs
//! that fill the disk cannot take them, except in the moment after sled cut that file. The rest is a file of
//! blocks without content, which is given up when sled writes to files of its own. New objects are refused
//! when either part is touched, until both are complete.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Size of the part within the database's file, in bytes. It is enough for thousands of deletions: each
/// commit appends some kilobytes, and old segments are reused.
pub(super) const WITHIN_BYTES: u64 = 16 << 20;
/// Size of the file beside the database, in bytes, for sled's notes of where its objects are, written when
/// it opens, and the rare large value.
const BESIDE_BYTES: u64 = 4 << 20;
/// Space that must be free in addition before new objects are accepted, in bytes.
const HEADROOM_BYTES: u64 = 8 << 20;

/// The reserve, shared by the store's thread, which spends it, and the callers that ask whether there is
/// room.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    beside: Arc<File>,
    /// Number of bytes that are missing of those that the database's file should hold.
    missing_within: Arc<AtomicU64>,
}

impl Reserve {
    /// Opens the file; it is filled as soon as there is room for it.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join("reserve");
        let beside = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        // An older release kept the whole reserve here.
        if beside.metadata()?.len() > BESIDE_BYTES {
            beside.set_len(BESIDE_BYTES)?;
        }
        Ok(Self { beside: Arc::new(beside), missing_within: Arc::new(AtomicU64::new(WITHIN_BYTES)) })
    }

    /// True if new objects may be stored now: there is room for them and for all of the reserve.
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

    /// Records how many bytes of the reserve the database's file holds.
    pub(super) fn held_within(&self, bytes: u64) {
        self.missing_within.store(WITHIN_BYTES.saturating_sub(bytes), Ordering::Relaxed);
    }

    /// Frees the file beside the database, unless `bytes` are free already.
    pub(super) fn make_free(&self, bytes: u64) -> io::Result<()> {
        if free_bytes(&self.beside)? >= bytes { Ok(()) } else { self.beside.set_len(0) }
    }

    /// Allocates the file's blocks again when the disk has them to spare.
    pub(super) fn refill(&self) -> io::Result<()> {
        let is_filled = self.beside.metadata()?.len() == BESIDE_BYTES;
        if is_filled || free_bytes(&self.beside)? < HEADROOM_BYTES + BESIDE_BYTES {
            return Ok(());
        }
        match fallocate(&*self.beside, FallocateFlags::empty(), 0, BESIDE_BYTES) {
            // A file system without reservations keeps no reserve.
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
