//! Conditions: a user reads them to learn how far the host is from the spec, and why.
//!
//! Guarantees: reasons are a closed list; raw host errors never become a reason, and their text
//! reaches `message` only through [`crate::validate::printable`].

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::numbers::Generation;

/// The aspects that conditions report; the first three exist for all kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub enum ConditionType {
    /// The host matches the spec.
    Ready,
    /// Work toward the spec is under way.
    Progressing,
    /// A fault exists that may need a person's attention.
    Degraded,
    /// A guest that needs the kernel's headers has them; reported only while it has not.
    KernelHeaders,
    /// The VMM is behind all walls; reported while there is a VMM.
    Confined,
    /// Changes of the spec wait for a start; reported only while some do.
    PendingChanges,
    /// The guest has as much hotplug memory as it should; reported only while it has not.
    MemoryResized,
    /// The guest has the volumes mounted that it should; reported only while it has not.
    VolumesMounted,
    /// The policy of the guest's egress is in force; reported only while it is not, and the guest reaches nothing.
    EgressMediated,
}

/// The status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

/// The reason of a condition: a closed list, CamelCase on the wire. Adding a reason is a change of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "wire", schemars(rename = "ConditionReason"))]
pub enum Reason {
    /// The plan is empty: the host matches the spec.
    Converged,
    /// Steps remain and are being taken.
    Converging,
    /// A step failed and will be tried again.
    Retrying,
    /// The spec cannot be carried out on this host as it is.
    Refused,
    /// The object is being removed.
    Deleting,
    /// The observation itself failed.
    ObservationFailed,
    WaitingForImage,
    WaitingForDisk,
    WaitingForSnapshot,
    WaitingForNetwork,
    /// The process that carries the instance's connections to the outside is not ready, or has not its policy yet.
    WaitingForEgress,
    /// The instance's VM is down, so this object is not needed.
    NotNeeded,
    WaitingForGuest,
    /// The instance is stopped because the spec says so.
    Stopped,
    /// The snapshot could not be taken, or its files are gone.
    SnapshotFailed,
    /// The instance's memory is kept and no process runs, because the spec says so.
    Standby,
    /// The program ended by itself.
    ProgramExited,
    /// The program is ended because its health check failed.
    HealthCheckFailed,
    /// The guest could not start the program; the message names phase and cause.
    GuestBootFailed,
    /// The guest did not report within the boot deadline.
    GuestBootTimedOut,
    /// The guest runs and has not answered the host for half a minute: its kernel hangs, or was halted.
    AgentUnreachable,
    /// The VMM ended unexpectedly.
    VmmDied,
    /// The kernel ended the VMM because memory was short: that of its own limit, or that of the host.
    OutOfMemory,
    /// The VM lost its TAP, and its hypervisor cannot connect it to another TAP: the VM is started again.
    NetworkLost,
    /// This host has no headers of the guest kernel; its guests do without.
    KernelHeadersMissing,
    /// The VMM reaches nothing of the host but what it was given.
    WallsComplete,
    /// The VMM is not behind all walls; the message names those that are missing.
    WallsMissing,
    /// A change cannot reach a program that runs, or a memory that is saved.
    WaitingForStart,
    /// The guest is giving memory back, or getting it.
    ResizingMemory,
    /// The guest uses memory that it should give back; the message says what uses it.
    MemoryInUse,
    /// Volumes are being put into the VM and mounted, or unmounted and taken out of it.
    ChangingVolumes,
    /// The guest cannot mount or unmount a volume; the message says why.
    VolumeInUse,
    ImageNotFound,
    ImageUnauthorized,
    ImageInvalid,
    RegistryUnavailable,
    PlatformNotAvailable,
    RateLimited,
    DiskFull,
    SubnetConflict,
    NameTaken,
    /// A foreign program listens at a port that this object needs.
    PortInUse,
    CapacityExhausted,
    /// The host has not enough processors or memory left for the instance, which is tried again when it has.
    InsufficientResources,
    /// The stored record cannot be read (checksum or schema).
    RecordUnreadable,
    Unsupported,
    PermissionDenied,
    HostFault,
}

/// The status of an aspect, in the form that Kubernetes uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub struct Condition {
    /// Aspect that the condition is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// True, False or Unknown.
    pub status: ConditionStatus,
    /// Reason of the status, for programs.
    pub reason: Reason,
    /// Reason of the status, for people.
    pub message: String,
    /// The generation of the spec that this condition is about.
    pub observed_generation: Generation,
    /// Time at which `status` last changed; kept while `status` stays the same.
    #[cfg_attr(feature = "wire", schemars(with = "crate::api::schema::Time"))]
    pub last_transition_time: Timestamp,
}

/// Replaces the condition of the same type, or adds it; the transition time changes only with `status`.
pub fn set(conditions: &mut Vec<Condition>, new: Condition) {
    match conditions.iter_mut().find(|old| old.kind == new.kind) {
        Some(old) => {
            let kept =
                if old.status == new.status { old.last_transition_time } else { new.last_transition_time };
            *old = Condition { last_transition_time: kept, ..new };
        }
        None => {
            conditions.push(new);
            conditions.sort_by_key(|condition| condition.kind);
        }
    }
}

/// Returns the condition of a type, if it was ever set.
#[must_use]
pub fn find(conditions: &[Condition], kind: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

/// True if the condition `Ready` is `True`.
#[must_use]
pub fn is_ready(conditions: &[Condition]) -> bool {
    find(conditions, ConditionType::Ready).is_some_and(|ready| ready.status == ConditionStatus::True)
}
