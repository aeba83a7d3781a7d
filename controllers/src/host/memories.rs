//! Memories: the RAM and the device state of VMs, saved on the host so that a VMM can continue from them.

use std::future::Future;

use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};
use stead_schemas::snapshot::CompressionState;

use super::HostError;
use super::vmms::{LaunchPlan, VolumeDisk};

/// The RAM of a VM as it is kept on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// Incomplete memory, left by a save or a discard that a crash cut short. It has no value.
    Incomplete,
    /// Complete and current memory; a VM can continue from it.
    Saved(SavedMemory),
}

/// The description of a saved memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMemory {
    /// The standby number it was saved for, from the spec (`InstanceSpec::standby`).
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    pub compression_state: CompressionState,
    /// Numbers of the disks of volumes that the VM had.
    pub volumes: Vec<u32>,
}

/// The memory to take over, and the numbers under which it is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptPlan {
    pub owner: Uid,
    pub snapshot: Uid,
    /// The numbers that [`SavedMemory`] will show.
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    /// The owner's disk, which is a copy of the snapshot's disk.
    pub overlay: Uid,
    /// The volume disks, by their numbers: copies, or the same disks where they are only read. The memory continues with
    /// those whose numbers it was saved with.
    pub volumes: Vec<VolumeDisk>,
}

impl AdoptPlan {
    /// Returns all disks, in the order of [`LaunchPlan::disks`].
    #[must_use]
    pub fn disks(&self) -> Vec<VolumeDisk> {
        VolumeDisk::after_root(&self.overlay, &self.volumes)
    }
}

/// The saved memories of one scope, at most one for each instance.
pub trait Memories: Send + Sync + 'static {
    /// Returns `None` if there is neither a saved memory nor any remainder of one.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<Memory>, HostError>> + Send;
    /// Saves the memory of a paused VM durably; the VM stays paused. If the save fails, the VM is resumed,
    /// and the part that was saved has no value.
    fn save(&self, owner: &Uid, standby: StandbyNo) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts a VMM from the saved memory and leaves it paused; the memory stays saved. After a crash during
    /// the call, `Vmms::inspect` shows a `Created` VMM. The error is Permanent if no retry can help: a memory
    /// can continue only on the hypervisor that it was saved from.
    fn restore(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Marks the saved memory as discarded in one durable step, and then removes its files.
    fn discard(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes the memory of a snapshot the owner's saved memory, durably, and shares its pages. The error is
    /// Missing if the snapshot has no memory, and Permanent if that memory is damaged.
    fn adopt(&self, plan: &AdoptPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts to compress the saved memory and returns at once. Returns `Ok` while the compression runs and
    /// when it is done. The end is announced. The failure of the last attempt is returned once, by the next
    /// call. A restore that comes first cancels the compression.
    fn compress(&self, owner: &Uid, how: Compression) -> impl Future<Output = Result<(), HostError>> + Send;
}
