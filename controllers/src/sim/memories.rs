//! The memory file of a simulated VM, complete or cut off.

use stead_schemas::numbers::StandbyNo;
use stead_schemas::snapshot::PackingState;

use super::machines::Vmm;
use crate::host::{Memory, SavedMemory};

#[derive(Debug, Clone)]
pub(super) struct MemoryFile {
    /// Number of its save, and the VM in the saved state.
    pub(super) saved: Option<(StandbyNo, Vmm)>,
    pub(super) packing: PackingState,
}

impl MemoryFile {
    pub(super) fn vmm(&self) -> Option<&Vmm> {
        self.saved.as_ref().map(|(_, vmm)| vmm)
    }

    pub(super) fn seen(&self) -> Memory {
        match &self.saved {
            None => Memory::Loose,
            Some((standby, vmm)) => Memory::Saved(SavedMemory {
                standby: *standby,
                run: vmm.run,
                launch: vmm.launch,
                packing: self.packing,
            }),
        }
    }
}
