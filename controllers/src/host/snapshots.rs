//! Snapshots: directories that hold the disk, and optionally the memory, of an instance at one moment.

use std::future::Future;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CompressionState, SnapshotKind};

use super::HostError;

/// The state of a snapshot on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Captured {
    /// An incomplete snapshot, left by a capture that was cut short. It has no value.
    Incomplete,
    Whole {
        kind: SnapshotKind,
        /// Number of allocated bytes, shared ones included.
        size: Bytes,
        captured_at: Timestamp,
        /// Compression state of the snapshot's memory.
        compression_state: CompressionState,
    },
}

/// A capture to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturePlan {
    pub snapshot: Uid,
    /// The instance to capture.
    pub source: Uid,
    pub kind: SnapshotKind,
    /// The root disk of the source.
    pub disk: Uid,
    /// The disks that the source's volumes are written to. Each is kept under its uid.
    pub volumes: Vec<Uid>,
    /// The run that the memory must belong to.
    pub run: RunNo,
}

/// The snapshots of one scope, found by their own uid.
pub trait Snapshots: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    fn inspect(&self, snapshot: &Uid) -> impl Future<Output = Result<Option<Captured>, HostError>> + Send;
    /// Returns the greatest number of bytes that a capture can write.
    fn measure(&self, plan: &CapturePlan) -> impl Future<Output = Result<Bytes, HostError>> + Send;
    /// Copies the disks, and for Standby the memory, of one moment. A running VM is paused only while its
    /// state and the copies are taken, and continues whatever the result is; after a crash during the call it
    /// is seen paused. The remainder of an earlier attempt is replaced. The result is complete and durable,
    /// or has no value. The error is Conflict if the source is not in the state that the plan names.
    fn capture(&self, plan: &CapturePlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Compresses the memory of a snapshot as `Memories::compress` does. Forks can be made of it
    /// meanwhile, each with a copy of its own.
    fn compress(
        &self,
        snapshot: &Uid,
        how: Compression,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes a snapshot. Returns `Ok` if it is gone. Objects that were made from it do not depend on it.
    fn remove(&self, snapshot: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
