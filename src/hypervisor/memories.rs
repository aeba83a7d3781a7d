//! The port `Memories`: the saved memories of VMs, whatever their driver. A save and a restore are its large verbs.

use stead_controllers::host::{AdoptPlan, HostError, LaunchPlan, Memories, Memory};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;

use super::hypervisors::Hypervisors;
use super::record::Record;
use super::save::on_thread;

impl Memories for Hypervisors {
    async fn inspect(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        self.observe_memory(owner)
    }

    async fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        self.save_memory(owner, standby).await
    }

    async fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _lock = self.locks.take(&plan.owner).await;
        self.compressor.end(&plan.owner).await;
        self.launch_saved(plan).await
    }

    async fn discard(&self, owner: &Uid) -> Result<(), HostError> {
        self.compressor.end(owner).await;
        self.forget_verified(owner);
        let (memory, paths) = (self.memory_dir(owner), self.paths(owner));
        let discard = move || match Record::read(&paths)? {
            Some(record) => memory.consume(record.mapped_inode()),
            None => memory.discard(),
        };
        on_thread(owner, discard).await
    }

    async fn adopt(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        self.adopt_snapshot(plan).await
    }

    async fn compress(&self, owner: &Uid, how: Compression) -> Result<(), HostError> {
        self.compressor.begin(owner, self.memory_dir(owner), how)
    }
}
