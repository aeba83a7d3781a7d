//! Volume: a file system of its own, mounted in instances and outliving them.
//!
//! The content is in a disk that the volume owns. The instances alone record which of them mount it: nothing
//! of that is kept here, so nothing is left behind by a removed instance.

use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::meta::Kind;
use crate::names::Uid;
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::{Ref, Role};

/// The kind of volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volume {}

impl Kind for Volume {
    const NAME: &'static str = "volume";
    const FINALIZER: &'static str = "volume";
    type Spec = VolumeSpec;
    type Status = VolumeStatus;

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Apparent size; blocks are allocated as guests write.
    pub size: Bytes,
    /// The disk with the content; it is replaced when an instance is restored to a snapshot with the volume.
    pub disk: Uid,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

/// A volume in an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// The volume; mounted at most once in an instance.
    pub volume: Uid,
    /// The mount path, absolute and in its shortest form.
    pub path: String,
    pub access: Access,
}

impl VolumeMount {
    /// Returns the reference to the volume, from the object that has the mount.
    #[must_use]
    pub fn reference(&self) -> Ref {
        Ref::to::<Volume>(self.access.role(), &self.volume)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Reading and writing by one instance, while no other instance mounts the volume.
    ReadWrite,
    /// Reading by any number of instances, while none writes.
    ReadOnly,
    /// Reading by any number of instances, while none writes; writes go to a disk of the instance's own.
    Overlay { disk: Uid, size: Bytes },
}

impl Access {
    #[must_use]
    pub fn is_writing(&self) -> bool {
        *self == Self::ReadWrite
    }

    /// Returns the role that a mount with this access has towards its volume.
    #[must_use]
    pub fn role(&self) -> Role {
        if self.is_writing() { Role::Writes } else { Role::Reads }
    }
}
