//! Snapshots: directories that hold the disk, and perhaps the memory, of one moment of an instance.

use std::future::Future;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{PackingState, SnapshotKind};

use super::HostError;

/// What is there of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Captured {
    /// Left by a capture that was cut short: worth nothing.
    Loose,
    Whole {
        kind: SnapshotKind,
        /// Allocated bytes, shared ones included.
        size: Bytes,
        captured_at: Timestamp,
        /// Of its memory.
        packing: PackingState,
    },
}

/// What to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturePlan {
    pub snapshot: Uid,
    /// The instance.
    pub source: Uid,
    pub kind: SnapshotKind,
    /// Of the source.
    pub disk: Uid,
    /// Those that its volumes are written to; each is kept under its uid.
    pub volumes: Vec<Uid>,
    /// The run that the memory has to be of.
    pub run: RunNo,
}

/// Snapshots of one scope, found by their own uid.
pub trait Snapshots: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    fn inspect(&self, snapshot: &Uid) -> impl Future<Output = Result<Option<Captured>, HostError>> + Send;
    /// Bytes that a capture writes at most.
    fn measure(&self, plan: &CapturePlan) -> impl Future<Output = Result<Bytes, HostError>> + Send;
    /// Copies the disks, and for Standby the memory, of one moment. A VM that runs is held only while
    /// state and copies are taken, and runs on whatever comes of it; after a crash in between it is
    /// seen paused. What is there of an earlier try is replaced. Conflict when the source is not as
    /// the plan says. Whole, durably, or worth nothing.
    fn capture(&self, plan: &CapturePlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Compresses its memory as `Machines::compress_memory` does. Forks are made of it all the same,
    /// each with a copy of its own.
    fn compress(
        &self,
        snapshot: &Uid,
        how: Compression,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// `Ok` when gone. What was made from it does not depend on it.
    fn remove(&self, snapshot: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
