//! Instance: a program of an image that shall run in a VM of its own.
//!
//! `spec.power` is the whole wish about running; the eight states of the wire are observations.
//! A program that ends by itself ends its *run*; `start` begins the next one by raising `spec.run`.

use std::collections::BTreeMap;
use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::compression::{CompressionWish, SnapshotPolicy};
use crate::condition::Condition;
use crate::health::{HealthCheck, HealthStatus};
use crate::image::Image;
use crate::limits;
use crate::meta::{Kind, Object};
use crate::names::{Digest, ImageRef, Platform, Uid};
use crate::numbers::{Generation, LaunchId, RunNo, StandbyNo};
use crate::policy::{AutoStandbyPolicy, IdleStatus, RestartPolicy, RestartStatus};
use crate::quantity::Bytes;
use crate::references::{Ref, Role, Target};
use crate::snapshot::Snapshot;
use crate::volume::VolumeMount;

/// The kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {}

impl Kind for Instance {
    const NAME: &'static str = "instance";
    const FINALIZER: &'static str = "vm";
    type Spec = InstanceSpec;
    type Status = InstanceStatus;

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let (spec, status) = (&object.spec, &object.status);
        let origin_content = spec.origin.as_ref().and_then(|origin| origin.image_digest.as_ref());
        let content = status.image_digest.iter().chain(origin_content).map(Ref::to_content);
        let awaited = object.awaits_memory().map(|origin| &origin.snapshot);
        let awaited = awaited.map(|snapshot| Ref::to::<Snapshot>(Role::AwaitsMemory, snapshot));
        let timeout = spec.auto_standby.as_ref().and_then(AutoStandbyPolicy::timeout);
        let is_counted = status.state == State::Running && timeout.is_some();
        let counted = is_counted.then_some(Ref { role: Role::Counts, target: Target::Connections });
        let image = Ref::to::<Image>(Role::Image, &spec.allocated.image);
        let mounts = spec.volumes.iter().map(VolumeMount::reference);
        content.chain(awaited).chain(counted).chain([image]).chain(mounts).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// What the client named; the image object has the same name.
    pub image: ImageRef,
    pub platform: Platform,
    /// The content has to be what the registry said when it was asked for the image's `pull` of this number, or
    /// later; 0 is content of any age.
    #[serde(default)]
    pub pull: u64,
    pub vcpus: u32,
    pub memory: Bytes,
    pub overlay: Bytes,
    pub env: BTreeMap<String, Secret>,
    /// Replaces the image's entrypoint, and then the image's cmd too.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's cmd.
    pub cmd: Option<Vec<String>>,
    pub has_network: bool,
    pub hypervisor: Hypervisor,
    pub skip_guest_agent: bool,
    pub skip_kernel_headers: bool,
    #[serde(default)]
    pub restart: RestartPolicy,
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// +1 by every change of `health`: what was counted by another check says nothing.
    #[serde(default)]
    pub health_version: u64,
    /// The instance is deleted then.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    #[serde(default)]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// It does not go to standby by itself before.
    #[serde(default)]
    pub hold_until: Option<Timestamp>,
    pub power: Power,
    /// Who changed `power` last.
    #[serde(default)]
    pub power_by: PowerCause,
    /// When `power` was last asked for: the grace of a stop counts from here.
    pub power_since: Timestamp,
    /// The run that is wanted; starts at 1, +1 by every `start`.
    pub run: RunNo,
    /// Standbys asked for so far; a saved memory bears the number of the one it was saved for.
    #[serde(default)]
    pub standby: StandbyNo,
    /// Stop or delete without giving the guest time.
    pub is_forced: bool,
    #[serde(default)]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// Of the memory of the last standby.
    #[serde(default)]
    pub compression: Option<CompressionWish>,
    /// What its disk, and perhaps its memory, begin with.
    #[serde(default)]
    pub origin: Option<Origin>,
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Chosen in admission.
    pub allocated: Allocated,
}

impl InstanceSpec {
    /// When it goes to standby by itself unless somebody connects; `None` while nothing counts.
    #[must_use]
    pub fn standby_due(&self, idle: &IdleStatus) -> Option<Timestamp> {
        let timeout = self.auto_standby.as_ref()?.timeout()?;
        let timeout = SignedDuration::try_from(timeout).unwrap_or(SignedDuration::MAX);
        let due = idle.idle_since?.saturating_add(timeout).unwrap_or(Timestamp::MAX);
        Some(self.hold_until.map_or(due, |hold| hold.max(due)))
    }
}

/// Choices made in the commit that stored the wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocated {
    pub image: Uid,
    pub disk: Uid,
    pub port: Option<Uid>,
    /// vsock context id, 3 and up; unique on this host.
    pub cid: u32,
}

/// The snapshot that an instance was forked from, or was last restored from in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub snapshot: Uid,
    /// What was below the snapshot's disk, and belongs below its copies.
    pub image_digest: Option<Digest>,
    /// `InstanceSpec::standby` of the wish: one origin is told from the next by it.
    #[serde(rename = "generation")]
    pub standby: StandbyNo,
    /// The run that goes on from the snapshot's memory; `None` when only the disk is taken over.
    pub memory_for_run: Option<RunNo>,
    /// True if the instance was created from the snapshot, and is nothing without it; false after a restore in
    /// place, and in records of earlier versions.
    #[serde(default)]
    pub is_fork: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    Running,
    Stopped,
    Standby,
    /// Restored, made an instance of its own but for its name, and held: a member of its snapshot's pool,
    /// nobody's until it becomes a fork.
    Warm,
}

/// Why an instance shall be as `power` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerCause {
    /// Somebody asked.
    #[default]
    Client,
    /// Nobody was connected for as long as its policy says.
    Idle,
    /// Somebody connected.
    Traffic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

    /// How many block devices its VMs have room for, for volumes.
    #[must_use]
    pub fn volume_devices_max(self) -> usize {
        match self {
            Self::CloudHypervisor | Self::Firecracker | Self::Qemu | Self::Vz => limits::VOLUME_DEVICES_MAX,
            Self::QemuMicrovm => limits::VOLUME_DEVICES_WITHOUT_PCI_MAX,
        }
    }
}

/// The wire's eight words, case-sensitive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum State {
    /// VMM up and guest not started, or still being prepared.
    #[default]
    Created,
    Initializing,
    Running,
    Paused,
    Shutdown,
    Stopped,
    Standby,
    /// Only while the observer itself cannot observe; always with `state_error`.
    Unknown,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub state: State,
    pub state_error: Option<String>,
    /// The content that `spec.image` meant when it was first ready; kept, so that the overlay
    /// never meets another lower layer.
    pub image_digest: Option<Digest>,
    /// The last run that ended for good; `spec.run` beyond it is still to be carried out.
    pub ended_run: RunNo,
    /// How the program last ended, and in which run that was.
    pub exit: Option<Exit>,
    #[serde(default)]
    pub exit_run: RunNo,
    /// The last launch that was observed: the next one has the number after it.
    #[serde(default)]
    pub launch: LaunchId,
    /// The launch whose program was last observed to run.
    #[serde(default)]
    pub started_launch: Option<LaunchId>,
    /// The launch whose end was recorded and is followed by another of the same run: its machine
    /// goes, the run goes on.
    #[serde(default)]
    pub ended_launch: Option<LaunchId>,
    /// When that was: the grace of its program counts from here.
    #[serde(default)]
    pub ended_launch_at: Option<Timestamp>,
    #[serde(default)]
    pub restart: RestartStatus,
    #[serde(default)]
    pub health: HealthStatus,
    #[serde(default)]
    pub idle: IdleStatus,
    /// Milliseconds in each state but the present one.
    #[serde(default)]
    pub phases: BTreeMap<State, u64>,
    /// Since when it is in the present one.
    #[serde(default)]
    pub state_since: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub stopped_at: Option<Timestamp>,
    /// VMMs that died unasked, since the program last ran for a while.
    pub vmm_deaths: u32,
    /// The last such death, recorded before its leftovers are cleared away.
    pub last_death: Option<VmmDeath>,
    /// Since when the VMM's process lives without answering.
    pub unreachable_since: Option<Timestamp>,
    /// A memory to go on from is on the host.
    #[serde(default)]
    pub has_saved_memory: bool,
    /// The origin whose memory was taken over (`Origin::generation`): never twice, since the disk
    /// has moved on by then.
    #[serde(default)]
    pub adopted: StandbyNo,
    /// The launch in which a member of a pool became ready to be taken.
    #[serde(default)]
    pub prepared_launch: Option<LaunchId>,
    pub vmm_pid: Option<u32>,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

impl Object<Instance> {
    /// Made in advance; clients neither see nor name it.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        self.spec.power == Power::Warm
    }

    /// A member of a pool that a fork may take.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        let is_held = self.status.state == State::Paused && self.status.prepared_launch.is_some();
        self.is_pooled() && is_held && !self.meta.is_deleting()
    }

    /// The origin whose memory this instance's wish still has to take over.
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

/// One death of a VMM: which launch, and when it was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmDeath {
    #[serde(alias = "launched_at")]
    pub launch: LaunchId,
    pub noticed_at: Timestamp,
}

/// The end of a program, as the guest's PID 1 saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Shell convention: the exit code, 126/127 when not started, 128+n for signal n; none when
    /// the guest went without saying.
    pub code: Option<i32>,
    pub message: String,
    /// The guest could not start the program at all.
    pub is_boot_failure: bool,
}

/// Text that is sealed at rest and never logged: its `Debug` says nothing, and its memory is cleared.
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
