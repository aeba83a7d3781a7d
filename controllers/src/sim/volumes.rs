//! Volumes that come and go while simulated VMs run.

use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::World;
use super::vmms::Vmm;
use super::written::Known;
use crate::host::{HostError, HostErrorKind, VolumeDisk};

impl Vmm {
    /// Returns whether no disk of a volume has this number.
    fn has_room_for(&self, number: u32) -> bool {
        self.disks.iter().skip(1).all(|known| known.disk.number != number)
    }

    /// Takes out a disk, whatever the guest does with it.
    pub(super) fn remove_volume(&mut self, number: u32) {
        let mut index = 0;
        self.disks.retain(|known| {
            index += 1;
            index == 1 || known.disk.number != number
        });
        self.unsure_volume = self.unsure_volume.filter(|unsure| *unsure != number);
        self.volume_sizes.remove(&number);
    }

    /// Makes a disk known with this size, which never becomes smaller.
    pub(super) fn grow_volume(&mut self, number: u32, size: Bytes) {
        if !self.has_room_for(number) {
            let known = self.volume_sizes.entry(number).or_default();
            *known = size.max(*known);
        }
    }
}

impl World {
    /// Puts the disk of a volume into a VM. A crash in the middle leaves a part of it.
    pub(super) async fn add_volume(&self, owner: &Uid, disk: &VolumeDisk) -> Result<(), HostError> {
        self.verb("put a volume into the VM of", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "put a volume into the VM of", owner.as_str());
            let vmm = state.machines.get(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if !vmm.has_room_for(disk.number) || vmm.unsure_volume.is_some() {
                return Err(refuse(HostErrorKind::Conflict));
            }
            let mut added = Known::of(std::iter::once(disk.clone()));
            if !state.has_disks(&added) {
                return Err(refuse(HostErrorKind::Missing));
            }
            let is_cut = state.rng.chance(state.faults.after);
            let size = state.disks.get(&disk.disk).copied();
            // It may be written to from here on, however far this comes.
            state.begin_to_write(owner, &mut added);
            let vmm = state.machines.get_mut(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if is_cut {
                vmm.unsure_volume = Some(disk.number);
                return Err(refuse(HostErrorKind::Transient));
            }
            vmm.volume_sizes.extend(size.map(|size| (disk.number, size)));
            vmm.disks.extend(added);
            vmm.disks[1..].sort_by_key(|known| known.disk.number);
            Ok(())
        })
        .await
    }
}
