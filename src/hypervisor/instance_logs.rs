//! The port `InstanceLogs`: the directories of consoles, VMM logs and journals.

use stead_controllers::host::{HostError, InstanceLogs};
use stead_schemas::names::Uid;

use super::hypervisors::Hypervisors;
use super::save::on_thread;
use crate::host::directories::remove_dir;

impl InstanceLogs for Hypervisors {
    async fn exist(&self, owner: &Uid) -> Result<bool, HostError> {
        let logs = self.paths(owner).logs().to_owned();
        logs.try_exists().map_err(|error| HostError::io("observe", logs.display().to_string(), error))
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        let (logs, name) = (self.paths(owner).logs().to_owned(), owner.clone());
        let failed = move |error| HostError::io("discard the logs of", name.as_str(), error);
        on_thread(owner, move || remove_dir(&logs).map_err(failed)).await
    }
}
