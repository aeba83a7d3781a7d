//! Volume: a file system of its own, mounted in instances and outliving them.
//!
//! Its content is in a disk that it owns. Who mounts it is told by the instances alone: nothing of that
//! is kept here, so nothing is left of an instance that went.

use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::meta::Kind;
use crate::names::Uid;
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::{Ref, Role};

/// The kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volume {}

impl Kind for Volume {
    const NAME: &'static str = "volume";
    const FINALIZER: &'static str = "volume";
    type Spec = VolumeSpec;
    type Status = VolumeStatus;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Apparent size; blocks are allocated as guests write.
    pub size: Bytes,
    /// Where its content is; another takes its place when an instance is restored to a snapshot with it.
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
    /// Once in one instance.
    pub volume: Uid,
    /// Absolute and in its shortest form.
    pub path: String,
    pub access: Access,
}

impl VolumeMount {
    /// The reference of whatever has the mount to the volume.
    #[must_use]
    pub fn reference(&self) -> Ref {
        Ref::to::<Volume>(self.access.role(), &self.volume)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// By one instance, while no other mounts it.
    ReadWrite,
    /// By any number of instances, while none writes.
    ReadOnly,
    /// Likewise; what is written is in a disk of the instance's own.
    Overlay { disk: Uid, size: Bytes },
}

impl Access {
    #[must_use]
    pub fn is_writing(&self) -> bool {
        *self == Self::ReadWrite
    }

    /// The role that a mount with this access has towards its volume.
    #[must_use]
    pub fn role(&self) -> Role {
        if self.is_writing() { Role::Writes } else { Role::Reads }
    }
}
