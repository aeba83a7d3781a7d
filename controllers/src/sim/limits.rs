//! Simulated limits of VMMs.

use stead_schemas::names::Uid;

use super::World;
use super::vmms::Vmm;
use crate::host::{HostError, Limits, LimitsSeen, VmmLimits};

impl Vmm {
    pub(super) fn limits_seen(&self) -> LimitsSeen {
        LimitsSeen { vcpus: Some(self.limits.vcpus), memory: Some(self.limits.memory) }
    }
}

impl Limits for World {
    async fn inspect(&self, owner: &Uid) -> Result<Option<LimitsSeen>, HostError> {
        self.verb("inspect limits", owner.as_str(), |state| {
            Ok(state.machines.get(owner).map(Vmm::limits_seen))
        })
        .await
    }

    async fn set(&self, owner: &Uid, limits: VmmLimits) -> Result<(), HostError> {
        self.on_vmm("limit", owner, |vmm| {
            vmm.limits = limits;
            Ok(())
        })
        .await
    }
}
