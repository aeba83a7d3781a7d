//! The saved memories of simulated VMs, complete or cut off.

use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::CompressionState;

use super::World;
use super::vmms::Vmm;
use crate::host::{
    AdoptPlan, HostError, HostErrorKind, LaunchPlan, Memories, Memory, SavedMemory, VmmState, VolumeDisk,
};

/// The state of every compressed memory.
pub(super) const COMPRESSED: CompressionState =
    CompressionState::Compressed { compressed: Bytes(1 << 20), plain: Bytes(4 << 20) };

#[derive(Debug, Clone)]
pub(super) struct MemoryFile {
    /// Number of its save, and the VM in the saved state.
    pub(super) saved: Option<(StandbyNo, Vmm)>,
    pub(super) compression_state: CompressionState,
}

impl MemoryFile {
    pub(super) fn vmm(&self) -> Option<&Vmm> {
        self.saved.as_ref().map(|(_, vmm)| vmm)
    }

    pub(super) fn seen(&self) -> Memory {
        match &self.saved {
            None => Memory::Incomplete,
            Some((standby, vmm)) => Memory::Saved(SavedMemory {
                standby: *standby,
                run: vmm.run,
                launch: vmm.launch,
                compression_state: self.compression_state,
                volumes: vmm.disks.iter().skip(1).map(|known| known.disk.number).collect(),
            }),
        }
    }
}

impl Memories for World {
    async fn inspect(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        self.verb("inspect memory", owner.as_str(), |state| {
            Ok(state.memories.get(owner).map(MemoryFile::seen))
        })
        .await
    }

    async fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        self.verb("save", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "save", owner.as_str());
            let vmm = state.machines.get(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if vmm.state != VmmState::Paused {
                return Err(refuse(HostErrorKind::Conflict));
            }
            // A crash in the middle leaves an incomplete memory.
            let is_cut = state.rng.chance(state.faults.after);
            let saved = (!is_cut).then(|| (standby, vmm.clone()));
            if !is_cut {
                state.note_save(owner, standby);
            }
            state
                .memories
                .insert(owner.clone(), MemoryFile { saved, compression_state: CompressionState::Plain });
            if is_cut { Err(refuse(HostErrorKind::Transient)) } else { Ok(()) }
        })
        .await
    }

    async fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        self.verb("restore", plan.owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "restore", plan.owner.as_str());
            if state.machines.contains_key(&plan.owner) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            let saved = state.memories.get(&plan.owner).and_then(|memory| memory.saved.clone());
            let (_, mut vmm) = saved.ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if vmm.hypervisor != plan.hypervisor {
                return Err(refuse(HostErrorKind::Permanent));
            }
            if plan.network.as_ref().is_some_and(|card| !state.links.contains_key(&card.tap)) {
                return Err(refuse(HostErrorKind::Missing));
            }
            if plan.network.as_ref().is_some_and(|card| state.is_watched(&card.tap)) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            state.put_over(&plan.owner, &plan.overlay, &plan.rootfs);
            state.next_pid += 1;
            (vmm.pid, vmm.is_network_cut) = (state.next_pid, false);
            vmm.disk_rate = plan.disk_rate;
            vmm.volume_sizes = state.volume_sizes(&vmm.disks);
            (vmm.is_restored, vmm.has_unused_memory) = (true, false);
            (vmm.tap, vmm.address) =
                plan.network.as_ref().map(|card| (card.tap.clone(), card.address)).unzip();
            vmm.state =
                if state.rng.chance(state.faults.after) { VmmState::Created } else { VmmState::Paused };
            state.machines.insert(plan.owner.clone(), vmm);
            Ok(())
        })
        .await
    }

    async fn discard(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("discard memory", owner.as_str(), |state| {
            state.memories.remove(owner);
            Ok(())
        })
        .await
    }

    async fn adopt(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        let now = self.time();
        self.verb("adopt memory", plan.owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "adopt memory", plan.owner.as_str());
            let captured = state.captured_vmm(&plan.snapshot).cloned();
            let mut vmm = captured.ok_or_else(|| refuse(HostErrorKind::Missing))?;
            let disks = plan.disks();
            for (index, known) in vmm.disks.iter_mut().enumerate() {
                let number = known.disk.number;
                let is_it = |disk: &&VolumeDisk| disk.number == number;
                let disk = if index == 0 { disks.first() } else { disks.iter().skip(1).find(is_it) };
                known.disk = disk.cloned().ok_or_else(|| refuse(HostErrorKind::Permanent))?;
            }
            if !state.has_disks(&vmm.disks) {
                return Err(refuse(HostErrorKind::Missing));
            }
            (vmm.run, vmm.launch) = (plan.run, plan.launch);
            (vmm.launched_at, vmm.shown_launched_at) = (now, self.shown(now));
            let is_cut = state.rng.chance(state.faults.after);
            let saved = (!is_cut).then_some((plan.standby, vmm));
            state
                .memories
                .insert(plan.owner.clone(), MemoryFile { saved, compression_state: CompressionState::Plain });
            if is_cut { Err(refuse(HostErrorKind::Transient)) } else { Ok(()) }
        })
        .await
    }

    async fn compress(&self, owner: &Uid, _: Compression) -> Result<(), HostError> {
        self.verb("compress memory", owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "compress memory", owner.as_str());
            state.memories.get_mut(owner).ok_or_else(missing)?.compression_state = COMPRESSED;
            Ok(())
        })
        .await
    }
}
