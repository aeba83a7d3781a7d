//! Conditions: what a user reads to learn how far the host is from the wish, and why.
//!
//! Guarantees: reasons are a closed list; raw host errors never become a reason, and their text
//! reaches `message` only through [`crate::validate::printable`].

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::numbers::Generation;

/// The questions a condition answers; the first three are asked of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// The host matches the wish.
    Ready,
    /// Work toward the wish is under way.
    Progressing,
    /// Something is wrong that a person may have to see to.
    Degraded,
    /// A guest that wants the kernel's headers has them; told only while one has not.
    KernelHeaders,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

/// Why; closed, CamelCase on the wire. Adding one is a change of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// Plan is empty: the host is as wished.
    Converged,
    /// Steps remain and are being taken.
    Converging,
    /// A step failed and will be tried again.
    Retrying,
    /// The wish cannot be carried out on this host as it is.
    Refused,
    /// Being removed.
    Deleting,
    /// Observation itself failed.
    ObservationFailed,
    WaitingForImage,
    WaitingForDisk,
    WaitingForSnapshot,
    WaitingForNetwork,
    /// Its VM is down.
    NotNeeded,
    WaitingForGuest,
    /// Stopped because the wish says so.
    Stopped,
    /// The snapshot could not be taken, or its files are gone.
    SnapshotFailed,
    /// Its memory is kept and no process runs, because the wish says so.
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
    /// The VMM ended without having been asked to.
    VmmDied,
    /// This host has no headers of the guest kernel; its guests do without.
    KernelHeadersMissing,
    ImageNotFound,
    ImageUnauthorized,
    ImageInvalid,
    RegistryUnavailable,
    PlatformNotAvailable,
    RateLimited,
    DiskFull,
    SubnetConflict,
    NameTaken,
    /// Another program listens at a port that it shall have.
    PortInUse,
    CapacityExhausted,
    /// The stored record cannot be read (checksum or schema).
    RecordUnreadable,
    Unsupported,
    PermissionDenied,
    HostFault,
}

/// One answer, as Kubernetes has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: ConditionType,
    pub status: ConditionStatus,
    pub reason: Reason,
    pub message: String,
    /// The generation this answer is about.
    pub observed_generation: Generation,
    /// When `status` last changed; kept while it stays.
    pub last_transition_time: Timestamp,
}

/// Puts `new` in place of the condition of its type; the transition time moves only with `status`.
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

/// The condition of a type, if it was ever set.
#[must_use]
pub fn find(conditions: &[Condition], kind: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

/// `Ready` is `True`.
#[must_use]
pub fn is_ready(conditions: &[Condition]) -> bool {
    find(conditions, ConditionType::Ready).is_some_and(|ready| ready.status == ConditionStatus::True)
}
