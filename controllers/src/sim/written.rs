//! Simulated writes: a VM's memory knows the state of its disks, and this checks whether it still holds.

use std::collections::BTreeMap;

use stead_schemas::names::{Digest, Uid};
use stead_schemas::quantity::Bytes;

use super::State;
use crate::host::VolumeDisk;

/// A disk of a VM, and the number of times that VMs had begun to write to it by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) disk: VolumeDisk,
    age: u64,
}

impl Known {
    pub(super) fn of(disks: impl Iterator<Item = VolumeDisk>) -> Vec<Self> {
        disks.map(|disk| Self { disk, age: 0 }).collect()
    }
}

impl State {
    pub(super) fn has_disks(&self, known: &[Known]) -> bool {
        known.iter().all(|known| self.disks.contains_key(&known.disk.disk))
    }

    /// Returns the sizes of the files of volumes' disks, by the numbers of the disks. The first disk is the root's.
    pub(super) fn volume_sizes(&self, known: &[Known]) -> BTreeMap<u32, Bytes> {
        let volumes = known.iter().skip(1);
        volumes.filter_map(|known| Some((known.disk.number, *self.disks.get(&known.disk.disk)?))).collect()
    }

    pub(super) fn age(&self, disk: &Uid) -> u64 {
        self.disk_ages.get(disk).copied().unwrap_or(0)
    }

    /// Notes that a VM begins to run with its disks; returns whether each of them is as the VM knew it.
    pub(super) fn begin_to_write(&mut self, owner: &Uid, known: &mut [Known]) -> bool {
        self.note_sharing(owner, known);
        let mut is_as_known = true;
        for Known { disk, age } in known {
            is_as_known &= *age == self.age(&disk.disk);
            if !disk.is_read_only {
                *self.disk_ages.entry(disk.disk.clone()).or_default() += 1;
            }
            *age = self.age(&disk.disk);
        }
        is_as_known
    }

    /// Notes that a root disk is used over this content of an image; records a corruption if it was over another.
    pub(super) fn put_over(&mut self, owner: &Uid, disk: &Uid, content: &Digest) {
        let first = self.lower_layers.entry(disk.clone()).or_insert_with(|| content.clone());
        if first != content {
            self.corrupted.push(owner.clone());
        }
    }

    /// Records a corruption when two VMs have the same disk and one of them writes to it.
    fn note_sharing(&mut self, owner: &Uid, known: &[Known]) {
        let others = self.machines.iter().filter(|(uid, vmm)| *uid != owner && vmm.is_alive());
        let is_shared = others.flat_map(|(_, vmm)| &vmm.disks).any(|theirs| {
            known.iter().any(|own| {
                let is_written = !own.disk.is_read_only || !theirs.disk.is_read_only;
                own.disk.disk == theirs.disk.disk && is_written
            })
        });
        if is_shared {
            self.corrupted.push(owner.clone());
        }
    }
}
