//! Disks: ext4 files in the data directory.

use std::future::Future;

use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::HostError;

/// A disk file of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    pub owner: Uid,
    /// Apparent size.
    pub size: Bytes,
}

/// Room of the file system that holds the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total: Bytes,
    pub available: Bytes,
    /// Kept free for the store and the logs, by configuration.
    pub reserve: Bytes,
}

/// Disk files, found by their name, which is the owner's uid.
pub trait Disks: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<DiskFile>, HostError>> + Send;
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<DiskFile>, HostError>> + Send;
    /// Makes a sparse ext4 file under a temporary name and renames it: it is whole or absent.
    /// Temporaries of a crashed try are removed by the next `create` and `remove` of that owner.
    fn create(&self, owner: &Uid, size: Bytes) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes a file with the content of a snapshot's disk: of its root's, or of what was captured as the
    /// disk `of`. Whole or absent as with `create`. Missing when the snapshot has none; Permanent when
    /// that is not of this size: something was cut off.
    fn copy(
        &self,
        owner: &Uid,
        snapshot: &Uid,
        of: Option<&Uid>,
        size: Bytes,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    fn remove(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    fn space(&self) -> impl Future<Output = Result<Space, HostError>> + Send;
}
