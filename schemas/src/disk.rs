//! Disk: a sparse ext4 file that instances mount.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::condition::{self, Condition};
use crate::meta::{Kind, Object};
use crate::names::Uid;
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::{Ref, Role, WokenBy};
use crate::resource::Usage;
use crate::snapshot::Snapshot;

/// The kind of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {}

impl Kind for Disk {
    const NAME: &'static str = "disk";
    const FINALIZER: &'static str = "disk";
    type Spec = DiskSpec;
    type Status = DiskStatus;
    const WOKEN_BY: &'static [WokenBy] = &[WokenBy::Target(Role::AwaitsCopy)];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let is_to_be_made = !object.meta.is_deleting()
            && !object.status.was_created
            && object.status.content_lost_at.is_none();
        let source = object.spec.source.as_ref().filter(|_| is_to_be_made);
        source.map(|snapshot| Ref::to::<Snapshot>(Role::AwaitsCopy, snapshot)).into_iter().collect()
    }

    /// Returns the size of the disk. A disk gives its space back when its deletion is requested.
    fn usage(object: &Object<Self>) -> Usage {
        let size = if object.meta.is_deleting() { 0 } else { u128::from(object.spec.size.0) };
        match object.spec.purpose {
            DiskPurpose::RootOverlay | DiskPurpose::VolumeOverlay => {
                Usage { overlays: size, ..Usage::default() }
            }
            DiskPurpose::Volume => Usage { volumes: size, ..Usage::default() },
        }
    }
}

impl Object<Disk> {
    /// True if the file is as the present spec describes it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        condition::is_ready(&self.status.conditions)
            && self.status.observed_generation == self.meta.generation
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Apparent size, in bytes; blocks are allocated as the guest writes.
    pub size: Bytes,
    pub purpose: DiskPurpose,
    /// The snapshot whose disk this disk starts as a copy of; without it, the disk starts empty.
    #[serde(default)]
    pub source: Option<Uid>,
    /// The uid under which the source was captured among the snapshot's disks; without it, the source is the
    /// root's disk.
    #[serde(default)]
    pub source_disk: Option<Uid>,
    /// Size of the source, in bytes, if it is smaller than this disk: the disk grows after the copy.
    #[serde(default)]
    pub source_size: Option<Bytes>,
    /// The name of a prepared file that becomes this disk, complete with its content.
    #[serde(default)]
    pub prepared: Option<Uid>,
}

impl DiskSpec {
    /// Returns the spec of a disk that begins empty.
    #[must_use]
    pub fn empty(size: Bytes, purpose: DiskPurpose) -> Self {
        Self { size, purpose, source: None, source_disk: None, source_size: None, prepared: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskPurpose {
    /// The writable layer over an instance's image.
    RootOverlay,
    /// The content of a volume.
    Volume,
    /// The writable layer of one instance over a volume that others read too.
    VolumeOverlay,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Apparent size of the file that was observed on the host, in bytes.
    pub size: Option<Bytes>,
    /// True if the file was observed. If the file is missing later, its content is lost: the loss is
    /// recorded here and reported in a condition (`Degraded`), and only then a fresh file is made.
    pub was_created: bool,
    /// Time at which the file was last found to be missing with its content.
    #[serde(default)]
    pub content_lost_at: Option<Timestamp>,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}
