//! Volumes from archives: a client's archive becomes a file system in a prepared file, which a disk takes later.
//!
//! Guarantees: a prepared file is whole or absent. Nothing outside of a directory of its own is written, whatever names
//! and links the archive has, and nothing is mounted. Bytes, entries, room on the disk, pace and time are bounded.
//! Cancel/crash: what is dropped on the way leaves nothing but files that the next start removes.

#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes as Chunk;
use futures::Stream;
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use self::tree::{ENTRIES_MAX, Tree};
use super::disks::{Ext4Files, Filled};
use super::oci::archive;
use super::oci::jobs::Stop;
use super::oci::receive::{Bounds, Uploads};
use super::oci::{Oci, Refused, blocking, unpack};

/// Time limit for unpacking an archive and making its file system.
const DEADLINE: Duration = Duration::from_secs(3600);
/// Size of an entry besides its content, in an archive, in bytes: a header, perhaps an extended one, and padding.
const ENTRY_BYTES: u64 = 2048;
/// Number of content bytes between two checks of the free disk space.
const ROOM_INTERVAL_BYTES: u64 = 64 << 20;

/// The reason why an archive did not become a volume.
#[derive(Debug)]
pub enum ArchiveError {
    /// The archive does not fit into the volume. The text says what of it.
    TooLarge(String),
    Host(HostError),
}

impl From<HostError> for ArchiveError {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

/// The maker of prepared files. Clones share the uploads, also with imports of images.
#[derive(Clone)]
pub struct VolumeArchives {
    uploads: Uploads,
    disks: Ext4Files,
    scratch: PathBuf,
}

impl std::fmt::Debug for VolumeArchives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeArchives").field("scratch", &self.scratch).finish_non_exhaustive()
    }
}

/// A prepared file. It is removed with the value, unless a disk was stored that takes it.
#[derive(Debug)]
pub struct Prepared {
    name: Uid,
    disks: Ext4Files,
    is_kept: bool,
}

impl Prepared {
    /// Returns the name by which a disk takes the file.
    #[must_use]
    pub fn name(&self) -> &Uid {
        &self.name
    }

    /// Leaves the file to the disk that takes it.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if !self.is_kept {
            self.disks.discard_prepared(&self.name);
        }
    }
}

impl VolumeArchives {
    /// Prepares the directory for unpacked archives, and removes what an earlier daemon left there.
    ///
    /// # Errors
    /// Returns an error when the directory cannot be emptied or made.
    pub fn new(images: &Oci, disks: Ext4Files, scratch: PathBuf) -> Result<Self, HostError> {
        let failed = |error| HostError::io("empty", scratch.display().to_string(), error);
        super::directories::remove_dir(&scratch).map_err(failed)?;
        super::directories::make_private_dir(&scratch).map_err(failed)?;
        Ok(Self { uploads: images.uploads(), disks, scratch })
    }

    /// Receives an archive of a client, and makes a file system of this size from it, under this name.
    ///
    /// # Errors
    /// `TooLarge` for an archive that does not fit. Permanent for one that is hostile or broken, Exhausted without room,
    /// and Transient while too many archives are received.
    pub async fn prepare(
        &self,
        client: &Arc<str>,
        name: Uid,
        size: Bytes,
        archive: impl Stream<Item = io::Result<Chunk>> + Send + Unpin,
    ) -> Result<Prepared, ArchiveError> {
        let received = self.uploads.receive(client, archive, self.bounds(size)).await?;
        let too_large = || ArchiveError::TooLarge(format!("the archive is larger than {size}"));
        let received = received.ok_or_else(too_large)?;
        let (given_up, stop) = Stop::new();
        let (maker, path) = (self.clone(), received.path().to_owned());
        let unpacked = blocking("unpack", move || Ok(maker.unpack(&path, size, &stop)));
        let late =
            || HostError::new(HostErrorKind::Permanent, "unpack", "an archive").because("it takes too long");
        let unpacked = tokio::time::timeout(DEADLINE, unpacked).await.map_err(|_| late())??;
        drop((given_up, received));
        let directory = unpacked?;
        match self.disks.prepare(&name, size, directory.path()).await? {
            Filled::Whole => Ok(Prepared { name, disks: self.disks.clone(), is_kept: false }),
            Filled::TooSmall => {
                Err(ArchiveError::TooLarge(format!("the archive's files do not fit into {size}")))
            }
        }
    }

    fn bounds(&self, size: Bytes) -> Bounds {
        let disks = self.disks.clone();
        Bounds {
            directory: self.scratch.clone(),
            size_max: archive_max(size),
            need_room: Arc::new(move || disks.need_room(0)),
        }
    }

    /// Unpacks an archive into a directory that is removed with the value.
    fn unpack(&self, archive: &Path, size: Bytes, stop: &Stop) -> Result<tempfile::TempDir, ArchiveError> {
        let failed = |error: Refused| ArchiveError::Host(error.into_host("unpack", "the archive"));
        let io = |error: io::Error| failed(Refused::of_io(error));
        let directory = tempfile::tempdir_in(&self.scratch).map_err(io)?;
        let mut tree = Tree::new(directory.path(), size).map_err(io)?;
        let file = std::fs::File::open(archive).map_err(io)?;
        let mut bytes = unpack::open(file, archive_max(size), stop).map_err(failed)?;
        let mut unseen = 0;
        let read = archive::read(&mut bytes, |item, size, content| {
            unseen += size;
            if unseen >= ROOM_INTERVAL_BYTES {
                unseen = 0;
                self.disks.need_room(size).map_err(Refused::of_io)?;
            }
            tree.put(item, size, content)
        });
        match read {
            Ok(()) => tree.finish().map_err(failed).map(|()| directory),
            Err(refused) if tree.is_full() || bytes.is_over() => Err(ArchiveError::TooLarge(refused.message)),
            Err(refused) => Err(failed(refused)),
        }
    }
}

/// Returns the largest size of an archive whose files fit into a volume, in bytes.
fn archive_max(size: Bytes) -> u64 {
    size.0.saturating_add(ENTRIES_MAX as u64 * ENTRY_BYTES)
}
