//! Simulated disk files.

use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::World;
use super::snapshots::CapturedDisk;
use crate::host::{DiskFile, Disks, HostError, HostErrorKind, Space};

impl World {
    /// Sets the space that is left on the host's disk.
    pub fn set_space(&self, available: Bytes) {
        self.lock().space_available = available;
    }

    /// Prepares a file for a disk, under this name.
    pub fn prepare_disk(&self, name: Uid, size: Bytes) {
        self.lock().prepared.insert(name, size);
    }
}

impl Disks for World {
    async fn list(&self) -> Result<Vec<DiskFile>, HostError> {
        self.verb("list", "disks", |state| {
            let file = |(owner, size): (&Uid, &Bytes)| DiskFile { owner: owner.clone(), size: *size };
            Ok(state.disks.iter().map(file).collect())
        })
        .await
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<DiskFile>, HostError> {
        self.verb("inspect disk", owner.as_str(), |state| {
            Ok(state.disks.get(owner).map(|&size| DiskFile { owner: owner.clone(), size }))
        })
        .await
    }

    async fn create(&self, owner: &Uid, size: Bytes) -> Result<(), HostError> {
        self.verb("create disk", owner.as_str(), |state| {
            if state.space_available.0 == 0 {
                return Err(HostError::new(HostErrorKind::Exhausted, "create disk", owner.as_str()));
            }
            if !state.disks.contains_key(owner) {
                state.disks.insert(owner.clone(), size);
                state.lower_layers.remove(owner);
            }
            Ok(())
        })
        .await
    }

    async fn copy(
        &self,
        owner: &Uid,
        snapshot: &Uid,
        of: Option<&Uid>,
        size: Bytes,
    ) -> Result<(), HostError> {
        self.verb("copy disk", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "copy disk", owner.as_str());
            let CapturedDisk { size: taken, age, lower_layer } =
                state.captured_disk(snapshot, of).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if taken < size {
                return Err(refuse(HostErrorKind::Permanent));
            }
            if !state.disks.contains_key(owner) {
                state.disks.insert(owner.clone(), taken);
                state.disk_ages.insert(owner.clone(), age);
                state.lower_layers.extend(lower_layer.map(|layer| (owner.clone(), layer)));
            }
            Ok(())
        })
        .await
    }

    async fn take(&self, owner: &Uid, prepared: &Uid) -> Result<(), HostError> {
        self.verb("take disk", owner.as_str(), |state| {
            if state.disks.contains_key(owner) {
                return Ok(());
            }
            let missing = || HostError::new(HostErrorKind::Missing, "take disk", owner.as_str());
            let size = state.prepared.remove(prepared).ok_or_else(missing)?;
            state.disks.insert(owner.clone(), size);
            Ok(())
        })
        .await
    }

    async fn grow(&self, owner: &Uid, size: Bytes) -> Result<(), HostError> {
        self.verb("grow disk", owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "grow disk", owner.as_str());
            let present = state.disks.get_mut(owner).ok_or_else(missing)?;
            *present = size.max(*present);
            Ok(())
        })
        .await
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("remove disk", owner.as_str(), |state| {
            state.disks.remove(owner);
            Ok(())
        })
        .await
    }

    async fn space(&self) -> Result<Space, HostError> {
        self.verb("read", "space", |state| {
            Ok(Space { total: Bytes(1 << 40), available: state.space_available, reserve: Bytes(1 << 30) })
        })
        .await
    }
}
