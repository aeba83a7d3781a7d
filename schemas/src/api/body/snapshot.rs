//! Bodies of requests about snapshots and forks.

use schemars::JsonSchema;

use super::policy::CompressionRequest;
use crate::api::schema::{NewName, TagMap};
use crate::instance::Hypervisor;
use crate::limits;
use crate::snapshot::SnapshotKind;

/// The states that an instance can be made or restored in.
#[derive(Debug, JsonSchema)]
pub enum TargetState {
    Running,
    Stopped,
    Standby,
}

/// The body of `POST /instances/{id}/fork`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ForkCreate {
    /// Name of the new instance.
    pub name: NewName,
    /// True to allow a source that is running; it is paused for a moment. False by default.
    pub from_running: Option<bool>,
    /// State of the new instance; the state of the source by default.
    pub target_state: Option<TargetState>,
}

/// The body of `POST /instances/{id}/snapshots`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Kind of the snapshot: with memory, or of the disk only.
    pub kind: SnapshotKind,
    /// Name of the snapshot, unique among the snapshots of the instance.
    pub name: Option<NewName>,
    /// Key-value pairs for filters of lists.
    pub tags: Option<TagMap>,
    /// Compression; the instance's policy decides by default.
    pub compression: Option<CompressionRequest>,
    /// Number of forks to hold ready, for the kind `Standby` only; 0 by default. It is an addition to the
    /// contract.
    #[schemars(range(min = 0, max = limits::POOL_MAX))]
    pub pool_size: Option<u32>,
}

/// The body of `PATCH /snapshots/{id}`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotUpdate {
    /// Number of forks to hold ready.
    #[schemars(range(min = 0, max = limits::POOL_MAX))]
    pub pool_size: u32,
}

/// The body of `POST /snapshots/{id}/fork`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotFork {
    /// Name of the new instance.
    pub name: NewName,
    /// State of the new instance; by default `Running` for a snapshot with memory, `Stopped` for others.
    pub target_state: Option<TargetState>,
    /// Hypervisor of the new instance, for snapshots of the kind `Stopped` only; the source's by
    /// default.
    pub target_hypervisor: Option<Hypervisor>,
}

/// The optional body of `POST /instances/{id}/snapshots/{snapshot}/restore`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotRestore {
    /// State of the instance afterwards; by default `Running` for a snapshot with memory, `Stopped` for
    /// others.
    pub target_state: Option<TargetState>,
    /// Hypervisor of the instance afterwards, for snapshots of the kind `Stopped` only; the snapshot's
    /// by default.
    pub target_hypervisor: Option<Hypervisor>,
}
