//! Snapshot: the state of an instance at one moment, kept for restores in place and for forks.
//!
//! A snapshot of kind Standby holds memory and disk of one moment; a snapshot of kind Stopped holds only the
//! disk. It is taken once: a snapshot that failed, or whose files went missing, is not taken again. It
//! outlives its source.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::compression::Compression;
use crate::condition::Condition;
use crate::instance::{Instance, InstanceSpec};
use crate::meta::{Kind, Object};
use crate::names::{Digest, Name, Uid};
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::{Ref, Role, WokenBy};
use crate::schedule::SnapshotSchedule;
use crate::volume::{Volume, VolumeMount};

/// The kind of snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {}

impl Kind for Snapshot {
    const NAME: &'static str = "snapshot";
    const FINALIZER: &'static str = "snapshot";
    type Spec = SnapshotSpec;
    type Status = SnapshotStatus;
    const WOKEN_BY: &'static [WokenBy] = &[
        WokenBy::Target(Role::Captures),
        WokenBy::Release(Role::AwaitsCopy),
        WokenBy::Release(Role::AwaitsMemory),
        // A fork took a pooled instance.
        WokenBy::Release(Role::Owner),
    ];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let spec = &object.spec;
        let is_being_taken = object.status.phase == SnapshotPhase::Pending && !object.meta.is_deleting();
        let content = spec.image_digest.iter().map(Ref::to_content);
        let source = Ref::to::<Instance>(Role::Source, &spec.source);
        let captured = is_being_taken.then(|| Ref::to::<Instance>(Role::Captures, &spec.source));
        let copied = spec.volume_disks.iter().filter(|_| is_being_taken);
        let copied = copied.map(|disk| Ref::to::<Volume>(Role::Copies, &disk.volume));
        let schedule = spec.schedule.as_ref();
        let schedule = schedule.map(|run| Ref::to::<SnapshotSchedule>(Role::Schedule, &run.schedule));
        let mounts = spec.instance.volumes.iter().map(VolumeMount::reference);
        content.chain([source]).chain(captured).chain(copied).chain(schedule).chain(mounts).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSpec {
    pub source: Uid,
    pub source_name: Name,
    pub kind: SnapshotKind,
    /// Name of the snapshot; unique among the snapshots of its source.
    pub name: Option<Name>,
    pub purpose: SnapshotPurpose,
    /// The run of a schedule that took it; `None` when a client requested it.
    #[serde(default)]
    pub schedule: Option<ScheduledRun>,
    /// The spec of the source, which a fork or a restore begins with.
    pub instance: Box<InstanceSpec>,
    /// Digest of the content below the disk; the content is kept as long as the snapshot is.
    pub image_digest: Option<Digest>,
    /// Compression of its memory.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Number of forks to hold ready.
    #[serde(default)]
    pub pool: u32,
    /// Disks that are captured besides the root's disk: those that hold writes to its volumes.
    #[serde(default)]
    pub volume_disks: Vec<CapturedDisk>,
}

/// A disk of a volume, as the instance had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedDisk {
    pub volume: Uid,
    pub disk: Uid,
    pub size: Bytes,
}

/// A run of a schedule, identified by the time at which it was due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduledRun {
    pub schedule: Uid,
    pub due: Timestamp,
}

/// The kinds of snapshots: the wire's two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub enum SnapshotKind {
    Standby,
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPurpose {
    /// The snapshot was requested, and is deleted on request.
    Kept,
    /// The snapshot only serves a fork: it is removed when the fork has what it needs, and is shown to no
    /// client.
    Fork,
}

/// The phase of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "wire", schemars(rename = "SnapshotStatus"))]
pub enum SnapshotPhase {
    #[default]
    Pending,
    Ready,
    Failed,
}

/// The progress of the compression of a memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompressionState {
    #[default]
    Plain,
    #[serde(rename = "packing")]
    Compressing,
    #[serde(rename = "packed")]
    Compressed {
        /// Bytes of the memory: in the compressed file, and before the compression.
        #[serde(rename = "packed")]
        compressed: Bytes,
        plain: Bytes,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    pub phase: SnapshotPhase,
    /// Bytes allocated on the host.
    pub size: Bytes,
    /// The moment that the snapshot was captured at.
    pub captured_at: Option<Timestamp>,
    /// The reason why it failed.
    pub error: Option<String>,
    /// Time at which it failed; `None` in records of earlier versions.
    #[serde(default)]
    pub failed_at: Option<Timestamp>,
    #[serde(default)]
    #[serde(rename = "packing")]
    pub compression_state: CompressionState,
    /// The reason why its memory could not be compressed.
    #[serde(default)]
    #[serde(rename = "packing_error")]
    pub compression_error: Option<String>,
    /// Number of the pooled instances that a fork could take now; `pool` is the desired number.
    #[serde(default)]
    pub warm: u32,
    /// The reason why the pool does not have its size, if something is wrong with it.
    #[serde(default)]
    pub pool_error: Option<String>,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

impl Object<Snapshot> {
    /// True if it failed before it was taken: it holds no files and no name, and is removed after a while. A
    /// snapshot that was taken and lost its files later stays until its owner deletes it.
    #[must_use]
    pub fn was_never_taken(&self) -> bool {
        self.status.phase == SnapshotPhase::Failed && self.status.captured_at.is_none()
    }
}
