//! Policies: the rules and credentials of instances in the process that carries their connections, and the logs of what
//! it carried.

use std::future::Future;

use stead_schemas::egress::Policy;
use stead_schemas::names::Uid;

use super::HostError;

/// The state of one instance's policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicySeen {
    /// The fingerprint of the policy that is in force, or `None` without one, as when the process has ended.
    pub fingerprint: Option<String>,
    /// True if a log of the instance is kept.
    pub has_log: bool,
}

/// Access to the policies by their owners. The process keeps them in memory only: they end with it.
pub trait Policies: Send + Sync + 'static {
    /// Returns every owner of a policy or a log.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<PolicySeen, HostError>> + Send;
    /// Sets the policy of its owner, or replaces it. Requests that began keep the credentials that they began with;
    /// connections that are not allowed any more are cut. The error is Missing without a process.
    fn put(&self, policy: &Policy) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the policy and cuts the connections of its owner. Returns `Ok` if there is none.
    fn remove(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the log. Returns `Ok` if there is none.
    fn discard_log(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
