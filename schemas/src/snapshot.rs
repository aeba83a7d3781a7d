//! Snapshot: what an instance was at one moment, kept for restores in place and for forks.
//!
//! Of the kind Standby it holds memory and disk of one moment; of the kind Stopped the disk alone.
//! It is taken once: one that failed, or whose files went missing, is not taken again. It outlives
//! its source.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::compression::Compression;
use crate::condition::Condition;
use crate::instance::{Instance, InstanceSpec};
use crate::meta::{Kind, Object};
use crate::names::{Digest, Name, Uid};
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::{Ref, Role};
use crate::schedule::SnapshotSchedule;
use crate::volume::{Volume, VolumeMount};

/// The kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {}

impl Kind for Snapshot {
    const NAME: &'static str = "snapshot";
    const FINALIZER: &'static str = "snapshot";
    type Spec = SnapshotSpec;
    type Status = SnapshotStatus;

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
    /// Unique among the snapshots of its source.
    pub name: Option<Name>,
    pub purpose: SnapshotPurpose,
    /// The run of a schedule that it was taken by; none when somebody asked for it.
    #[serde(default)]
    pub schedule: Option<ScheduledRun>,
    /// The wish that it is taken of: what a fork or a restore begins with.
    pub instance: Box<InstanceSpec>,
    /// The content below the disk; kept as long as the snapshot is.
    pub image_digest: Option<Digest>,
    /// Of its memory.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Forks held ready.
    #[serde(default)]
    pub pool: u32,
    /// Captured beside the root's disk: those that its volumes are written to.
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

/// One run of a schedule, by the time that it was due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduledRun {
    pub schedule: Uid,
    pub due: Timestamp,
}

/// The wire's two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SnapshotKind {
    Standby,
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPurpose {
    /// Asked for, and deleted when that is asked for.
    Kept,
    /// The way of a fork from its source: gone when the fork has what it needs, shown to nobody.
    Fork,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPhase {
    #[default]
    Pending,
    Ready,
    Failed,
}

/// How far the compression of a memory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackingState {
    #[default]
    Plain,
    Packing,
    Packed {
        /// Of the memory, in the file now and before.
        packed: Bytes,
        plain: Bytes,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    pub phase: SnapshotPhase,
    /// Allocated on the host.
    pub size: Bytes,
    /// The moment that it is of.
    pub captured_at: Option<Timestamp>,
    /// Why it failed.
    pub error: Option<String>,
    /// Time at which it failed; none in records of earlier versions.
    #[serde(default)]
    pub failed_at: Option<Timestamp>,
    #[serde(default)]
    pub packing: PackingState,
    /// Why its memory could not be compressed.
    #[serde(default)]
    pub packing_error: Option<String>,
    /// Of `pool`, those that a fork could take now.
    #[serde(default)]
    pub warm: u32,
    /// Reason why the pool does not have its size, if something is wrong with it.
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
