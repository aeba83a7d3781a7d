//! Machines: VMM processes and the guests inside, seen from outside.
//!
//! A machine is found by its runtime directory (named by the instance's uid) and its process by pid, start
//! time and boot id. It survives the daemon, and a new daemon finds it the same way.

use std::future::Future;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_schemas::compression::Compression;
use stead_schemas::instance::{Exit, Hypervisor};
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::network::Mac;
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;

use super::HostError;

/// A machine that exists on the host. It has at least a runtime directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub owner: Uid,
    /// The run that the machine was launched for.
    pub run: RunNo,
    /// The hypervisor that the machine was launched on.
    pub hypervisor: Hypervisor,
    pub vmm: VmmState,
    /// Process id of the VMM, while the process lives.
    pub pid: Option<u32>,
    /// The launch of the instance that this machine belongs to.
    pub launch: LaunchId,
    pub launched_at: Timestamp,
    /// Time since which this daemon receives the guest's messages; earlier messages may have been lost.
    pub listening_since: Timestamp,
    /// True if the far end of the machine's network card is gone: its TAP was removed while it was attached.
    /// A TAP that was created since under the same name is a different interface.
    pub is_network_cut: bool,
    /// True if the machine was launched with the headers of its kernel.
    pub has_headers: bool,
    pub guest: GuestView,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmState {
    /// The process exists and its vCPUs were never started.
    Created,
    Running,
    Paused,
    /// The VMM paused the guest because the host had no space for a write to the guest's disk. A resume
    /// repeats the write. The value is the space that is free now.
    Stalled(Bytes),
    /// The guest powered off or panicked; the process waits to be ended.
    Shutdown,
    /// The process ended; its sockets and directory are left over.
    Dead,
    /// The process lives but does not answer; the text describes the failure.
    Unreachable(String),
}

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
    /// The identity that the guest reports, and in `assume_error` why it could not take over the identity it
    /// was sent.
    pub incarnation: Option<String>,
    pub assume_error: Option<String>,
    /// The incarnation of the last `assume` since the channel was last connected.
    pub identity_told: Option<String>,
    /// True if the VM runs and its guest has not answered the host for at least 30 s.
    pub is_unresponsive: bool,
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

/// The parameters of a VMM, with all references resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    pub owner: Uid,
    pub run: RunNo,
    /// The launch number. For a restore it is the launch of the saved memory.
    pub launch: LaunchId,
    pub hypervisor: Hypervisor,
    pub vcpus: u32,
    pub memory: Bytes,
    pub rootfs: Digest,
    pub overlay: Uid,
    pub cid: u32,
    pub network: Option<NetworkCard>,
    /// True if the kernel headers should be attached, if this host has them.
    pub wants_headers: bool,
    /// The volume disks, in the order in which the guest knows them.
    pub volumes: Vec<VolumeDisk>,
}

/// The disk of a volume, or the disk that holds one instance's writes over a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDisk {
    pub disk: Uid,
    pub is_read_only: bool,
}

impl LaunchPlan {
    /// Returns all disks, the root disk first.
    #[must_use]
    pub fn disks(&self) -> Vec<VolumeDisk> {
        disks(&self.overlay, &self.volumes)
    }
}

fn disks(overlay: &Uid, volumes: &[VolumeDisk]) -> Vec<VolumeDisk> {
    let root = VolumeDisk { disk: overlay.clone(), is_read_only: false };
    std::iter::once(root).chain(volumes.iter().cloned()).collect()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkCard {
    pub tap: LinkName,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// The RAM of a VM as it is kept on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// Incomplete memory, left by a save or a discard that a crash cut short. It has no value.
    Loose,
    /// Complete and current memory; a VM can continue from it.
    Saved(SavedMemory),
}

/// The description of a saved memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMemory {
    /// The standby number it was saved for, from the spec (`InstanceSpec::standby`).
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    pub packing: PackingState,
}

/// The memory to take over, and the numbers under which it is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptPlan {
    pub owner: Uid,
    pub snapshot: Uid,
    /// The numbers that [`SavedMemory`] will show.
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    /// The owner's disk, which is a copy of the snapshot's disk.
    pub overlay: Uid,
    /// The volume disks, in the order of the snapshot's: copies, or the same disks where they are only read.
    pub volumes: Vec<VolumeDisk>,
}

impl AdoptPlan {
    /// Returns all disks, in the order of [`LaunchPlan::disks`].
    #[must_use]
    pub fn disks(&self) -> Vec<VolumeDisk> {
        disks(&self.overlay, &self.volumes)
    }
}

/// The VMMs of one scope.
pub trait Machines: Send + Sync + 'static {
    /// Returns the owners of every runtime directory, every record directory and every memory.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns `None` if there is neither a runtime directory nor a process.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<Machine>, HostError>> + Send;
    /// Returns true if logs or other lasting records of this instance exist.
    fn has_records(&self, owner: &Uid) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Starts a VMM and its vCPUs. The error is Conflict if a VMM exists already, and Unsupported for a
    /// hypervisor that this host does not have. After a crash during the call, `inspect` shows what was made:
    /// a directory, a `Created` VMM, or a running VMM.
    fn launch(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Sends the configuration to the guest that waits for it.
    fn configure(
        &self,
        owner: &Uid,
        config: &stead_schemas::guest::Config,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Sends a guest its new identity, with random bytes of the host. The effect is visible in the guest's
    /// incarnation.
    fn assume(
        &self,
        owner: &Uid,
        assumed: &stead_schemas::guest::Assumed,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks the guest to end its program and power off.
    fn shutdown(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Notifies the guest that its exit record is stored; the guest then powers off.
    fn acknowledge_exit(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Connects a running machine's card to the TAP of this name; the guest notices only the lost frames. The
    /// error is Missing if the TAP does not exist.
    fn reconnect(&self, owner: &Uid, tap: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Resumes the vCPUs. The error is Conflict while a saved memory exists, because it would become older
    /// than the disk.
    fn resume(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Pauses the vCPUs.
    fn pause(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Returns `None` if there is neither a saved memory nor any remainder of one.
    fn memory(&self, owner: &Uid) -> impl Future<Output = Result<Option<Memory>, HostError>> + Send;
    /// Saves the memory of a paused VM durably; the VM stays paused. If the save fails, the VM is resumed,
    /// and the part that was saved has no value.
    fn save(&self, owner: &Uid, standby: StandbyNo) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts a VMM from the saved memory and leaves it paused; the memory stays saved. After a crash during
    /// the call, `inspect` shows a `Created` VMM. The error is Permanent if no retry can help: a memory can
    /// continue only on the hypervisor that it was saved from.
    fn restore(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Marks the saved memory as discarded in one durable step, and then removes its files.
    fn discard_memory(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes the memory of a snapshot the owner's saved memory, durably, and shares its pages. The error is
    /// Missing if the snapshot has no memory, and Permanent if that memory is damaged.
    fn adopt_memory(&self, plan: &AdoptPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts to compress the saved memory and returns at once. Returns `Ok` while the compression runs and
    /// when it is done. The end is announced. The failure of the last attempt is returned once, by the next
    /// call. A restore that comes first cancels the compression.
    fn compress_memory(
        &self,
        owner: &Uid,
        how: Compression,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends the process by its identity (never by pid alone) and waits until it is gone.
    fn kill(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the runtime directory and the cgroup of a dead machine. The error is Conflict while the
    /// machine lives.
    fn release(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes logs and other lasting records.
    fn discard_records(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
