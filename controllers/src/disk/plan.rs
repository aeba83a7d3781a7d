//! The plan of a disk file: from the spec and the observation to the next step.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::disk::Disk;
use stead_schemas::limits::{DISK_FULL_RETRY, DISK_ROOM_MIN};
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;

use super::{Action, Observed, SourceSeen};
use crate::host::Space;
use crate::runtime::{Desired, Plan, Record, Refusal, Wait};

pub(super) fn plan(desired: &Desired<'_, Disk>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    match (desired, &seen.file) {
        (Desired::Present(object), Some(file)) if file.size < object.spec.size => {
            let (owner, size) = (object.meta.uid.clone(), object.spec.size);
            Plan::Act(vec![Action::Grow { owner, size }])
        }
        (Desired::Absent(_), None) | (Desired::Present(_), Some(_)) => Plan::Converged,
        (Desired::Absent(_), Some(file)) => Plan::Act(vec![Action::Remove { owner: file.owner.clone() }]),
        (Desired::Present(object), None) => plan_missing(object, seen, now),
    }
}

fn plan_missing(object: &Object<Disk>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    if object.status.was_created {
        // The loss is recorded before a new file hides its trace.
        return Plan::Record(Record {
            reason: Reason::HostFault,
            what: "recording that the file went missing",
        });
    }
    match seen.space {
        Some(space) if !has_room(space) => Plan::Wait(Wait {
            reason: Reason::DiskFull,
            message: format!("{} are free, of which {} are kept in reserve", space.available, space.reserve),
            until: Some(now.saturating_add(DISK_FULL_RETRY).unwrap_or(Timestamp::MAX)),
        }),
        _ => plan_content(object, seen.source),
    }
}

/// Plans a copy of the disk's source, the prepared file, or an empty file.
fn plan_content(object: &Object<Disk>, source: Option<SourceSeen>) -> Plan<Action> {
    let owner = object.meta.uid.clone();
    let is_first = object.status.content_lost_at.is_none();
    if let Some(prepared) = object.spec.prepared.clone().filter(|_| is_first) {
        return Plan::Act(vec![Action::Take { owner, prepared }]);
    }
    match (object.spec.source.clone().filter(|_| is_first), source) {
        (None, _) => Plan::Act(vec![Action::Create { owner, size: object.spec.size }]),
        (Some(snapshot), Some(SourceSeen::Ready)) => {
            let of = object.spec.source_disk.clone();
            let size = object.spec.source_size.unwrap_or(object.spec.size);
            Plan::Act(vec![Action::Copy { owner, snapshot, of, size }])
        }
        (Some(_), Some(SourceSeen::Pending)) => Plan::Wait(Wait {
            reason: Reason::WaitingForSnapshot,
            message: "the snapshot to copy from is being taken".to_owned(),
            until: None,
        }),
        (Some(snapshot), Some(SourceSeen::Lost) | None) => Plan::Refuse(Refusal {
            reason: Reason::SnapshotFailed,
            message: format!("the snapshot {snapshot} to copy from failed or is gone"),
        }),
    }
}

pub(super) fn has_room(space: Space) -> bool {
    let Bytes(needed) = DISK_ROOM_MIN;
    space.available.0 >= space.reserve.0.saturating_add(needed)
}
