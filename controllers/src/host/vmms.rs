//! VMMs: the processes that VMs run in, seen from outside.
//!
//! A machine is found by its runtime directory (named by the instance's uid) and its process by pid, start
//! time and boot id. It survives the daemon, and a new daemon finds it the same way.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::confinement::Wall;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::network::Mac;
use stead_schemas::numbers::{LaunchId, RunNo};
use stead_schemas::quantity::{Bytes, Rate};

use super::guests::GuestView;
use super::{HostError, VmmLimits};

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
    pub disk_limit: DiskLimit,
    /// True if the host can take memory back that the guest does not use.
    pub returns_memory: bool,
    /// True if the guest gave memory back that the host has not taken yet.
    pub has_unused_memory: bool,
    /// The disks of volumes that are in the machine.
    pub volumes: Vec<VolumeDisk>,
    /// The number of a disk that was being put into the machine, or taken out, when a crash came.
    pub unsure_volume: Option<u32>,
    /// Sizes with which the machine knows its disks of volumes, in bytes, by their numbers. Machines of earlier versions
    /// have none until a disk grows.
    pub volume_sizes: BTreeMap<u32, Bytes>,
    /// True if disks of volumes can be put into this machine, and taken out, while it runs.
    pub has_live_volumes: bool,
    /// Walls that the VMM is not behind, as observed of its process. Meaningless without a process.
    pub missing_walls: BTreeSet<Wall>,
    /// True if the machine was launched with the headers of its kernel.
    pub has_headers: bool,
    /// True if the process has ended because memory was short: the kernel killed it.
    pub is_out_of_memory: bool,
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

/// The limit of the bytes that a machine reads and writes on its disks, per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskLimit {
    /// The limit of this machine cannot be changed, because an earlier daemon launched it without one, or its VMM does
    /// not answer.
    Fixed,
    Unlimited,
    Limited(Rate),
}

impl From<Option<Rate>> for DiskLimit {
    fn from(rate: Option<Rate>) -> Self {
        rate.map_or(Self::Unlimited, Self::Limited)
    }
}

/// A single change of a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineChange {
    /// The card is connected to the TAP of this name. The guest notices only the lost frames.
    Tap(LinkName),
    /// The disks have this limit, or none. The guest waits for what is above the limit.
    DiskRate(Option<Rate>),
    /// The host takes back the memory that the guest reports as unused.
    UnusedMemory,
    /// This disk is put into the machine.
    AddVolume(VolumeDisk),
    /// The disk of this number is taken out of the machine, if it is there, whatever the guest does with it.
    RemoveVolume(u32),
    /// The disk of this number has this size from now on, which its file has already.
    GrowVolume(u32, Bytes),
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
    /// The memory of the guest in all, in whole megabytes.
    pub memory: Bytes,
    /// The part of it that the guest can give back while it runs.
    pub hotplug: Bytes,
    /// The limit of the disks, or `None` without one.
    pub disk_rate: Option<Rate>,
    pub rootfs: Digest,
    pub overlay: Uid,
    pub cid: u32,
    pub network: Option<NetworkCard>,
    /// True if the kernel headers should be attached, if this host has them.
    pub wants_headers: bool,
    /// The volume disks, in the order in which the guest knows them.
    pub volumes: Vec<VolumeDisk>,
    pub limits: VmmLimits,
}

/// The disk of a volume, or the disk that holds one instance's writes over a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDisk {
    pub disk: Uid,
    pub is_read_only: bool,
    /// Number by which the guest knows the disk among those of volumes; 0 for the root disk, which is none of them, and in
    /// records of earlier versions.
    #[serde(default)]
    pub number: u32,
}

impl LaunchPlan {
    /// Returns all disks, the root disk first.
    #[must_use]
    pub fn disks(&self) -> Vec<VolumeDisk> {
        VolumeDisk::after_root(&self.overlay, &self.volumes)
    }
}

impl VolumeDisk {
    /// Returns the disks of a VM in the order in which its guest knows them, the root disk first.
    pub(super) fn after_root(overlay: &Uid, volumes: &[Self]) -> Vec<Self> {
        let root = Self { disk: overlay.clone(), is_read_only: false, number: 0 };
        std::iter::once(root).chain(volumes.iter().cloned()).collect()
    }

    /// Numbers the disks of an earlier version, which are numbered by their order.
    pub fn number_earlier<'a>(disks: impl Iterator<Item = &'a mut Self>) {
        let mut next = 0;
        for disk in disks {
            disk.number = disk.number.max(next);
            next = disk.number + 1;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkCard {
    pub tap: LinkName,
    pub mac: Mac,
    pub address: Ipv4Addr,
    /// True if the TAP can have several queues.
    pub has_queues: bool,
}

/// The VMMs of one scope.
pub trait Vmms: Send + Sync + 'static {
    /// Declares what VMs on this hypervisor can do, or `None` if this host has no driver for it. The answer
    /// is a constant of the program: it does not depend on what is installed.
    fn capabilities(&self, hypervisor: Hypervisor) -> Option<VmmCapabilities>;
    /// Returns the owners of everything of VMs that this host keeps: VMMs and their leftovers, logs, and
    /// memories.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns `None` if there is neither a runtime directory nor a process.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<Machine>, HostError>> + Send;
    /// Starts a VMM and its vCPUs. The error is Conflict if a VMM exists already, and Unsupported for a
    /// hypervisor that this host does not have. After a crash during the call, `inspect` shows what was made:
    /// a directory, a `Created` VMM, or a running VMM.
    fn launch(&self, plan: &LaunchPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Pauses the vCPUs.
    fn pause(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Resumes the vCPUs. The error is Conflict while a saved memory exists, because it would become older
    /// than the disk.
    fn resume(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Changes a running machine. The error is Missing if the machine, or a TAP that it should have, does not exist.
    fn change(
        &self,
        owner: &Uid,
        change: &MachineChange,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends the process by its identity (never by pid alone) and waits until it is gone.
    fn kill(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the runtime directory and the cgroup of a dead machine. The error is Conflict while the
    /// machine lives.
    fn release(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
