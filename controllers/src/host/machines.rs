//! Machines: VMM processes and the guests inside, seen from outside.
//!
//! A machine is found by its runtime directory (named by the instance's uid) and its process by
//! pid, start time and boot id. It does not die with the daemon; a new daemon finds it the same way.

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

/// What is there of an instance: its runtime directory at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub owner: Uid,
    /// The run it was launched for.
    pub run: RunNo,
    /// What it was launched on.
    pub hypervisor: Hypervisor,
    pub vmm: VmmState,
    /// While the VMM's process lives.
    pub pid: Option<u32>,
    /// Which of the instance's launches it is of.
    pub launch: LaunchId,
    pub launched_at: Timestamp,
    /// Since when this daemon hears what the guest says; before, nobody may have.
    pub listening_since: Timestamp,
    /// It has a network card whose far end is gone: its TAP was removed under it, and one that was
    /// made since under the same name is another.
    pub is_network_cut: bool,
    /// It was launched with the headers of its kernel.
    pub has_headers: bool,
    pub guest: GuestView,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmState {
    /// The process is there and its vCPUs were never started.
    Created,
    Running,
    Paused,
    /// Held by the VMM, because the host had no room for what the guest wrote to its disk; a resume
    /// writes it again. This much is free by now.
    Stalled(Bytes),
    /// The guest powered off or panicked; the process waits to be ended.
    Shutdown,
    /// The process ended; sockets and directory are left over.
    Dead,
    /// The process lives but does not answer; the text says how it failed.
    Unreachable(String),
}

/// What the guest said of this boot on the control channel; nothing of an earlier one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestView {
    pub phase: GuestPhase,
    /// The program's end, once it ended. Repeated by the guest until acknowledged.
    pub exit: Option<Exit>,
    /// `shutdown` was called for this boot and the request was handed to the guest; seen by the
    /// first `inspect` after it. May be forgotten when the daemon restarts: it is then asked again.
    pub is_shutdown_requested: bool,
    /// Likewise for `acknowledge_exit`.
    pub is_exit_acknowledged: bool,
    /// Who it says it is, and why it could not become who it was told it is.
    pub incarnation: Option<String>,
    pub assume_error: Option<String>,
    /// The incarnation of the last `assume` since the channel was last connected.
    pub identity_told: Option<String>,
    /// True while its VM runs and has not answered the host for at least 30 s.
    pub is_unresponsive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GuestPhase {
    /// Not heard of yet (booting, or the channel is being connected).
    Silent,
    /// Its PID 1 asked for the configuration.
    AwaitingConfig,
    /// It was configured and is preparing; seen as soon as `configure` has answered.
    Configured,
    /// The program started; the agent answers unless skipped.
    Ready,
    /// The program ended.
    Exited,
}

/// Everything a VMM needs; only resolved references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    pub owner: Uid,
    pub run: RunNo,
    /// Of a restore, the launch that the saved memory shows.
    pub launch: LaunchId,
    pub hypervisor: Hypervisor,
    pub vcpus: u32,
    pub memory: Bytes,
    pub rootfs: Digest,
    pub overlay: Uid,
    pub cid: u32,
    pub network: Option<NetworkCard>,
    /// With the headers of its kernel, where this host has them.
    pub wants_headers: bool,
    /// In the order in which the guest knows them.
    pub volumes: Vec<VolumeDisk>,
}

/// A disk of a volume, or of what one instance writes over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDisk {
    pub disk: Uid,
    pub is_read_only: bool,
}

impl LaunchPlan {
    /// All of them, the root's first.
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

/// A VM's RAM as it is kept on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// Left by a save or a discard that a crash cut short: worth nothing.
    Loose,
    /// Complete and current: a VM goes on from it.
    Saved(SavedMemory),
}

/// What a saved memory is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMemory {
    /// The wish it was saved for, `InstanceSpec::standby`.
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    pub packing: PackingState,
}

/// Whose memory to take over, and as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptPlan {
    pub owner: Uid,
    pub snapshot: Uid,
    /// As [`SavedMemory`] will show them.
    pub standby: StandbyNo,
    pub run: RunNo,
    pub launch: LaunchId,
    /// The owner's disk, which is a copy of the snapshot's.
    pub overlay: Uid,
    /// Likewise, or the very disks where they are only read; in the order of the snapshot's.
    pub volumes: Vec<VolumeDisk>,
}

impl AdoptPlan {
    /// As [`LaunchPlan::disks`] has them.
    #[must_use]
    pub fn disks(&self) -> Vec<VolumeDisk> {
        disks(&self.overlay, &self.volumes)
    }
}

/// VMMs of one scope.
pub trait Machines: Send + Sync + 'static {
    /// Owners of every runtime directory, every record directory and every memory.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// `None` when there is neither a runtime directory nor a process.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<Machine>, HostError>> + Send;
    /// Logs or other lasting records of this instance exist.
    fn has_records(&self, owner: &Uid) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Starts a VMM and its vCPUs. Conflict when one is there; Unsupported for a hypervisor that this host
    /// does not have. After a crash in between, `inspect`
    /// shows what was made: a directory, a `Created` VMM, or a running one.
    fn launch(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Answers the guest's wait for its configuration.
    fn configure(
        &self,
        owner: &Uid,
        config: &stead_schemas::guest::Config,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Tells a guest who it is from here on, with random bytes of the host. Seen by its incarnation.
    fn assume(
        &self,
        owner: &Uid,
        assumed: &stead_schemas::guest::Assumed,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks the guest to end its program and power off.
    fn shutdown(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Tells the guest that its exit record is stored; it powers off then.
    fn acknowledge_exit(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Plugs a running machine's card into the TAP of that name; the guest notices nothing but the
    /// lost frames. Missing when the TAP is not there.
    fn reconnect(&self, owner: &Uid, tap: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Lets the vCPUs run. Conflict while a saved memory is there: it would grow older than the disk.
    fn resume(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Holds the vCPUs.
    fn pause(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// `None` when there is neither a saved memory nor anything left of one.
    fn memory(&self, owner: &Uid) -> impl Future<Output = Result<Option<Memory>, HostError>> + Send;
    /// Makes the memory of a paused VM a saved one, durably; the VM stays paused. When it fails the
    /// VM is resumed, and what was saved of it counts as nothing.
    fn save(&self, owner: &Uid, standby: StandbyNo) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts a VMM from the saved memory and leaves it paused; the memory stays saved. After a
    /// crash in between, `inspect` shows a `Created` VMM. Permanent when no retry can help: a memory goes
    /// on only on the hypervisor that it was saved of.
    fn restore(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Has the saved memory be none, in one step, durably; then its files go.
    fn discard_memory(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Makes the memory of a snapshot the owner's saved one, durably, sharing its pages. Missing when
    /// the snapshot has none; Permanent when it is damaged.
    fn adopt_memory(&self, plan: &AdoptPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Begins to compress the saved memory and answers at once; while that goes on, or when it is done,
    /// `Ok`. Its end is announced. The failure of the last try is what the next call answers, once. A
    /// restore that comes first ends it, undone.
    fn compress_memory(
        &self,
        owner: &Uid,
        how: Compression,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends the process by its identity (never by bare pid) and waits until it is gone.
    fn kill(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the runtime directory and cgroup of a dead machine. Conflict while it lives.
    fn release(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes logs and other lasting records.
    fn discard_records(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
