//! Mediators: the process that carries the connections of guests whose egress is mediated.
//!
//! The process outlives the daemon, like a VMM, and is found again by its mark. Its end and its death are announced on
//! the adapter's change channel.

use std::future::Future;

use stead_schemas::egress::MediatorSettings;
use stead_schemas::names::Uid;

use super::HostError;

/// The state of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediatorSeen {
    pub pid: u32,
    /// True if it runs the program of this daemon, and not that of an earlier or later version.
    pub is_current: bool,
    /// The settings that it was started with, or `None` if it does not answer.
    pub settings: Option<MediatorSettings>,
}

/// Access to the processes, by the object that they were started for.
pub trait Mediators: Send + Sync + 'static {
    /// Returns every object that a process was started for.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns `None` if no process runs for the object.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<MediatorSeen>, HostError>> + Send;
    /// Starts a process without policies, and returns when it answers. The error is Conflict if another program has one
    /// of its ports. A crash leaves at most a process that `inspect` finds.
    fn launch(
        &self,
        owner: &Uid,
        settings: &MediatorSettings,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends the process and its connections. Returns `Ok` if there is none.
    fn retire(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
