//! Logs of instances: consoles, VMM logs and journals, which outlive the VM and end with the instance.

use std::future::Future;

use stead_schemas::names::Uid;

use super::HostError;

/// The logs of one scope, by instance.
pub trait InstanceLogs: Send + Sync + 'static {
    /// Returns true if logs or other lasting records of this instance exist.
    fn exist(&self, owner: &Uid) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Removes logs and other lasting records. Returns `Ok` if there are none.
    fn remove(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
