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
    /// Number of the mount's first disk in the VM, which it keeps as long as it is there. `None` in records of earlier
    /// versions, whose disks are numbered by the order of the mounts.
    #[serde(default)]
    pub first_disk: Option<u32>,
    /// True if the volume is to be unmounted and taken out of the VM. The mount is there until that is done.
    #[serde(default)]
    pub is_leaving: bool,
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

    /// Returns how many disks of a VM a mount with this access needs.
    #[must_use]
    pub fn disks(&self) -> u32 {
        if matches!(self, Self::Overlay { .. }) { 2 } else { 1 }
    }
}

/// Returns the mounts, each with the number of its first disk in the VM.
pub fn numbered(mounts: &[VolumeMount]) -> impl Iterator<Item = (u32, &VolumeMount)> {
    mounts.iter().scan(0, |next, mount| {
        let first = mount.first_disk.unwrap_or(*next);
        *next = first.saturating_add(mount.access.disks());
        Some((first, mount))
    })
}

/// Returns the lowest number from which on so many disks are not used by any of the mounts.
#[must_use]
pub fn free_disk(mounts: &[VolumeMount], disks: u32) -> u32 {
    let taken: Vec<_> =
        numbered(mounts).map(|(first, mount)| first..first.saturating_add(mount.access.disks())).collect();
    let is_free = |first: &u32| taken.iter().all(|range| first + disks <= range.start || range.end <= *first);
    // One of the ends is free, because the last one is.
    let ends = taken.iter().map(|range| range.end);
    std::iter::once(0).chain(ends).filter(is_free).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_keep_their_numbers_and_a_new_one_gets_the_first_that_is_free() {
        let uid: Uid = format!("v{:023}", 0).parse().expect("valid");
        let mount = |first_disk, access| VolumeMount {
            volume: uid.clone(),
            path: "/data".to_owned(),
            access,
            first_disk,
            is_leaving: false,
        };
        let overlay = || Access::Overlay { disk: uid.clone(), size: Bytes(1) };
        let of = |mounts: &[VolumeMount]| {
            let numbers = numbered(mounts).map(|(first, _)| first).collect::<Vec<_>>();
            (numbers, free_disk(mounts, 1), free_disk(mounts, 2))
        };
        assert_eq!(of(&[]), (vec![], 0, 0));
        let earlier = [mount(None, Access::ReadOnly), mount(None, overlay()), mount(None, Access::ReadWrite)];
        assert_eq!(of(&earlier), (vec![0, 1, 3], 4, 4));
        let changed = [mount(Some(4), Access::ReadWrite), mount(Some(1), overlay())];
        assert_eq!(of(&changed), (vec![4, 1], 0, 5));
    }
}
