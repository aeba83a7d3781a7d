//! Disks: ext4 files in the data directory.

use std::future::Future;

use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::HostError;

/// A disk file of this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    pub owner: Uid,
    /// Apparent size of the file, in bytes.
    pub size: Bytes,
}

/// The capacity of the file system that holds the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total: Bytes,
    pub available: Bytes,
    /// Number of bytes that the configuration keeps free for the store and the logs.
    pub reserve: Bytes,
}

/// Access to the disk files. A file is found by its name, which is the uid of its owner.
pub trait Disks: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<DiskFile>, HostError>> + Send;
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<DiskFile>, HostError>> + Send;
    /// Creates a sparse ext4 file under a temporary name and renames it, so the file is complete or absent.
    /// Temporary files of a crashed attempt are removed by the next `create` or `remove` of that owner.
    fn create(&self, owner: &Uid, size: Bytes) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Creates a file with the content of a disk in a snapshot: the root disk, or, if `of` is given, the copy
    /// that was captured of the disk `of`. The file is complete or absent, as with `create`. The error is
    /// Missing if the snapshot has no such disk, and Permanent if that disk is less than `size` long,
    /// because then something was cut off.
    fn copy(
        &self,
        owner: &Uid,
        snapshot: &Uid,
        of: Option<&Uid>,
        size: Bytes,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes a prepared file the file of a disk. The error is Missing if there is no such file.
    fn take(&self, owner: &Uid, prepared: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes a file at least `size` long, whether a VM uses it or not. The time of its last change stays.
    fn grow(&self, owner: &Uid, size: Bytes) -> impl Future<Output = Result<(), HostError>> + Send;
    fn remove(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    fn space(&self) -> impl Future<Output = Result<Space, HostError>> + Send;
}
