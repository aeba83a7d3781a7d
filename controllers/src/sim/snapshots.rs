//! Simulated snapshots: the ages of the disks, and the VM in the captured state.

use std::collections::BTreeMap;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::names::{Digest, Uid};
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CompressionState, SnapshotKind};

use super::memories::{COMPRESSED, MemoryFile};
use super::vmms::Vmm;
use super::{State, World};
use crate::host::{CapturePlan, Captured, HostError, HostErrorKind, Memory, Snapshots, VmmState};
use crate::runtime::Clock;

/// A snapshot's directory; `None` when a capture was cut off.
#[derive(Debug, Clone)]
pub(super) struct SnapshotDir(Option<Taken>);

/// A disk as it was captured.
#[derive(Debug, Clone)]
pub(super) struct CapturedDisk {
    pub(super) size: Bytes,
    pub(super) age: u64,
    pub(super) lower_layer: Option<Digest>,
}

#[derive(Debug, Clone)]
struct Taken {
    at: Timestamp,
    /// The disks by the uid under which each was captured; the root's has no uid.
    disks: BTreeMap<Option<Uid>, CapturedDisk>,
    vmm: Option<Vmm>,
    compression_state: CompressionState,
}

impl SnapshotDir {
    pub(super) fn seen(&self) -> Captured {
        match &self.0 {
            None => Captured::Incomplete,
            Some(taken) => Captured::Whole {
                kind: if taken.vmm.is_some() { SnapshotKind::Standby } else { SnapshotKind::Stopped },
                size: Bytes(taken.disks.values().map(|disk| disk.size.0).sum()),
                captured_at: taken.at,
                compression_state: taken.compression_state,
            },
        }
    }
}

impl State {
    pub(super) fn captured_vmm(&self, snapshot: &Uid) -> Option<&Vmm> {
        self.snapshots.get(snapshot)?.0.as_ref()?.vmm.as_ref()
    }

    /// Returns a snapshot's disk.
    pub(super) fn captured_disk(&self, snapshot: &Uid, of: Option<&Uid>) -> Option<CapturedDisk> {
        self.snapshots.get(snapshot)?.0.as_ref()?.disks.get(&of.cloned()).cloned()
    }

    /// Returns the disks to copy; `None` when one is missing.
    fn disks_to_capture(&self, plan: &CapturePlan) -> Option<BTreeMap<Option<Uid>, CapturedDisk>> {
        let root = [(None, &plan.disk)];
        let all = root.into_iter().chain(plan.volumes.iter().map(|disk| (Some(disk.clone()), disk)));
        let captured = |disk: &Uid| {
            let lower_layer = self.lower_layers.get(disk).cloned();
            Some(CapturedDisk { size: *self.disks.get(disk)?, age: self.age(disk), lower_layer })
        };
        all.map(|(of, disk)| Some((of, captured(disk)?))).collect()
    }

    /// Returns the VM at one moment, held while it is copied.
    fn vmm_to_capture(&mut self, plan: &CapturePlan, now: Timestamp) -> Result<Option<Vmm>, HostError> {
        let refuse = || HostError::new(HostErrorKind::Conflict, "capture", plan.snapshot.as_str());
        let memory = self.memories.get(&plan.source);
        match (plan.kind, self.machines.get(&plan.source)) {
            (SnapshotKind::Stopped, None) => Ok(None),
            (SnapshotKind::Standby, Some(vmm)) if vmm.is_running_of(plan.run) && memory.is_none() => {
                Ok(Some(vmm.paused_copy(now)))
            }
            (SnapshotKind::Standby, None) => {
                let seen = memory.map(MemoryFile::seen);
                let is_asked = matches!(seen, Some(Memory::Saved(saved)) if saved.run == plan.run);
                let vmm = memory.and_then(MemoryFile::vmm).filter(|_| is_asked);
                vmm.cloned().map(Some).ok_or_else(refuse)
            }
            _ => Err(refuse()),
        }
    }
}

impl Snapshots for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "snapshots", |state| Ok(state.snapshots.keys().cloned().collect())).await
    }

    async fn inspect(&self, snapshot: &Uid) -> Result<Option<Captured>, HostError> {
        self.verb("inspect snapshot", snapshot.as_str(), |state| {
            Ok(state.snapshots.get(snapshot).map(SnapshotDir::seen))
        })
        .await
    }

    async fn measure(&self, plan: &CapturePlan) -> Result<Bytes, HostError> {
        self.verb("measure", plan.source.as_str(), |_| Ok(Bytes(64 << 20))).await
    }

    async fn capture(&self, plan: &CapturePlan) -> Result<(), HostError> {
        let (time, now) = (self.time(), self.now());
        self.verb("capture", plan.snapshot.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "capture", plan.snapshot.as_str());
            let vmm = state.vmm_to_capture(plan, time)?;
            let disks = state.disks_to_capture(plan).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            // A crash in the middle leaves an incomplete snapshot, and may leave the VM held.
            let (is_cut, is_held) = (state.rng.chance(state.faults.after), state.rng.chance(500));
            if is_cut
                && is_held
                && let Some(vmm) = state.machines.get_mut(&plan.source)
            {
                vmm.hold(time);
            }
            let taken = (!is_cut).then_some(Taken {
                at: now,
                disks,
                vmm,
                compression_state: CompressionState::Plain,
            });
            state.snapshots.insert(plan.snapshot.clone(), SnapshotDir(taken));
            if is_cut { Err(refuse(HostErrorKind::Transient)) } else { Ok(()) }
        })
        .await
    }

    async fn compress(&self, snapshot: &Uid, _: Compression) -> Result<(), HostError> {
        self.verb("compress", snapshot.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "compress", snapshot.as_str());
            let taken = state.snapshots.get_mut(snapshot).and_then(|dir| dir.0.as_mut());
            taken.ok_or_else(missing)?.compression_state = COMPRESSED;
            Ok(())
        })
        .await
    }

    async fn remove(&self, snapshot: &Uid) -> Result<(), HostError> {
        self.verb("remove snapshot", snapshot.as_str(), |state| {
            state.snapshots.remove(snapshot);
            Ok(())
        })
        .await
    }
}

impl Vmm {
    fn is_running_of(&self, run: RunNo) -> bool {
        self.state == VmmState::Running && self.run == run
    }
}
