//! Instance: a program of an image that should run in a VM of its own.
//!
//! `spec.power` alone is the desired state of running; the eight states of the wire are observations. A
//! program that ends by itself ends its *run*; `start` begins the next run by raising `spec.run`.

use std::collections::BTreeMap;
use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::compression::{DesiredCompression, SnapshotPolicy};
use crate::condition::Condition;
use crate::egress::EgressSpec;
use crate::health::{HealthCheck, HealthStatus};
use crate::meta::Object;
use crate::names::{Digest, ImageRef, Platform, Uid};
use crate::numbers::{Generation, GrantNo, LaunchId, RunNo, StandbyNo};
use crate::policy::{AutoStandbyPolicy, IdleStatus, RestartPolicy, RestartStatus};
use crate::quantity::{Bytes, Rate};
use crate::resource::{Usage, vm_memory};
use crate::root_image::{NextImage, PinnedImage};
use crate::volume::VolumeMount;

/// The kind of instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The image that the client named; the image object has the same name.
    pub image: ImageRef,
    pub platform: Platform,
    /// Minimum pull of the content: the registry must have resolved it for the image's `pull` of this
    /// number, or later; 0 allows content of any age.
    #[serde(default)]
    pub pull: u64,
    /// Version of the image below the root disk, raised by 1 with every change of it: content that was pinned for
    /// another version does not apply.
    #[serde(default)]
    pub image_version: u64,
    pub vcpus: u32,
    pub memory: Bytes,
    /// Memory on top of `memory` that the guest can give back and get again while it runs: a multiple of
    /// [`limits::MEMORY_BLOCK`].
    #[serde(default)]
    pub hotplug: Bytes,
    /// The part of `hotplug` that the guest should have; `None` means all of it.
    #[serde(default)]
    pub hotplugged: Option<Bytes>,
    /// Hotplug memory that was taken back for the host, for a while.
    #[serde(default)]
    pub memory_hold: Option<MemoryHold>,
    pub overlay: Bytes,
    /// The limits of traffic that the client asked for.
    #[serde(default)]
    pub rates: Rates,
    pub env: BTreeMap<String, Secret>,
    /// Mediated egress: `None` for a guest that reaches the outside by itself.
    #[serde(default)]
    pub egress: Option<EgressSpec>,
    /// The entrypoint that replaces the image's entrypoint, and then the image's cmd too.
    pub entrypoint: Option<Vec<String>>,
    /// The command that replaces the image's cmd.
    pub cmd: Option<Vec<String>>,
    pub has_network: bool,
    pub hypervisor: Hypervisor,
    pub skip_guest_agent: bool,
    pub skip_kernel_headers: bool,
    #[serde(default)]
    pub restart: RestartPolicy,
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// Version of `health`, raised by 1 with every change: counts made with another check do not apply.
    #[serde(default)]
    pub health_version: u64,
    /// Time at which the instance is deleted.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    #[serde(default)]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// Time before which the instance does not go to standby by itself.
    #[serde(default)]
    pub hold_until: Option<Timestamp>,
    pub power: Power,
    /// The cause of the last change of `power`.
    #[serde(default)]
    pub power_by: PowerCause,
    /// Time at which `power` was last requested: the grace of a stop counts from here.
    pub power_since: Timestamp,
    /// The desired run; starts at 1, and is raised by 1 by every `start`.
    pub run: RunNo,
    /// Number of standbys requested so far; a saved memory bears the number of the standby it was saved for.
    #[serde(default)]
    pub standby: StandbyNo,
    /// The last grant of processors and memory, which admission gives; 0 in records of earlier versions, and while
    /// there was none. The instance holds them until its status says that it gave this grant back.
    #[serde(default)]
    pub grant: GrantNo,
    /// True if the instance is stopped or deleted without giving the guest time.
    pub is_forced: bool,
    #[serde(default)]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// Compression of the memory of the last standby.
    #[serde(default)]
    pub compression: Option<DesiredCompression>,
    /// The source of the instance's first disk contents, and perhaps of its memory.
    #[serde(default)]
    pub origin: Option<Origin>,
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Changes that wait for the next start.
    #[serde(default)]
    pub pending: Pending,
    /// The allocations that were chosen in admission.
    pub allocated: Allocated,
}

/// An upper limit of the hotplug memory of a guest until some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryHold {
    pub hotplugged: Bytes,
    pub until: Timestamp,
}

/// Changes of the fields that a VM is started with. `None` means no change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pending {
    pub vcpus: Option<u32>,
    pub memory: Option<Bytes>,
    pub hotplug: Option<Bytes>,
    /// New size of the disk over the image, which is larger than the present one.
    pub overlay: Option<Bytes>,
    /// New values of environment variables; `None` removes the variable.
    pub env: BTreeMap<String, Option<Secret>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub hypervisor: Option<Hypervisor>,
    pub skip_guest_agent: Option<bool>,
    pub skip_kernel_headers: Option<bool>,
    /// A new image, with an empty root disk over it.
    pub image: Option<NextImage>,
    pub card: Option<CardChange>,
    /// True if a program that runs is started again for these changes once their image is on the host.
    pub restarts: bool,
}

/// A change of an instance's connection to the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CardChange {
    /// The instance gets this network card.
    Add(Uid),
    /// The instance loses its network card.
    Remove,
}

/// The limits of an instance's traffic. `None` stands for the host's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Traffic to the guest, over its network card.
    #[serde(default)]
    pub download: Option<Rate>,
    /// Traffic from the guest, over its network card.
    #[serde(default)]
    pub upload: Option<Rate>,
    /// Bytes read and written on the root disk and all volumes together.
    #[serde(default)]
    pub disk: Option<Rate>,
}

impl InstanceSpec {
    /// Returns the limit of the disks, or `None` without one.
    #[must_use]
    pub fn disk_rate(&self) -> Option<Rate> {
        self.rates.disk.filter(|rate| rate.0 > 0)
    }

    /// Returns the memory of the guest when it has all of its hotplug memory, in whole megabytes, as VMMs count it.
    #[must_use]
    pub fn memory_max(&self) -> Bytes {
        in_all(self.memory, self.hotplug)
    }

    /// Returns the same of the VM after the next start.
    fn next_memory_max(&self) -> Bytes {
        in_all(self.pending.memory.unwrap_or(self.memory), self.pending.hotplug.unwrap_or(self.hotplug))
    }

    /// Returns the hotplug memory that the guest should have now.
    #[must_use]
    pub fn hotplug_target(&self, now: Timestamp) -> Bytes {
        let held = self.memory_hold.filter(|hold| now < hold.until).map(|hold| hold.hotplugged);
        [self.hotplugged, held].into_iter().flatten().fold(self.hotplug, Bytes::min)
    }

    /// Returns what a VM of the instance takes of its host while it runs, or after its next start where that is more,
    /// apart from the disks, which are counted by themselves.
    #[must_use]
    pub fn demand(&self) -> Usage {
        let rate = |rate: Option<Rate>| rate.map_or(0, |rate| u128::from(rate.0));
        Usage {
            vcpus: u128::from(self.pending.vcpus.map_or(self.vcpus, |next| next.max(self.vcpus))),
            memory: vm_memory(self.memory_max().max(self.next_memory_max())),
            download: rate(self.rates.download),
            upload: rate(self.rates.upload),
            disk_io: rate(self.rates.disk),
            ..Usage::default()
        }
    }

    /// Returns when the instance goes to standby by itself unless a client connects; `None` while no
    /// countdown runs.
    #[must_use]
    pub fn standby_due(&self, idle: &IdleStatus) -> Option<Timestamp> {
        let timeout = self.auto_standby.as_ref()?.timeout()?;
        let timeout = SignedDuration::try_from(timeout).unwrap_or(SignedDuration::MAX);
        let due = idle.idle_since?.saturating_add(timeout).unwrap_or(Timestamp::MAX);
        Some(self.hold_until.map_or(due, |hold| hold.max(due)))
    }
}

fn in_all(memory: Bytes, hotplug: Bytes) -> Bytes {
    Bytes((memory.mib_ceil() << 20).saturating_add(hotplug.0))
}

/// Choices that were made in the commit that stored the spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocated {
    pub image: Uid,
    pub disk: Uid,
    #[serde(rename = "port")]
    pub nic: Option<Uid>,
    /// The vsock context id, 3 and up; unique on this host.
    pub cid: u32,
}

/// The snapshot that an instance was forked from, or was last restored from in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub snapshot: Uid,
    /// Digest of the image below the snapshot's disk, which belongs below its copies too.
    pub image_digest: Option<Digest>,
    /// The `InstanceSpec::standby` of the spec with this origin; it distinguishes an origin from the next one.
    #[serde(rename = "generation")]
    pub standby: StandbyNo,
    /// The run that continues from the snapshot's memory; `None` when only the disk is taken over.
    pub memory_for_run: Option<RunNo>,
    /// True if the instance was created from the snapshot and cannot exist without it; false after a restore
    /// in place, and in records of earlier versions.
    #[serde(default)]
    pub is_fork: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    Running,
    Stopped,
    Standby,
    /// A pooled instance of its snapshot: restored, complete except for its name, and held. It has no owner
    /// until it becomes a fork.
    Warm,
}

/// The cause of the desired power state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PowerCause {
    /// A client requested it.
    #[default]
    Client,
    /// No client was connected for as long as the policy says.
    Idle,
    /// A client connected.
    Traffic,
}

/// A program that runs VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub enum Hypervisor {
    #[serde(rename = "cloud-hypervisor")]
    CloudHypervisor,
    #[serde(rename = "firecracker")]
    Firecracker,
    #[serde(rename = "qemu")]
    Qemu,
    #[serde(rename = "qemu-microvm")]
    QemuMicrovm,
    #[serde(rename = "vz")]
    Vz,
}

impl Hypervisor {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
            Self::QemuMicrovm => "qemu-microvm",
            Self::Vz => "vz",
        }
    }
}

/// The states of an instance: the wire's eight words, case-sensitive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "wire", schemars(rename = "InstanceState"))]
pub enum State {
    /// The VMM is up and the guest is not started, or the instance is still being prepared.
    #[default]
    Created,
    Initializing,
    Running,
    Paused,
    Shutdown,
    Stopped,
    Standby,
    /// The state cannot be observed; always with `state_error`.
    Unknown,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub state: State,
    pub state_error: Option<String>,
    /// Digest of the content that `spec.image` meant when it was first ready. It is kept, so that the
    /// overlay never meets another lower layer.
    pub image_digest: Option<Digest>,
    /// The `InstanceSpec::image_version` of that content.
    #[serde(default)]
    pub image_version: u64,
    /// Content of the image that waits for the next start.
    #[serde(default)]
    pub next_image: Option<PinnedImage>,
    /// The last run that ended for good; a `spec.run` beyond it is still to be carried out.
    pub ended_run: RunNo,
    /// The last end of the program; `exit_run` is the run in which it ended.
    pub exit: Option<Exit>,
    #[serde(default)]
    pub exit_run: RunNo,
    /// The last launch that was observed: the next launch has the next number.
    #[serde(default)]
    pub launch: LaunchId,
    /// The launch whose program was last observed to run.
    #[serde(default)]
    pub started_launch: Option<LaunchId>,
    /// The launch whose end was recorded and is followed by another launch of the same run: its machine is
    /// removed, and the run continues.
    #[serde(default)]
    pub ended_launch: Option<LaunchId>,
    /// Time of that end: the grace of the launch's program counts from here.
    #[serde(default)]
    pub ended_launch_at: Option<Timestamp>,
    #[serde(default)]
    pub restart: RestartStatus,
    #[serde(default)]
    pub health: HealthStatus,
    #[serde(default)]
    pub idle: IdleStatus,
    /// Milliseconds in each state, without the time in the current state since `state_since`.
    #[serde(default)]
    pub phases: BTreeMap<State, u64>,
    /// Time since which the instance has been in its current state.
    #[serde(default)]
    pub state_since: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub stopped_at: Option<Timestamp>,
    /// Number of VMMs that died unexpectedly since the program last ran for a while.
    pub vmm_deaths: u32,
    /// The last such death, recorded before its leftovers are removed.
    pub last_death: Option<VmmDeath>,
    /// Time since which the VMM's process has lived without answering.
    pub unreachable_since: Option<Timestamp>,
    /// True if a memory to continue from is on the host.
    #[serde(default)]
    pub has_saved_memory: bool,
    /// The origin whose memory was taken over (`Origin::standby`). It is never taken over twice, since the
    /// disk has moved on by then.
    #[serde(default)]
    pub adopted: StandbyNo,
    /// The launch in which a pooled instance became ready to be taken.
    #[serde(default)]
    pub prepared_launch: Option<LaunchId>,
    pub vmm_pid: Option<u32>,
    /// Hotplug memory that the guest has, as it last reported while it ran; `None` without any.
    #[serde(default)]
    pub hotplugged: Option<Bytes>,
    /// True if the host can take memory back from the VM that runs, which has no RAM of a saved file.
    #[serde(default)]
    pub returns_memory: bool,
    /// The last grant that was given back: no VM was there any more, and none was to come.
    #[serde(default)]
    pub returned: GrantNo,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

impl Object<Instance> {
    /// True if the instance is pooled: made in advance, and neither visible to clients nor named by them.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        self.spec.power == Power::Warm
    }

    /// True if this is a pooled instance that a fork may take.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        let is_held = self.status.state == State::Paused && self.status.prepared_launch.is_some();
        self.is_pooled() && is_held && !self.meta.is_deleting()
    }

    /// Returns the origin whose memory this instance's spec still has to take over.
    #[must_use]
    pub fn awaits_memory(&self) -> Option<&Origin> {
        let InstanceSpec { origin, run, power, .. } = &self.spec;
        let origin = origin.as_ref()?;
        let is_wanted = origin.memory_for_run == Some(*run)
            && *power != Power::Stopped
            && *run > self.status.ended_run
            && !self.meta.is_deleting();
        (is_wanted && self.status.adopted != origin.standby).then_some(origin)
    }
}

/// A death of a VMM: its launch, and when it was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmDeath {
    #[serde(alias = "launched_at")]
    pub launch: LaunchId,
    pub noticed_at: Timestamp,
    /// True if the kernel ended it because memory was short.
    #[serde(default)]
    pub is_out_of_memory: bool,
}

/// The end of a program, as the guest's PID 1 saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code by shell convention: the program's code, 126/127 when not started, 128+n for signal n;
    /// `None` when the guest went away without a report.
    pub code: Option<i32>,
    pub message: String,
    /// True if the guest could not start the program at all.
    pub is_boot_failure: bool,
}

/// Text that is sealed at rest and never logged: its `Debug` prints only stars, and its memory is cleared.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_reach_debug_output() {
        assert_eq!(format!("{:?}", Secret("hunter2".to_owned())), "***");
    }
}
