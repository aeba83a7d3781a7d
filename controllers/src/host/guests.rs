//! Guests: the control channel to the agent inside a VM.
//!
//! The state of a guest is part of [`Machine`](super::Machine), so that it always belongs to the VMM that was
//! observed with it. No verb of this port reads.

use std::future::Future;

use stead_schemas::guest::{Config, MountedVolumes, NewIdentity, VolumeMount};
use stead_schemas::instance::Exit;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::HostError;

/// The state that the guest reported on the control channel during this boot. Reports of an earlier boot are
/// not included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestView {
    pub phase: GuestPhase,
    /// The end of the program, once it ended. The guest repeats it until it is acknowledged.
    pub exit: Option<Exit>,
    /// True if `shutdown` was called for this boot and the request was delivered to the guest. The first
    /// `inspect` after the call shows it. It may be lost when the daemon restarts; the request is then
    /// repeated.
    pub is_shutdown_requested: bool,
    /// True if `acknowledge_exit` was called for this boot and delivered, with the same limits as
    /// `is_shutdown_requested`.
    pub is_exit_acknowledged: bool,
    /// The identity that the guest reports, and in `identity_error` why it could not take over the identity it
    /// was sent.
    pub incarnation: Option<String>,
    pub identity_error: Option<String>,
    /// The incarnation of the last `take_identity` since the channel was last connected.
    pub identity_sent: Option<String>,
    /// The hotplug memory that the guest reports; `None` without any.
    pub memory: Option<GuestMemory>,
    /// The last `resize_memory` since the channel was last connected.
    pub memory_asked: Option<Bytes>,
    /// The volumes that the guest reports; `None` while it has not, and from guests that cannot change them.
    pub volumes: Option<MountedVolumes>,
    /// The last `mount_volumes` since the channel was last connected.
    pub volumes_asked: Option<Vec<VolumeMount>>,
    /// True if the VM runs and its guest has not answered the host for at least 30 s.
    pub is_unresponsive: bool,
}

/// The hotplug memory of a guest, as it reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestMemory {
    /// The part that the guest was last asked to use; `None` before it was asked: it then uses all of it.
    pub target: Option<Bytes>,
    pub used: Bytes,
    /// The reason why it uses another part.
    pub error: Option<String>,
    /// Numbers of the blocks that it does not use, counted from the physical address 0.
    pub unused: Vec<u64>,
    /// Number of the last change of these blocks.
    pub change: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GuestPhase {
    /// The guest has not sent anything yet (it boots, or the channel is being connected).
    Silent,
    /// The guest's PID 1 asked for the configuration.
    AwaitingConfig,
    /// The guest was configured and prepares to start. The state is visible as soon as `configure` has
    /// returned.
    Configured,
    /// The program started, and the agent answers unless it is skipped.
    Ready,
    /// The program ended.
    Exited,
}

/// Requests to the guests of one scope. A request is sent and not awaited: its effect is visible in
/// [`GuestView`]. The error is Missing if no VMM of this owner is connected.
pub trait Guests: Send + Sync + 'static {
    /// Sends the configuration to the guest that waits for it.
    fn configure(&self, owner: &Uid, config: &Config) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Sends a guest its new identity, with random bytes of the host. The effect is visible in the guest's
    /// incarnation.
    fn take_identity(
        &self,
        owner: &Uid,
        identity: &NewIdentity,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks the guest to use this part of its hotplug memory. The effect is visible in the memory that it reports.
    fn resize_memory(
        &self,
        owner: &Uid,
        hotplugged: Bytes,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks the guest to have exactly these volumes mounted. The effect is visible in the volumes that it reports.
    fn mount_volumes(
        &self,
        owner: &Uid,
        volumes: &[VolumeMount],
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks the guest to end its program and power off.
    fn shutdown(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Notifies the guest that its exit record is stored; the guest then powers off.
    fn acknowledge_exit(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
