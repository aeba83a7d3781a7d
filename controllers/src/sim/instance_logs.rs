//! The logs of simulated instances: whether there are any.

use stead_schemas::names::Uid;

use super::World;
use crate::host::{HostError, InstanceLogs};

impl InstanceLogs for World {
    async fn exist(&self, owner: &Uid) -> Result<bool, HostError> {
        self.verb("inspect records", owner.as_str(), |state| Ok(state.records.contains(owner))).await
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("discard records", owner.as_str(), |state| {
            state.records.remove(owner);
            Ok(())
        })
        .await
    }
}
